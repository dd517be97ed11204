"""A type of objects, as its author declares it: options, how one is built, what is shown of it.

Owns:        ObjectType, BuildContext.
Never sees:  which types there are.
Read next:   options/specs.py for tables of options; registry.py, which finds types; daemon/objects.py, which builds.

A package adds a type by an entry point of the group `localmig.objects`, named as the type:

    [project.entry-points."localmig.objects"]
    virtio-rng = "localmig_rng:OBJECT"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from localmig.device_api.netdev import Netdev
from localmig.device_api.part import Part
from localmig.device_api.queues import Queues
from localmig.errors import ConfigError
from localmig.options.specs import Spec
from localmig.qapi import Member
from localmig.trace import Tracer

SpecT = TypeVar("SpecT", bound=Spec)
SharedT = TypeVar("SharedT")


def inherited(descriptor: int | str) -> int:
    """The descriptor of a daemon that starts: of a number, because nobody has given it any by name.

    Raises:
        ConfigError: it is a name.
    """
    if isinstance(descriptor, str):
        raise ConfigError(
            f"there is no descriptor '{descriptor}': names are given by getfd to a daemon that runs, for netdev_add; a "
            "daemon that starts takes the numbers of descriptors that it inherits"
        )
    return descriptor


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What an object is built with, besides its spec.

    Attributes:
        tracer: where facts go.
        queues: starts, stops and moves the rings of all devices.
        stays_home: why this object's descriptors do not move, because of one that refers to it; None where they may. To
            be asked at each handover: such an object may come and go.
        parts: the objects that were built before, by id.
        shared_by_all: what objects of a daemon have together, by its class.
        descriptor: the descriptor of a number or a name that an option says, lent: the object owns it once its `open`
            has succeeded. Raises ConfigError where it cannot be had.
    """

    tracer: Tracer
    queues: Queues
    stays_home: Callable[[], str | None] = field(default_factory=lambda: lambda: None)
    parts: Mapping[str, Part] = field(default_factory=dict)
    shared_by_all: dict[type[Any], Any] = field(default_factory=dict)
    descriptor: Callable[[int | str], int] = inherited

    def part(self, id: str) -> Part:  # noqa: A002 - the user's word
        """The object that a reference of the spec leads to."""
        return self.parts[id]

    def netdev(self, id: str) -> Netdev:  # noqa: A002 - the user's word
        """The netdev that a reference of the spec leads to."""
        return cast(Netdev, self.parts[id])

    def shared(self, cls: type[SharedT]) -> SharedT:
        """The one instance of `cls` that the objects of a daemon share, made without arguments at its first use."""
        if cls not in self.shared_by_all:
            self.shared_by_all[cls] = cls()
        return cast(SharedT, self.shared_by_all[cls])


@dataclass(frozen=True, kw_only=True)
class ObjectType(Generic[SpecT]):
    """A type of objects.

    Attributes:
        spec: its table of options; kind, name and summary stand on it.
        build: makes an object of a spec: frozen, stopped, with nothing opened. What it raises refuses the object.
        info: what query-* shows of it besides id, type and notes: members of what `Part.info` returns.
        opens_with_privileges: whether `open` needs what the process gives up before it serves: its user, capabilities.
            Sockets do not, and are to be the new user's.
    """

    spec: type[SpecT]
    build: Callable[[SpecT, BuildContext], Part]
    info: tuple[Member, ...] = ()
    opens_with_privileges: bool = False
