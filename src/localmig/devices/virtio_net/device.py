"""The virtio-net device: what a frontend says becomes queue pairs that run between its rings and a TAP.

Owns:        guest memory, the queue pairs; when they run.
Never sees:  vhost-user bytes, packets, the migration stream.
Read next:   vhost_user/protocol.py for the events, dataplane/ for the queue pairs, state.py for what travels.

A queue pair runs while three things hold: the frontend wants one of its rings served, guest memory holds that ring,
and this process serves. The first two are decided in `_apply` alone; the third belongs to all devices together, see
device_api/queues.py.

A ring is served while it is started and enabled. The transmit rings behind the first pair are served while they are
started and the first pair's is enabled: a guest that goes to fewer queue pairs leaves packets in rings that its VMM
then disables, and its TCP repeats nothing that it believes to be in the device, so those connections would stand for
good. vhost-user ("Ring states") has such packets thrown away; they are sent, as the kernel's vhost does. A frontend
that disables the first pair as well pauses, leaves or resets its driver: its packets wait, and none of its rings is
read, because the guest may have other things in that memory now.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from localmig import dataplane, trace
from localmig.contact import ConnectTo, Contact, ListenAt
from localmig.dataplane import Counters, GuestMemory, Ledger, QueuePair, Ring
from localmig.device_api import Netdev, Offload, Part
from localmig.device_api.queues import Queues
from localmig.devices.virtio_net.features import check_acked, offer, tap_offloads
from localmig.devices.virtio_net.heir import ANYONE, NOBODY, STRANGER, Heir, HeirKind, heir_of, once_asked
from localmig.devices.virtio_net.info import QueuePairInfo, VirtioNetInfo
from localmig.devices.virtio_net.notes import NOT_SHARED, Notes, excess_note, set_up_notes
from localmig.devices.virtio_net.state import VIRTIO_NET, ConnectionState, SocketState, VirtioNetState
from localmig.errors import ConfigError, KernelError, LocalmigError, PeerError
from localmig.fds import OwnedFd
from localmig.trace import (
    DeviceNoted,
    GuestAnnounced,
    InterfaceChanged,
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
from localmig.vhost_user.protocol import (
    DeviceReset,
    Event,
    FeaturesSet,
    MemoryChanged,
    MtuSet,
    NotifiersChanged,
    Offer,
    RarpRequested,
    RequestRefused,
    SessionState,
    VringChanged,
    VringState,
    check_servable,
    check_state,
)
from localmig.vhost_user.session import Endpoint
from localmig.virtio import Feature, packed_ring, split_ring
from localmig.virtio.net import (
    MAC_LENGTH,
    OFFLOADS,
    LinkStatus,
    NetConfig,
    NetFeature,
    header_length,
    receive_queue,
    transmit_queue,
)

_logger = logging.getLogger(__name__)

_THREAD_ADVICE: Final = (
    "; each has a thread: raise RLIMIT_NPROC of this user, pids.max of the control group or sysctl kernel.threads-max"
)

POPULATE_SECONDS_MAX: Final = 0.01
"""For memory that a frontend adds while this process serves. The frontend waits for its reply meanwhile, and so do all
others. Ten milliseconds map a gigabyte of pages that exist, or look through gigabytes that have none; the rest comes by
page faults."""

THREAD_NAME_LENGTH_MAX: Final = 15
"""TASK_COMM_LEN is 16, and the last byte is NUL (linux/sched.h)."""


class VirtioNet(Part):
    """A NIC with as many queue pairs as its netdev has queues.

    Args:
        id: the user's name for it.
        netdev: its host side, which this device reads and writes but does not own.
        socket: where and how frontends come.
        local_migration: whether its descriptors may move.
        offloads: which of `virtio.net.OFFLOADS` may be offered.
        mac: the guest's Ethernet address, for frontends and drivers that take it from the device.
        packed: whether packed rings are offered.
        rings: what starts and stops its queue pairs together with all others.
        tracer: where facts go.
    """

    setup = VIRTIO_NET

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the user's word
        netdev: Netdev,
        socket: ListenAt | ConnectTo,
        local_migration: bool,
        rings: Queues,
        tracer: Tracer,
        offloads: NetFeature = OFFLOADS,
        mac: bytes | None = None,
        packed: bool = False,
    ) -> None:
        self.id = id
        self._netdev = netdev
        self._socket = socket
        self._local_migration = local_migration
        self._tracer = tracer
        self._offloads = offloads
        self._packed = packed
        self._own_mac = mac
        self._known_mac = mac
        """The guest's address as far as anybody said it, for the network."""
        self._endpoint: Endpoint | None = None
        self._memory: GuestMemory | None = None
        self._ledger: Ledger | None = None
        self._ledger_file: OwnedFd | None = None
        self._ring_errors: OwnedFd | None = None
        self._pairs: list[QueuePair] = []
        self._rings = rings
        self._awaits_netdev = False
        self._config_there = NetConfig()
        """The configuration space as the source had it, where there was one."""
        self._receiving: dict[int, int] = {}
        """Queue pairs whose receive ring is served, and where a ring of its format begins."""
        self._heirs: dict[int, Heir] = {}
        """Whom the waiting frames of other queue pairs are for."""
        self._failures: dict[int, str] = {}
        """Why a ring failed last, by its vring's number."""
        self._frame_length_laid_out = 0
        """Bytes of the longest frame that the queue pairs have room for."""
        self._notes = Notes(self._find_notes, self._is_untouched, self._tell_note)
        self._kicks_before: dict[int, tuple[OwnedFd, int]] = {}
        """Of the first queue pair's rings: the kick descriptor, and how many kicks are not its driver's."""
        self._vring_count_asked = 0
        """As the last session's, if that had too many."""
        self._closed_because: str | None = None
        rings.join(self)
        netdev.observer = self

    @property
    def queue_pair_count(self) -> int:
        """Queue pairs it has while it is open."""
        return self._netdev.queue_count

    @property
    def queue_pairs(self) -> Sequence[QueuePair]:
        """Those that exist now."""
        return self._pairs

    # -- serving ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Listens, or sees to a connection. The netdev is open already."""
        self._make_pairs()
        if self._netdev.is_fresh:
            # What the kernel sends by itself when an interface comes up, IPv6 for one, is for no driver.
            self._heirs = dict.fromkeys(range(self._netdev.queue_count), NOBODY)
        try:
            self._endpoint = self._make_endpoint(self._socket.open())
        except BaseException:
            self._drop_pairs()
            raise

    def resume(self) -> None:
        """Nothing: its queue pairs start with all others, see `Queues`."""

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
        assert self._ring_errors is not None, self.id
        self._endpoint.contact.claim()
        if (state := self._session_state()) is not None:
            self._netdev.mtu_told = state.mtu
        self._tell_network()
        self._endpoint.thaw()
        asyncio.get_running_loop().add_reader(self._ring_errors.fileno(), self._report_rings)
        self._note_kicks()
        self._notes.expect()
        self._apply_options()

    def close(self) -> None:
        """Ends the session, removes the socket."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        self._drop_pairs()

    # -- to be seen ---------------------------------------------------------------------------------------------

    def info(self) -> VirtioNetInfo:
        """The session as the frontend told it, and each ring as its queue pair has it."""
        state = self._session_state()
        return VirtioNetInfo(
            id=self.id,
            netdev=self._netdev.id,
            socket=self._socket.path,
            server=isinstance(self._socket, ListenAt),
            mac=self._known_mac,
            session=None if state is None else SessionInfo.of(state),
            vrings=() if state is None else tuple(self._vring_infos(state)),
            queue_pairs=tuple(
                QueuePairInfo(index=index, running=self._runs(pair), counters=Counters(*pair.counters()))
                for index, pair in enumerate(self._pairs)
            ),
            notes=self._notes.get(),
        )

    def _runs(self, pair: QueuePair) -> bool:
        """Whether packets move: what a guest sends to an interface that is gone is only taken out of its ring."""
        return pair.is_running() and not self._netdev.is_gone

    def _vring_infos(self, state: SessionState) -> Iterator[VringInfo]:
        for number, pair in enumerate(self._pairs):
            # Not `pair.failed()`: what it knows and nobody has reported yet has no reason to tell either.
            for index, position in zip((receive_queue(number), transmit_queue(number)), pair.positions(), strict=True):
                vring = state.vrings[index]
                yield VringInfo(
                    index=index,
                    size=vring.size,
                    started=vring.started,
                    enabled=vring.enabled,
                    running=self._runs(pair) and position is not None and not vring.failed,
                    position=vring.next_avail if position is None else position,
                    failed=vring.failed,
                    # Where it failed before a handover, the source's log has the reason.
                    failure=self._failures.get(index) if vring.failed else None,
                )

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

    def save_setup(self, *, with_descriptors: bool) -> VirtioNetState:
        """The session as it stands; its descriptors stay this device's."""
        assert self._endpoint is not None, self.id
        session = self._endpoint.session
        socket = None
        if with_descriptors:
            connection = None
            if session is not None:
                connection = ConnectionState(
                    connection=session.connection, session=session.backend.state, ledger=self._ledger_file
                )
            socket = SocketState(listener=self._endpoint.contact.save(), connection=connection)
        return VirtioNetState(
            features_acked=session.backend.state.features_acked if session is not None else 0,
            mac=self._known_mac or b"",
            config=session.backend.config if session is not None else self._endpoint.config,
            heirs=self._saved_heirs() if with_descriptors else (),
            socket=socket,
        )

    def release(self) -> None:
        """Drops socket, connection, memory and rings: another process serves them."""
        if self._endpoint is not None:
            self._endpoint.release()
            self._endpoint = None
        self._drop_pairs()

    # -- destination --------------------------------------------------------------------------------------------

    def check_setup(self, state: VirtioNetState) -> None:
        """Whether this daemon can serve the session: its features, its rings, its memory table."""
        # Whether the TAP knows USO is known once it is here: `adopt_setup` looks again.
        offered = self._offer(has_uso=True)
        self._check_acked(state, offered)
        if len(state.mac) not in (0, MAC_LENGTH):
            raise PeerError(f"device '{self.id}': Ethernet address of {len(state.mac)} bytes, must be {MAC_LENGTH}")
        _read_config(self.id, state.config)
        if state.socket is None:
            return
        if len(state.heirs) != self.queue_pair_count or any(heir.kind > max(HeirKind) for heir in state.heirs):
            raise PeerError(f"device '{self.id}': {state.heirs} is not an heir for each queue pair")
        try:
            self._socket.check(state.socket.listener)
            if state.socket.connection is not None:
                _check_connection(state.socket.connection, offered)
        except PeerError as error:
            raise PeerError(f"device '{self.id}': {error}") from error

    def adopt_setup(self, state: VirtioNetState) -> None:
        """Takes over socket and session, maps guest memory and lays out the queue pairs, parked.

        Without descriptors it listens beside the path, which is the source's until `thaw` claims it. Again: queue pairs
        stay, and so does memory that is the same.
        """
        memory = self._memory
        self._drop_adopted()
        if not self._pairs:
            self._make_pairs()
        self._known_mac = self._own_mac or state.mac or None
        self._awaits_netdev = not self._netdev.is_open
        self._config_there = _read_config(self.id, state.config)
        self._check_acked(state, self._offer(has_uso=self._netdev.has_uso))
        if state.socket is None:
            self._endpoint = self._make_endpoint(self._socket.open_beside())
            return
        self._endpoint = self._make_endpoint(self._socket.adopt(state.socket.listener))
        self._heirs = dict(enumerate(state.heirs))
        self._receiving.clear()
        try:
            if state.socket.connection is not None:
                connection = state.socket.connection
                self._ledger_file = connection.ledger
                self._endpoint.adopt_session(connection.connection, connection.session, config=state.config)
                self._map_ledger()
                for index in range(len(self._pairs)):
                    self._go_on_receiving(index)
                # A frontend that spoilt its memory since it announced it loses its own rings and stops no handover.
                self._memory = self._map_memory(lambda regions: GuestMemory.adopt(regions, memory))
                if self._memory is not None:
                    self._rings.populate(self._memory)
            for index in range(len(self._pairs)):
                self._lay_out(index)
        except PeerError as error:
            raise PeerError(f"device '{self.id}': {error}") from error

    def recover(self) -> None:
        """Sees to it that frontends find it: who died may have claimed the socket's path. Rings: see `Queues`."""
        assert self._endpoint is not None, self.id
        self._endpoint.contact = self._socket.recover(self._endpoint.contact)

    def take_notes(self) -> list[str]:
        """Rings whose used index in guest memory stands elsewhere than the source said."""
        return [
            f"device '{self.id}': {text}"
            for index in range(len(self._pairs))
            for text in self._report_corrections(index, logging.WARNING)
        ]

    def source_released(self) -> None:
        """A TAP that the source had open until now is there at last, and rings that waited for it can run."""
        if self._awaits_netdev and self._netdev.is_open:
            assert self._endpoint is not None, self.id
            self._config_changed()
            if self._endpoint.session is not None:
                self._set_up_netdev()
            self._apply_all()
            # Not before: after an error this is called again.
            self._awaits_netdev = False

    def discard(self) -> None:
        """Drops what was adopted; a socket of our own, beside the source's, goes too."""
        self._drop_adopted()
        self.release()

    def _drop_adopted(self) -> None:
        """Drops what was adopted, all but the queue pairs, which keep their memory until they are laid out again."""
        if self._endpoint is not None:
            self._endpoint.discard()
            self._endpoint = None
        self._memory = None
        self._drop_ledger()

    # -- the network --------------------------------------------------------------------------------------------

    def needs_announcement(self) -> bool:
        """A TAP that came is where it was; one of this process's own is on another port of the network."""
        return self._netdev.is_open and not self._netdev.has_arrived

    def announcement_blocker(self) -> str | None:
        """Without an address there is nothing to tell."""
        if self._known_mac is None:
            return f"device '{self.id}': the guest's Ethernet address is not known; say it with mac="
        return None

    def announce(self) -> None:
        """Broadcasts a RARP for the guest, as QEMU does for one that cannot do it by itself."""
        if self._rings.serving and self._known_mac is not None:
            self._send_rarp(self._known_mac)

    def interface_changed(self) -> None:
        """The guest is told the interface's MTU and whether its link is up. See `NetdevObserver`."""
        if self._endpoint is None:
            return
        if self._netdev.frame_length_max > self._frame_length_laid_out:
            self._lay_out_again()
        self._config_changed()
        self._tracer.emit(InterfaceChanged(device=self.id, mtu=self._netdev.mtu, link_is_up=self._netdev.link_is_up))

    def queues_changed(self) -> None:
        """The queue pairs read and write the interface that was attached. See `NetdevObserver`."""
        if self._endpoint is not None:
            # A successor lays its queue pairs out again too: the descriptors that it has of the TAP close next.
            self._endpoint.note_change()
        self._lay_out_again()

    def _lay_out_again(self) -> None:
        """As when the frontend sets everything up; a session that cannot go on ends."""
        session = self._endpoint.session if self._endpoint is not None else None
        try:
            if session is not None:
                self._set_up_netdev()
            self._apply_all()
        except LocalmigError as error:
            for pair in self._pairs:
                pair.release()  # the TAP's old descriptors may close next
            _logger.warning("device '%s': %s", self.id, error)
            if session is not None:
                # Not now: this may be in the middle of one of its messages.
                asyncio.get_running_loop().call_soon(session.close, str(error))

    # -- the frontend's events ----------------------------------------------------------------------------------

    def session_opened(self) -> None:
        """Rings come later, by their events."""
        self._tracer.emit(SessionOpened(device=self.id))
        self._notes.expect()

    def handle(self, event: Event) -> None:
        """Makes the queue pairs what the session's state says. See `SessionHandler`."""
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
                self._apply(vring // 2, anew=vring if anew else None)
                assert self._endpoint is not None, self.id
                for drained, leader in self._endpoint.offer.drained_vrings.items():
                    if leader == vring:
                        self._apply(drained // 2)
            case NotifiersChanged(index=vring):
                self._set_notifiers(vring)
            case RequestRefused(reason=reason):
                self._note_refusal(reason)
            case FeaturesSet():
                self._make_ledger()
                self._set_up_netdev()
                self._apply_all()
            case MemoryChanged():
                self._change_memory()
            case DeviceReset():
                self._set_up_netdev()
                for index in range(len(self._pairs)):
                    self._end_receiving(index)
                self._apply_all()
                self._rewind()
            case MtuSet(mtu=mtu):
                self._check_mtu(mtu)
                self._netdev.mtu_told = mtu
            case RarpRequested(mac=mac):
                self._known_mac = mac
                self._send_rarp(mac)
            case _:
                raise AssertionError(event)

    def session_closed(self, reason: str | None) -> None:
        """Every ring stops: its descriptors close next."""
        for index, pair in enumerate(self._pairs):
            self._stop(index)
            self._end_receiving(index)
            self._note_asked(index)
            pair.release()
        self._memory = None
        self._failures.clear()
        self._kicks_before.clear()
        self._drop_ledger()
        self._netdev.mtu_told = 0
        self._reset_netdev()
        self._vring_count_asked = self._asked_now()
        if reason is not None:
            # A frontend that comes again and again with the same mistake fills no log.
            level = logging.WARNING if reason != self._closed_because else logging.DEBUG
            _logger.log(level, "device '%s': session closed: %s", self.id, reason)
        self._closed_because = reason
        self._tracer.emit(SessionClosed(device=self.id, reason=reason))

    # -- queue pairs --------------------------------------------------------------------------------------------

    def _apply_all(self) -> None:
        for index in range(len(self._pairs)):
            self._apply(index)

    def _apply(self, index: int, *, anew: int | None = None) -> None:
        """Stops the queue pair, lays it out as the session says, lets it run if it shall.

        `anew` is a ring of it that the frontend sets up again, so that a failure until now is over.
        """
        # Steered first: while the kernel detaches a queue, what waits in it is still read.
        self._steer(index)
        self._stop(index, anew=anew)
        is_received = self._is_received(index)
        if not is_received:
            self._end_receiving(index)
        self._lay_out(index)
        if is_received:
            self._begin_receiving(index)
        self._settle(index)
        if index == 0:
            self._note_kicks()
            self._tell_network()
        if self._rings.serving:
            self._start(index)

    def _tell_network(self) -> None:
        """The interface has a carrier while a driver serves the NIC, where that is asked for."""
        if not self._netdev.is_open:
            return
        try:
            if self._is_received(0):
                self._netdev.driver_begins()
            else:
                self._netdev.driver_ends()
        except KernelError as error:
            # Neither a session nor a handover ends for that: a macvtap that arrived has no carrier to turn.
            _logger.warning("device '%s': %s", self.id, error)

    def _steer(self, index: int) -> None:
        """Attaches the pair's TAP queue where the guest receives from it, and detaches it where it does not.

        A VMM that only pauses leaves the ring enabled: what comes meanwhile waits.
        """
        if index == 0 or not self._netdev.is_open:
            return
        if self._receives(index):
            self._netdev.attach(index)
        else:
            self._netdev.detach(index)

    def _receives(self, index: int) -> bool:
        """Whether the pair's TAP queue is attached: the first one always is."""
        state = self._session_state()
        vring = state.vrings[receive_queue(index)] if state is not None else VringState()
        return index == 0 or (vring.enabled and vring.is_configured)

    def _is_received(self, index: int) -> bool:
        """Whether the pair's receive ring is the device's to serve."""
        state, vring = self._session_state(), receive_queue(index)
        return state is not None and self._endpoint is not None and self._endpoint.offer.serves(vring, state.vrings)

    def _begin_receiving(self, index: int) -> None:
        """A driver receives from now on: what waits is for this one, or the queue pair reads it out."""
        state = self._session_state()
        assert state is not None, self.id
        if index in self._receiving:
            return
        self._note_asked(index)
        state.vrings[receive_queue(index)].base_told = False
        start = self._receiving[index] = _start_of_rings(state)
        pair, heir = self._pairs[index], self._heirs.pop(index, STRANGER)
        if heir.kind == HeirKind.STRANGER:
            pair.refuse_waiting(start)
        elif heir.kind != HeirKind.ANYONE:
            pair.reserve_waiting(heir.position if heir.kind == HeirKind.RING else None)

    def _go_on_receiving(self, index: int) -> None:
        """A driver may receive that did so in the source: nothing that waits is for another one."""
        state = self._session_state()
        assert state is not None, self.id
        if self._is_received(index) and self._heirs[index].kind == HeirKind.ANYONE:
            del self._heirs[index]
            self._receiving[index] = _start_of_rings(state)

    def _end_receiving(self, index: int) -> None:
        """No driver receives from now on."""
        state, start = self._session_state(), self._receiving.pop(index, None)
        if start is not None and state is not None:
            self._heirs[index] = heir_of(state.vrings[receive_queue(index)].next_avail, start=start)

    def _note_asked(self, index: int) -> None:
        """Takes note that the frontend has asked where the receive ring stood."""
        state = self._session_state()
        if state is not None and state.vrings[receive_queue(index)].base_told and index in self._heirs:
            self._heirs[index] = once_asked(self._heirs[index])

    def _saved_heirs(self) -> tuple[Heir, ...]:
        return tuple(
            ANYONE if index in self._receiving else self._heirs.get(index, STRANGER)
            for index in range(self._netdev.queue_count)
        )

    def _change_memory(self) -> None:
        """Goes on with the session's new table. Queue pairs whose rings stay where they are do not stop for it.

        Raises as `_map_memory`; then nothing changed.
        """
        memory = self._map_memory(lambda regions: GuestMemory(regions, self._memory))
        # Before any ring meets it, and while all rings run.
        populated = 0 if memory is None else memory.populate(POPULATE_SECONDS_MAX)
        swapped = [False] * len(self._pairs) if memory is None else dataplane.swap_memory(self._pairs, memory)
        # From here on the former memory has no user but the queue pairs that were not swapped.
        self._memory = memory
        undisturbed = tuple(index for index, done in enumerate(swapped) if done and not self._awaits_memory(index))
        for index in range(len(self._pairs)):
            if index not in undisturbed:
                self._apply(index)
        self._tracer.emit(
            MemoryMapped(
                device=self.id,
                regions=len(self._regions()),
                populated_bytes=populated,
                undisturbed_queue_pairs=undisturbed,
            )
        )

    def _awaits_memory(self, index: int) -> bool:
        """Whether a ring of the queue pair was not in the former memory, and is in the present one."""
        state = self._session_state()
        assert state is not None, self.id
        rings = zip((receive_queue(index), transmit_queue(index)), self._pairs[index].positions(), strict=True)
        return any(position is None and self._ring(state, vring) is not None for vring, position in rings)

    def _set_notifiers(self, vring: int) -> None:
        """Lets a ring call its driver by the descriptors that the session has now; it goes on meanwhile."""
        state = self._session_state()
        assert state is not None, self.id
        call, error = _fileno(state.vrings[vring].call), _fileno(state.vrings[vring].error)
        direction = "rx" if vring == receive_queue(vring // 2) else "tx"
        try:
            self._pairs[vring // 2].set_notifiers(direction, call_fd=call, error_fd=error)
        except ValueError as reason:
            raise PeerError(f"queue pair {vring // 2}: {reason}") from reason

    def _make_ledger(self) -> None:
        """Packed rings need a ledger from the first packet on."""
        state = self._session_state()
        assert state is not None, self.id
        if not state.is_packed or self._ledger is not None:
            return
        try:
            self._ledger_file = OwnedFd(Ledger.create(len(state.vrings)))
        except OSError as error:
            raise KernelError(f"cannot make a ledger: {error.strerror}", errno=error.errno or 0) from error
        self._map_ledger()

    def _map_ledger(self) -> None:
        state = self._session_state()
        assert state is not None, self.id
        if self._ledger_file is None:
            return
        try:
            self._ledger = Ledger(self._ledger_file.fileno(), len(state.vrings))
        except ValueError as error:
            raise PeerError(str(error)) from error
        except OSError as error:
            raise KernelError(f"cannot map the ledger: {error.strerror}", errno=error.errno or 0) from error

    def _drop_ledger(self) -> None:
        self._ledger = None
        if self._ledger_file is not None:
            self._ledger_file.close()
            self._ledger_file = None

    def _settle(self, index: int) -> None:
        """Writes into the ledger where rings go on that may not run for a while, and may run elsewhere next."""
        state = self._session_state()
        if state is not None and state.is_packed and self._ledger is not None:
            for vring in (receive_queue(index), transmit_queue(index)):
                self._ledger.settle(vring, state.vrings[vring].next_avail)

    def _regions(self) -> Sequence[MemoryRegion]:
        state = self._session_state()
        assert state is not None, self.id
        return state.regions

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

    def _lay_out(self, index: int) -> None:
        """Tells the stopped queue pair where its rings are, or that it has none."""
        state, pair = self._session_state(), self._pairs[index]
        rx = tx = None
        if state is not None and self._memory is not None and self._netdev.is_open:
            rx, tx = self._ring(state, receive_queue(index)), self._ring(state, transmit_queue(index))
        if rx is None and tx is None:
            pair.release()
            return
        assert state is not None, self.id
        assert self._memory is not None, self.id
        self._frame_length_laid_out = self._netdev.frame_length_max
        try:
            pair.configure(
                memory=self._memory,
                # A detached queue sends nothing; all of them send into the same interface.
                host=self._netdev.host(index if self._receives(index) else 0),
                header_length=header_length(state.features_acked),
                frame_length_max=self._netdev.frame_length_max,
                # What waits may come with all that this driver took, also if the options allow less since.
                offloads=int(tap_offloads(state.features_acked, OFFLOADS)),
                event_index=bool(state.features_acked & Feature.RING_EVENT_IDX),
                indirect=bool(state.features_acked & Feature.RING_INDIRECT_DESC),
                mergeable=bool(state.features_acked & NetFeature.MRG_RXBUF),
                rx=rx,
                tx=tx,
                packed=state.is_packed,
            )
        except ValueError as error:
            raise PeerError(f"queue pair {index}: {error}") from error

    def _ring(self, state: SessionState, index: int) -> Ring | None:
        vring = state.vrings[index]
        assert self._endpoint is not None, self.id
        if not self._endpoint.offer.serves(index, state.vrings) or vring.failed:
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
        )

    def _start(self, index: int) -> None:
        pair = self._pairs[index]
        if _has_rings(pair):
            self._tracer.emit(RingsStarted(device=self.id, queue_pair=index, at_ns=pair.start()))
            # The frontend told the position. Cloud Hypervisor always tells another, so that is no news for people.
            self._report_corrections(index, logging.DEBUG)

    def _stop(self, index: int, *, anew: int | None = None) -> None:
        """Stops the queue pair and writes its positions into the session's state. `anew` as in `_apply`."""
        pair, state = self._pairs[index], self._session_state()
        was_running = pair.is_running()
        positions = pair.stop()
        rings = zip((receive_queue(index), transmit_queue(index)), positions, pair.failed(), strict=True)
        for vring, position, failed in rings:
            if state is None or position is None:
                continue
            if vring != anew or (state.vrings[vring].started and not failed):
                state.vrings[vring].next_avail = position
        self._note_failed(index, anew=anew)
        if was_running:
            self._tracer.emit(RingsStopped(device=self.id, queue_pair=index))

    def _note_failed(self, index: int, *, anew: int | None = None) -> None:
        """Writes into the session's state which rings of a queue pair stopped for good. `anew` as in `_apply`."""
        state = self._session_state()
        pair = self._pairs[index]
        rings = zip((receive_queue(index), transmit_queue(index)), pair.positions(), pair.failed(), strict=True)
        for vring, position, failed in rings:
            # One that the frontend stopped meanwhile begins anew.
            if failed and position is not None and state is not None and state.vrings[vring].started and vring != anew:
                state.vrings[vring].failed = True
                state.vrings[vring].next_avail = position

    def _report_rings(self) -> None:
        assert self._ring_errors is not None
        os.read(self._ring_errors.fileno(), 8)
        for index, pair in enumerate(self._pairs):
            # All pairs started together, so a handover told the positions, or this process itself, which went on.
            self._report_corrections(index, logging.WARNING)
            for direction, reason in pair.take_ring_errors():
                vring = _vring_of(index, direction)
                self._failures[vring] = reason
                _logger.warning("device '%s': vring %s (%s) stopped: %s", self.id, vring, direction, reason)
                self._tracer.emit(RingFailed(device=self.id, vring=vring, reason=reason))
            self._note_failed(index)
        # A queue pair whose TAP's interface is gone signals too. The netdev knows, and may attach another one.
        self._netdev.look_soon()

    def _report_corrections(self, index: int, level: int) -> list[str]:
        """Tells of rings that began elsewhere than they were told, and gives the same as text."""
        texts = []
        for direction, told, begun in self._pairs[index].take_corrections():
            vring = _vring_of(index, direction)
            text = f"vring {vring} ({direction}) goes on at {begun}, where its used index stands, and was told {told}"
            _logger.log(level, "device '%s': %s", self.id, text)
            self._tracer.emit(RingCorrected(device=self.id, vring=vring, told=told, begun=begun))
            texts.append(text)
        return texts

    def _note_refusal(self, reason: str) -> None:
        _logger.warning("device '%s': the frontend's request is refused: %s", self.id, reason)
        self._tracer.emit(trace.RequestRefused(device=self.id, reason=reason))

    # -- what keeps it from working -----------------------------------------------------------------------------

    def _find_notes(self) -> Iterator[str]:
        if asked := self._asked_now():
            yield excess_note(self.id, self._netdev.id, asked=-(-asked // 2), there=len(self._pairs))
        if self._endpoint is None or self._endpoint.session is None:
            return
        backend = self._endpoint.session.backend
        yield from set_up_notes(backend.state, has_spoken=backend.has_spoken)
        kicks = self._kicks()
        if any(kicks[vring] > before for vring, (_, before) in self._kicks_before.items()) and self._is_untouched():
            yield NOT_SHARED

    def _tell_note(self, note: str) -> None:
        _logger.warning("device '%s': %s", self.id, note)
        self._tracer.emit(DeviceNoted(device=self.id, note=note))

    def _asked_now(self) -> int:
        """How many vrings the frontend has, or the last one had, where those are too many; else 0."""
        state = self._session_state()
        if state is None or not (state.vring_count_asked or state.was_served):
            return self._vring_count_asked
        return state.vring_count_asked

    def _is_untouched(self) -> bool:
        """Whether the first queue pair runs and the driver has written into neither ring, as far as memory tells."""
        state = self._session_state()
        if state is None or self._memory is None or not self._pairs or not self._pairs[0].is_running():
            return False
        indices = receive_queue(0), transmit_queue(0)
        if any(state.vrings[index].failed for index in indices):
            return False
        return all(
            position is not None and self._is_vring_untouched(self._memory, state, index, position)
            for index, position in zip(indices, self._pairs[0].positions(), strict=True)
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
        state = self._session_state()
        for (vring, count), position in zip(self._kicks().items(), self._pairs[0].positions(), strict=True):
            kick = None if state is None else state.vrings[vring].kick
            # Only of a ring that is laid out it is known what the descriptor is: a file's server may hold poll(2) up.
            if kick is None or position is None:
                continue
            if vring not in self._kicks_before or self._kicks_before[vring][0] is not kick:
                pending = select.poll()
                pending.register(kick.fileno(), select.POLLIN)
                self._kicks_before[vring] = kick, count + len(pending.poll(0))

    def _kicks(self) -> dict[int, int]:
        """How often each ring of the first queue pair was kicked."""
        counters = Counters(*self._pairs[0].counters())
        return {receive_queue(0): counters.rx_kicks, transmit_queue(0): counters.tx_kicks}

    # -- small things -------------------------------------------------------------------------------------------

    def _make_pairs(self) -> None:
        self._ring_errors = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        for index in range(self._netdev.queue_count):
            try:
                self._pairs.append(QueuePair(thread_name(self.id, index), self._ring_errors.fileno()))
            except OSError as error:
                advice = _THREAD_ADVICE if error.errno == errno.EAGAIN else ""
                raise KernelError(
                    f"device '{self.id}': cannot make queue pair {index}: {os.strerror(error.errno or 0)}{advice}",
                    errno=error.errno or errno.EIO,
                ) from error

    def _drop_pairs(self) -> None:
        for pair in self._pairs:
            pair.close()
        self._pairs = []
        self._memory = None
        self._drop_ledger()
        if self._ring_errors is not None:
            asyncio.get_running_loop().remove_reader(self._ring_errors.fileno())
            self._ring_errors.close()
            self._ring_errors = None
        self._notes.stop()

    def _session_state(self) -> SessionState | None:
        return self._endpoint.state if self._endpoint is not None else None

    def _offer(self, *, has_uso: bool) -> Offer:
        return offer(
            queue_pair_count=self._netdev.queue_count,
            offloads=self._offloads,
            has_offloads=self._netdev.has_offloads,
            has_uso=has_uso,
            has_mac=self._own_mac is not None,
            packed=self._packed,
        )

    def _make_endpoint(self, contact: Contact) -> Endpoint:
        return Endpoint(contact, self, self._offer(has_uso=self._netdev.has_uso), config=self._config())

    def _check_acked(self, state: VirtioNetState, offered: Offer) -> None:
        """A session that comes goes on with what it was offered; one that begins again is offered what is here."""
        try:
            if state.socket is None:
                check_acked(state.features_acked, offered)
            else:
                check_servable(state.features_acked, offered.all_servable_features, "features")
        except PeerError as error:
            raise PeerError(f"device '{self.id}': {error}") from error

    def _config(self) -> bytes:
        return NetConfig(
            # A session that was offered an address goes on with it.
            mac=self._own_mac or self._config_there.mac,
            # A link that waits for its interface, in a handover, is not told to be down.
            status=LinkStatus.LINK_UP if self._netdev.link_is_up or not self._netdev.is_open else 0,
            queue_pair_count_max=self._netdev.queue_count,
            # One that is awaited is most likely the interface that the source has.
            mtu=self._netdev.mtu if self._netdev.is_open else self._config_there.mtu,
        ).encode()

    def _config_changed(self) -> None:
        """What the configuration space tells of the netdev may differ now: frontends that can hear of that do."""
        if self._endpoint is not None:
            self._endpoint.change_config(self._config())

    def _set_up_netdev(self) -> None:
        """The TAP's vnet header and offloads become what the guest acknowledged. Rings stand still meanwhile."""
        state = self._session_state()
        assert state is not None
        if self._netdev.is_open:
            for index in range(len(self._pairs)):
                self._stop(index)
            self._netdev.set_vnet_header_length(header_length(state.features_acked))
            self._netdev.set_offloads(tap_offloads(state.features_acked, self._offloads))

    def _apply_options(self) -> None:
        """Leaves to a guest that a handover brought what our options allow, which may be less or more than theirs did.

        Not before the guest runs again: setting it may wait for whoever configures an interface just now, and until
        then the guest gets nothing that it did not acknowledge.
        """
        state = self._session_state()
        if state is None or not self._netdev.is_open:
            return
        if tap_offloads(state.features_acked, self._offloads) != self._netdev.offloads:
            try:
                self._set_up_netdev()
            except KernelError as error:
                _logger.warning("device '%s': %s", self.id, error)
            self._apply_all()

    def _reset_netdev(self) -> None:
        """Nobody is there to take anything over: the TAP has one queue, and every frame comes whole."""
        if not self._netdev.is_open:
            return
        try:
            for index in range(1, self._netdev.queue_count):
                self._netdev.detach(index)
            self._netdev.set_offloads(Offload(0))
            self._netdev.driver_ends()
        except KernelError as error:
            # The session ends all the same, and the next one sets what it needs.
            _logger.warning("device '%s': %s", self.id, error)

    def _send_rarp(self, mac: bytes) -> None:
        if self._netdev.is_open:
            self._netdev.inject(_rarp_frame(mac))
            self._tracer.emit(GuestAnnounced(device=self.id, mac=mac.hex(":")))

    def _rewind(self) -> None:
        """Every ring is back at the beginning: stopping it wrote down where it stood."""
        state = self._session_state()
        assert state is not None, self.id
        for vring in state.vrings:
            vring.next_avail = 0

    def _check_mtu(self, mtu: int) -> None:
        # Whatever the kernel has told of it so far may be late.
        self._netdev.look()
        if self._netdev.is_open and mtu > self._netdev.mtu:
            raise ConfigError(
                f"device '{self.id}': the frontend wants MTU {mtu}, netdev '{self._netdev.id}' has {self._netdev.mtu}"
            )


def _check_connection(connection: ConnectionState, offered: Offer) -> None:
    check_state(connection.session, offered)
    check_sizes(connection.session.regions)
    if connection.session.is_packed and connection.ledger is None:
        raise PeerError("the guest's rings are packed, and no ledger came that tells where they stand")


def _read_config(device: str, config: bytes) -> NetConfig:
    try:
        return NetConfig.decode(config)
    except PeerError as error:
        raise PeerError(f"device '{device}': {error}") from error


def thread_name(device: str, queue_pair: int) -> str:
    """What the thread of a queue pair is called. A long id is cut, never the number."""
    number = f"/{queue_pair}"
    return device[: THREAD_NAME_LENGTH_MAX - len(number)] + number


def _vring_of(pair: int, direction: str) -> int:
    return receive_queue(pair) if direction == "rx" else transmit_queue(pair)


def _start_of_rings(state: SessionState) -> int:
    return packed_ring.START if state.is_packed else split_ring.START


def _has_rings(pair: QueuePair) -> bool:
    return pair.positions() != (None, None)


def _rarp_frame(mac: bytes) -> bytes:
    """A reverse ARP request (RFC 903) for `mac`, broadcast, which teaches switches where the guest is now."""
    addresses = mac + bytes(4)
    return b"\xff" * 6 + mac + bytes.fromhex("8035 0001 0800 06 04 0003") + 2 * addresses + bytes(18)


def _fileno(fd: OwnedFd | None) -> int | None:
    return None if fd is None else fd.fileno()
