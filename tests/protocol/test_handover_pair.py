"""Source and destination in one event loop, and everything that a part or a process can do wrong, at every point.

A fault waits at the n-th point a side passes, for n = 1, 2, 3 … until a run has no n-th point. A point is the
beginning or the end of a call of a part, or of a frame's sending or receiving. After each run exactly one side serves,
whole, and no descriptor is lost; on the way there were never two. And no side took a step that handover_model.py has
not: what is found there by walking everything holds for these two as well.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from tests.protocol.handover_model import ALL_RULES, Input, explore

from localmig.device_api import Part
from localmig.errors import KernelError, PeerError, PeerLostError
from localmig.fds import OwnedFd
from localmig.migration import incoming as incoming_module
from localmig.migration import outgoing as outgoing_module
from localmig.migration.analysis import analyze
from localmig.migration.channel import Channel, Frame, FrameKind
from localmig.migration.exchange import CATCH_UP_ROUNDS_MAX
from localmig.migration.handover import (
    DESTINATION,
    SOURCE,
    DestinationEvent,
    DestinationState,
    Machine,
    SourceEvent,
    SourceState,
    destination_machine,
    source_machine,
)
from localmig.migration.hello import Hello
from localmig.migration.incoming import Incoming
from localmig.migration.outgoing import Outgoing
from localmig.migration.parameters import Parameters
from localmig.migration.peer import Peer, Revocation
from localmig.migration.progress import Progress
from localmig.migration.recording import write_recording
from localmig.trace import Event, MigrationStatusChanged, Tracer
from localmig.vmstate import Description, fd, optional, u32, u64

SERVES_IN_PART: Final = "serves, but not with all of its parts"

PATIENCE_S: Final = 10.0
"""No run waits so long for anything but a handover that is stuck."""


# -- a part ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeSetup:
    generation: int
    file: OwnedFd | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeRings:
    position: int


SETUP: Final = Description(
    name="fake", version=1, oldest_version=1, state=FakeSetup, fields=(u32("generation"), optional(fd("file")))
)
RINGS: Final = Description(name="fake-rings", version=1, oldest_version=1, state=FakeRings, fields=(u64("position"),))


class FakePart(Part):
    """A part with one descriptor, which keeps account of what it was told."""

    setup = SETUP
    switchover = RINGS

    def __init__(self, side: Side, id: str) -> None:  # noqa: A002
        self.id = id
        self.side = side
        self.running = False
        self.frozen = True
        self.generation = 1
        self.changing: Callable[[], None] | None = None
        self.position = 0
        self.file: OwnedFd | None = None
        self.notes: list[str] = []
        side.parts.append(self)

    @property
    def serves(self) -> bool:
        return self.running and not self.frozen and self.file is not None

    def open(self) -> None:
        self.file = OwnedFd(os.memfd_create(self.id, os.MFD_CLOEXEC))

    def resume(self) -> None:
        with self.side.points(f"{self.id}.resume"):
            self.side.world.note_start(self.side)
            assert self.file is not None
            self.running = True

    def stop(self) -> None:
        with self.side.points(f"{self.id}.stop"):
            if self.running:
                self.position += 1
            self.running = False

    def freeze(self) -> None:
        with self.side.points(f"{self.id}.freeze"):
            self.frozen = True

    def thaw(self) -> None:
        with self.side.points(f"{self.id}.thaw"):
            self.frozen = False

    def close(self) -> None:
        self.drop()

    def change(self) -> None:
        """A frontend says something. Nobody reads it while the part is frozen."""
        if not self.frozen:
            if self.changing is not None:
                self.changing()
            self.generation += 100

    def watch_setup(self, changing: Callable[[], None] | None) -> None:
        with self.side.points(f"{self.id}.watch_setup"):
            self.changing = changing

    def save_setup(self, *, with_descriptors: bool) -> FakeSetup:
        with self.side.points(f"{self.id}.save_setup"):
            return FakeSetup(generation=self.generation, file=self.file if with_descriptors else None)

    def save_switchover(self) -> FakeRings:
        with self.side.points(f"{self.id}.save_switchover"):
            return FakeRings(position=self.position)

    def release(self) -> None:
        with self.side.points(f"{self.id}.release"):
            self.drop()

    def check_setup(self, state: FakeSetup) -> None:
        with self.side.points(f"{self.id}.check_setup"):
            assert state.file is not None

    def adopt_setup(self, state: FakeSetup) -> None:
        with self.side.points(f"{self.id}.adopt_setup"):
            assert state.file is not None
            self.drop()
            self.generation = state.generation + 1
            self.file = state.file.take()

    def check_switchover(self, state: FakeRings) -> None:
        with self.side.points(f"{self.id}.check_switchover"):
            pass

    def adopt_switchover(self, state: FakeRings) -> None:
        with self.side.points(f"{self.id}.adopt_switchover"):
            self.position = state.position

    def recover(self) -> None:
        with self.side.points(f"{self.id}.recover"):
            assert self.file is not None

    def source_released(self) -> None:
        with self.side.points(f"{self.id}.source_released"):
            pass

    def take_notes(self) -> list[str]:
        with self.side.points(f"{self.id}.take_notes"):
            return list(self.notes)

    def discard(self) -> None:
        with self.side.points(f"{self.id}.discard"):
            self.drop()

    def drop(self) -> None:
        self.running = False
        if self.file is not None:
            self.file.close()
            self.file = None


# -- two processes --------------------------------------------------------------------------------------------


class What(StrEnum):
    """What happens at a point."""

    FAILS = "fails"
    """A part says that it cannot."""
    BLAMES = "blames the other side"
    """A part says that what the other side sent cannot be."""
    HAS_A_BUG = "has a bug"
    """Something is raised that nobody expects."""
    DIES = "dies"
    """The process is killed."""
    IS_CANCELLED = "is cancelled"
    """The task is cancelled, as by a loop that ends."""
    CHANGES = "is changed by a frontend"
    """A part, where its control plane is read."""
    CHANNEL_BREAKS = "channel breaks"
    """What is on its way still arrives; nothing more can be said."""


class BugError(Exception):
    """What nobody expects."""


class DiedError(BaseException):
    """Unwinds the task of a process that is dead; it passes no point any more."""


class Child:
    """A process that does nothing. One that outlives a run is there for the next, because starting one takes longer."""

    idle: ClassVar[list[Child]] = []

    def __init__(self) -> None:
        self._process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        self.pid = self._process.pid

    @classmethod
    def reserve(cls, count: int) -> None:
        """Has so many wait to be taken."""
        cls.idle += [cls() for _ in range(count - len(cls.idle))]

    def kill(self) -> None:
        """Kills it; it is gone afterwards. Idempotent."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def give_back(self) -> None:
        """It is needed no more."""
        if self._process.poll() is None:
            self.idle.append(self)
        else:
            self.kill()


@pytest.fixture(autouse=True, scope="module")
def no_child_is_left() -> Iterator[None]:
    yield
    while Child.idle:
        Child.idle.pop().kill()


class Side:
    """A process: its parts, its end of the channel, and a child that lives and dies in its place."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.parts: list[FakePart] = []
        self.child = Child.idle.pop()
        self.lives = True
        self.was_ended = False
        """Whether somebody killed it or told it to quit; else it ended by itself."""
        self.sock: socket.socket | None = None
        self.task: asyncio.Task[None] | None = None
        self.passed: list[str] = []
        self.input: str = Input.HERE
        """What it has heard since its last step."""
        self.error: BaseException | None = None
        self.statuses: list[str] = []
        self.tracer = Tracer()
        self.tracer.subscribe(self._note)

    def _note(self, event: Event) -> None:
        if isinstance(event, MigrationStatusChanged):
            self.statuses.append(event.status)

    @property
    def serves(self) -> bool:
        return self.lives and any(part.running for part in self.parts)

    @property
    def serves_whole(self) -> bool:
        return self.lives and all(part.serves for part in self.parts) and len(self.parts) == 2

    @contextmanager
    def points(self, name: str) -> Iterator[None]:
        self.pass_by(f"before {name}", in_part=True)
        yield
        self.pass_by(f"after {name}", in_part=True)

    def pass_by(self, point: str, *, in_part: bool) -> None:
        if not self.lives:
            raise DiedError
        self.passed.append(point)
        self.world.act(self, point, in_part=in_part)

    def die(self) -> None:
        """The process is gone, with all it held."""
        if self.lives:
            self.lives = False
            self.child.kill()
            for part in self.parts:
                part.drop()
            if self.sock is not None and self.sock.fileno() >= 0:
                self.sock.shutdown(socket.SHUT_RDWR)
            if self.task is not None and self.task is not asyncio.current_task():
                self.task.cancel()

    def close(self) -> None:
        for part in self.parts:
            part.drop()
        self.child.give_back()


class WatchedChannel(Channel):
    """A channel whose sending and receiving are points."""

    def __init__(self, sock: socket.socket, side: Side) -> None:
        super().__init__(sock)
        self._side = side
        side.sock = sock

    async def send(self, kind: FrameKind, *arguments: Any, **options: Any) -> None:
        self._side.pass_by(f"before send {kind.name}", in_part=False)
        with self._noting_troubles():
            await super().send(kind, *arguments, **options)
        self._side.pass_by(f"after send {kind.name}", in_part=False)

    def try_send(self, kind: FrameKind, data: bytes = b"") -> bool:
        self._side.pass_by(f"before send {kind.name}", in_part=False)
        told = super().try_send(kind, data)
        self._side.pass_by(f"after send {kind.name}", in_part=False)
        return told

    async def receive(self, *, timeout_s: float | None, eager: bool = False) -> Frame:
        self._side.pass_by("before receive", in_part=False)
        # The two share a thread: whoever waits must let the other one run.
        with self._noting_troubles():
            frame = await super().receive(timeout_s=timeout_s)
        self._side.input = frame.kind.name
        try:
            self._side.pass_by(f"after receive {frame.kind.name}", in_part=False)
        except BaseException:
            frame.close()
            raise
        return frame

    @contextmanager
    def _noting_troubles(self) -> Iterator[None]:
        try:
            yield
        except PeerLostError:
            self._side.input = Input.END
            raise
        except TimeoutError:
            self._side.input = Input.TIME
            raise


class WatchedMachine(Machine[Any, Any]):
    """A side's state, whose every step must be one of the model's."""

    def __init__(self, machine: Machine[Any, Any], table: Mapping[tuple[Any, Any], Any], side: Side) -> None:
        super().__init__(machine.state, table)
        self._side = side

    def fire(self, event: Any) -> Any:
        before, heard = self.state, self._side.input
        after = super().fire(event)
        self._side.input = Input.HERE
        if before in (SourceState.FENCING, SourceState.IN_DOUBT):
            heard = Input.DEATH if event is SourceEvent.PEER_DIED else Input.TIME
        elif event in OWN_STEPS:
            heard = Input.HERE
        elif event is SourceEvent.CANCEL:
            heard = Input.OPERATOR
        step = (self._side.name, before, heard, event)
        # The model has the two connected in one step. A process that is dead steps no more, here it unwinds.
        if self._side.lives and event is not DestinationEvent.CONNECTED and step not in MODEL:
            self._side.world.not_in_model.append(" ".join(map(str, step)))
        return after


OWN_STEPS: Final = (SourceEvent.START, SourceEvent.CONNECTED, SourceEvent.CONTINUED, SourceEvent.COMMIT_SENT)

MODEL: Final = frozenset[tuple[str, StrEnum | None, str, StrEnum]]().union(
    *(explore(rules).fired for rules in ALL_RULES)
)


Fault = Callable[[Side, str], What | None]
"""What happens at a point that a side passes."""


def at(side: str, point: str, what: What) -> Fault:
    """The same each time the side passes the point."""
    return lambda passing, name: what if (passing.name, name) == (side, point) else None


def at_number(side: str, number: int, what: What) -> Fault:
    """At the n-th point the side passes."""
    return lambda passing, _: what if passing.name == side and len(passing.passed) == number else None


class World:
    """One handover between two processes, and the faults that wait in it."""

    def __init__(self, *faults: Fault, running: bool = True, record: str = "") -> None:
        self.faults = faults
        self.record = record
        self.running = running
        self.fired: dict[Fault, str] = {}
        self.two_owners: list[str] = []
        self.not_in_model: list[str] = []
        self.announced: list[str] = []
        self.stuck = False
        self.wrong: str | None = None
        self.source, self.destination = Side(self, "source"), Side(self, "destination")
        self.states: dict[str, StrEnum] = {}
        self.outgoing: Outgoing | None = None
        self.incoming: Incoming | None = None
        self.source_may_return: list[bool] = []
        """As the destination sees it: once its own part ended, and in the end."""

    def act(self, side: Side, point: str, *, in_part: bool) -> None:
        """The faults that wait here happen, each once."""
        for fault in self.faults:
            what = None if fault in self.fired else fault(side, point)
            if what is None or (what in (What.FAILS, What.BLAMES) and not in_part):
                continue
            self.fired[fault] = f"{side.name} {what} {point}"
            if what in (What.FAILS, What.BLAMES, What.HAS_A_BUG):
                side.input = Input.HERE
            match what:
                case What.FAILS:
                    raise KernelError(self.fired[fault], errno=errno.EIO)
                case What.BLAMES:
                    raise PeerError(self.fired[fault])
                case What.HAS_A_BUG:
                    raise BugError(self.fired[fault])
                case What.DIES:
                    side.was_ended = True
                    side.die()
                    raise DiedError
                case What.IS_CANCELLED:
                    assert side.task is not None
                    side.was_ended = True
                    side.task.cancel()
                case What.CHANGES:
                    self.source.parts[0].change()
                case What.CHANNEL_BREAKS:
                    for each in (self.source, self.destination):
                        if each.sock is not None and each.sock.fileno() >= 0:
                            each.sock.shutdown(socket.SHUT_RDWR)

    def note_start(self, side: Side) -> None:
        """Rings start on `side`."""
        other = self.destination if side is self.source else self.source
        if other.serves:
            self.two_owners.append(f"{side.name} starts while {other.name} runs")

    async def run(self) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        near.setblocking(False)
        far.setblocking(False)
        for name in ("a", "b"):
            part = FakePart(self.source, name)
            part.open()
            part.running, part.frozen = self.running, False
        self.source.sock, self.destination.sock = near, far
        self.source.task = asyncio.create_task(self._source(near))
        self.destination.task = asyncio.create_task(self._destination(far))
        tasks = [self.source.task, self.destination.task]
        _, pending = await asyncio.wait(tasks, timeout=PATIENCE_S)
        self.stuck = bool(pending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        near.close()
        far.close()
        if not self.source.lives and self.outgoing is not None and self.outgoing._peer is not None:
            # A process that is killed closes everything; here it only unwound.
            self.outgoing._peer.close()
        if not self.source.lives and self.outgoing is not None:
            for held in (self.outgoing._revocation, self.outgoing._changes):
                if held is not None:
                    held.close()

    async def _source(self, sock: socket.socket) -> None:
        async def connect() -> Channel:
            return WatchedChannel(sock, self.source)

        self.outgoing = outgoing = Outgoing(
            connect=connect,
            parameters=Parameters(local=True, commit_timeout_ms=500, record=self.record),
            parts=self.source.parts,
            objects=(),
            running=self.running,
            is_ending=lambda: False,
            tracer=self.source.tracer,
        )
        try:
            self.states["source"] = await outgoing.run()
        except DiedError:
            pass
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the daemon logs it and goes on
            self.source.error = error

    async def _destination(self, sock: socket.socket) -> None:
        def build(hello: Hello) -> list[FakePart]:
            return [FakePart(self.destination, name) for name in ("a", "b")]

        self.incoming = incoming = Incoming(
            parameters=lambda: Parameters(local=True),
            build=build,
            on_serving=lambda: self.announced.append("destination"),
            is_ending=lambda: False,
            tracer=self.destination.tracer,
        )
        try:
            state = await incoming.run(WatchedChannel(sock, self.destination))
            self.states["destination"] = state
            self.source_may_return.append(incoming.source_may_return)
            if state is DestinationState.FAILED:
                self.destination.die()
        except DiedError:
            pass
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the daemon logs it and ends its process
            self.destination.error = error
            self.destination.die()

    @property
    def nobody_could_serve(self) -> bool:
        """Whether who had the guest died: before the other side had everything, or after it had let go."""
        if not self.source.lives:
            return "after b.adopt_setup" not in self.destination.passed or self.setup_is_old
        return self.destination.was_ended and "after receive DONE" in self.source.passed

    @property
    def setup_is_old(self) -> bool:
        """Whether the destination lacks something that a frontend of the source changed."""
        theirs = [part.generation + 1 for part in self.source.parts]
        return [part.generation for part in self.destination.parts] != theirs

    def judge(self) -> str | None:
        """What is wrong in the end, None if nothing is."""
        assert self.outgoing is not None
        if self.two_owners or self.not_in_model:
            return "; ".join([*self.two_owners, *self.not_in_model])
        if self.stuck:
            return "stuck"
        if self.source.lives and not self.outgoing.has_ended:
            return f"the source's migration never ends: {self.source.error!r}"
        if self.destination.serves and self.setup_is_old:
            return "the destination serves with an old setup"
        if self.nobody_could_serve:
            return None
        owners = [side for side in (self.source, self.destination) if side.serves]
        if len(owners) != 1:
            return f"{len(owners)} owners, {self.states}"
        if not owners[0].serves_whole:
            return f"{owners[0].name} {SERVES_IN_PART}"
        if owners == [self.destination] and self.announced != ["destination"]:
            return f"the destination serves and its daemon was told so {len(self.announced)} times"
        holds = any(part.file for part in self.source.parts)
        # A part that cannot let go holds on; but then the operator is told.
        if self.states.get("source") is SourceState.COMPLETED and holds and not self.outgoing.info().note:
            return "the source says completed and holds something"
        return None

    def close(self) -> None:
        self.source.close()
        self.destination.close()


@pytest.fixture(autouse=True)
def quick_and_as_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a process in this process; each side is known by a child of its own."""
    monkeypatch.setattr(incoming_module, "RELEASE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(outgoing_module, "DEATH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(incoming_module, "DEATH_GRACE_S", 0.05)
    monkeypatch.setattr(incoming_module, "RELEASE_RETRY_S", 0.05)


def hand_over(monkeypatch: pytest.MonkeyPatch, *faults: Fault, running: bool = True, record: str = "") -> World:
    Child.reserve(2)  # whose descriptors count as ours
    before = set(Path("/proc/self/fd").iterdir())
    world = World(*faults, running=running, record=record)
    kill, tell, let_go = Peer.kill, Revocation.tell, Revocation.let_go

    def tell_alive(revocation: Revocation) -> None:
        # A process that is killed says nothing; here it unwinds.
        if world.source.lives:
            tell(revocation)

    def let_go_alive(revocation: Revocation) -> None:
        if world.source.lives:
            let_go(revocation)

    def kill_destination(peer: Peer) -> bool:
        taken = kill(peer)
        if taken:
            world.destination.die()
        return taken

    with ExitStack() as stack, monkeypatch.context() as patch:
        stack.callback(world.close)
        for module, side in ((outgoing_module, world.source), (incoming_module, world.destination)):
            patch.setattr(module, "own_pidfd", lambda pid=side.child.pid: OwnedFd(os.pidfd_open(pid)))
        machines = {"source": WatchedMachine(source_machine(), SOURCE, world.source)}
        machines["destination"] = WatchedMachine(destination_machine(), DESTINATION, world.destination)
        patch.setattr(outgoing_module, "source_machine", lambda: machines["source"])
        patch.setattr(incoming_module, "destination_machine", lambda: machines["destination"])
        patch.setattr(Peer, "kill", kill_destination)
        patch.setattr(Revocation, "tell", tell_alive)
        patch.setattr(Revocation, "let_go", let_go_alive)
        asyncio.run(world.run())
        world.wrong = world.judge()
        if world.incoming is not None:
            world.source_may_return.append(world.incoming.source_may_return)
            world.incoming.close()  # as its daemon does when it ends
    if lost := set(Path("/proc/self/fd").iterdir()) - before:
        world.wrong = f"{world.wrong or 'fine'}, but {len(lost)} descriptors are lost"
    if world.outgoing is not None and world.outgoing._peer is not None:
        world.outgoing._peer.close()  # judged already; the next run starts afresh
    return world


def wrong_runs(monkeypatch: pytest.MonkeyPatch, side: str, what: What, *besides: Fault) -> list[str]:
    """Lets it happen at every point the side passes; the runs that ended wrong."""
    wrong = []
    number = 0
    while True:
        number += 1
        fault = at_number(side, number, what)
        world = hand_over(monkeypatch, fault, *besides)
        if world.wrong is not None:
            wrong.append(f"{', '.join(world.fired.values()) or 'no fault'}: {world.wrong}")
        passed = (world.source if side == "source" else world.destination).passed
        if fault not in world.fired and number > len(passed):
            assert number > 20, passed
            return wrong


# -- one fault ------------------------------------------------------------------------------------------------


def test_without_a_fault_everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    world = hand_over(monkeypatch)
    assert world.wrong is None
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}
    assert [(part.generation, part.position) for part in world.destination.parts] == [(2, 1), (2, 1)]
    assert world.source.statuses == ["setup", "active", "device", "completed"]
    assert world.destination.statuses == ["setup", "active", "completed"]


def test_parts_that_stood_still_stand_still_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    world = hand_over(monkeypatch, running=False)
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}
    assert [(part.running, part.frozen) for part in world.destination.parts] == [(False, False)] * 2


@pytest.mark.parametrize("what", What)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_whatever_happens_once_one_side_serves(monkeypatch: pytest.MonkeyPatch, side: str, what: What) -> None:
    assert wrong_runs(monkeypatch, side, what) == []


def test_a_destination_knows_whether_its_source_may_still_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    world = hand_over(monkeypatch, at("destination", "before send DONE", What.CHANNEL_BREAKS))
    assert world.wrong is None
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}
    # Where DONE is lost the source is in doubt, and the destination has ended its own part long before it is no more.
    assert world.source_may_return == [True, False]
    assert hand_over(monkeypatch).source_may_return == [False, False]


def test_a_step_that_the_model_has_not_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = ("destination", DestinationState.READY, "COMMIT", DestinationEvent.COMMIT_RECEIVED)
    assert step in MODEL
    monkeypatch.setattr(sys.modules[__name__], "MODEL", MODEL - {step})
    assert hand_over(monkeypatch).wrong == "destination ready COMMIT commit-received"


# -- a fault on the way back ----------------------------------------------------------------------------------

REFUSED = at("destination", "before b.check_switchover", What.FAILS)
DEAD_PAST_COMMIT = at("destination", "after receive COMMIT", What.DIES)


@pytest.mark.parametrize("what", [What.FAILS, What.HAS_A_BUG], ids=str)
@pytest.mark.parametrize("trouble", [REFUSED, DEAD_PAST_COMMIT], ids=["refused", "dead-past-commit"])
def test_a_part_that_cannot_go_back_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch, trouble: Fault, what: What
) -> None:
    wrong = wrong_runs(monkeypatch, "source", what, trouble)
    # What does not start does not run: but it alone, and everybody is told.
    assert [run for run in wrong if not run.endswith(SERVES_IN_PART)] == []


# -- frontends that change something meanwhile ------------------------------------------------------------------------

CHANGED = at("source", "after send SETUP", What.CHANGES)


def test_what_a_frontend_changes_at_any_point_is_there_whoever_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_runs(monkeypatch, "source", What.CHANGES) == []


@pytest.mark.parametrize("what", [what for what in What if what is not What.CHANGES], ids=str)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_whatever_happens_once_a_frontend_changed_something(
    monkeypatch: pytest.MonkeyPatch, side: str, what: What
) -> None:
    assert wrong_runs(monkeypatch, side, what, CHANGED) == []


def test_a_frontend_that_changes_something_in_every_round_is_frozen_for_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakePart, "save_setup", save_and_change)
    world = hand_over(monkeypatch)
    assert world.wrong is None
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}
    assert world.source.passed.count("before send SETUP") == 1 + CATCH_UP_ROUNDS_MAX
    assert world.source.statuses == ["setup", "active", "device", "completed"]


def test_changes_in_every_round_leave_one_for_what_the_code_of_a_device_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePart, "save_setup", save_and_change)
    monkeypatch.setattr(FakePart, "is_outdated", lambda part: True)
    world = hand_over(monkeypatch)
    assert world.wrong is None
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}
    assert world.source.passed.count("before send SETUP") == 1 + CATCH_UP_ROUNDS_MAX


def save_and_change(part: FakePart, *, with_descriptors: bool) -> FakeSetup:
    state = FakeSetup(generation=part.generation, file=part.file if with_descriptors else None)
    part.change()
    return state


def test_a_destination_that_takes_long_to_take_the_last_change_gives_the_guest_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakePart, "save_setup", save_and_change)
    send = WatchedChannel.send

    async def send_all_but_the_last_ack(self: WatchedChannel, kind: FrameKind, *arguments: Any, **options: Any) -> None:
        acks = self._side.passed.count("after send SETUP_ACK")
        if kind is not FrameKind.SETUP_ACK or acks < CATCH_UP_ROUNDS_MAX:
            await send(self, kind, *arguments, **options)

    monkeypatch.setattr(WatchedChannel, "send", send_all_but_the_last_ack)
    world = hand_over(monkeypatch)
    assert world.wrong is None
    assert world.states["source"] is SourceState.FAILED
    assert world.outgoing is not None
    assert world.outgoing.info().error_desc == (
        "a frontend changed its session at the last moment, and the destination did not take that within 80 ms; "
        "try again"
    )


def test_a_source_that_sends_changes_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePart, "save_setup", save_and_change)
    monkeypatch.setattr(outgoing_module, "CATCH_UP_ROUNDS_MAX", CATCH_UP_ROUNDS_MAX + 3)
    world = hand_over(monkeypatch)
    assert world.wrong is None
    assert world.states == {"source": SourceState.FAILED, "destination": DestinationState.FAILED}
    assert world.outgoing is not None
    assert f"the source sent changes of its setup {CATCH_UP_ROUNDS_MAX + 1} times" in str(
        world.outgoing.info().error_desc
    )


@pytest.mark.parametrize(("waits", "outcome"), [(True, "a frontend waits"), (False, "within downtime-limit")])
def test_a_frontend_that_waits_is_not_kept_waiting_for_ready(
    monkeypatch: pytest.MonkeyPatch, waits: bool, outcome: str
) -> None:
    monkeypatch.setattr(FakePart, "frontend_waits", lambda _: waits)
    instead_of(monkeypatch, FrameKind.READY, lambda: None)
    world = hand_over(monkeypatch)
    assert world.wrong is None
    assert world.states["source"] is SourceState.FAILED
    assert world.outgoing is not None
    assert outcome in str(world.outgoing.info().error_desc)


# -- a destination that can be neither told nor killed ----------------------------------------------------------------


def test_a_destination_that_was_not_told_does_not_take_over_from_a_source_that_took_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WatchedChannel, "try_send", lambda *_: False)
    # It is cancelled, serves on, and dies.
    source_dies = at("source", "after b.thaw", What.DIES)
    world = hand_over(monkeypatch, at("source", "after send SWITCHOVER", What.IS_CANCELLED), source_dies)
    assert source_dies in world.fired
    assert world.states == {"destination": DestinationState.FAILED}
    assert not world.destination.serves


def instead_of(monkeypatch: pytest.MonkeyPatch, frame: FrameKind, what: Callable[[], None]) -> None:
    send = WatchedChannel.send

    async def send_others(self: WatchedChannel, kind: FrameKind, *arguments: Any, **options: Any) -> None:
        if kind is frame:
            what()
        else:
            await send(self, kind, *arguments, **options)

    monkeypatch.setattr(WatchedChannel, "send", send_others)


def test_a_destination_that_cannot_say_that_it_serves_is_not_killed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KernelError("cannot send", errno=errno.ENOMEM)

    instead_of(monkeypatch, FrameKind.DONE, fail)
    world = hand_over(monkeypatch)
    assert world.wrong is None
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}


def test_a_destination_that_cannot_be_killed_past_commit_is_not_joined_by_the_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    instead_of(monkeypatch, FrameKind.DONE, lambda: None)  # it gets lost
    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    world = hand_over(monkeypatch)
    assert world.wrong is None
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}
    note = note_of(world)
    assert note is not None
    assert note.endswith("cannot be killed: look whether it serves")


# -- notes ----------------------------------------------------------------------------------------------------


def test_what_a_part_noted_at_its_takeover_is_told_by_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePart, "take_notes", lambda part: [f"{part.id} goes on elsewhere"])
    world = hand_over(monkeypatch)
    assert world.outgoing is not None
    assert world.incoming is not None
    assert world.outgoing.info().note == "destination: a goes on elsewhere; destination: b goes on elsewhere"
    assert world.incoming.info().note == "a goes on elsewhere; b goes on elsewhere"


def test_what_a_part_noted_is_told_by_who_took_over_from_a_dead_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePart, "take_notes", lambda part: [f"{part.id} goes on elsewhere"])
    world = hand_over(monkeypatch, at("source", "before send COMMIT", What.DIES))
    assert world.incoming is not None
    assert str(world.incoming.info().note).endswith("from guest memory; a goes on elsewhere; b goes on elsewhere")


# -- recording --------------------------------------------------------------------------------------------------------

SECTIONS: Final = ["a/fake", "b/fake", "a/fake-rings", "b/fake-rings"]


def recorded_sections(path: Path) -> list[str]:
    """The names in a recording that nobody else can read."""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return [section.name for section in analyze(path.read_bytes()).sections]


def note_of(world: World) -> str | None:
    assert world.outgoing is not None
    return world.outgoing.info().note


def test_a_handover_is_recorded_once_the_guest_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[tuple[bool, str]] = []

    def write_and_look(path: str, pieces: list[bytes]) -> None:
        served.append((world_of[0].destination.serves_whole, world_of[0].source.statuses[-1]))
        write_recording(path, pieces)

    world_of: list[World] = []
    monkeypatch.setattr(World, "act", lambda world, *_, **__: world_of.append(world))
    monkeypatch.setattr(outgoing_module, "write_recording", write_and_look)
    path = tmp_path / "stream"
    world = hand_over(monkeypatch, record=str(path))
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}
    assert served == [(True, "device")]
    assert recorded_sections(path) == SECTIONS
    assert analyze(path.read_bytes()).descriptors() == {"unknown": 2}
    assert note_of(world) is None
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "trouble",
    [at("destination", "before send READY", What.DIES), DEAD_PAST_COMMIT],
    ids=["dead-before-ready", "dead-past-commit"],
)
def test_a_handover_that_came_back_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trouble: Fault) -> None:
    path = tmp_path / "stream"
    world = hand_over(monkeypatch, trouble, record=str(path))
    assert world.wrong is None
    assert world.states["source"] in (SourceState.FAILED, SourceState.TAKEN_BACK)
    assert recorded_sections(path) == SECTIONS


def test_what_never_was_a_whole_stream_is_not_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = hand_over(
        monkeypatch, at("destination", "before b.check_setup", What.FAILS), record=str(tmp_path / "stream")
    )
    assert world.wrong is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "problem"), [("none/stream", "No such file or directory"), ("", "is no file")])
def test_a_recording_that_cannot_be_written_is_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, problem: str
) -> None:
    world = hand_over(monkeypatch, record=str(tmp_path / name))
    assert world.wrong is None
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}
    note = note_of(world)
    assert note is not None
    assert note.startswith("the stream was not recorded: ")
    assert problem in note
    assert world.source.statuses[-1] == "completed"


def test_a_file_system_that_hangs_holds_nothing_up_for_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    is_told = threading.Event()
    end = Progress.end

    def end_and_tell(progress: Progress) -> None:
        end(progress)
        if progress._role == "source":
            is_told.set()

    monkeypatch.setattr(outgoing_module, "RECORD_TIMEOUT_S", 0.05)
    monkeypatch.setattr(outgoing_module, "write_recording", lambda *_: is_told.wait(PATIENCE_S))
    # The hang ends once the source told of it: a loop that ends waits for its threads.
    monkeypatch.setattr(Progress, "end", end_and_tell)
    world = hand_over(monkeypatch, record=str(tmp_path / "stream"))
    assert world.states == {"source": SourceState.COMPLETED, "destination": DestinationState.COMPLETED}
    assert note_of(world) == f"the stream was not recorded: '{tmp_path}/stream' takes longer than 0.05 s"


@pytest.mark.parametrize("what", [What.HAS_A_BUG, What.DIES, What.CHANNEL_BREAKS], ids=str)
def test_whatever_happens_once_one_side_serves_also_with_a_recording(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: What
) -> None:
    for number in range(40, 90, 7):
        world = hand_over(monkeypatch, at_number("source", number, what), record=str(tmp_path / "stream"))
        assert world.wrong is None, world.fired
