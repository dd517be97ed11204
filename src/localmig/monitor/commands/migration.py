"""Commands about migration.

Owns:        starting, cancelling and watching a migration; parameters and capabilities.
Never sees:  clients, JSON text, channels.
Read next:   daemon/ for what the commands do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from localmig.daemon import Daemon
from localmig.errors import ConfigError
from localmig.migration.parameters import Announcement
from localmig.monitor.schema import (
    CAPABILITIES,
    CAPABILITY_STATUS,
    CHANNEL,
    MIGRATION_STATUS,
    PARAMETERS,
    Command,
    capabilities_to_qmp,
    parameters_changed,
    parameters_to_qmp,
)
from localmig.options.address import Address, FdAddress, UnixAddress, parse_address
from localmig.qapi import Array, Boolean, Integer, Member, String, Struct, Uint64, returned


def migrate(
    daemon: Daemon, *, uri: str | None = None, channels: Sequence[Mapping[str, object]] = ()
) -> dict[str, object]:
    """Starts to hand all over."""
    daemon.migrate(_address(uri, channels))
    return {}


def migrate_incoming(
    daemon: Daemon, *, uri: str | None = None, channels: Sequence[Mapping[str, object]] = ()
) -> dict[str, object]:
    """Says where the migration comes from, after `--incoming defer`."""
    daemon.migrate_incoming(_address(uri, channels))
    return {}


def migrate_cancel(daemon: Daemon) -> dict[str, object]:
    """Takes the migration back where it is not committed."""
    daemon.migrate_cancel()
    return {}


def migrate_continue(daemon: Daemon, *, state: str) -> dict[str, object]:
    """Goes on from `pre-switchover`."""
    daemon.migrate_continue(state)
    return {}


def query_migrate(daemon: Daemon) -> dict[str, object]:
    """What is known of the present or the last migration, in QEMU's shape; `local` holds what QEMU has no word for."""
    info = daemon.migration_info()
    if info is None:
        return {}
    known: dict[str, object | None] = {
        "status": info.status,
        "total-time": info.total_time_ms,
        "setup-time": info.setup_time_ms,
        # QEMU's downtime has whole milliseconds; rounded up, for none at all would be a lie.
        "downtime": None if info.downtime_us is None else -(-info.downtime_us // 1000),
        "error-desc": info.error_desc,
    }
    local: dict[str, object | None] = {
        "downtime-us": info.downtime_us,
        "phases": [{"name": phase.name, "duration-us": phase.duration_us} for phase in info.phases],
        "descriptors": info.descriptors,
        "note": info.note,
    }
    return {**_present(known), "local": _present(local)}


def set_parameters(daemon: Daemon, **changes: object) -> dict[str, object]:
    """Changes all the given parameters, or none."""
    daemon.set_parameters(parameters_changed(daemon.parameters, changes))
    return {}


def query_parameters(daemon: Daemon) -> dict[str, object]:
    """All parameters."""
    return parameters_to_qmp(daemon.parameters)


def announce_self(
    daemon: Daemon,
    *,
    interfaces: Sequence[str] | None = None,
    name: str = "",
    **schedule: int,
) -> dict[str, object]:
    """Begins to tell the network where the guests are."""
    daemon.announce(Announcement(**schedule), devices=interfaces, name=name)
    return {}


def set_capabilities(daemon: Daemon, *, capabilities: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Changes all the given capabilities, or none."""
    changes = {CAPABILITIES[str(item["capability"])]: item["state"] for item in capabilities}
    return set_parameters(daemon, **changes)


def query_capabilities(daemon: Daemon) -> list[dict[str, object]]:
    """All capabilities."""
    return capabilities_to_qmp(daemon.parameters)


def query_local_migration(daemon: Daemon) -> list[dict[str, object]]:
    """For each object whether a local migration would move its descriptors, and why not."""
    return [
        _present({"id": report.id, "type": report.type, "transfers": report.transfers, "reason": report.reason})
        for report in daemon.local_migration_reports()
    ]


def _address(uri: str | None, channels: Sequence[Mapping[str, object]]) -> Address:
    if (uri is None) == (not channels):
        raise ConfigError("need either 'uri' or 'channels' argument")
    if uri is not None:
        return parse_address(uri)
    if len(channels) > 1:
        raise ConfigError("Channel list has more than one main entry")
    match channels[0]["address"]:
        case {"type": "unix", "path": str(path)}:
            return UnixAddress(path=path)
        case {"type": "fd", "name": str(name)}:
            return FdAddress(name=name)
        case {"type": "inet", "host": str(host), "port": str(port)}:
            return parse_address(f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}")
        case address:
            raise AssertionError(f"the schema let {address} pass")


def _present(members: Mapping[str, object | None]) -> dict[str, object]:
    return {name: value for name, value in members.items() if value is not None}


_WHERE: Final = Struct(
    (
        Member(name="uri", attribute="uri", type=String(), required=False),
        Member(name="channels", attribute="channels", type=Array(CHANNEL), required=False),
    )
)

_PHASE: Final = Struct((returned("name", String()), returned("duration-us", Uint64())))

_LOCAL: Final = Struct(
    (
        returned("downtime-us", Uint64(), required=False),
        returned("phases", Array(_PHASE)),
        returned("descriptors", Uint64()),
        returned("note", String(), required=False),
    )
)

_MIGRATION_INFO: Final = Struct(
    (
        returned("status", MIGRATION_STATUS, required=False),
        returned("total-time", Uint64(), required=False),
        returned("setup-time", Uint64(), required=False),
        returned("downtime", Uint64(), required=False),
        returned("error-desc", String(), required=False),
        returned("local", _LOCAL, required=False),
    )
)

_LOCAL_MIGRATION: Final = Struct(
    (
        returned("id", String()),
        returned("type", String()),
        returned("transfers", Boolean()),
        returned("reason", String(), required=False),
    )
)

_ANNOUNCEMENT: Final = Struct(
    (
        *(
            Member(name=name, attribute=f"{name}{unit}", type=Integer())
            for name, unit in (("initial", "_ms"), ("max", "_ms"), ("rounds", ""), ("step", "_ms"))
        ),
        Member(name="interfaces", attribute="interfaces", type=Array(String()), required=False),
        Member(name="id", attribute="name", type=String(), required=False),
    )
)

COMMANDS: Final = (
    Command(name="announce-self", run=announce_self, arguments=_ANNOUNCEMENT),
    Command(name="migrate", run=migrate, arguments=_WHERE),
    Command(name="migrate-incoming", run=migrate_incoming, arguments=_WHERE),
    Command(name="migrate_cancel", run=migrate_cancel),
    Command(
        name="migrate-continue",
        run=migrate_continue,
        arguments=Struct((Member(name="state", attribute="state", type=MIGRATION_STATUS),)),
    ),
    Command(name="query-migrate", run=query_migrate, returns=_MIGRATION_INFO),
    Command(name="migrate-set-parameters", run=set_parameters, arguments=PARAMETERS),
    Command(name="query-migrate-parameters", run=query_parameters, returns=PARAMETERS),
    Command(
        name="migrate-set-capabilities",
        run=set_capabilities,
        arguments=Struct((Member(name="capabilities", attribute="capabilities", type=Array(CAPABILITY_STATUS)),)),
    ),
    Command(name="query-migrate-capabilities", run=query_capabilities, returns=Array(CAPABILITY_STATUS)),
    Command(name="query-local-migration", run=query_local_migration, returns=Array(_LOCAL_MIGRATION)),
)
