"""The source's side of a handover: everything slow while the guest runs, then a few hundred bytes.

Owns:        the order of the steps, what each one undoes, the waits and their bounds.
Never sees:  what a part is, how a frame travels, QMP.
Read next:   handover.py for the table these steps walk, incoming.py for the other side.

Theory of operation. The steps up to COMMIT each leave an undo behind; any failure, refusal, timeout or cancel runs
the undos, newest first, and the source serves on. COMMIT is in no list: past it the source serves again only if the
destination is known dead.

Frontends are answered while the setup is sent, while the destination builds it and while the operator is awaited. What
they change meanwhile is counted before it happens, and is sent again before the switchover. Only for the last of that
are control planes frozen, and a frontend that waits then is answered within a tenth of a second: the handover is given
up for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Final

from localmig.device_api import Part
from localmig.errors import KernelError, LocalmigError, PeerError, PeerLostError, StateError, reason_of
from localmig.fds import OwnedFd, close_foreign
from localmig.migration.channel import Channel, Frame, FrameKind
from localmig.migration.downtime import rehearse_exchange, switchover_sections, undisturbed, urgent
from localmig.migration.exchange import (
    CATCH_UP_ROUNDS_MAX,
    HELLO_TIMEOUT_S,
    SETUP_TIMEOUT_S,
    Blaming,
    blaming_nobody,
    hello_descriptors,
    hello_payload,
    on_off,
)
from localmig.migration.handover import (
    SOURCE_ENDED,
    SOURCE_STATUS,
    SourceEvent,
    SourceState,
    source_machine,
)
from localmig.migration.hello import (
    Done,
    HandoverObject,
    Hello,
    decode_reason,
    encode_reason,
    program_version,
    setup_payload,
)
from localmig.migration.parameters import Parameters
from localmig.migration.peer import Changes, Peer, Revocation, own_pidfd
from localmig.migration.progress import Progress
from localmig.migration.recording import write_recording
from localmig.migration.status import MigrationInfo
from localmig.migration.stream import OutgoingStream, Section, section_name
from localmig.migration.undo import for_all
from localmig.service_manager import ServiceManager
from localmig.trace import MigrationStatusChanged, Tracer
from localmig.vmstate import Blob

_logger = logging.getLogger(__name__)

FROZEN_TIMEOUT_S: Final = 0.08
"""How long a frontend that waits may find its socket frozen. A VMM waits for its answer with its main loop and its
monitor, so it is promised one within 100 ms; the rest of that is for going back."""

FROZEN_LOOK_S: Final = 0.01
"""How often it is looked, after that, whether a frontend waits: a part of what is left of the 100 ms."""

QUIESCE_TIMEOUT_S: Final = 1.5
"""How long code of a device's own may go on before it is left behind: longer than a device lets it."""

QUIESCE_LOOK_S: Final = 0.001
"""How often it is looked whether such code has returned."""

PARTS_AT_ONCE: Final = 16
"""Parts that are saved before the event loop gets a turn: a few milliseconds, in which frontends wait for an answer."""

DEATH_TIMEOUT_S: Final = 5.0
"""How long a killed process may take to be gone: the kernel first frees what it holds, guest memory above all."""

RECORD_TIMEOUT_S: Final = 5.0
"""How long writing the stream to a file may take. It has some megabytes at most: whoever is slower hangs."""


class Outgoing:
    """One handover as the source sees it. `run` it once.

    Args:
        connect: opens the channel.
        parameters: as they were when the migration began.
        parts: what is handed over, netdevs before the devices on them.
        objects: the same as HELLO tells them.
        running: whether rings run; where they do not, the destination leaves them stopped too.
        service_manager: who is to watch the destination's process from then on; None for nobody.
        is_ending: whether this process was told to end once the handover is over.
        tracer: where facts go.
        blaming: who is blamed for what a part raises.
    """

    def __init__(
        self,
        *,
        connect: Callable[[], Awaitable[Channel]],
        parameters: Parameters,
        parts: Sequence[Part],
        objects: Sequence[HandoverObject],
        running: bool,
        service_manager: ServiceManager | None = None,
        is_ending: Callable[[], bool],
        tracer: Tracer,
        blaming: Blaming = blaming_nobody,
    ) -> None:
        self._connect = connect
        self._service_manager = service_manager
        self._is_ending = is_ending
        self._parameters = parameters
        self._parts = parts
        self._objects = tuple(objects)
        self._running = running
        self._tracer = tracer
        self._blaming = blaming
        self._progress = Progress("source", tracer)
        self._machine = source_machine()
        self._channel: Channel | None = None
        self._peer: Peer | None = None
        self._destination_pid = 0
        self._revocation: Revocation | None = None
        self._changes: Changes | None = None
        self._stream = OutgoingStream()
        self._watched: list[Part] = []
        self._changed: set[str] = set()
        """Ids of parts that changed since they were saved."""
        self._outdated: set[str] = set()
        """Setup sections that are another since, and that a destination can do without."""
        self._frozen: list[Part] = []
        self._frozen_at = 0.0
        self._stopped: list[Part] = []
        self.unthawed: list[Part] = []
        """Parts whose control sockets are not served, for want of memory or descriptors, although rings run."""
        self._switchover: bytes | bytearray | None = None
        """The switchover piece as it was sent."""
        self._last_heard: str | None = None
        """Why a destination that has the guest is not trusted with it any more."""
        self._continued = asyncio.Event()
        if not parameters.pause_before_switchover:
            self._continued.set()
        self._pausing = False
        self._past_pause = False
        self._cancelling = False
        self._reported = SOURCE_STATUS[SourceState.IDLE]
        self._task: asyncio.Task[None] | None = None

    # -- what others may ask ------------------------------------------------------------------------------------

    @property
    def state(self) -> SourceState:
        """Where the source stands."""
        return self._machine.state

    @property
    def has_ended(self) -> bool:
        """Whether `run` is over, also where the outcome stays unknown."""
        return self._progress.has_ended

    @property
    def destination_pid(self) -> int:
        """The destination's process number, 0 where it is not known or has none here."""
        return self._destination_pid

    @property
    def awaits_operator(self) -> bool:
        """Whether it will not go past the pause before switchover by itself."""
        return not self._continued.is_set()

    def info(self) -> MigrationInfo:
        """The facts so far."""
        return self._progress.info(self._status())

    def cancel(self) -> bool:
        """Takes the handover back if it is not committed; whether it can be. `run` then ends soon."""
        if self.has_ended or not (self._task is None or self._machine.allows(SourceEvent.CANCEL)):
            return False
        if not self._cancelling:
            self._cancelling = True
            self._report()
            if self._task is not None:
                self._task.cancel()
        return True

    def continue_switchover(self) -> bool:
        """Ends the pause before switchover; whether there was one."""
        if not self._pausing:
            return False
        self._continued.set()
        return True

    # -- the handover -------------------------------------------------------------------------------------------

    async def run(self) -> SourceState:
        """Hands over. Gives the state it ended in: an ended one, or IN_DOUBT where nobody can know.

        To stop it early use `cancel`; cancelling the task past COMMIT would leave the outcome unknown.
        """
        self._task = asyncio.current_task()
        try:
            with ExitStack() as downtime:
                committed = await self._commit(downtime)
                # Once COMMIT is out nothing leads to `_abandon`.
                event = await self._await_done() if committed else None
            if event is not None:
                await self._conclude(event)
            self._close_channel()
            await self._record()
        finally:
            self._report()
            self._end()
        return self.state

    async def _commit(self, downtime: ExitStack) -> bool:
        """Everything up to COMMIT; whether it was sent. Where it was not, the source serves on."""
        try:
            await self._prepare()
            downtime.enter_context(undisturbed(self._tracer))
            downtime.enter_context(urgent())
            phases = await self._switch_over()
        except asyncio.CancelledError:
            assert self._task is not None
            self._task.uncancel()
            self._abandon(SourceEvent.CANCEL, "cancelled by the operator")
        except TimeoutError as error:
            self._abandon(SourceEvent.TIMED_OUT, str(error) or "the destination does not read")
        except PeerLostError as error:
            self._abandon(SourceEvent.CHANNEL_LOST, f"destination lost while '{self.state}': {error}")
        except PeerError as error:
            self._abandon(SourceEvent.REFUSED, str(error))
        except LocalmigError as error:
            self._abandon(SourceEvent.FAILED_HERE, reason_of(error))
        except (OSError, MemoryError) as error:
            self._abandon(SourceEvent.FAILED_HERE, f"the kernel refused while '{self.state}': {reason_of(error)}")
        except BaseException as error:
            self._abandon(SourceEvent.FAILED_HERE, f"internal error: {error!r}")
            raise
        else:
            may_be_sent = await self._send_commit()
            # Only now: until COMMIT was sent the guest waited.
            for name, duration_ns in phases:
                self._progress.add_phase(name, duration_ns)
            return may_be_sent
        return False

    async def _send_commit(self) -> bool:
        """Sends COMMIT; whether it may have been sent."""
        assert self._channel is not None
        assert self._progress.stopped_ns is not None
        commit = self._progress.stopped_ns.to_bytes(8, "big")
        timeout_s = self._parameters.commit_timeout_ms / 1000
        try:
            await self._channel.send(FrameKind.COMMIT, commit, timeout_s=timeout_s)
        except (PeerLostError, TimeoutError) as error:
            # It is so short that the socket takes it whole or not at all.
            self._abandon(SourceEvent.CHANNEL_LOST, f"destination lost before COMMIT: {error}")
            await self._hear_refusal()
            return False
        except KernelError as error:
            # As above.
            self._abandon(SourceEvent.FAILED_HERE, f"COMMIT was not sent: {reason_of(error)}")
            return False
        except Exception:
            # Sent or not? Only the destination's answer, or its death, can tell now.
            _logger.exception("internal error while COMMIT was sent")
        self._machine.fire(SourceEvent.COMMIT_SENT)
        return True

    async def _hear_refusal(self) -> None:
        """A destination that was gone when COMMIT was sent may have said why. The guest is served again by now."""
        assert self._channel is not None
        try:
            frame = await self._channel.receive(timeout_s=DEATH_TIMEOUT_S)
        except (PeerError, KernelError, TimeoutError):
            return  # it died without a word
        frame.close()
        self._progress.error = f"{_unexpected(frame, 'nothing')}; {self._progress.error}"

    async def _prepare(self) -> None:
        self._fire(SourceEvent.START)
        if self._cancelling:
            raise asyncio.CancelledError
        with self._progress.phase("connect"):
            channel = self._channel = await self._connect()
        self._fire(SourceEvent.CONNECTED)
        with self._progress.phase("hello"):
            await self._greet(channel)
        self._fire(SourceEvent.HELLO_ACCEPTED)
        with self._progress.phase("setup"):
            for part in self._parts:
                self._watched.append(part)
                part.watch_setup(partial(self._note_change, part.id))
            await self._send_setup(
                self._parts,
                self._stream.start(),
                lambda _: self._stream.describe(switchover_sections(self._parts)),
                deadline=time.monotonic() + SETUP_TIMEOUT_S,
            )
        with self._progress.phase("setup-ack"):
            await self._expect(FrameKind.SETUP_ACK, SETUP_TIMEOUT_S, "take the setup")
        self._progress.prepared_ns = time.monotonic_ns()
        self._fire(SourceEvent.SETUP_ACKED)
        if self.awaits_operator:
            await self._pause(channel)
            self._past_pause = True
        with self._progress.phase("catch-up"):
            await self._catch_up()
        self._fire(SourceEvent.CONTINUED)

    async def _catch_up(self) -> None:
        """Sends what frontends changed since the setup was saved. At its end they are frozen, and all is sent."""
        # The last two of all rounds come behind this: with devices' code at rest, and with frontends frozen.
        for _ in range(CATCH_UP_ROUNDS_MAX - 2):
            if self._changed:
                await self._send_setup_again(SETUP_TIMEOUT_S)
        await self._quiesce()
        self._outdated = {self._name(part) for part in self._parts if part.is_outdated()}
        if self._outdated or self._changed:
            await self._send_setup_again(SETUP_TIMEOUT_S)
            self._outdated.clear()
        self._frozen_at = time.monotonic()
        for part in self._parts:
            part.freeze()
        if self._changed:
            try:
                await self._send_setup_again(FROZEN_TIMEOUT_S)
            except TimeoutError:
                limit_ms = FROZEN_TIMEOUT_S * 1000
                raise TimeoutError(
                    "a frontend changed its session at the last moment, and the destination did not take that within "
                    f"{limit_ms:.0f} ms; try again"
                ) from None

    async def _quiesce(self) -> None:
        """Waits for code of devices' own that is under way; frontends are answered meanwhile."""
        self._frozen = list(self._parts)
        busy = self._frozen
        deadline = time.monotonic() + QUIESCE_TIMEOUT_S
        while busy := [part for part in busy if not part.quiesce()]:
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(QUIESCE_LOOK_S)

    async def _send_setup_again(self, timeout_s: float) -> None:
        """Lets the destination replace what changed. TimeoutError where that takes longer than `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        self._fire(SourceEvent.SETUP_OUTDATED)
        changed = [part for part in self._parts if part.id in self._changed or self._name(part) in self._outdated]
        await self._send_setup(changed, Blob(), self._stream.describe_again, deadline=deadline)
        await self._expect(FrameKind.SETUP_ACK, deadline - time.monotonic(), "take what a frontend changed")
        self._fire(SourceEvent.SETUP_ACKED)

    async def _send_setup(
        self, parts: Sequence[Part], piece: Blob, describe: Callable[[list[str]], bytes], *, deadline: float
    ) -> None:
        """Saves `parts` into `piece` and sends it behind its description, which `describe` returns for its sections.

        A part that is as it would be without a word is left out: the destination need not know that it could be saved.

        TimeoutError where the destination has not taken all of it by `deadline`, in seconds of the monotonic clock.
        """
        assert self._changes is not None
        # What changes from here on counts as not known, also where it is in time to be saved.
        known = self._changes.count
        self._changed.difference_update(part.id for part in parts)
        copies: list[OwnedFd] = []
        names: list[str] = []
        try:
            for number, part in enumerate(parts, 1):
                section = self._setup_section(part)
                if self._may_stay_away(part, section):
                    continue
                names.append(section.name)
                self._stream.write(section, piece)
                # A frontend may replace a descriptor while the frame is on its way.
                copies += (OwnedFd(os.dup(fd)) for _, fd in piece.fds[len(copies) :])
                if number % PARTS_AT_ONCE == 0:
                    await asyncio.sleep(0)  # thousands of parts take longer than a frontend may wait
            await self._say(FrameKind.DESCRIPTION, describe(names), timeout_s=deadline - time.monotonic())
            lent = [(at, copy.fileno()) for (at, _), copy in zip(piece.fds, copies, strict=True)]
            data, fds = setup_payload(known, Blob(data=piece.data, fds=lent))
            # Last, because a destination that has it can do without us.
            await self._say(FrameKind.SETUP, data, fds, timeout_s=deadline - time.monotonic())
            self._progress.descriptors = max(self._progress.descriptors, len(fds))
        finally:
            close_foreign(copies)

    def _name(self, part: Part) -> str:
        return section_name(part.id, part.setup)

    def _note_change(self, part_id: str) -> None:
        """A part changes next. Counted once for each time that it is saved, before it happens."""
        if part_id not in self._changed:
            assert self._changes is not None
            self._changes.add(1)
            self._changed.add(part_id)

    async def _greet(self, channel: Channel) -> None:
        hello = Hello(
            version=program_version(),
            local=self._parameters.local,
            running=self._running,
            objects=self._objects,
            # Of no use on another machine.
            service_manager=self._service_manager if self._parameters.local else None,
        )
        self._revocation, self._changes = Revocation.create(), Changes.create()
        with own_pidfd() as pidfd:
            told = [pidfd.fileno(), self._revocation.fileno(), self._changes.fileno()]
            data, places = hello_payload(channel, hello, told)
            await self._say(FrameKind.HELLO, data, places, timeout_s=HELLO_TIMEOUT_S)
        answer = await self._expect(FrameKind.HELLO, HELLO_TIMEOUT_S, "answer HELLO")
        try:
            theirs = Hello.decode(answer.data)
            if theirs.local != self._parameters.local:
                raise PeerError(
                    f"parameter 'local' is {on_off(self._parameters.local)} here and {on_off(theirs.local)} there"
                )
            for pidfd in hello_descriptors(answer, 1, required=self._parameters.local):
                self._peer = Peer.from_descriptor(pidfd.take(), known=channel.process)
                self._destination_pid = self._peer.pid
            _check_outlives_us(self._destination_pid)
        finally:
            answer.close()

    async def _pause(self, channel: Channel) -> None:
        """Waits for the operator, as long as the destination is there: it has nothing to say now."""
        self._pausing = True
        self._report()
        waits = [
            asyncio.ensure_future(self._continued.wait()),
            asyncio.ensure_future(channel.receive(timeout_s=None)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._pausing = False
            for wait in waits:
                wait.cancel()
            results = await asyncio.gather(*waits, return_exceptions=True)
        match results[1]:
            case Frame() as frame:
                frame.close()
                raise _unexpected(frame, "nothing")
            case BaseException() as error if not isinstance(error, asyncio.CancelledError):
                raise error

    async def _switch_over(self) -> tuple[tuple[str, int], ...]:
        """Stops the rings and hands over where they stand; the destination has said READY then. Gives the phases."""
        limit_s = self._parameters.downtime_limit_ms / 1000
        # Right before, not in setup: what is warmed up here cools down in milliseconds.
        await rehearse_exchange(self._stream.switchover(switchover_sections(self._parts)).data)
        stopped_ns = self._progress.stopped_ns = time.monotonic_ns()
        for part in self._parts:
            if self._running:
                self._stopped.append(part)
            part.stop()
        saved_ns = time.monotonic_ns()
        blob = self._stream.switchover(switchover_sections(self._parts))
        self._switchover = blob.data
        # Thousands of NICs do not fit into the socket's buffer, and while they are sent no frontend is looked after.
        await self._say(FrameKind.SWITCHOVER, blob.data, blob.fds, timeout_s=min(limit_s, FROZEN_TIMEOUT_S))
        sent_ns = time.monotonic_ns()
        await self._expect_ready(limit_s - (sent_ns - stopped_ns) / 1e9)
        self._fire(SourceEvent.READY_RECEIVED)
        ready_ns = time.monotonic_ns()
        return (
            ("stop", saved_ns - stopped_ns),
            ("switchover", sent_ns - saved_ns),
            ("ready", ready_ns - sent_ns),
        )

    async def _conclude(self, event: SourceEvent) -> None:
        """Past COMMIT: ends when the destination serves, or is known dead and the source serves again."""
        while self._machine.fire(event) not in SOURCE_ENDED:
            match self.state:
                case SourceState.FENCING:
                    event = await self._fence()
                case SourceState.IN_DOUBT if self._peer is not None:
                    # Nothing is said or heard any more: a destination that never got COMMIT ends at once then.
                    self._close_channel()
                    event = await self._await_death(self._peer)
                case _:
                    # Nothing is shared without a pidfd: the frontend is free to go to whoever answers it.
                    self._progress.error = (
                        "the channel broke after COMMIT and nobody can tell whether the destination serves: "
                        "look there; 'cont' serves here again, 'quit' ends this daemon"
                    )
                    return
        # Told only when it is true: who reads "completed" finds nothing here any more.
        if self.state is SourceState.TAKEN_BACK:
            problems = self._take_back()
            text = "the destination died after COMMIT: this daemon serves again"
            if self._last_heard is not None:
                text = f"the destination was killed after COMMIT, for {self._last_heard}: this daemon serves again"
            self._progress.error = "; ".join([text, *problems])
        else:
            problems = for_all(self._parts, lambda part: part.release())
            if problems:
                self._progress.add_note("; ".join(["something is still held here, end this daemon", *problems]))
            if self._revocation is not None:
                # Before the channel ends, for then the destination may hand over in its turn.
                self._revocation.let_go()

    async def _record(self) -> None:
        """Writes the stream to a file where the operator wants that. The guest is served, whatever comes of it."""
        path = self._parameters.record
        if not path or self._switchover is None:
            return
        try:
            async with asyncio.timeout(RECORD_TIMEOUT_S):
                await asyncio.to_thread(write_recording, path, self._stream.recording(self._switchover))
        except TimeoutError:
            self._progress.add_note(f"the stream was not recorded: '{path}' takes longer than {RECORD_TIMEOUT_S:g} s")
        except (LocalmigError, OSError) as error:
            self._progress.add_note(f"the stream was not recorded: {error}")

    async def _await_done(self) -> SourceEvent:
        assert self._channel is not None
        timeout_s = self._parameters.commit_timeout_ms / 1000
        begun_ns = time.monotonic_ns()
        try:
            frame = await self._channel.receive(timeout_s=timeout_s, eager=True)
            frame.close()
            _require(FrameKind.DONE, frame)
            done = Done.decode(frame.data)
        except TimeoutError:
            self._last_heard = f"it said nothing for {timeout_s * 1000:.0f} ms (commit-timeout)"
            return SourceEvent.TIMED_OUT
        except PeerLostError:
            died = self._peer is not None and self._peer.is_dead
            return SourceEvent.PEER_DIED if died else SourceEvent.CHANNEL_LOST
        except PeerError as error:
            self._last_heard = str(error)
            return SourceEvent.REFUSED
        except KernelError as error:
            _logger.warning("DONE cannot be heard: %s", error)
            return SourceEvent.CHANNEL_LOST
        except Exception:
            # A bug here says nothing about the destination: its life or death does.
            _logger.exception("internal error while DONE was awaited")
            return SourceEvent.CHANNEL_LOST
        self._progress.serving_ns = done.serving_ns
        self._progress.add_phase("done", time.monotonic_ns() - begun_ns)
        self._progress.add_phases_of_the_other_side("destination", done.phases)
        for note in done.notes:
            self._progress.add_note(f"destination: {note}")
        return SourceEvent.DONE_RECEIVED

    async def _fence(self) -> SourceEvent:
        why = "it cannot be killed"
        if self._is_ending():
            # Whoever ends takes no guest from a destination that may wake up.
            why = "it was not killed, for this daemon was told to end"
        elif self._peer is not None and self._peer.kill() and await self._peer.wait_dead(timeout_s=DEATH_TIMEOUT_S):
            return SourceEvent.PEER_DIED
        self._progress.note = (
            f"the destination has the guest, but {self._last_heard}, and {why}: look whether it serves"
        )
        return SourceEvent.TIMED_OUT

    async def _await_death(self, peer: Peer) -> SourceEvent:
        if await peer.wait_dead(timeout_s=DEATH_TIMEOUT_S):
            return SourceEvent.PEER_DIED
        if self._progress.note is None:
            self._progress.note = "the channel broke after COMMIT; the destination lives and serves"
        return SourceEvent.TIMED_OUT

    # -- going back ---------------------------------------------------------------------------------------------

    def _abandon(self, event: SourceEvent, reason: str) -> None:
        """Before COMMIT: the source serves on, the destination is told so."""
        self._unwatch()
        self._machine.fire(event if self._machine.allows(event) else SourceEvent.FAILED_HERE)
        problems = for_all(reversed(self._stopped), lambda part: part.resume())
        # Told before control planes thaw: whoever took over from here later would hold old control state.
        if self._revocation is not None:
            # Also where CANCEL does not get through: it must not take over when this process ends one day.
            self._revocation.tell()
        if self._channel is not None:
            self._channel.try_send(FrameKind.CANCEL, encode_reason(reason))
        problems += for_all(reversed(self._frozen), lambda part: part.thaw(), short=self.unthawed)
        if event is not SourceEvent.CANCEL or problems:
            self._progress.error = "; ".join([reason, *problems])

    def _take_back(self) -> list[str]:
        problems = for_all(self._parts, lambda part: part.recover())
        if self._running:
            problems += for_all(self._parts, lambda part: part.resume())
        return problems + for_all(self._parts, lambda part: part.thaw(), short=self.unthawed)

    def _close_channel(self) -> None:
        """Tells the destination that the source holds nothing any more."""
        if self._channel is not None:
            try:
                self._channel.close()
            except Exception:
                # It is of no use any more, and past COMMIT nothing may keep the source from taking back.
                _logger.exception("internal error while the channel was closed")

    def _unwatch(self) -> None:
        watched, self._watched = self._watched, []
        for_all(watched, lambda part: part.watch_setup(None))

    def _end(self) -> None:
        self._progress.end()
        self._unwatch()
        self._stream, self._switchover = OutgoingStream(), None
        self._close_channel()
        for held in (self._peer, self._revocation, self._changes):
            if held is not None:
                held.close()

    # -- small things -------------------------------------------------------------------------------------------

    def _setup_section(self, part: Part) -> Section:
        with self._blaming(part, "save"):
            with_descriptors = self._parameters.local and part.local_migration_blocker() is None
            state = part.save_setup(with_descriptors=with_descriptors)
        return Section(name=section_name(part.id, part.setup), description=part.setup, state=state)

    def _may_stay_away(self, part: Part, section: Section) -> bool:
        """Whether the destination has this state without a word: it was told of no other one."""
        if self._stream.has(section.name):
            return False
        with self._blaming(part, "save"):
            default = part.setup_default()
            return default is not None and bool(section.state == default)

    async def _say(
        self, kind: FrameKind, data: bytes | bytearray, fds: Sequence[tuple[int, int]] = (), *, timeout_s: float
    ) -> None:
        """Sends a frame. Where the destination is gone, why it refused is heard first."""
        assert self._channel is not None
        try:
            await self._channel.send(kind, data, fds, timeout_s=timeout_s)
        except PeerLostError:
            frame = await self._channel.receive(timeout_s=timeout_s)
            frame.close()
            raise _unexpected(frame, "nothing") from None

    async def _expect(self, kind: FrameKind, timeout_s: float, what: str, *, eager: bool = False) -> Frame:
        """The next frame, which must be a `kind`; PeerError with the destination's reason if it refuses."""
        assert self._channel is not None
        try:
            frame = await self._channel.receive(timeout_s=timeout_s, eager=eager)
        except TimeoutError:
            raise TimeoutError(f"the destination did not {what} ({max(0.0, timeout_s * 1000):.0f} ms)") from None
        _require(kind, frame)
        return frame

    async def _expect_ready(self, limit_s: float) -> None:
        """READY, within `limit_s` seconds; within less where a frontend waits that found its socket frozen too long."""
        limit = time.monotonic() + limit_s
        patience = self._frozen_at + FROZEN_TIMEOUT_S
        eager = True
        while True:
            until = min(limit, max(patience, time.monotonic() + FROZEN_LOOK_S))
            try:
                await self._expect(FrameKind.READY, until - time.monotonic(), "say READY", eager=eager)
            except TimeoutError:
                if until == limit:
                    limit_ms = self._parameters.downtime_limit_ms
                    text = f"the destination did not say READY within downtime-limit ({limit_ms} ms)"
                    raise TimeoutError(text) from None
                if any(part.frontend_waits() for part in self._frozen):
                    text = "the destination did not say READY, and a frontend waits for an answer; try again"
                    raise TimeoutError(text) from None
                eager = False
            else:
                return

    def _fire(self, event: SourceEvent) -> None:
        self._machine.fire(event)
        self._report()

    def _report(self) -> None:
        """Traces the status where it is another one than last time."""
        status = self._status()
        if status != self._reported:
            self._reported = status
            self._tracer.emit(MigrationStatusChanged(status=status, reason=self._progress.error))

    def _status(self) -> str:
        if self._pausing:
            return "pre-switchover"
        if self._past_pause and self.state in (SourceState.SETTING_UP, SourceState.PREPARED):
            return "device"  # the operator said go: whoever watches sees no step back
        if self._cancelling and self.state not in SOURCE_ENDED:
            return "cancelling"
        if self.state is SourceState.IN_DOUBT and self.has_ended:
            return "failed"
        return SOURCE_STATUS[self.state]


def _check_outlives_us(destination_pid: int) -> None:
    """Raises StateError where the kernel would kill the destination when this process ends.

    Args:
        destination_pid: its number, 0 where it has none in our PID namespace.
    """
    if os.getpid() == 1 and destination_pid:
        raise StateError(
            f"this daemon is process 1 of its PID namespace, a container's, and process {destination_pid}, which would "
            "take over, is in it: when process 1 ends, the kernel kills all others. Run the container with an init "
            "(docker run --init), or hand over to a daemon in a container of its own"
        )


def _require(kind: FrameKind, frame: Frame) -> None:
    """Raises PeerError where `frame` is of another kind, and closes it; with the destination's reason if it refuses."""
    if frame.kind is not kind:
        frame.close()
        raise _unexpected(frame, kind.name)


def _unexpected(frame: Frame, expected: str) -> PeerError:
    if frame.kind is FrameKind.REFUSE:
        return PeerError(f"the destination refused: {decode_reason(frame.data)}")
    if frame.kind is FrameKind.CANCEL:
        return PeerError(f"the other side took the handover back: {decode_reason(frame.data)}")
    return PeerError(f"{frame.kind.name} came where {expected} was expected")
