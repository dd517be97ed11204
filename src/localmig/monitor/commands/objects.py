"""Commands about what is served: devices, their sessions and rings, netdevs.

Owns:        query-devices and query-netdevs.
Never sees:  clients, JSON text, a particular type of objects.
Read next:   registry.py for the types; the info.py of each type for what is shown of it.

QEMU has no such commands. Feature bits have the names that its x-query-virtio-status gives them.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from localmig.daemon import BuiltObject, Daemon
from localmig.errors import LocalmigError, blamed
from localmig.monitor.schema import Command, PerType
from localmig.qapi import Array, Enumeration, Member, String, Struct, Union, ValueType, returned, to_qmp
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


def _shape(registry: Registry, *, kind: str) -> ValueType:
    """What is shown of objects of a kind."""
    types = {each.spec.type_name: each.object_type.info for each in registry.known(kind)}
    tag = returned("type", Enumeration(tuple(types)))
    return Array(Union(base=(returned("id", String()), _NOTES), tag=tag, branches=types))


COMMANDS: Final = (
    Command(name="query-devices", run=query_devices, returns=PerType(partial(_shape, kind="device"))),
    Command(name="query-netdevs", run=query_netdevs, returns=PerType(partial(_shape, kind="netdev"))),
)
