"""Commands about what is served: devices, their sessions and rings, netdevs.

Owns:        query-devices and query-netdevs; netdev_add, netdev_del, device_add, device_del, device_socket_add,
             device_socket_del, session-close, set_link.
Never sees:  clients, JSON text, a particular type of objects.
Read next:   registry.py for the types; the info.py of each type for what is shown of it.

QEMU has no query-devices, query-netdevs, sockets of devices and sessions. Feature bits have the names that its
x-query-virtio-status gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from localmig.daemon import BuiltObject, Daemon
from localmig.errors import LocalmigError, blamed
from localmig.monitor.schema import Command, PerType
from localmig.options.specs import KINDS, options_of
from localmig.qapi import (
    Array,
    Boolean,
    Enumeration,
    Member,
    String,
    Struct,
    Uint64,
    Union,
    ValueType,
    returned,
    to_qmp,
)
from localmig.registry import Registry

_NOTES: Final = Member(name="notes", attribute="notes", type=Array(String()))
"""What of every object keeps it from working, each with what to do."""


def query_devices(daemon: Daemon) -> object:
    """Every device with its session, its rings and what they counted."""
    return [_shown(each) for each in daemon.objects("device")]


def query_netdevs(daemon: Daemon) -> object:
    """Every netdev as it is set."""
    return [_shown(each) for each in daemon.objects("netdev")]


def _shown(built: BuiltObject) -> dict[str, object]:
    """An object with what its type shows. One that cannot be shown has that for a note, and hides no other one."""
    facts: dict[str, object] = {"id": built.spec.id, "type": built.spec.type_name}
    try:
        with blamed(f"{built.type} cannot show it"):
            info = built.part.info()
            own = to_qmp(Struct(built.type.object_type.info), info)
            assert isinstance(own, dict), own
            return {**facts, **own, "notes": list(getattr(info, "notes", ()))}
    except LocalmigError as error:
        return {**facts, "notes": [str(error)]}


def add(daemon: Daemon, *, kind: str, options: Mapping[str, object]) -> dict[str, object]:
    """Serves one more object."""
    daemon.add_object(kind, options)
    return {}


def delete(daemon: Daemon, *, kind: str, id: str) -> dict[str, object]:  # noqa: A002 - QMP's word
    """Ends an object."""
    daemon.delete_object(kind, id)
    return {}


def set_link(daemon: Daemon, *, name: str, up: bool) -> dict[str, object]:
    """Takes a NIC off the network, or connects it again."""
    daemon.set_link(name, up=up)
    return {}


def add_socket(daemon: Daemon, *, id: str, socket: str) -> dict[str, object]:  # noqa: A002 - QMP's word
    """Has a device connect to a second frontend's address."""
    daemon.add_socket(id, socket)
    return {}


def delete_socket(daemon: Daemon, *, id: str, socket: str) -> dict[str, object]:  # noqa: A002
    """Takes one of a device's two addresses back."""
    daemon.delete_socket(id, socket)
    return {}


def close_session(daemon: Daemon, *, id: str, session: int) -> dict[str, object]:  # noqa: A002
    """Ends a session of a device."""
    daemon.close_session(id, session)
    return {}


def _options(registry: Registry, *, kind: str) -> ValueType:
    """What describes an object of a kind: a member for each option of its type."""
    types = {
        each.spec.type_name: tuple(
            Member(name=row.name, attribute=row.name, type=row.value.qapi, required=row.required)
            for row in options_of(each.spec)
            if row.name != "id"
        )
        for each in registry.known(kind)
    }
    tag = returned(KINDS[kind].selector, Enumeration(tuple(types)))
    return Union(base=(returned("id", String()),), tag=tag, branches=types)


def _shape(registry: Registry, *, kind: str) -> ValueType:
    """What is shown of objects of a kind."""
    types = {each.spec.type_name: each.object_type.info for each in registry.known(kind)}
    tag = returned("type", Enumeration(tuple(types)))
    return Array(Union(base=(returned("id", String()), _NOTES), tag=tag, branches=types))


_LINK: Final = Struct(
    (Member(name="name", attribute="name", type=String()), Member(name="up", attribute="up", type=Boolean()))
)

_ID: Final = Struct((Member(name="id", attribute="id", type=String()),))

_SOCKET: Final = Struct(
    (Member(name="id", attribute="id", type=String()), Member(name="socket", attribute="socket", type=String()))
)

_SESSION: Final = Struct(
    (Member(name="id", attribute="id", type=String()), Member(name="session", attribute="session", type=Uint64()))
)

COMMANDS: Final = (
    Command(name="query-devices", run=query_devices, returns=PerType(partial(_shape, kind="device"))),
    Command(name="query-netdevs", run=query_netdevs, returns=PerType(partial(_shape, kind="netdev"))),
    *(
        Command(name=f"{kind}_add", run=partial(add, kind=kind), arguments=PerType(partial(_options, kind=kind)))
        for kind in KINDS
    ),
    *(Command(name=f"{kind}_del", run=partial(delete, kind=kind), arguments=_ID) for kind in KINDS),
    Command(name="device_socket_add", run=add_socket, arguments=_SOCKET),
    Command(name="device_socket_del", run=delete_socket, arguments=_SOCKET),
    Command(name="session-close", run=close_session, arguments=_SESSION),
    Command(name="set_link", run=set_link, arguments=_LINK),
)
