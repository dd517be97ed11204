"""What keeps a device from working, told to people once it has lasted.

Owns:        the sentences about what a frontend did and did not do; when they are looked for, and that each is told
             once.
Never sees:  a log, guest memory, a ring, a socket.
Read next:   vhost_user_device.py, which finds the facts; cli/status.py, which shows the notes.

A frontend sets up a device within milliseconds, once its guest's driver is ready; before that it may wait for ever. So
what is missing counts after a set-up began, and if two looks in a row find it missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from localmig.vhost_user.protocol import SessionState, VringState

LOOK_SECONDS: Final = 1.5
"""Between two looks. A set-up takes milliseconds, on a machine that swaps perhaps a second."""

NOT_SHARED: Final = (
    "the driver notifies its rings, and nothing changes in the memory that the frontend shared: the guest has other"
    " memory; let the VMM share it (QEMU: share=on for the memory backend)"
)

TOLD_MAX: Final = 256
"""Notes that are remembered as told. There are as many as numbers of pairs, and those about held rings."""

_NO_MEMORY: Final = (
    "rings are started and the frontend shared no memory; let the VMM share it (QEMU: a memory backend with share=on)"
)

_NO_LOG: Final = (
    "the frontend wants to know which memory is written (VHOST_F_LOG_ALL) and gave no log for it (SET_LOG_BASE): its"
    " rings wait for that; look into its log file"
)

_STEPS: Final[tuple[tuple[str, Callable[[VringState], bool]], ...]] = (
    ("SET_VRING_NUM", lambda vring: bool(vring.size)),
    ("SET_VRING_ADDR", lambda vring: bool(vring.descriptor_area)),
    ("SET_VRING_KICK", lambda vring: vring.started),
    ("SET_VRING_ENABLE", lambda vring: vring.enabled),
)
"""What a ring needs before it is served, and whether it came."""


def set_up_notes(state: SessionState, vrings: Sequence[int], *, has_spoken: bool) -> Iterator[str]:
    """What is said of a frontend that does not finish the set-up of the rings a device cannot do without.

    `has_spoken`: it sent a whole message in this process, or its session came by a handover.
    """
    if state.unparsed:
        yield "the frontend stopped in the middle of a message; look into its log, or end it"
    elif not has_spoken:
        yield "a program is connected and says nothing; end it if it is no VMM"
    started = sum(state.vrings[index].started for index in vrings)
    if started and not state.regions:
        yield _NO_MEMORY
    elif started and state.awaits_log:
        yield _NO_LOG
    elif (0 < started < len(vrings) or not state.was_served) and (started or state.features_acked):
        for name, came in _STEPS:
            missing = " and ".join(str(index) for index in vrings if not came(state.vrings[index]))
            if missing:
                yield f"the frontend stopped half-way: there was no {name} for vring {missing}; look into its log"
                return


def held_note(held: str, owner: str) -> str:
    """What is said of a session whose rings wait, beside the one that owns."""
    return f"{held} waits for the rings that {owner} has; end that one, or this one: session-close"


class Notes:
    """The notes of a device: looks for them after each change of its session, and goes on while there is a reason.

    Args:
        find: what is the matter now.
        may_appear: whether something may become the matter without a change of the session.
        tell: is told once of each note that lasts.
    """

    def __init__(
        self, find: Callable[[], Iterable[str]], may_appear: Callable[[], bool], tell: Callable[[str], None]
    ) -> None:
        self._find = find
        self._may_appear = may_appear
        self._tell = tell
        self._found: tuple[str, ...] = ()
        self._lasting: tuple[str, ...] = ()
        self._told: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None

    def get(self) -> tuple[str, ...]:
        """What lasts and still is so."""
        return tuple(note for note in self._find() if note in self._lasting)

    def expect(self) -> None:
        """The session changed: there may be something to find soon."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def stop(self) -> None:
        """Looks no more, until it is to `expect` something. Calling it again does nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        found = tuple(self._find())
        self._lasting = tuple(note for note in found if note in self._found)
        self._found = found
        for note in self._lasting:
            # Once for each, not at each reconnect.
            if note not in self._told:
                if len(self._told) == TOLD_MAX:
                    self._told.clear()
                self._told.add(note)
                self._tell(note)
        if self._lasting != found or self._may_appear():
            self.expect()
