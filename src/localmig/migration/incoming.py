"""The destination's side of a handover: build everything, touch nothing, then serve on one word.

Owns:        the order of the steps, when descriptors of a failed handover are dropped, taking over from a dead source.
Never sees:  what a part is, how a frame travels, QMP.
Read next:   handover.py for the table these steps walk, outgoing.py for the other side.

Theory of operation. Everything that arrives is decoded whole, then checked whole, then adopted; until COMMIT every
part is parked and touches nothing that it shares with the running source. A channel that ends is first read to its
end and only then believed: the source may have taken the handover back before it died. A destination that failed
ends its process, which is how a source in doubt learns that nobody else serves.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from localmig.device_api import Part
from localmig.errors import KernelError, LocalmigError, PeerError, PeerLostError, StateError, reason_of
from localmig.fds import OwnedFd
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
    DESTINATION_STATUS,
    DestinationEvent,
    DestinationState,
    destination_machine,
)
from localmig.migration.hello import Done, Hello, decode_reason, encode_reason, program_version, read_setup
from localmig.migration.parameters import Parameters
from localmig.migration.peer import Changes, Peer, Revocation, own_pidfd
from localmig.migration.progress import Progress
from localmig.migration.status import MigrationInfo
from localmig.migration.stream import IncomingStream, OutgoingStream, Section, section_name
from localmig.migration.undo import for_all
from localmig.trace import MigrationStatusChanged, Tracer
from localmig.vmstate import Description, FilePlace, check_descriptors, check_distinct, close_descriptors, files_of

_logger = logging.getLogger(__name__)

DEATH_GRACE_S: Final = 1.0
"""How much later than its sockets' end a dead process may be seen as dead: in between the kernel frees its memory."""

RELEASE_TIMEOUT_S: Final = 5.0
"""How long a source that was told DONE may take to let go: it closes descriptors and joins threads, in milliseconds."""

RELEASE_RETRY_S: Final = 1.0
RELEASE_TRIES_MAX: Final = 6
"""The end of the channel says that the source let go, but for two: one that was killed, of which the kernel closes one
thing after the other, and one that did not get DONE. That one is in doubt for `DEATH_TIMEOUT_S` and lets go then."""


class _SourceDiedError(PeerLostError):
    """The source is known dead."""


class _CancelledError(PeerError):
    """The source took the handover back."""


class _OutdatedError(PeerLostError):
    """The source is known dead, and answered its frontend something that never arrived here."""


class Incoming:
    """One handover as the destination sees it. `run` it once.

    Args:
        parameters: gives the `local` both sides must agree on, at the moment the source's HELLO arrives.
        build: makes the parts for what HELLO says, netdevs before the devices on them, all of them parked. Raises
            LocalmigError where they do not fit.
        on_serving: called once the guest is served here.
        is_ending: whether this process was told to end, also where the event loop has not heard of it yet.
        tracer: where facts go.
        blaming: who is blamed for what a part raises.
    """

    def __init__(
        self,
        *,
        parameters: Callable[[], Parameters],
        build: Callable[[Hello], Sequence[Part]],
        on_serving: Callable[[], None],
        is_ending: Callable[[], bool],
        tracer: Tracer,
        blaming: Blaming = blaming_nobody,
    ) -> None:
        self._parameters = parameters
        self._build = build
        self._on_serving = on_serving
        self._is_ending = is_ending
        self._tracer = tracer
        self._blaming = blaming
        self._progress = Progress("destination", tracer)
        self._machine = destination_machine()
        self._parts: Sequence[Part] = ()
        self.unthawed: list[Part] = []
        """Parts whose control sockets are not served, for want of memory or descriptors, although rings run."""
        self._peer: Peer | None = None
        self._revocation: Revocation | None = None
        self._changes: Changes | None = None
        self._changes_known = 0
        """How many changes of the source the adopted setup knows of."""
        self._files: dict[str, list[FilePlace]] = {}
        """Of each setup section, by its name."""
        self._stream = IncomingStream(setup={}, switchover={})
        self._hello: Hello | None = None
        self._is_sole_owner = False
        """Whether nobody else can serve the guest any more: DONE goes out, or the source is dead."""
        self._has_told_serving = False

    # -- what others may ask ------------------------------------------------------------------------------------

    @property
    def state(self) -> DestinationState:
        """Where the destination stands."""
        return self._machine.state

    @property
    def has_ended(self) -> bool:
        """Whether `run` is over."""
        return self._progress.has_ended

    @property
    def is_sole_owner(self) -> bool:
        """Whether nobody else can serve the guest any more."""
        return self._is_sole_owner

    @property
    def source_may_return(self) -> bool:
        """Whether the source would take the guest back if this process, which has it, died: it lives and is in doubt.

        So long this daemon may hand over to nobody: its end would make two owners.
        """
        if self._peer is None or self._revocation is None or self.state is not DestinationState.COMPLETED:
            return False
        # Whether it let go is looked at last: it may say so and end in between.
        return not self._peer.is_dead and not self._revocation.has_let_go

    @property
    def source_was_running(self) -> bool:
        """Whether the guest's rings ran in the source."""
        return self._hello is not None and self._hello.running

    def info(self) -> MigrationInfo:
        """The facts so far."""
        return self._progress.info(DESTINATION_STATUS[self.state])

    # -- the handover -------------------------------------------------------------------------------------------

    async def run(self, channel: Channel) -> DestinationState:
        """Takes over what comes through `channel`, which it closes.

        Gives COMPLETED; anything else means that this process must end, for it does not serve.
        """
        self._progress.start()
        self._fire(DestinationEvent.CONNECTED)
        try:
            try:
                await self._take_over(channel)
            except _SourceDiedError as error:
                await self._outlive_source(error)
        except asyncio.CancelledError:
            if not self._is_sole_owner:
                self._refuse(channel, StateError("the destination was told to end"))
            raise
        except Exception as error:
            if not self._is_sole_owner:
                # The end of this process gives the guest back, where it had it.
                self._refuse(channel, error)
                if not isinstance(error, LocalmigError | OSError | MemoryError):
                    raise
            else:
                # The guest is served here and nowhere else: whatever this is, it is no reason to stop.
                _logger.exception("internal error after the takeover")
                self._progress.add_note(f"internal error after the takeover: {error!r}")
                try:
                    self._tell_serving()
                except Exception:
                    _logger.exception("internal error while this daemon was told that it serves")
                # A source that still waits for DONE would end this process for its silence.
                channel.close()
                await self._settle()
        finally:
            self._progress.end()
            if self._changes is not None:
                self._changes.close()
                self._changes = None
            if not self.source_may_return:
                self.close()
            channel.close()
        return self.state

    def close(self) -> None:
        """Forgets the source, which `source_may_return` asked about until now. Idempotent."""
        for held in (self._peer, self._revocation):
            if held is not None:
                held.close()
        self._peer = self._revocation = None

    async def _take_over(self, channel: Channel) -> None:
        with self._progress.phase("hello"):
            await self._greet(channel)
        self._fire(DestinationEvent.HELLO_ACCEPTED)
        frame = await self._expect(channel, FrameKind.DESCRIPTION, timeout_s=SETUP_TIMEOUT_S)
        self._stream.description(frame.data)
        await self._take_setup(channel, self._stream.setup)
        for _ in range(CATCH_UP_ROUNDS_MAX + 1):
            with urgent():
                self._check_wanted()
                await self._say(channel, FrameKind.SETUP_ACK)
                await self._rehearse()
                # The operator may let the source pause here, and past READY the source alone decides: both end with it.
                frame = await self._expect(channel, FrameKind.SWITCHOVER, FrameKind.DESCRIPTION, timeout_s=None)
                if frame.kind is FrameKind.SWITCHOVER:
                    with undisturbed(self._tracer):
                        is_told = await self._switch_over(channel, frame)
                    break
            # Not urgent, because what is built may have threads.
            self._stream.description_again(frame.data)
            await self._take_setup(channel, self._stream.setup_again)
        else:
            raise PeerError(f"the source sent changes of its setup {CATCH_UP_ROUNDS_MAX + 1} times, limit is one less")
        if is_told:
            try:
                await channel.receive_end(timeout_s=RELEASE_TIMEOUT_S)
            except (OSError, PeerError, KernelError) as error:
                self._progress.add_note(f"the source did not let go: {reason_of(error) or 'no end of the channel'}")
        await self._settle()

    async def _switch_over(self, channel: Channel, frame: Frame) -> bool:
        """Takes over; whether the source knows, or is gone. The channel is closed where it does not."""
        begun_ns = time.monotonic_ns()
        self._adopt_switchover(self._stream, frame.data, frame.fds)
        self._check_wanted()
        await self._say(channel, FrameKind.READY)
        self._fire(DestinationEvent.SWITCHOVER_ADOPTED)
        ready_ns = time.monotonic_ns()
        frame = await self._expect(channel, FrameKind.COMMIT, timeout_s=None)
        self._check_wanted()
        # Whatever COMMIT says besides, from here on this process owns the guest.
        self._fire(DestinationEvent.COMMIT_RECEIVED)
        committed_ns = time.monotonic_ns()
        self._serve()
        self._progress.stopped_ns = int.from_bytes(frame.data[:8], "big")
        assert self._progress.serving_ns is not None
        own_phases = (
            ("adopt", ready_ns - begun_ns),
            ("await-commit", committed_ns - ready_ns),
            ("start", self._progress.serving_ns - committed_ns),
        )
        # Before it is sent: a source that has read it lets go.
        self._is_sole_owner = True
        notes = self._take_notes()
        done = Done(serving_ns=self._progress.serving_ns, phases=own_phases, notes=notes)
        is_told = await self._say_done(channel, done.encode())
        self._tell_serving()
        for note in notes:
            self._progress.add_note(note)
        for name, duration_ns in own_phases:
            self._progress.add_phase(name, duration_ns)
        return is_told

    def _check_wanted(self) -> None:
        """A process that was told to end takes no guest. The loop would tell it so when it next waits for long."""
        if self._is_ending():
            raise asyncio.CancelledError

    async def _say_done(self, channel: Channel, done: bytes) -> bool:
        try:
            await channel.send(FrameKind.DONE, done, timeout_s=HELLO_TIMEOUT_S)
        except PeerLostError:
            pass  # nobody there needs to be told
        except (KernelError, TimeoutError) as error:
            # A source that waits for DONE would end this process for its silence.
            channel.close()
            self._progress.add_note(f"the source could not be told that this daemon serves: {reason_of(error)}")
            return False
        return True

    async def _rehearse(self) -> None:
        """Does, with states of our own, what the downtime will do.

        Once in setup, to find what cannot work while the guest still runs; and once more right before it counts, for
        what was not run for some milliseconds is several times slower.
        """
        stream = IncomingStream(setup={}, switchover=self._switchover_descriptions())
        outgoing = OutgoingStream()
        outgoing.describe(switchover_sections(self._parts))
        sample = outgoing.switchover(switchover_sections(self._parts)).data
        with undisturbed(self._tracer):
            await rehearse_exchange(sample)
            self._adopt_switchover(stream, sample, [])

    async def _greet(self, channel: Channel) -> None:
        frame = await self._expect(channel, FrameKind.HELLO, timeout_s=HELLO_TIMEOUT_S)
        try:
            hello = Hello.decode(frame.data)
            local = self._parameters().local
            if hello.local != local:
                raise PeerError(
                    f"parameter 'local' is {on_off(hello.local)} in the source and {on_off(local)} in the destination"
                )
            if descriptors := hello_descriptors(frame, 3, required=local):
                pidfd, revocation, changes = descriptors
                self._peer = Peer.from_descriptor(pidfd.take(), known=channel.process)
                self._revocation = Revocation.from_descriptor(revocation.take())
                self._changes = Changes.from_descriptor(changes.take())
        finally:
            frame.close()
        self._hello = hello
        self._parts = self._build(hello)
        self._stream = IncomingStream(
            setup={section_name(part.id, part.setup): part.setup for part in self._parts},
            switchover=self._switchover_descriptions(),
            defaults=self._setup_defaults(),
        )
        answer = Hello(version=program_version(), local=local, running=hello.running)
        with own_pidfd() as pidfd:
            data, places = hello_payload(channel, answer, [pidfd.fileno()])
            try:
                await channel.send(FrameKind.HELLO, data, places, timeout_s=HELLO_TIMEOUT_S)
            except PeerLostError:
                # Whether it died makes no difference: nothing is here yet. Why it left does.
                frame = await channel.receive(timeout_s=HELLO_TIMEOUT_S)
                frame.close()
                raise _unexpected(frame, "nothing") from None

    async def _take_setup(
        self, channel: Channel, read: Callable[[bytes, Iterable[tuple[int, OwnedFd]]], list[Section]]
    ) -> None:
        """Receives sections of the setup, all or those that changed, and adopts them."""
        frame = await self._expect(channel, FrameKind.SETUP, timeout_s=SETUP_TIMEOUT_S)
        if self.state is DestinationState.PREPARED:
            # Only now: what is here is good for a source that dies, until all of what is newer has come.
            self._fire(DestinationEvent.SETUP_OUTDATED)
        with self._progress.phase("setup"):
            self._changes_known, data, fds = read_setup(frame)
            self._adopt_setup(read(data, fds))
            if self._changes is not None and self._changes_known > self._changes.count:
                raise PeerError(f"SETUP knows of {self._changes_known} changes, the source made {self._changes.count}")
            self._progress.descriptors = max(self._progress.descriptors, len(fds))
            await self._rehearse()
        self._progress.prepared_ns = time.monotonic_ns()
        self._fire(DestinationEvent.SETUP_ADOPTED)

    def _adopt_setup(self, sections: Sequence[Section]) -> None:
        by_name = {section.name: section for section in sections}
        pairs = [(part, by_name.get(section_name(part.id, part.setup))) for part in self._parts]
        arrived = [(part, section.state) for part, section in pairs if section is not None]
        try:
            for section in sections:
                check_descriptors(section.description, section.state, section=section.name)
                self._files[section.name] = files_of(section.description, section.state, section=section.name)
            check_distinct(itertools.chain.from_iterable(self._files.values()))
            for part, state in arrived:
                with self._blaming(part, "take over"):
                    part.check_setup(state)
            for part, state in arrived:
                with self._blaming(part, "take over"):
                    part.adopt_setup(state)
        except BaseException:
            # Adopted or not: nothing of it is in use yet, and closing twice is harmless.
            for section in sections:
                close_descriptors(section.description, section.state)
            raise

    def _setup_defaults(self) -> dict[str, Any]:
        defaults = {}
        for part in self._parts:
            with self._blaming(part, "take over"):
                if (default := part.setup_default()) is not None:
                    defaults[section_name(part.id, part.setup)] = default
        return defaults

    def _switchover_descriptions(self) -> dict[str, Description[Any]]:
        return {
            section_name(part.id, part.switchover): part.switchover
            for part in self._parts
            if part.switchover is not None
        }

    def _adopt_switchover(
        self, stream: IncomingStream, data: bytes | bytearray, fds: Iterable[tuple[int, OwnedFd]]
    ) -> None:
        """Decodes all, checks all, then applies all: a bad last section leaves no half-loaded device."""
        states = {section.name: section.state for section in stream.switchover(bytes(data), fds)}
        pairs = [
            (part, states[section_name(part.id, part.switchover)])
            for part in self._parts
            if part.switchover is not None
        ]
        for part, state in pairs:
            part.check_switchover(state)
        for part, state in pairs:
            part.adopt_switchover(state)

    def _serve(self) -> None:
        if self.source_was_running:
            for part in self._parts:
                part.resume()
        self._progress.serving_ns = time.monotonic_ns()
        for part in self._parts:
            part.thaw()

    async def _recover(self) -> None:
        """The source is dead: serve from what arrived whole and from what stands in guest memory."""
        self._is_sole_owner = True
        self._progress.note = "the source died during the handover; this daemon took over from guest memory"
        problems = for_all(self._parts, lambda part: part.recover())
        if self.source_was_running:
            problems += for_all(self._parts, lambda part: part.resume())
        self._progress.serving_ns = time.monotonic_ns()
        problems += for_all(self._parts, lambda part: part.thaw(), short=self.unthawed)
        self._progress.note = "; ".join([self._progress.note, *problems, *self._take_notes()])
        self._tell_serving()
        await self._settle()

    def _take_notes(self) -> list[str]:
        """What both sides show of how the guest goes on."""
        notes: list[str] = []
        problems = for_all(self._parts, lambda part: notes.extend(part.take_notes()))
        return notes + problems

    def _tell_serving(self) -> None:
        if not self._has_told_serving:
            self._on_serving()
            self._has_told_serving = True

    async def _settle(self) -> None:
        """The source lets go of the rest. Too late for a no: this process owns the guest, and what is here works."""
        problems = self._take_the_rest()
        for _ in range(RELEASE_TRIES_MAX):
            if not problems:
                break
            is_dead = self._peer is not None and await self._peer.wait_dead(timeout_s=RELEASE_RETRY_S)
            if self._peer is None:
                await asyncio.sleep(RELEASE_RETRY_S)
            problems = self._take_the_rest()
            if is_dead:
                break
        if problems:
            self._progress.add_note("; ".join(problems))
        if self._peer is not None and not (self._revocation is not None and self._revocation.has_let_go):
            # A source that was killed is dead a moment after its channel ended; nothing of it is to be kept then.
            await self._peer.wait_dead(timeout_s=DEATH_GRACE_S)
        self._fire(DestinationEvent.SETTLED)

    def _take_the_rest(self) -> list[str]:
        return for_all(self._parts, lambda part: part.source_released())

    async def _outlive_source(self, error: _SourceDiedError) -> None:
        if self._machine.allows(DestinationEvent.SOURCE_DIED):
            self._fire(DestinationEvent.SOURCE_DIED)
        if self.state is DestinationState.RECOVERING:
            await self._recover()
        else:
            self._give_up(None, f"{error} before it had sent everything: nothing to recover")

    def _refuse(self, channel: Channel, error: Exception) -> None:
        match error:
            case _CancelledError():
                self._give_up(DestinationEvent.CANCELLED, str(error))
            case PeerLostError():
                self._give_up(DestinationEvent.CHANNEL_LOST, f"source lost while '{self.state}': {error}")
            case TimeoutError():
                self._give_up(DestinationEvent.TIMED_OUT, str(error) or "the source does not read")
            case _:
                reason = f"internal error: {error!r}"
                if isinstance(error, LocalmigError):
                    reason = reason_of(error)
                elif isinstance(error, OSError | MemoryError):
                    reason = f"the kernel refused while '{self.state}': {reason_of(error)}"
                self._give_up(DestinationEvent.FAILED_HERE, reason)
                channel.try_send(FrameKind.REFUSE, encode_reason(reason))

    def _give_up(self, event: DestinationEvent | None, reason: str) -> None:
        self._progress.error = reason
        for_all(reversed(self._parts), lambda part: part.discard())
        if event is not None and self._machine.allows(event):
            self._fire(event)

    # -- small things -------------------------------------------------------------------------------------------

    async def _say(self, channel: Channel, kind: FrameKind) -> None:
        """Sends a frame without content. Where that fails, what the source said before is heard first."""
        try:
            await channel.send(kind, timeout_s=HELLO_TIMEOUT_S)
        except PeerLostError:
            await self._expect(channel, FrameKind.CANCEL, timeout_s=HELLO_TIMEOUT_S)
            raise

    async def _expect(self, channel: Channel, *kinds: FrameKind, timeout_s: float | None) -> Frame:
        """The next frame, which must be one of `kinds`."""
        wanted = " or ".join(kind.name for kind in kinds)
        try:
            frame = await channel.receive(timeout_s=timeout_s, eager=True)
        except TimeoutError:
            raise TimeoutError(f"the source sent no {wanted} in {timeout_s:g} s") from None
        except PeerLostError as error:
            # What the source said is read to the end now. Sockets end a little before their process counts as dead.
            if self._peer is not None and await self._peer.wait_dead(timeout_s=DEATH_GRACE_S):
                # Dead first, then this: it says nothing more now. CANCEL need not have got through.
                if self._revocation is not None and self._revocation.is_told:
                    raise _CancelledError("the source took the handover back and is gone since") from error
                if self._changes is not None and self._changes.count != self._changes_known:
                    raise _OutdatedError(
                        "it died after a frontend changed something that was not sent again"
                    ) from error
                raise _SourceDiedError(f"the source died while '{self.state}'") from error
            raise
        if frame.kind is FrameKind.CANCEL or frame.kind not in kinds:
            frame.close()
            raise _unexpected(frame, wanted)
        return frame

    def _fire(self, event: DestinationEvent) -> None:
        before = DESTINATION_STATUS[self.state]
        status = DESTINATION_STATUS[self._machine.fire(event)]
        if status != before or event is DestinationEvent.CONNECTED:
            self._tracer.emit(MigrationStatusChanged(status=status, reason=self._progress.error))


def _unexpected(frame: Frame, expected: str) -> PeerError:
    if frame.kind is FrameKind.CANCEL:
        return _CancelledError(f"the source took the handover back: {decode_reason(frame.data)}")
    return PeerError(f"{frame.kind.name} came where {expected} was expected")
