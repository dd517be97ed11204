"""`localmig status`: what a daemon serves and how it is.

Owns:        which facts are asked for, and how they are shown; rates, from two samples.
Never sees:  anything a QMP client could not ask.
Read next:   client.py; monitor/commands/objects.py for most of the facts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from localmig.cli.client import Client, connected
from localmig.cli.text import milliseconds, quantity, seconds, table
from localmig.errors import ConfigError

_EXAMPLES: Final = """\
examples:
  localmig status /run/vm1/qmp.sock
  localmig status --json /run/vm1/qmp.sock

  what moves, counted over two seconds:
    localmig status --rate 2 /run/vm1/qmp.sock

  all about one device, again and again:
    watch localmig status --device nic0 --rate 1 /run/vm1/qmp.sock
"""

_ROWS_MAX: Final = 20
"""Devices in the table: with the lines above it they fill a terminal. Those that want a look come first."""

_QUEUE_PAIRS_MAX: Final = 6
"""Columns of one device's counters, for the same reason."""

_WIDTH: Final = 100

_DROPS: Final = (
    "rx-dropped-length",
    "rx-dropped-stale",
    "rx-dropped-error",
    "tx-dropped-interface",
    "tx-dropped-header",
    "tx-dropped-memory",
)

_SHOWN_BY_NAME: Final = frozenset(
    {
        "id",
        "type",
        "mac",
        "netdev",
        "socket",
        "second-socket",
        "server",
        "sessions",
        "session",
        "vrings",
        "queue-pairs",
        "rings",
        "notes",
    }
)
"""What of a device has a place of its own in what is shown. Whatever else its type adds is shown as it comes."""

Facts = Mapping[str, Any]
"""JSON objects as the daemon answers them."""


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "status",
        help="show what a daemon serves and how it is",
        description="Shows a daemon's run state, its last migration, and its devices: whether a guest is connected, "
        "which rings run, what moved and what was dropped, and what would stay behind in a local migration.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="QMP-SOCKET", help="path of the daemon's QMP socket")
    parser.add_argument("--device", metavar="ID", help="all about one device")
    parser.add_argument(
        "--rate", metavar="SECONDS", type=seconds, help="count for so long, and show what moves in a second"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with everything")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    facts = asyncio.run(_ask(arguments.socket, arguments.rate))
    if arguments.device is not None:
        device_of(facts, arguments.device)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        print(show(facts) if arguments.device is None else show_device(facts, arguments.device))
    return 0


async def _ask(path: str, rate_s: float | None) -> dict[str, Any]:
    async with connected(path) as client:
        first = await _sample(client)
        if rate_s is not None:
            await asyncio.sleep(rate_s)
        second = first if rate_s is None else await _sample(client)
        facts = {
            "pid": client.pid,
            "version": (await client.execute("query-version"))["package"],
            "security": await client.execute("query-security"),
            "status": (await client.execute("query-status"))["status"],
            "migration": await client.execute("query-migrate"),
            "objects": await client.execute("query-local-migration"),
            "netdevs": await client.execute("query-netdevs"),
            "devices": second[1],
        }
        if rate_s is not None:
            facts["rates"] = rates(first[1], second[1], second[0] - first[0])
        return facts


async def _sample(client: Client) -> tuple[float, list[Any]]:
    """When the devices were asked, in seconds, and what they answered."""
    asked_s = time.monotonic()
    return asked_s, await client.execute("query-devices")


def rates(before: Sequence[Facts], after: Sequence[Facts], elapsed_s: float) -> dict[str, dict[str, float]]:
    """What each device counted in a second, for those that are there both times."""
    earlier = {device["id"]: totals(device) for device in before}
    return {
        device["id"]: {
            name: round((count - earlier[device["id"]][name]) / elapsed_s, 1) for name, count in totals(device).items()
        }
        for device in after
        if device["id"] in earlier and earlier[device["id"]].keys() == totals(device).keys()
    }


def totals(device: Facts) -> dict[str, int]:
    """A device's counters, all queue pairs together."""
    sums: dict[str, int] = {}
    for pair in device.get("queue-pairs", ()):
        for name, count in pair["counters"].items():
            sums[name] = sums.get(name, 0) + count
    return sums


def device_of(facts: Facts, wanted: str) -> Facts:
    """The device of that id. ConfigError where there is none."""
    for device in facts["devices"]:
        if device["id"] == wanted:
            found: Facts = device
            return found
    known = [device["id"] for device in facts["devices"]]
    shown = ", ".join(known[:_ROWS_MAX]) + (", …" if len(known) > _ROWS_MAX else "")
    raise ConfigError(f"there is no device '{wanted}': {f'there are {shown}' if known else 'there is none at all'}")


# -- the whole daemon -------------------------------------------------------------------------------------------------


def show(facts: Facts) -> str:
    """The facts as text for people."""
    lines = _head(facts)
    devices = facts["devices"]
    if devices:
        lines.append(f"devices    {_summary(devices)}")
        # Sorting keeps the order among equals.
        rows = sorted((_row(facts, device) for device in devices), key=lambda row: not row[-1])
        lines += ["", _table_without_empty_columns(_heads(facts), rows[:_ROWS_MAX])]
        if len(rows) > _ROWS_MAX:
            lines.append(f"… and {len(rows) - _ROWS_MAX} more: --device ID shows one, --json all")
    return "\n".join(lines)


def _head(facts: Facts) -> list[str]:
    return [
        f"daemon     process {facts['pid']}, {facts['version']}",
        f"confined   {show_security(facts['security'])}",
        f"run state  {facts['status']}",
        f"migration  {show_migration(facts['migration'])}",
    ]


def _summary(devices: Sequence[Facts]) -> str:
    connected_count = sum("session" in device for device in devices)
    vrings = [vring for device in devices for vring in device.get("vrings", ())]
    running, failed = (sum(vring[what] for vring in vrings) for what in ("running", "failed"))
    return f"{len(devices)}, {connected_count} connected; {running} rings run, {failed} failed"


def _heads(facts: Facts) -> tuple[str, ...]:
    per = " a second" if "rates" in facts else ""
    return ("device", "netdev", "frontend", "rings", f"to guest{per}", f"from guest{per}", "dropped", "note")


def _row(facts: Facts, device: Facts) -> tuple[str, ...]:
    return (
        device["id"],
        _netdev(facts, device),
        _frontends(device),
        _rings(device),
        *_traffic(facts, device),
        "; ".join(_notes(facts, device)),
    )


def _frontends(device: Facts) -> str:
    """Whether there is one; of several, how many have the device and how many wait for it."""
    if "session" not in device:
        return "none"
    roles = [session["role"] for session in device.get("sessions", ())]  # a daemon of before has none
    if len(roles) < 2:
        return "connected"
    counts = {role: roles.count(role) for role in ("owns", "held", "idle")}
    return ", ".join(f"{count} {role}" for role, count in counts.items() if count)


def _traffic(facts: Facts, device: Facts) -> tuple[str, str, str]:
    """To the guest, from it, and what was dropped."""
    if "queue-pairs" in device:
        counts = totals(device)
        unit = "bit/s" if "rates" in facts else "B"
        moved = facts["rates"].get(device["id"], {}) if "rates" in facts else counts
        return _moved(moved, "rx", unit), _moved(moved, "tx", unit), quantity(_dropped(counts))
    rings = device.get("rings")
    if rings is None or "rates" in facts:
        return "", "", ""
    # A device whose rings its own code serves moves no packets.
    written, read = (sum(ring["counters"][name] for ring in rings) for name in ("bytes-written", "bytes-read"))
    return quantity(written, "B"), quantity(read, "B"), ""


def _table_without_empty_columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    kept = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    return table([heads[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _netdev(facts: Facts, device: Facts) -> str:
    netdev = _netdev_of(facts, device)
    if netdev is None:
        return str(device.get("netdev", ""))
    gone = ", gone" if netdev.get("interface") == "gone" or netdev.get("connected") is False else ""
    return f"{netdev['id']} ({netdev.get('ifname', netdev['type'] if netdev.get('open') else 'closed')}{gone})"


def _netdev_of(facts: Facts, device: Facts) -> Facts | None:
    return next((netdev for netdev in facts["netdevs"] if netdev["id"] == device.get("netdev")), None)


def _rings(device: Facts) -> str:
    """Those that the frontend started, and how many of them run."""
    started = [vring for vring in device.get("vrings", ()) if vring["started"]]
    running = sum(vring["running"] for vring in started)
    if not started:
        return "none"
    return f"{running} run" if running == len(started) else f"{running} of {len(started)} run"


def _moved(counts: Mapping[str, float], direction: str, unit: str) -> str:
    packets, size = counts.get(f"{direction}-packets", 0), counts.get(f"{direction}-bytes", 0)
    return f"{quantity(packets)} packets, {quantity(size * (8 if unit == 'bit/s' else 1), unit)}"


def _dropped(counts: Mapping[str, int]) -> int:
    return sum(counts.get(name, 0) for name in _DROPS)


def _notes(facts: Facts, device: Facts) -> Iterator[str]:
    """What wants a look. Drops are no reason: a guest that is not up yet drops what it is sent."""
    yield from device.get("notes", ())  # a daemon of before has none
    for vring in device.get("vrings", ()):
        if vring["failed"]:
            yield f"vring {vring['index']} failed"
    if (netdev := _netdev_of(facts, device)) is not None:
        yield from netdev.get("notes", ())
    for each in facts["objects"]:
        if each["id"] in (device["id"], device.get("netdev")) and not each["transfers"]:
            yield f"{each['id']} stays home: {each['reason']}"


def show_security(security: Facts) -> str:
    """What query-security returned, in one line."""
    sandbox = security["sandbox"]
    said = [f"user {security['user-id']}"]
    if sandbox["enabled"]:
        said.append("sandbox on")
        said.append("may run programs" if sandbox["spawn"] else "runs no programs")
    else:
        said.append("no sandbox")
    if "reason" in sandbox:
        said.append(sandbox["reason"])
    if users := security["allowed-users"]:
        said.append(f"listens to users {', '.join(map(str, users))} as well")
    return "; ".join(said)


def show_migration(migration: Facts) -> str:
    """What query-migrate returned, in one line."""
    if not migration:
        return "none yet"
    text = str(migration["status"])
    local = migration.get("local", {})
    if "downtime-us" in local:
        text += f", downtime {milliseconds(local['downtime-us'])}"
    if local.get("descriptors"):
        text += f", {local['descriptors']} descriptors"
    for reason in (migration.get("error-desc"), local.get("note")):
        text += f": {reason}" if reason else ""
    return text


# -- one device -------------------------------------------------------------------------------------------------------


def show_device(facts: Facts, wanted: str) -> str:
    """One device as text for people."""
    device = device_of(facts, wanted)
    lines = [*_head(facts), f"device     {', '.join(device[name] for name in ('id', 'type', 'mac') if name in device)}"]
    if "socket" in device:
        also = f", and to {device['second-socket']}" if "second-socket" in device else ""
        lines.append(f"socket     {device['socket']}, {'listens' if device['server'] else f'connects{also}'}")
    if "netdev" in device:
        lines.append(f"netdev     {_netdev_facts(facts, device)}")
    lines += [f"note       {note}" for note in _notes(facts, device)]
    if "vrings" in device:
        lines += _session_lines(device)
    if len(device.get("sessions", ())) > 1:
        lines += ["", _sessions(device)]
    lines += [f"{name:<10} {_shown(device[name])}" for name in device if name not in _SHOWN_BY_NAME]
    if device.get("vrings"):
        is_nic = "queue-pairs" in device
        rows = [
            (
                str(vring["index"]),
                ("from guest" if vring["index"] % 2 else "to guest") if is_nic else "",
                str(vring["size"]),
                str(vring["position"]),
                _vring_state(vring),
            )
            for vring in device["vrings"]
        ]
        heads = ("vring", "direction", "size", "position", "state")
        lines += ["", _table_without_empty_columns(heads, rows)]
    if device.get("queue-pairs"):
        lines += ["", _counters(facts, device)]
    if rings := device.get("rings"):
        # Of rings that a device's own code serves.
        heads = ("ring", *(name.replace("-", " ") for name in rings[0]["counters"]))
        rows = [(ring["name"], *map(str, ring["counters"].values())) for ring in rings]
        lines += ["", _table_without_empty_columns(heads, rows)]
    return "\n".join(lines)


def _shown(value: object) -> str:
    """What a type adds, as it comes."""
    return value if isinstance(value, str) else json.dumps(value)


def _netdev_facts(facts: Facts, device: Facts) -> str:
    netdev = _netdev_of(facts, device)
    if netdev is None or not netdev.get("open"):
        return f"{device['netdev']}, closed"
    if "ifname" not in netdev:
        more = (f"{name} {_shown(netdev[name])}" for name in netdev if name not in ("id", "type", "open", "notes"))
        return ", ".join((netdev["id"], netdev["type"], *more))
    offloads = " ".join(_without_prefix(netdev["offloads"], "TUN_F_")) or "none"
    return (
        f"{netdev['id']}, {netdev['type']} {netdev['ifname']}, {_interface_facts(netdev)}, "
        f"{netdev['attached-queues']} of {netdev['queues']} queues attached, "
        f"header of {netdev['vnet-header-length']} bytes, offloads {offloads}"
    )


def _interface_facts(netdev: Facts) -> str:
    """What the interface is now, or why that is not known."""
    match netdev.get("interface"):
        case None:  # a daemon of before
            return f"MTU {netdev['mtu']}"
        case "gone":
            return "gone: the interface was deleted"
        case "elsewhere":
            return f"MTU {netdev['mtu']}, whether it is up is unknown (another network namespace)"
    bridge = f", in bridge {netdev['bridge']}" if "bridge" in netdev else ""
    return f"{'up' if netdev['up'] else 'down'}, MTU {netdev['mtu']}{bridge}"


def _session_lines(device: Facts) -> list[str]:
    session = device.get("session")
    if session is None:
        return ["frontend   none"]
    count = session["memory-regions"]
    memory = f"{session['memory-size'] / 2**20:.0f} MiB in {count} region{'' if count == 1 else 's'}"
    return [
        f"frontend   connected, {memory}",
        *_wrapped("driver", _without_prefix(session["device-status"], "VIRTIO_CONFIG_S_")),
        *_wrapped("features", session["features"]),
        *_wrapped("protocol", _without_prefix(session["protocol-features"], "VHOST_USER_PROTOCOL_F_")),
    ]


def _sessions(device: Facts) -> str:
    """A line for each frontend: what it is to the device, since when, and whose process it is."""
    rows = [
        (
            str(session["number"]),
            session["role"],
            _age(session["since"]),
            str(session.get("pid", "")),
            str(session.get("user-id", "")),
            session["socket"],
        )
        for session in device["sessions"]
    ]
    return table(("session", "role", "for", "process", "user", "socket"), rows)


def _age(since_s: int) -> str:
    """How long ago that was, in the largest unit of which it has two."""
    age_s = max(0, int(time.time()) - since_s)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= 2 * size:
            return f"{age_s // size} {unit}"
    return f"{age_s} s"


def _without_prefix(names: Sequence[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in names]


def _wrapped(head: str, names: Sequence[str]) -> list[str]:
    return textwrap.wrap(
        " ".join(names) or "none",
        width=_WIDTH,
        initial_indent=head.ljust(11),
        subsequent_indent=" " * 11,
        break_on_hyphens=False,
    )


def _vring_state(vring: Facts) -> str:
    if vring["failed"]:
        return f"failed: {vring.get('failure', 'in the daemon before this one, see its log')}"
    if vring["running"]:
        return "runs"
    if not vring["started"]:
        return "not started"
    return "stands still" if vring["enabled"] else "started, not enabled"


def _counters(facts: Facts, device: Facts) -> str:
    """A line for each counter; a column for each queue pair, for all of them, and for a second."""
    pairs, sums = device["queue-pairs"], totals(device)
    columns: list[tuple[str, Mapping[str, float]]] = []
    if 1 < len(pairs) <= _QUEUE_PAIRS_MAX:
        columns += [(f"queue pair {pair['index']}", pair["counters"]) for pair in pairs]
    columns.append(("all" if len(pairs) > 1 else "queue pair 0", sums))
    rows = [(name, *(str(counts[name]) for _, counts in columns)) for name in sums]
    heads = ["counter", *(head for head, _ in columns)]
    if (moving := facts.get("rates", {}).get(device["id"])) is not None:
        heads.append("a second")
        rows = [(*row, quantity(moving[row[0]])) for row in rows]
    return table(heads, rows)
