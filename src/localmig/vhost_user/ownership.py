"""Which session of a device owns it: whose rings run.

Owns:        Ownership, the rule; what it looks at of a session.
Never sees:  a socket, a ring that runs, a clock.
Read next:   device_api/vhost_user_device.py, which follows it; docs/devices.md for the rule in words.

A device serves several frontends at once, because a VMM that is replaced, or a guest that moves on its machine, has two
for a while. At most one session owns. Rings that another one starts are held until the owner's session ends; or, before
that, until the owner's rings have stopped and the held ones continue them. So two VMMs never both run one guest's
device, and a second guest on a copied socket path does not get the device when the first one reboots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from localmig.vhost_user.protocol import Offer, SessionState
from localmig.virtio import packed_ring, split_ring

SESSION_COUNT_MAX: Final = 8
"""Sessions of a device at once. A VMM that is replaced makes two, a move that is tried again one more; the rest is for
frontends that connected and say nothing. Each may bring as many descriptors as a guest has regions of memory."""


class Role(StrEnum):
    """What a session is to its device."""

    OWNS = "owns"
    """Its rings run, or were the last to run."""
    HELD = "held"
    """It started rings, which wait for the owner's."""
    IDLE = "idle"
    """It started none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What the rule looks at of a session.

    Attributes:
        wants: whether it shares memory and has a ring for the device to serve.
        started: its rings that are started.
        positions: where each ring stands; of a ring that runs this is behind.
        start: where a ring of its format begins.
    """

    wants: bool
    started: frozenset[int]
    positions: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, state: SessionState, offer: Offer) -> Standing:
        """Where a session stands."""
        started = frozenset(index for index, vring in enumerate(state.vrings) if vring.started)
        return cls(
            wants=bool(state.regions) and any(offer.serves(index, state.vrings) for index in started),
            started=started,
            positions=tuple(vring.next_avail for vring in state.vrings),
            start=packed_ring.START if state.is_packed else split_ring.START,
        )

    def continues(self, former: Standing) -> bool:
        """Whether its rings go on where those of `former` stopped.

        All that have moved there are started here, each where it stopped. Rings that all stand at the beginning tell
        nothing: those of any other guest begin there as well.
        """
        moved = {index for index, position in enumerate(former.positions) if position != former.start}
        return (
            bool(moved)
            and self.start == former.start
            and moved <= self.started
            and all(self.positions[index] == former.positions[index] for index in self.started)
        )


@dataclass(kw_only=True, slots=True)
class Ownership:
    """Who owns, among the sessions of a device, by their numbers.

    Attributes:
        owner: who owns, None while no session's rings have run.
        succeeded: those that owned and had a successor since: they get the rings back only once that one has left.
        held: those whose rings wait, the longest first.
    """

    owner: int | None = None
    succeeded: set[int] = field(default_factory=set)
    held: list[int] = field(default_factory=list)

    def role(self, number: int) -> Role:
        """What the session is to the device."""
        if number == self.owner:
            return Role.OWNS
        return Role.HELD if number in self.held else Role.IDLE

    def decide(self, sessions: Mapping[int, Standing], *, left: Standing | None = None) -> None:
        """Finds who owns now. To be called after each change of a session.

        Args:
            sessions: all that are connected.
            left: the owner as it stood when its session ended, None where that has not happened.
        """
        self._wait(sessions)
        owner = None if self.owner is None else sessions.get(self.owner)
        if owner is None:
            # Whoever continues is most likely the same guest; all others waited for just this, too.
            heirs = self.held if left is None else self._continuing(left, sessions)
            self._pass_on(next(iter((*heirs, *self.held)), None))
        elif not owner.wants:
            heirs = [number for number in self._continuing(owner, sessions) if number not in self.succeeded]
            if heirs and self.owner is not None:
                self.succeeded.add(self.owner)
                self._pass_on(heirs[0])
        self.succeeded &= sessions.keys()

    def _continuing(self, former: Standing, sessions: Mapping[int, Standing]) -> list[int]:
        return [number for number in self.held if sessions[number].continues(former)]

    def _wait(self, sessions: Mapping[int, Standing]) -> None:
        waiting = [number for number, each in sessions.items() if each.wants and number != self.owner]
        self.held = [number for number in self.held if number in waiting]
        self.held += [number for number in waiting if number not in self.held]

    def _pass_on(self, heir: int | None) -> None:
        self.owner = heir
        if heir is not None:
            self.held.remove(heir)
            self.succeeded.discard(heir)


def least_needed(sessions: Iterable[tuple[int, SessionState]]) -> int | None:
    """The oldest session without memory and rings, which makes room for another one; None where each has some."""
    bare = (number for number, state in sessions if not state.regions and not any(v.started for v in state.vrings))
    return min(bare, default=None)
