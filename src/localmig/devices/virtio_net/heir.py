"""For which driver the frames are that wait while no driver receives.

Owns:        whom a queue pair's waiting frames are for, and how that travels.
Never sees:  frames; a queue pair, which reads out what is for another driver.
Read next:   device.py, which says when a driver's receive ring begins and ends; dataplane/ for what is dropped then.

A TAP goes on queueing while a guest is paused, its VMM reconnects or its driver is reset. A driver that goes on where
the ring stood gets all of it. Frames that waited for another driver are of no use to this one, and may ask it for
offloads that it did not take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from localmig.vmstate import Description, u8, u16


class HeirKind(IntEnum):
    """Whom frames are for. The values travel."""

    ANYONE = 0
    """The driver that receives."""
    RING = 1
    """A driver whose receive ring goes on at a position."""
    NOBODY = 2
    """No driver that comes, unless its frontend had asked for the position."""
    STRANGER = 3
    """A driver that does not begin: it was served by another daemon, of which nothing is known. None was here yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heir:
    """Whom the waiting frames of a queue pair are for; `position` is where its receive ring stood."""

    kind: int
    position: int = 0


ANYONE: Final = Heir(kind=HeirKind.ANYONE)
NOBODY: Final = Heir(kind=HeirKind.NOBODY)
STRANGER: Final = Heir(kind=HeirKind.STRANGER)

HEIR: Final = Description(
    name="virtio-net-heir",
    version=1,
    oldest_version=1,
    state=Heir,
    fields=(u8("kind"), u16("position")),
)


def heir_of(position: int, *, start: int) -> Heir:
    """Whom frames are for once a receive ring has stopped.

    Args:
        position: where it stands; of a packed ring with the wrap counter in bit 15.
        start: where a ring of its format begins.
    """
    # There a new driver begins as well, so the position does not tell one from the other.
    return Heir(kind=HeirKind.NOBODY if position == start else HeirKind.RING, position=position)


def once_asked(heir: Heir) -> Heir:
    """Whom they are for if the frontend has asked where the ring stands: it pauses, and will go on there."""
    return replace(heir, kind=HeirKind.RING) if heir.kind == HeirKind.NOBODY else heir
