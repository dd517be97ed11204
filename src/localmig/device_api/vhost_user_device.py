"""A device served over vhost-user, whatever it is: what a frontend says becomes rings that an engine serves.

Owns:        guest memory, the groups of rings; when they run; the session's part of a handover.
Never sees:  vhost-user bytes, what is in a chain, the migration stream.
Read next:   vhost_user/protocol.py for the events, ring_group.py for the engines, device_state.py for what travels,
             devices/virtio_net/ for a device.

A subclass says what it is: which features and rings it offers, which engine serves each group of rings, what its
configuration space reads. Sessions, memory, rings and the handover are here.

A group of rings runs while three things hold: the frontend wants one of its rings served, guest memory holds that ring,
and this process serves. The first two are decided in `_apply` alone; the third belongs to all devices together, see
queues.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Final

from localmig import trace
from localmig.contact import ConnectTo, Contact, ListenAt
from localmig.dataplane import GuestMemory, InFlight, Ledger, Ring
from localmig.device_api.callback_group import CallbackGroup
from localmig.device_api.device_info import DeviceInfo
from localmig.device_api.device_state import DEVICE, ConnectionState, DeviceState, SocketState
from localmig.device_api.notes import NOT_SHARED, Notes, set_up_notes
from localmig.device_api.own_state import OwnState
from localmig.device_api.part import Part
from localmig.device_api.queues import Queues
from localmig.device_api.ring_group import Layout, RingGroup
from localmig.device_api.session_log import SessionLog
from localmig.errors import ConfigError, KernelError, LocalmigError, PeerError
from localmig.fds import OwnedFd, close_all
from localmig.trace import (
    DeviceNoted,
    MemoryMapped,
    RingCorrected,
    RingFailed,
    RingsStarted,
    RingsStopped,
    SessionClosed,
    SessionOpened,
    Tracer,
)
from localmig.vhost_user.info import SessionInfo, VringInfo
from localmig.vhost_user.memory import MemoryRegion, borrowed, check_sizes, to_guest_address
from localmig.vhost_user.message import VRING_INDEX_MAX
from localmig.vhost_user.protocol import (
    LOG_ALL,
    DeviceReset,
    Event,
    FeaturesSet,
    LoggingChanged,
    LogSet,
    MemoryChanged,
    NotifiersChanged,
    Offer,
    RequestRefused,
    SessionState,
    VringChanged,
    check_servable,
    check_state,
)
from localmig.vhost_user.session import Endpoint
from localmig.virtio import packed_ring, split_ring
from localmig.vmstate import Description

_logger = logging.getLogger(__name__)

POPULATE_SECONDS_MAX: Final = 0.01
"""For memory that a frontend adds while this process serves. The frontend waits for its reply meanwhile, and so do all
others. Ten milliseconds map a gigabyte of pages that exist, or look through gigabytes that have none; the rest comes by
page faults."""


class VhostUserDevice(Part):
    """A device with one vhost-user socket.

    Args:
        id: the user's name for it.
        socket: where and how frontends come.
        local_migration: whether its descriptors may move.
        queues: what starts and stops its rings together with those of all others.
        tracer: where facts go.

    Attributes:
        own_state: describes what it has to hand over besides sessions and rings, None for nothing. What it is
            travels by `save`, `check` and `load`.
        own_parts: the parts that stand before it in a handover.
    """

    setup = DEVICE
    own_state: ClassVar[Description[Any] | None] = None

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the user's word
        socket: ListenAt | ConnectTo,
        local_migration: bool,
        queues: Queues,
        tracer: Tracer,
    ) -> None:
        self.id = id
        self.tracer = tracer
        self.own_parts: tuple[Part, ...] = () if self.own_state is None else (OwnState(self, self.own_state),)
        self._socket = socket
        self._local_migration = local_migration
        self._queues = queues
        self._endpoint: Endpoint | None = None
        self._memory: GuestMemory | None = None
        self._ledger: Ledger | None = None
        self._ledger_file: OwnedFd | None = None
        self._in_flight: InFlight | None = None
        self._in_flight_file: OwnedFd | None = None
        self._log = SessionLog()
        self._ring_events: OwnedFd | None = None
        self._groups: list[RingGroup] = []
        self.callback_groups: list[CallbackGroup] = []
        """Those of its groups that Python code serves."""
        self._config_there = b""
        self._failures: dict[int, str] = {}
        """Why a ring failed last, by its number."""
        self._notes = Notes(self.find_notes, self._is_untouched, self._tell_note)
        self._kicks_before: dict[int, tuple[OwnedFd, int]] = {}
        """Of the first group's rings: the kick descriptor, and how many kicks are not its driver's."""
        self._closed_because: str | None = None
        queues.join(self)

    # -- what a device says of itself -----------------------------------------------------------------------------

    @abstractmethod
    def offer(self) -> Offer:
        """What a session that begins is offered."""

    def possible_offer(self) -> Offer:
        """What it may offer once all that arrives is here; `offer` itself unless something is still to come."""
        return self.offer()

    @abstractmethod
    def make_groups(self, event_fd: int) -> Iterator[RingGroup]:
        """Makes its groups of rings, one after the other; between them they have every ring of the offer once.

        Args:
            event_fd: for each to signal where a ring failed.

        Raises:
            KernelError: one cannot be made. Those that were are closed.
        """

    def config_space(self) -> bytes:
        """What its configuration space reads now."""
        return b""

    @property
    def config_there(self) -> bytes:
        """The configuration space as the source had it, empty where there was none."""
        return self._config_there

    def check_config(self, config: bytes) -> None:
        """Raises PeerError where the source's configuration space cannot be one of this device's."""
        del config

    @property
    def can_serve(self) -> bool:
        """Whether what is behind it is there."""
        return True

    def on_event(self, event: Event) -> None:
        """Follows an event that only this kind of device has. Raises as `SessionHandler.handle`."""
        raise AssertionError(event)

    def features_changed(self) -> None:
        """The driver acknowledged other features. Every group is laid out anew next. Raises as `on_event`."""

    def before_layout(self, group: RingGroup) -> None:
        """A stopped group is about to be laid out."""

    def before_stop(self, group: RingGroup) -> None:
        """A group is about to be stopped and laid out anew."""

    def after_stop(self, group: RingGroup) -> None:
        """It is stopped; the session's state has its positions."""

    def after_layout(self, group: RingGroup) -> None:
        """It is laid out, and may start next."""

    def driver_left(self, group: RingGroup) -> None:
        """The driver of a stopped group is reset, or its session ends."""

    def ring_left(self, vring: int) -> None:
        """A ring that was laid out is the driver's again; what was in flight of it has been returned."""

    def session_ended(self) -> None:
        """The session is over and every ring is stopped."""

    def groups_dropped(self) -> None:
        """Its groups are closed next."""

    def thawing(self) -> None:
        """This process serves the session from now on."""

    def is_outdated(self) -> bool:
        """Whether `save` would give something else than last time, without a message of the frontend's."""
        return False

    def note_saved(self) -> None:
        """`save` is called next."""

    def save(self, *, with_descriptors: bool) -> Any:
        """The state that `own_state` describes.

        Args:
            with_descriptors: whether descriptors move. They are lent: they stay this device's until `release`.
        """
        raise NotImplementedError

    def check(self, state: Any) -> None:
        """Raises PeerError if this device cannot go on with a state that arrived, with the reason. Changes nothing."""

    def load(self, state: Any) -> None:
        """Goes on with a checked state, and takes its descriptors over (`OwnedFd.take`). `open` is not called then.

        Called again with a newer state if it changed in the source, so what it took before is dropped first.
        """
        raise NotImplementedError

    def keeps_chains(self) -> bool:
        """Whether Python code serves rings of this session, and may keep what it takes of them."""
        return bool(self.callback_groups)

    def ring_name(self, vring: int) -> str:
        """What a ring is called when people are told of it."""
        return f"vring {vring}"

    # -- what a device may ask ------------------------------------------------------------------------------------

    @property
    def groups(self) -> Sequence[RingGroup]:
        """Its groups of rings, none while it is closed."""
        return self._groups

    @property
    def is_open(self) -> bool:
        """Whether frontends can come, here or in the process that serves."""
        return self._endpoint is not None

    @property
    def is_serving(self) -> bool:
        """Whether rings may run."""
        return self._queues.serving

    @property
    def offer_made(self) -> Offer:
        """What sessions are offered here while it is open."""
        assert self._endpoint is not None, self.id
        return self._endpoint.offer

    @property
    def session_state(self) -> SessionState | None:
        """The session's state, None while there is no session."""
        return self._endpoint.state if self._endpoint is not None else None

    def is_served(self, vring: int) -> bool:
        """Whether a ring is the device's to serve."""
        state = self.session_state
        return state is not None and self._endpoint is not None and self._endpoint.offer.serves(vring, state.vrings)

    def change_config(self) -> None:
        """`config_space` reads something else now: frontends that can hear of that do."""
        if self._endpoint is not None:
            self._endpoint.change_config(self.config_space())

    def note_change(self) -> None:
        """Something changes next that a successor must know."""
        if self._endpoint is not None:
            self._endpoint.note_change()

    def apply_all(self) -> None:
        """Lays out all rings anew, as the session and what is behind the device have it now."""
        for group in self._groups:
            self._apply(group)

    def lay_out_again(self) -> None:
        """As when the frontend sets everything up; a session that cannot go on ends."""
        session = self._endpoint.session if self._endpoint is not None else None
        try:
            if session is not None:
                self.features_changed()
            self.apply_all()
        except LocalmigError as error:
            for group in self._groups:
                group.release()  # what is behind them may close next
            _logger.warning("device '%s': %s", self.id, error)
            if session is not None:
                # Not now: this may be in the middle of one of its messages.
                asyncio.get_running_loop().call_soon(session.close, str(error))

    # -- serving ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Listens, or sees to a connection. What it refers to is open already."""
        self._make_groups()
        try:
            self._endpoint = self._make_endpoint(self._socket.open())
        except BaseException:
            self._drop_groups()
            raise

    def resume(self) -> None:
        """Nothing: its rings start with all others, see `Queues`."""

    def stop(self) -> None:
        """Nothing, as `resume`."""

    def freeze(self) -> None:
        """Leaves socket and connection alone from now on."""
        self._notes.stop()
        if self._endpoint is not None:
            self._endpoint.freeze()

    def thaw(self) -> None:
        """Serves socket and connection."""
        assert self._endpoint is not None, self.id
        assert self._ring_events is not None, self.id
        self._endpoint.contact.claim()
        self.thawing()
        self._endpoint.thaw()
        asyncio.get_running_loop().add_reader(self._ring_events.fileno(), self._report_rings)
        self._note_kicks()
        self._notes.expect()

    def close(self) -> None:
        """Ends the session, removes the socket."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        self._drop_groups()

    # -- to be seen ---------------------------------------------------------------------------------------------

    @property
    def socket(self) -> ListenAt | ConnectTo:
        """Where and how frontends come."""
        return self._socket

    def info(self) -> DeviceInfo:
        """What every device shows; a subclass returns one with more members, which its type's `info` declares."""
        return DeviceInfo(**self.facts())

    def facts(self) -> dict[str, Any]:
        """The members of a `DeviceInfo`, for one that has more."""
        return {
            "socket": self.socket.path,
            "server": isinstance(self.socket, ListenAt),
            "session": self.session_info(),
            "vrings": tuple(self.vring_infos()),
            "notes": self.notes(),
        }

    def session_info(self) -> SessionInfo | None:
        """The session as the frontend told it, None while there is none."""
        state = self.session_state
        return None if state is None else SessionInfo.of(state)

    def vring_infos(self) -> Iterator[VringInfo]:
        """Each ring as its group has it; none without a session."""
        state = self.session_state
        if state is None:
            return
        for group in self._groups:
            # Not `failed()`: what it knows and nobody has reported yet has no reason to tell either.
            for index, position in zip(group.vrings, group.positions(), strict=True):
                if not self.offer_made.has(index, state.features_acked):
                    continue
                vring = state.vrings[index]
                yield VringInfo(
                    index=index,
                    size=vring.size,
                    started=vring.started,
                    enabled=vring.enabled,
                    running=self.moves(group) and position is not None and not vring.failed,
                    position=vring.next_avail if position is None else position,
                    failed=vring.failed,
                    # Where it failed before a handover, the source's log has the reason.
                    failure=self._failures.get(index) if vring.failed else None,
                )

    def moves(self, group: RingGroup) -> bool:
        """Whether what a guest puts into the group's rings gets anywhere."""
        return group.is_running()

    def notes(self) -> tuple[str, ...]:
        """What keeps it from working, each with what to do."""
        return self._notes.get()

    # -- source -------------------------------------------------------------------------------------------------

    def local_migration_blocker(self) -> str | None:
        """Only the user's word keeps this device's descriptors home."""
        return None if self._local_migration else "local-migration=off"

    def watch_setup(self, changing: Callable[[], None] | None) -> None:
        """Its frontend, and whether there is one, is what changes."""
        if self._endpoint is not None:
            self._endpoint.watch(changing)

    def frontend_waits(self) -> bool:
        """Whether its frontend waits for an answer, or a frontend to be let in."""
        return self._endpoint is not None and self._endpoint.frontend_waits()

    def save_setup(self, *, with_descriptors: bool) -> DeviceState:
        """The session as it stands; its descriptors stay this device's."""
        assert self._endpoint is not None, self.id
        session = self._endpoint.session
        socket = None
        if with_descriptors:
            connections: tuple[ConnectionState, ...] = ()
            if session is not None:
                connection = ConnectionState(
                    connection=session.connection,
                    session=session.backend.state,
                    ledger=self._ledger_file,
                    in_flight=self._in_flight_file,
                )
                connections = (connection,)
            socket = SocketState(listener=self._endpoint.contact.save(), connections=connections)
        return DeviceState(
            features_acked=session.backend.state.features_acked & ~LOG_ALL if session is not None else 0,
            config=session.backend.config if session is not None else self._endpoint.config,
            socket=socket,
        )

    def release(self) -> None:
        """Drops socket, connection, memory and rings: another process serves them."""
        if self._endpoint is not None:
            self._endpoint.release()
            self._endpoint = None
        self._drop_groups()

    # -- destination --------------------------------------------------------------------------------------------

    def check_setup(self, state: DeviceState) -> None:
        """Whether this daemon can serve the session: its features, its rings, its memory table."""
        # What is behind the device is here later: `adopt_setup` looks again.
        offered = self.possible_offer()
        try:
            _check_acked(state, offered)
            self.check_config(state.config)
            if state.socket is not None:
                self._socket.check(state.socket.listener)
                _check_connections(state.socket.connections, offered)
        except PeerError as error:
            raise PeerError(f"device '{self.id}': {error}") from error

    def adopt_setup(self, state: DeviceState) -> None:
        """Takes over socket and session, maps guest memory and lays out the rings, parked.

        Without descriptors it listens beside the path, which is the source's until `thaw` claims it. Again: groups
        stay, and so does memory that is the same.
        """
        memory = self._memory
        self._drop_adopted()
        if not self._groups:
            self._make_groups()
        self._config_there = state.config
        try:
            _check_acked(state, self.offer())
            if state.socket is None:
                self._endpoint = self._make_endpoint(self._socket.open_beside())
                return
            self._endpoint = self._make_endpoint(self._socket.adopt(state.socket.listener))
            for connection in state.socket.connections:
                self._ledger_file, self._in_flight_file = connection.ledger, connection.in_flight
                self._endpoint.adopt_session(connection.connection, connection.session, config=state.config)
                self._map_records()
                self._log.adopt(connection.session)
                self.session_adopted()
                # A frontend that spoilt its memory since it announced it loses its own rings and stops no handover.
                self._memory = self._map_memory(lambda regions: GuestMemory.adopt(regions, memory))
                if self._memory is not None:
                    self._queues.populate(self._memory)
            for group in self._groups:
                self._lay_out(group)
        except PeerError as error:
            raise PeerError(f"device '{self.id}': {error}") from error

    def session_adopted(self) -> None:
        """A session came; its rings are laid out next."""

    def recover(self) -> None:
        """Sees to it that frontends find it: who died may have claimed the socket's path. Rings: see `Queues`."""
        assert self._endpoint is not None, self.id
        self._endpoint.contact = self._socket.recover(self._endpoint.contact)

    def take_notes(self) -> list[str]:
        """Rings whose used index in guest memory stands elsewhere than the source said."""
        return [
            f"device '{self.id}': {text}"
            for group in self._groups
            for text in self._report_corrections(group, logging.WARNING)
        ]

    def discard(self) -> None:
        """Drops what was adopted; a socket of our own, beside the source's, goes too."""
        self._drop_adopted()
        self.release()

    def _drop_adopted(self) -> None:
        """Drops what was adopted, all but the groups, which keep their memory until they are laid out again."""
        if self._endpoint is not None:
            self._endpoint.discard()
            self._endpoint = None
        self._memory = None
        self._drop_records()

    # -- the frontend's events ----------------------------------------------------------------------------------

    def session_opened(self) -> None:
        """Rings come later, by their events."""
        self.tracer.emit(SessionOpened(device=self.id))
        self._notes.expect()

    def handle(self, event: Event) -> None:
        """Makes the rings what the session's state says. See `SessionHandler`."""
        self._notes.expect()
        try:
            self._follow(event)
        except LocalmigError as error:
            if event.refusable:
                self._note_refusal(str(error))
            raise

    def _follow(self, event: Event) -> None:
        match event:
            case VringChanged(index=vring, anew=anew):
                self._apply(self._group_of(vring), anew=vring if anew else None)
                assert self._endpoint is not None, self.id
                for drained, leader in self._endpoint.offer.drained_vrings.items():
                    if leader == vring:
                        self._apply(self._group_of(drained))
            case NotifiersChanged(index=vring):
                self._set_notifiers(vring)
            case RequestRefused(reason=reason):
                self._note_refusal(reason)
            case FeaturesSet():
                self._make_records()
                self.features_changed()
                self.apply_all()
            case LogSet():
                self._set_log()
            case LoggingChanged():
                self._change_logging()
            case MemoryChanged():
                self._change_memory()
            case DeviceReset():
                self.features_changed()
                for group in self._groups:
                    for vring in group.vrings:
                        self._forget(vring)
                    self.driver_left(group)
                self.apply_all()
                self._rewind()
            case _:
                self.on_event(event)

    def session_closed(self, reason: str | None) -> None:
        """Every ring stops: its descriptors close next."""
        for group in self._groups:
            self._stop(group)
            # A ring that its frontend disabled may be other memory of the guest's by now.
            self._give_back(group, [vring for vring in group.vrings if self.is_served(vring)])
            self.driver_left(group)
            group.release()
        self._memory = None
        self._failures.clear()
        self._kicks_before.clear()
        self._drop_records()
        self.session_ended()
        if reason is not None:
            # A frontend that comes again and again with the same mistake fills no log.
            level = logging.WARNING if reason != self._closed_because else logging.DEBUG
            _logger.log(level, "device '%s': session closed: %s", self.id, reason)
        self._closed_because = reason
        self.tracer.emit(SessionClosed(device=self.id, reason=reason))

    # -- groups of rings ----------------------------------------------------------------------------------------

    def _group_of(self, vring: int) -> RingGroup:
        return next(group for group in self._groups if vring in group.vrings)

    def _apply(self, group: RingGroup, *, anew: int | None = None) -> None:
        """Stops the group, lays it out as the session says, lets it run if it shall.

        `anew` is a ring of it that the frontend sets up again, so that a failure until now is over.
        """
        self.before_stop(group)
        self._stop(group, anew=anew)
        if (state := self.session_state) is not None:
            stopped = [vring for vring in group.vrings if not state.vrings[vring].started]
            self._give_back(group, [vring for vring in stopped if vring != anew])
            if anew is not None and (anew in stopped or not self._goes_on(group, anew)):
                self._forget(anew)
        self.after_stop(group)
        self._lay_out(group)
        self.after_layout(group)
        self._settle(group)
        if group is self._groups[0]:
            self._note_kicks()
        if self._queues.serving:
            self._start(group)

    def _give_back(self, group: RingGroup, vrings: Sequence[int]) -> None:
        """The frontend stopped these rings of a stopped group, and is told next where they stand."""
        for vring, position in zip(group.vrings, group.positions(), strict=True):
            if vring in vrings and position is not None:
                group.give_back(vring)
                self.ring_left(vring)

    def _goes_on(self, group: RingGroup, vring: int) -> bool:
        """Whether a ring of a stopped group, which was given another kick descriptor, is the one that ran."""
        index = group.vrings.index(vring)
        return group.positions()[index] is not None and not group.failed()[index]

    def _forget(self, vring: int) -> None:
        """The driver sets a stopped ring up again: its memory is the guest's, and nothing of it is in flight."""
        if self._in_flight is not None:
            self._in_flight.forget(vring)
            self.ring_left(vring)

    def _change_memory(self) -> None:
        """Goes on with the session's new table. Groups whose rings stay where they are do not stop for it.

        Raises as `_map_memory`; then nothing changed.
        """
        memory = self._map_memory(lambda regions: GuestMemory(regions, self._memory))
        # Before any ring meets it, and while all rings run.
        populated = 0 if memory is None else memory.populate(POPULATE_SECONDS_MAX)
        swapped = [memory is not None and group.swap_memory(memory) for group in self._groups]
        # From here on the former memory has no user but the groups that were not swapped.
        self._memory = memory
        undisturbed = tuple(
            index
            for index, (group, done) in enumerate(zip(self._groups, swapped, strict=True))
            if done and not self._awaits_memory(group)
        )
        for index, group in enumerate(self._groups):
            if index not in undisturbed:
                self._apply(group)
        self.tracer.emit(
            MemoryMapped(
                device=self.id,
                regions=len(self._regions()),
                populated_bytes=populated,
                undisturbed_queue_pairs=undisturbed,
            )
        )

    def _set_log(self) -> None:
        """Marks go to the session's new log. PeerError where none can: the rings that need it have stopped."""
        reason = self._log.renew(self._state())
        self._change_logging()
        if reason is not None:
            raise PeerError(reason)

    def _change_logging(self) -> None:
        """Marks go where the session says now. A group stops only if its rings have to wait for a log, or had to."""
        state = self._state()
        for group in self._groups:
            laid_out = [position is not None for position in group.positions()]
            can_run = [self._ring(state, vring) is not None for vring in group.vrings]
            rings = zip(group.vrings, laid_out, can_run, strict=True)
            if any(is_there != may for vring, is_there, may in rings if not state.vrings[vring].failed):
                self._apply(group)
                continue
            for vring, is_there in zip(group.vrings, laid_out, strict=True):
                if is_there:
                    group.set_log(vring, self._log.of(state, vring))

    def _awaits_memory(self, group: RingGroup) -> bool:
        """Whether a ring of the group was not in the former memory, and is in the present one."""
        state = self._state()
        rings = zip(group.vrings, group.positions(), strict=True)
        return any(position is None and self._ring(state, vring) is not None for vring, position in rings)

    def _set_notifiers(self, vring: int) -> None:
        """Lets a ring call its driver by the descriptors that the session has now; it goes on meanwhile."""
        state = self._state()
        call, error = _fileno(state.vrings[vring].call), _fileno(state.vrings[vring].error)
        try:
            self._group_of(vring).set_notifiers(vring, call_fd=call, error_fd=error)
        except ValueError as reason:
            raise PeerError(f"{self._group_of(vring).name}: {reason}") from reason

    def _make_records(self) -> None:
        """Packed rings need a ledger from the first packet on, code that keeps chains needs to have them remembered."""
        state = self._state()
        try:
            if state.is_packed and self._ledger_file is None:
                self._ledger_file = OwnedFd(Ledger.create(len(state.vrings)))
            if self.keeps_chains() and self._in_flight_file is None:
                self._in_flight_file = OwnedFd(InFlight.create(len(state.vrings)))
        except OSError as error:
            raise KernelError(f"cannot make a memory file: {error.strerror}", errno=error.errno or 0) from error
        self._map_records()

    def _map_records(self) -> None:
        count = len(self._state().vrings)
        try:
            if self._ledger_file is not None and self._ledger is None:
                self._ledger = Ledger(self._ledger_file.fileno(), count)
            if self._in_flight_file is not None and self._in_flight is None:
                self._in_flight = InFlight(self._in_flight_file.fileno(), count)
        except ValueError as error:
            raise PeerError(str(error)) from error
        except OSError as error:
            raise KernelError(f"cannot map a memory file: {error.strerror}", errno=error.errno or 0) from error

    def _drop_records(self) -> None:
        self._log.forget()
        self._ledger = self._in_flight = None
        close_all((self._ledger_file, self._in_flight_file))
        self._ledger_file = self._in_flight_file = None

    def _settle(self, group: RingGroup) -> None:
        """Writes into the ledger where rings go on that may not run for a while, and may run elsewhere next."""
        state = self.session_state
        if state is not None and state.is_packed and self._ledger is not None:
            for vring in group.vrings:
                self._ledger.settle(vring, state.vrings[vring].next_avail)

    def _regions(self) -> Sequence[MemoryRegion]:
        return self._state().regions

    def _map_memory(self, mapped: Callable[[list[tuple[int, int, int, int, int]]], GuestMemory]) -> GuestMemory | None:
        """The session's table as memory, None where it shares none.

        Raises:
            PeerError: the regions or their files cannot be.
            KernelError: this process cannot map them.
        """
        if not self._regions():
            return None
        try:
            return mapped(borrowed(self._regions()))
        except ValueError as error:
            raise PeerError(f"guest memory: {error}") from error
        except OSError as error:
            raise KernelError(f"cannot map guest memory: {error.strerror}", errno=error.errno or 0) from error

    def _lay_out(self, group: RingGroup) -> None:
        """Tells the stopped group where its rings are, or that it has none."""
        state = self.session_state
        if state is None or state.log is None:
            self._log.forget()
        rings: tuple[Ring | None, ...] = ()
        if state is not None and self._memory is not None and self.can_serve:
            rings = tuple(self._ring(state, vring) for vring in group.vrings)
        if not any(rings):
            group.release()
            return
        assert state is not None, self.id
        assert self._memory is not None, self.id
        self.before_layout(group)
        try:
            group.lay_out(
                Layout(
                    memory=self._memory,
                    rings=rings,
                    features=state.features_acked,
                    packed=state.is_packed,
                )
            )
        except ValueError as error:
            raise PeerError(f"{group.name}: {error}") from error

    def _ring(self, state: SessionState, index: int) -> Ring | None:
        vring = state.vrings[index]
        assert self._endpoint is not None, self.id
        if not self._endpoint.offer.serves(index, state.vrings) or vring.failed or state.awaits_log:
            return None
        assert vring.kick is not None, index
        sizes = (packed_ring if state.is_packed else split_ring).part_sizes(vring.size)
        try:
            descriptor_area, driver_area, device_area = (
                to_guest_address(state.regions, address, size)
                for address, size in zip(
                    (vring.descriptor_area, vring.driver_area, vring.device_area), sizes, strict=True
                )
            )
        except PeerError as error:
            # A frontend may take memory away and bring it back in another shape: until then the ring stands still.
            _logger.info("device '%s': vring %s stands still: %s", self.id, index, error)
            return None
        return Ring(
            size=vring.size,
            descriptor_area=descriptor_area,
            driver_area=driver_area,
            device_area=device_area,
            kick_fd=vring.kick.fileno(),
            call_fd=_fileno(vring.call),
            error_fd=_fileno(vring.error),
            next_avail=vring.next_avail,
            ledger=None if self._ledger is None else (self._ledger, index),
            in_flight=None if self._in_flight is None else (self._in_flight, index),
            log=self._log.of(state, index),
        )

    def _start(self, group: RingGroup) -> None:
        if _has_rings(group):
            self.tracer.emit(RingsStarted(device=self.id, queue_pair=self._groups.index(group), at_ns=group.start()))
            # The frontend told the position. Cloud Hypervisor always tells another, so that is no news for people.
            self._report_corrections(group, logging.DEBUG)

    def stop_groups(self, groups: Iterable[RingGroup]) -> None:
        """Stops the rings of groups, which are laid out and start anew next."""
        for group in groups:
            self._stop(group)

    def _stop(self, group: RingGroup, *, anew: int | None = None) -> None:
        """Stops the group and writes its positions into the session's state. `anew` as in `_apply`."""
        state = self.session_state
        was_running = group.is_running()
        positions = group.stop()
        for vring, position, failed in zip(group.vrings, positions, group.failed(), strict=True):
            if state is None or position is None:
                continue
            if vring != anew or (state.vrings[vring].started and not failed):
                state.vrings[vring].next_avail = position
        self._note_failed(group, anew=anew)
        if was_running:
            self.tracer.emit(RingsStopped(device=self.id, queue_pair=self._groups.index(group)))

    def _note_failed(self, group: RingGroup, *, anew: int | None = None) -> None:
        """Writes into the session's state which rings of a group stopped for good. `anew` as in `_apply`."""
        state = self.session_state
        for vring, position, failed in zip(group.vrings, group.positions(), group.failed(), strict=True):
            # One that the frontend stopped meanwhile begins anew.
            if failed and position is not None and state is not None and state.vrings[vring].started and vring != anew:
                state.vrings[vring].failed = True
                state.vrings[vring].next_avail = position

    def _report_rings(self) -> None:
        assert self._ring_events is not None
        os.read(self._ring_events.fileno(), 8)
        for group in self._groups:
            # All groups started together, so a handover told the positions, or this process itself, which went on.
            self._report_corrections(group, logging.WARNING)
            for vring, reason in group.take_errors():
                self._failures[vring] = reason
                _logger.warning("device '%s': %s stopped: %s", self.id, self.ring_name(vring), reason)
                self.tracer.emit(RingFailed(device=self.id, vring=vring, reason=reason))
            self._note_failed(group)
        self.rings_reported()

    def rings_reported(self) -> None:
        """An engine signalled: a ring failed, or what is behind it is another."""

    def _report_corrections(self, group: RingGroup, level: int) -> list[str]:
        """Tells of rings that began elsewhere than they were told, and gives the same as text."""
        texts = []
        for vring, told, begun in group.take_corrections():
            text = f"{self.ring_name(vring)} goes on at {begun}, where its used index stands, and was told {told}"
            _logger.log(level, "device '%s': %s", self.id, text)
            self.tracer.emit(RingCorrected(device=self.id, vring=vring, told=told, begun=begun))
            texts.append(text)
        return texts

    def _note_refusal(self, reason: str) -> None:
        _logger.warning("device '%s': the frontend's request is refused: %s", self.id, reason)
        self.tracer.emit(trace.RequestRefused(device=self.id, reason=reason))

    # -- what keeps it from working -----------------------------------------------------------------------------

    def find_notes(self) -> Iterator[str]:
        """What keeps the device from working now, a sentence each."""
        if self._endpoint is None or self._endpoint.session is None or not self._groups:
            return
        backend = self._endpoint.session.backend
        yield from set_up_notes(backend.state, self._groups[0].vrings, has_spoken=backend.has_spoken)
        kicks = self._kicks()
        if any(kicks[vring] > before for vring, (_, before) in self._kicks_before.items()) and self._is_untouched():
            yield NOT_SHARED

    def _tell_note(self, note: str) -> None:
        _logger.warning("device '%s': %s", self.id, note)
        self.tracer.emit(DeviceNoted(device=self.id, note=note))

    def _is_untouched(self) -> bool:
        """Whether the first group runs and the driver has written into none of its rings, as far as memory tells."""
        state = self.session_state
        if state is None or self._memory is None or not self._groups or not self._groups[0].is_running():
            return False
        first = self._groups[0]
        if any(state.vrings[index].failed for index in first.vrings):
            return False
        return all(
            position is not None and self._is_vring_untouched(self._memory, state, index, position)
            for index, position in zip(first.vrings, first.positions(), strict=True)
        )

    def _is_vring_untouched(self, memory: GuestMemory, state: SessionState, index: int, position: int) -> bool:
        ring, vring = (packed_ring if state.is_packed else split_ring), state.vrings[index]
        area, offset = ring.TOUCHED
        address = (vring.descriptor_area, vring.driver_area, vring.device_area)[area] + offset
        try:
            written = memory.read(to_guest_address(state.regions, address, 2), 2)
        except (PeerError, ValueError, OSError):
            return False  # its ring fails or stands still, and that is told
        return position == ring.START and not any(written)

    def _note_kicks(self) -> None:
        """A new kick descriptor is a new life of a ring. QEMU makes one with a kick in it, whatever the driver does."""
        state = self.session_state
        for (vring, count), position in zip(self._kicks().items(), self._groups[0].positions(), strict=True):
            kick = None if state is None else state.vrings[vring].kick
            # Only of a ring that is laid out it is known what the descriptor is: a file's server may hold poll(2) up.
            if kick is None or position is None:
                continue
            if vring not in self._kicks_before or self._kicks_before[vring][0] is not kick:
                pending = select.poll()
                pending.register(kick.fileno(), select.POLLIN)
                self._kicks_before[vring] = kick, count + len(pending.poll(0))

    def _kicks(self) -> dict[int, int]:
        """How often each ring of the first group was kicked."""
        first = self._groups[0]
        return dict(zip(first.vrings, first.kicks(), strict=True))

    # -- small things -------------------------------------------------------------------------------------------

    def _make_groups(self) -> None:
        if (count := self.offer().vring_count) > VRING_INDEX_MAX + 1:
            raise ConfigError(f"device '{self.id}' has {count} rings, vhost-user can name {VRING_INDEX_MAX + 1}")
        self._ring_events = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        # Into the list one after the other: what was made is closed with the device.
        for group in self.make_groups(self._ring_events.fileno()):
            self._groups.append(group)
        self._queues.groups_changed()
        self.callback_groups = [group for group in self._groups if isinstance(group, CallbackGroup)]

    def _drop_groups(self) -> None:
        self.groups_dropped()
        for group in self._groups:
            group.close()
        self._groups, self.callback_groups = [], []
        self._queues.groups_changed()
        self._memory = None
        self._drop_records()
        if self._ring_events is not None:
            asyncio.get_running_loop().remove_reader(self._ring_events.fileno())
            self._ring_events.close()
            self._ring_events = None
        self._notes.stop()

    def _state(self) -> SessionState:
        state = self.session_state
        assert state is not None, self.id
        return state

    def _make_endpoint(self, contact: Contact) -> Endpoint:
        return Endpoint(contact, self, self.offer(), config=self.config_space())

    def _rewind(self) -> None:
        """Every ring is back at the beginning: stopping it wrote down where it stood."""
        for vring in self._state().vrings:
            vring.next_avail = 0


def _check_acked(state: DeviceState, offered: Offer) -> None:
    """A session that comes goes on with what it was offered; one that begins again is offered what is here."""
    if state.socket is not None:
        check_servable(state.features_acked, offered.all_servable_features, "features")
    elif missing := state.features_acked & ~offered.all_features:
        raise PeerError(
            f"the guest uses features {state.features_acked:#x}, of which {missing:#x} are not offered here"
        )


def _check_connections(connections: Sequence[ConnectionState], offered: Offer) -> None:
    if len(connections) > 1:
        raise PeerError(f"{len(connections)} sessions came, and this release serves one")
    for connection in connections:
        check_state(connection.session, offered)
        check_sizes(connection.session.regions)
        if connection.session.is_packed and connection.ledger is None:
            raise PeerError("the guest's rings are packed, and no ledger came that tells where they stand")


def _has_rings(group: RingGroup) -> bool:
    return any(position is not None for position in group.positions())


def _fileno(fd: OwnedFd | None) -> int | None:
    return None if fd is None else fd.fileno()
