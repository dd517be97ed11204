"""What a QEMU listens on, by its command line, and which paths its successor uses until it can have the old ones.

Owns:        how each option names an address; the successor's paths.
Never sees:  sockets, files.
Read next:   plan.py, which asks.

QEMU removes the path of a socket that it listened on, and of its PID file, when it ends, whoever has that path by then.
So the successor gets paths of its own, which are renamed after its predecessor ended. Its command line keeps telling
the path that it was given: `clients_path` has what that is called now.
"""

from __future__ import annotations

import re
from typing import Final

from localmig.cli.vm_upgrade.command_line import Option

LEGACY_CHARDEVS: Final = frozenset({"debugcon", "gdb", "monitor", "parallel", "qmp", "qmp-pretty", "serial"})
"""Options whose value is a character device in one word, such as `unix:PATH,server=on`."""

_NUMBERED: Final = re.compile(r"\.moved(\d+)$")
_TCP_SCHEMES: Final = ("tcp:", "telnet:", "websocket:", "tn3270:")


def clients_path(path: str) -> str:
    """What clients call the path that a command line tells."""
    return _NUMBERED.sub("", path)


def next_path(path: str) -> str:
    """The path that the successor uses in place of `path`, until the process with `path` has ended."""
    number = _NUMBERED.search(path)
    return f"{clients_path(path)}.moved{int(number[1]) + 1 if number else 1}"


def moved(option: Option) -> tuple[dict[str, str], Option]:
    """An option for the successor.

    Returns:
        What the successor's new paths are to be called in the end, and the option with these paths.
    """
    path = _path(option)
    if path is None:
        return {}, option
    following = next_path(path)
    renames = {following: clients_path(path)}
    if option.name == "pidfile":
        return renames, Option(option.name, following)
    if option.name == "chardev":
        # QEMU would not go on before a client came.
        return renames, option.with_property("path", following).with_property("wait", "off")
    if option.name == "spice":
        return renames, option.with_property("addr", following)
    assert option.value is not None
    value = option.value.replace(_escaped(path), _escaped(following), 1)
    waits = option.name in LEGACY_CHARDEVS and option.properties.get("wait") != "off"
    return renames, Option(option.name, value + (",wait=off" if waits else ""))


def tcp_address(option: Option) -> str | None:
    """Where the option listens, where that is a port of the machine's; None otherwise."""
    properties = option.properties
    value = (option.value or "").removeprefix("mon:")
    first = value.partition(",")[0]
    match option.name:
        case "s":
            return "tcp::1234"
        case "chardev":
            listens = properties.get("server") == "on" and "port" in properties
            return f"{properties.get('host', '')}:{properties['port']}" if listens else None
        case "vnc":
            return first if re.search(r":\d+$", first) and not first.startswith("unix:") else None
        case "spice":
            port = properties.get("port", properties.get("tls-port"))
            return f"{properties.get('addr', '')}:{port}" if port is not None else None
        case "gdb":
            return first if first.startswith("tcp:") else None
        case name if name in LEGACY_CHARDEVS:
            return first if first.startswith(_TCP_SCHEMES) and properties.get("server") == "on" else None
    return None


def _path(option: Option) -> str | None:
    """The path that the option makes, None where it makes none."""
    properties = option.properties
    value = (option.value or "").removeprefix("mon:")
    match option.name:
        case "pidfile":
            return option.value
        case "chardev":
            return properties.get("path") if properties.get("server") == "on" else None
        case "spice":
            return properties.get("addr") if properties.get("unix") == "on" else None
        case "vnc" if value.startswith("unix:"):
            return _first(value).removeprefix("unix:")
        case name if name in LEGACY_CHARDEVS and value.startswith("unix:"):
            return _first(value).removeprefix("unix:") if properties.get("server") == "on" else None
    return None


def _first(value: str) -> str:
    return re.split(r"(?<!,)(?:,,)*,(?!,)", value)[0].replace(",,", ",")


def _escaped(path: str) -> str:
    return path.replace(",", ",,")
