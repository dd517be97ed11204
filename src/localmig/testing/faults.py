"""Faults at named points of a handover, in a real daemon process; a journal of the points it passed.

Owns:        the points, what can happen at one, a `localmig` in which it does; the journal, and who ran rings when.
Never sees:  which outcome is right; tests/faults/ does.
Read next:   tests/faults/, migration/channel.py and device_api/, whose frames and steps are the points.

    python -m localmig.testing.faults before-send:READY=kill -- run --incoming unix:/run/vm1/migrate.sock …

A point is a place and what it is the place of:

    before-send, after-send, after-receive      a kind of frame            before-send:COMMIT
    leave, enter                                a state of either table    enter:owner
    before, after                               a step of a part, of the   before:nic0.thaw
                                                channel, of the peer, or   after:channel.close
                                                of the daemon              before:peer.kill

Parts go by their ids; the rings of all devices are the part `*`. The action is taken once, at the first passing or at
the one that is asked for (`before-send:SETUP#2`), and only while a handover runs: what a daemon does to start, and what
it rehearses, passes no point.
"""

from __future__ import annotations

import os
import runpy
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from localmig.device_api import CallbackDevice, Part, Queues
from localmig.devices.virtio_net import VirtioNet
from localmig.errors import ConfigError
from localmig.migration.channel import Channel, Frame, FrameKind
from localmig.migration.downtime import MirrorChannel
from localmig.migration.handover import DestinationState, Machine, SourceState
from localmig.migration.incoming import Incoming
from localmig.migration.outgoing import Outgoing
from localmig.migration.peer import Peer
from localmig.netdevs.stream import Stream
from localmig.netdevs.tap import Tap


class Place(StrEnum):
    """Where, seen from a frame, a state or a step."""

    BEFORE_SEND = "before-send"
    AFTER_SEND = "after-send"
    AFTER_RECEIVE = "after-receive"
    LEAVE = "leave"
    ENTER = "enter"
    BEFORE = "before"
    AFTER = "after"


class Action(StrEnum):
    """What happens."""

    KILL = "kill"
    """The process is killed: nothing is cleaned up."""
    STOP = "stop"
    """The process stops (SIGSTOP), until somebody continues it."""
    RAISE = "raise"
    """An error nobody expects is raised."""
    END = "end"
    """The process is told to end (SIGTERM), which it hears of when it next waits for anything."""


PART_STEPS: Final = (
    *(
        "watch_setup",
        "save_setup",
        "quiesce",
        "freeze",
        "stop",
        "save_switchover",
        "release",
        "resume",
        "thaw",
        "recover",
    ),
    *("check_setup", "adopt_setup", "check_switchover", "adopt_switchover", "source_released", "discard"),
)
REHEARSED_STEPS: Final = ("save_switchover", "check_switchover", "adopt_switchover")
"""Taken before the downtime too, with states that do not count."""

OTHER_STEPS: Final = ("channel.close", "channel.receive_end", "peer.kill", "peer.wait_dead", "daemon.on_serving")

_STATES: Final = tuple(dict.fromkeys((*SourceState, *DestinationState)))
FRAME_PLACES: Final = (Place.BEFORE_SEND, Place.AFTER_SEND, Place.AFTER_RECEIVE)
_STATE_PLACES: Final = (Place.LEAVE, Place.ENTER)


class InjectedError(Exception):
    """What RAISE raises: no class of ours, as a bug's would be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A place, the frame, state or step that it is the place of, and which of several passings in one handover."""

    place: Place
    subject: str
    passing: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `PLACE:SUBJECT` or `PLACE:SUBJECT#PASSING`. ConfigError where it is none."""
        point, _, passing = text.partition("#")
        place, _, subject = point.partition(":")
        _check_word(text, passing, ["", *"123456789"])
        _check_word(text, place, list(Place))
        if place in FRAME_PLACES:
            _check_word(text, subject, [each.name for each in FrameKind])
        elif place in _STATE_PLACES:
            _check_word(text, subject, _STATES)
        elif subject not in OTHER_STEPS:
            _check_word(text, subject.rpartition(".")[2], PART_STEPS)
        return cls(place=Place(place), subject=subject, passing=int(passing or 1))

    def __str__(self) -> str:
        return f"{self.place}:{self.subject}" + (f"#{self.passing}" if self.passing > 1 else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One action at one point."""

    point: Point
    action: Action

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `PLACE:SUBJECT=ACTION`. ConfigError where it is none."""
        point, _, action = text.partition("=")
        parsed = Point.parse(point)
        _check_word(text, action, list(Action))
        return cls(point=parsed, action=Action(action))

    def __str__(self) -> str:
        return f"{self.point}={self.action}"

    def act(self) -> None:
        """Lets it happen."""
        match self.action:
            case Action.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Action.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Action.RAISE:
                raise InjectedError(str(self))
            case Action.END:
                os.kill(os.getpid(), signal.SIGTERM)


def _check_word(text: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise ConfigError(f"fault '{text}' is not PLACE:SUBJECT=ACTION: '{word}' is none of {', '.join(known)}")


# -- the journal ----------------------------------------------------------------------------------------------------


class Journal:
    """What daemons under test did, one line for each point passed, written at once: whoever is killed has written it.

    A line is CLOCK_MONOTONIC nanoseconds, the process, a word and what it is about; see `read_journal`. Beside it
    stands a mark for each process whose rings may run. Whoever starts rings sets its own mark and then looks at all
    others: one whose process is not dead is an owner too many, and that is written down as `two-owners`.

    Args:
        folder: of all daemons of one test.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(folder / "journal", flags, 0o600)  # as long as the process lives

    def write(self, word: str, about: str = "") -> None:
        """Appends a line."""
        os.write(self._fd, f"{time.monotonic_ns()} {os.getpid()} {word} {about}\n".encode())

    def rings_start(self) -> None:
        """Rings may run from here on."""
        self._mark(os.getpid()).touch()
        for mark in self._folder.glob("running.*"):
            pid = int(mark.suffix[1:])
            if pid != os.getpid() and not _is_dead(pid):
                self.write("two-owners", str(pid))
        self.write("start")

    def rings_stopped(self) -> None:
        """Rings run no more."""
        self.write("stopped")
        self._mark(os.getpid()).unlink(missing_ok=True)

    def _mark(self, pid: int) -> Path:
        return self._folder / f"running.{pid}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of a journal.

    Attributes:
        word: `point`, `fault`, `start` and `stopped` (of rings), `two-owners`.
        about: the point, the fault, the other owner's process.
    """

    at_ns: int
    pid: int
    word: str
    about: str


def read_journal(folder: Path) -> list[Entry]:
    """All lines so far."""
    path = folder / "journal"
    lines = path.read_text().splitlines() if path.exists() else []
    parts = [line.split(" ", 3) for line in lines]
    return [Entry(at_ns=int(at), pid=int(pid), word=word, about=about) for at, pid, word, about in parts]


def _is_dead(pid: int) -> bool:
    """Whether nothing of the process runs any more: not one thread."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(fd)


# -- the points -----------------------------------------------------------------------------------------------------


class Trap:
    """Waits at all points of this process.

    Args:
        fault: gives what shall happen, asked when a handover begins; None: nothing.
        journal: where passed points are written.

    Attributes:
        has_struck: whether a fault has happened.
    """

    def __init__(self, fault: Callable[[], Fault | None], journal: Journal | None = None) -> None:
        self._ask = fault
        self._journal = journal
        self._fault: Fault | None = None
        self._is_armed = False
        self._is_downtime = False
        self._passings: Counter[tuple[Place, str]] = Counter()
        self.has_struck = False

    def arm(self) -> None:
        """A handover begins."""
        self._fault = self._ask()
        self._is_armed = True
        self._is_downtime = False
        self._passings.clear()

    def disarm(self) -> None:
        """It is over."""
        self._is_armed = False

    def downtime_begins(self) -> None:
        """From here on a switchover's steps count."""
        self._is_downtime = True

    def pass_by(self, place: Place, subject: str) -> None:
        """This process passes a point."""
        if not self._is_armed or (subject.rpartition(".")[2] in REHEARSED_STEPS and not self._is_downtime):
            return
        self._passings[place, subject] += 1
        point = Point(place=place, subject=subject, passing=self._passings[place, subject])
        if self._journal is not None:
            self._journal.write("point", str(point))
        fault = self._fault
        if fault is not None and fault.point == point:
            self._fault = None
            self.has_struck = True
            if self._journal is not None:
                self._journal.write("fault", str(fault))
            fault.act()


def install(trap: Trap, journal: Journal | None = None) -> None:
    """From now on every point of this process leads by the trap."""
    _install_handovers(trap)
    _install_frames(trap)
    _install_states(trap)
    _install_parts(trap)
    _wrap(trap, Channel, "close", lambda channel: None if isinstance(channel, MirrorChannel) else "channel.close")
    _wrap(trap, Peer, "kill", lambda _: "peer.kill")
    if journal is not None:
        _install_witness(journal)


def _install_handovers(trap: Trap) -> None:
    """A trap is armed while a handover runs."""
    for kind in (Outgoing, Incoming):

        async def armed_run(self: Any, *arguments: Any, run: Any = kind.run) -> Any:
            trap.arm()
            try:
                return await run(self, *arguments)
            finally:
                trap.disarm()

        kind.run = armed_run  # type: ignore[method-assign]
    init = Incoming.__init__

    def init_with_points(self: Incoming, *, on_serving: Callable[[], None], **options: Any) -> None:
        def passing() -> None:
            trap.pass_by(Place.BEFORE, "daemon.on_serving")
            on_serving()
            trap.pass_by(Place.AFTER, "daemon.on_serving")

        init(self, on_serving=passing, **options)

    Incoming.__init__ = init_with_points  # type: ignore[method-assign]


def _install_frames(trap: Trap) -> None:
    send, try_send, receive = Channel.send, Channel.try_send, Channel.receive
    receive_end, wait_dead = Channel.receive_end, Peer.wait_dead

    def pass_by(channel: Channel, place: Place, kind: FrameKind) -> None:
        if not isinstance(channel, MirrorChannel):
            trap.pass_by(place, kind.name)

    async def faulty_send(self: Channel, kind: FrameKind, *arguments: Any, **options: Any) -> None:
        pass_by(self, Place.BEFORE_SEND, kind)
        await send(self, kind, *arguments, **options)
        pass_by(self, Place.AFTER_SEND, kind)

    def faulty_try_send(self: Channel, kind: FrameKind, data: bytes = b"") -> bool:
        pass_by(self, Place.BEFORE_SEND, kind)
        is_sent = try_send(self, kind, data)
        pass_by(self, Place.AFTER_SEND, kind)
        return is_sent

    async def faulty_receive(self: Channel, **options: Any) -> Frame:
        frame = await receive(self, **options)
        if frame.kind is FrameKind.SWITCHOVER and not isinstance(self, MirrorChannel):
            trap.downtime_begins()
        try:
            pass_by(self, Place.AFTER_RECEIVE, frame.kind)
        except InjectedError:
            frame.close()
            raise
        return frame

    async def faulty_receive_end(self: Channel, **options: Any) -> None:
        trap.pass_by(Place.BEFORE, "channel.receive_end")
        await receive_end(self, **options)
        trap.pass_by(Place.AFTER, "channel.receive_end")

    async def faulty_wait_dead(self: Peer, **options: Any) -> bool:
        trap.pass_by(Place.BEFORE, "peer.wait_dead")
        is_dead = await wait_dead(self, **options)
        trap.pass_by(Place.AFTER, "peer.wait_dead")
        return is_dead

    Channel.send = faulty_send  # type: ignore[method-assign]
    Channel.try_send = faulty_try_send  # type: ignore[method-assign]
    Channel.receive = faulty_receive  # type: ignore[method-assign]
    Channel.receive_end = faulty_receive_end  # type: ignore[method-assign]
    Peer.wait_dead = faulty_wait_dead  # type: ignore[method-assign]


def _install_states(trap: Trap) -> None:
    fire = Machine.fire

    def faulty_fire(self: Machine[Any, Any], event: Any) -> Any:
        trap.pass_by(Place.LEAVE, self.state)
        state = fire(self, event)
        trap.pass_by(Place.ENTER, state)
        return state

    Machine.fire = faulty_fire  # type: ignore[method-assign]


def _install_parts(trap: Trap) -> None:
    """Every kind of part that there is, at the steps where it does something.

    What is a device's own is saved, checked and adopted right before the device, which has points there.
    """
    for kind in (Tap, Stream, VirtioNet, CallbackDevice, Queues):
        for step in PART_STEPS:
            if getattr(kind, step) is not getattr(Part, step):
                _wrap(trap, kind, step, partial(_step_of, step))
    stop = Queues.stop

    def stop_and_count(self: Queues) -> None:
        trap.downtime_begins()
        stop(self)

    Queues.stop = stop_and_count  # type: ignore[method-assign]


def _step_of(step: str, part: Part) -> str:
    return f"{part.id}.{step}"


def _install_witness(journal: Journal) -> None:
    """Rings start and stop nowhere but here; a frontend's word starts one only while these run."""
    resume, stop = Queues.resume, Queues.stop

    def watched_resume(self: Queues) -> None:
        if not self.serving:
            journal.rings_start()
        resume(self)

    def watched_stop(self: Queues) -> None:
        was_serving = self.serving
        stop(self)
        if was_serving:
            journal.rings_stopped()

    Queues.resume = watched_resume  # type: ignore[method-assign]
    Queues.stop = watched_stop  # type: ignore[method-assign]


def _wrap(trap: Trap, kind: type, name: str, subject: Callable[[Any], str | None]) -> None:
    """A method that is a step: a point before it and one behind it."""
    step = getattr(kind, name)

    def faulty(self: Any, *arguments: Any, **options: Any) -> Any:
        what = subject(self)
        if what is None:
            return step(self, *arguments, **options)
        trap.pass_by(Place.BEFORE, what)
        result = step(self, *arguments, **options)
        trap.pass_by(Place.AFTER, what)
        return result

    setattr(kind, name, faulty)


# -- the program ----------------------------------------------------------------------------------------------------

USAGE: Final = f"""\
usage: python -m localmig.testing.faults PLACE:SUBJECT[#PASSING]=ACTION|@FILE [--journal FOLDER] -- LOCALMIG-ARGUMENTS…

  PLACE    {", ".join(FRAME_PLACES)}
  SUBJECT    {", ".join(kind.name for kind in FrameKind)}
  PLACE    {", ".join(_STATE_PLACES)}
  SUBJECT    {", ".join(_STATES)}
  PLACE    {Place.BEFORE}, {Place.AFTER}
  SUBJECT    {", ".join(OTHER_STEPS)}, PART.STEP with one of the steps
             {", ".join(PART_STEPS)}
  ACTION   {", ".join(Action)}

  @FILE    the fault is what FILE says when a handover begins; none where it is empty or is not there
  FOLDER   where the points that are passed are written down
"""


def _fault_in(path: Path) -> Fault | None:
    text = path.read_text().strip() if path.exists() else ""
    return Fault.parse(text) if text else None


def main(argv: Sequence[str]) -> None:
    """Runs `localmig` with the arguments behind `--` and the fault before it."""
    if argv in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return
    own = argv[: argv.index("--")] if "--" in argv else []
    rest = argv[len(own) + 1 :]
    if not rest or len(own) not in (1, 3) or (len(own) == 3 and own[1] != "--journal"):
        sys.stderr.write(USAGE)
        sys.exit(2)
    try:
        fault = None if own[0].startswith("@") else Fault.parse(own[0])
    except ConfigError as error:
        sys.stderr.write(f"{USAGE}\nlocalmig: error: {error}\n")
        sys.exit(2)
    journal = Journal(Path(own[2])) if len(own) == 3 else None
    trap = Trap(lambda: _fault_in(Path(own[0][1:])) if fault is None else None if trap.has_struck else fault, journal)
    install(trap, journal)
    sys.argv = ["localmig", *rest]
    runpy.run_module("localmig.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
