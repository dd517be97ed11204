"""QMP's commands as they are declared, and its names for what localmig calls otherwise.

Owns:        Command; the tables that translate between QMP's names and ours.
Never sees:  the daemon, sockets, JSON text.
Read next:   qapi/types.py for the types; commands/, the commands that take these arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from localmig.migration import parameters as migration_parameters
from localmig.migration.parameters import Parameters
from localmig.qapi import NOTHING, Boolean, Enumeration, Member, String, Struct, Uint64, Union, ValueType
from localmig.qapi.introspection import Described
from localmig.registry import Registry


@dataclass(frozen=True, slots=True)
class PerType:
    """A type that depends on which types of objects there are: `shape` describes it for clients."""

    shape: Callable[[Registry], ValueType]

    def read(self, value: object, name: str = "") -> dict[str, object]:
        """Takes any members as `options`: the table of the object's type reads them."""
        del name
        assert isinstance(value, dict), value
        return {"options": value}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command: its name, its arguments, what it returns, and the function that gets the daemon and the arguments.

    The function gets the arguments by our names, and returns by QMP's. Where `descriptor` names one more argument,
    that is the descriptor which the client sent along, the function's from now on, or None where it sent none.
    """

    name: str
    run: Callable[..., object]
    arguments: Struct | PerType = NOTHING
    returns: ValueType = NOTHING
    descriptor: str | None = None

    def described(self, registry: Registry) -> Described:
        """This command as clients are told of it."""
        return Described(
            name=self.name,
            arguments=self.arguments.shape(registry) if isinstance(self.arguments, PerType) else self.arguments,
            returns=self.returns.shape(registry) if isinstance(self.returns, PerType) else self.returns,
        )


# -- QMP's names for ours -------------------------------------------------------------------------------------------

PARAMETERS: Final = Struct(
    (
        Member(name="announce-initial", attribute="announce_initial_ms", type=Uint64(), required=False),
        Member(name="announce-max", attribute="announce_max_ms", type=Uint64(), required=False),
        Member(name="announce-rounds", attribute="announce_rounds", type=Uint64(), required=False),
        Member(name="announce-step", attribute="announce_step_ms", type=Uint64(), required=False),
        Member(name="commit-timeout", attribute="commit_timeout_ms", type=Uint64(), required=False),
        Member(name="downtime-limit", attribute="downtime_limit_ms", type=Uint64(), required=False),
        Member(name="events", attribute="events", type=Boolean(), required=False),
        Member(name="local", attribute="local", type=Boolean(), required=False),
        Member(name="pause-before-switchover", attribute="pause_before_switchover", type=Boolean(), required=False),
        Member(name="record", attribute="record", type=String(), required=False),
    )
)
"""The migration parameters, each a field of `Parameters`."""

CAPABILITIES: Final[Mapping[str, str]] = {
    member.name: member.attribute
    for member in PARAMETERS.members
    if member.attribute in migration_parameters.CAPABILITIES
}
"""The migration capabilities: parameters that commands of their own set and tell as well."""

CAPABILITY_STATUS: Final = Struct(
    (
        Member(name="capability", attribute="capability", type=Enumeration(tuple(CAPABILITIES))),
        Member(name="state", attribute="state", type=Boolean()),
    )
)

MIGRATION_STATUS: Final = Enumeration(
    (
        "none",
        "setup",
        "cancelling",
        "cancelled",
        "active",
        "postcopy-device",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover-setup",
        "postcopy-recover",
        "completed",
        "failing",
        "failed",
        "colo",
        "pre-switchover",
        "device",
        "wait-unplug",
    )
)
"""All of QEMU's words, of which localmig's migrations use some: a client may name any."""

_SOCKET: Final = Union(
    tag=Member(name="type", attribute="type", type=Enumeration(("inet", "unix", "fd"))),
    branches={
        "inet": (
            Member(name="host", attribute="host", type=String()),
            Member(name="port", attribute="port", type=String()),
        ),
        "unix": (Member(name="path", attribute="path", type=String()),),
        "fd": (Member(name="str", attribute="name", type=String()),),
    },
)

CHANNEL: Final = Struct(
    (
        Member(name="channel-type", attribute="channel_type", type=Enumeration(("main",))),
        Member(
            name="addr",
            attribute="address",
            type=Union(
                tag=Member(name="transport", attribute="transport", type=Enumeration(("socket",))),
                branches={"socket": (_SOCKET,)},
            ),
        ),
    )
)
"""QEMU's MigrationChannel, as far as localmig has such channels."""


def parameters_to_qmp(parameters: Parameters) -> dict[str, object]:
    """The parameters under QMP's names."""
    return {member.name: getattr(parameters, member.attribute) for member in PARAMETERS.members}


def parameters_changed(parameters: Parameters, changes: Mapping[str, object]) -> Parameters:
    """A copy with `changes`, which `PARAMETERS` read, made to it."""
    return dataclasses.replace(parameters, **changes)  # type: ignore[arg-type]  # PARAMETERS read them


def capabilities_to_qmp(parameters: Parameters) -> list[dict[str, object]]:
    """The capabilities under QMP's names."""
    return [{"capability": name, "state": getattr(parameters, attribute)} for name, attribute in CAPABILITIES.items()]
