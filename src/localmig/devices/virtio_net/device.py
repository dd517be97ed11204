"""The virtio-net device: queue pairs that run between its rings and a netdev.

Owns:        what the netdev is set to, whom waiting frames are for, the configuration space; its feature bits.
Never sees:  packets, vhost-user bytes, a TAP.
Read next:   device_api/vhost_user_device.py for all that is the same with every device, queue_pairs.py for the engine,
             state.py for what travels.

A ring is served while it is started and enabled. The transmit rings behind the first pair are served while they are
started and the first pair's is enabled: a guest that goes to fewer queue pairs leaves packets in rings that its VMM
then disables, and its TCP repeats nothing that it believes to be in the device, so those connections would stand for
good. vhost-user ("Ring states") has such packets thrown away; they are sent, as the kernel's vhost does. A frontend
that disables the first pair as well pauses, leaves or resets its driver: its packets wait, and none of its rings is
read, because the guest may have other things in that memory now.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Final

from localmig.contact import ConnectTo, ListenAt
from localmig.dataplane import Counters
from localmig.device_api import CallbackGroup, Netdev, Offload, Queues, RingGroup, VhostUserDevice
from localmig.devices.virtio_net.control import ERROR, OK, Announced, Command, OffloadsSet, PairsSet, read_command
from localmig.devices.virtio_net.features import has_control_queue, offer, tap_offloads
from localmig.devices.virtio_net.heir import ANYONE, NOBODY, STRANGER, Heir, HeirKind, heir_of, once_asked
from localmig.devices.virtio_net.info import QueuePairInfo, VirtioNetInfo
from localmig.devices.virtio_net.queue_pairs import QueuePairRings
from localmig.devices.virtio_net.state import ALL_OFFLOADS, VIRTIO_NET, VirtioNetState
from localmig.errors import ConfigError, KernelError, LocalmigError, PeerError
from localmig.trace import GuestAnnounced, InterfaceChanged, Tracer
from localmig.vhost_user.protocol import Event, MtuSet, Offer, RarpRequested, SessionState, VringState
from localmig.virtio import packed_ring, split_ring
from localmig.virtio.net import (
    MAC_LENGTH,
    OFFLOADS,
    LinkStatus,
    NetConfig,
    NetFeature,
    control_queue,
    header_length,
    receive_queue,
)

_logger = logging.getLogger(__name__)

COMMANDS_AT_ONCE: Final = 16
"""Commands of one driver before others get a turn. A driver waits for the answer to each."""

_GUEST_OFFLOADS: Final = int(
    NetFeature.GUEST_CSUM
    | NetFeature.GUEST_TSO4
    | NetFeature.GUEST_TSO6
    | NetFeature.GUEST_ECN
    | NetFeature.GUEST_USO4
    | NetFeature.GUEST_USO6
)
"""What CTRL_GUEST_OFFLOADS_SET is about (section 5.1.6.5.6.1)."""


class VirtioNet(VhostUserDevice):
    """A NIC with as many queue pairs as its netdev has queues.

    Args:
        id: the user's name for it.
        netdev: its host side, which this device reads and writes but does not own.
        socket: where and how frontends come.
        local_migration: whether its descriptors may move.
        offloads: which of `virtio.net.OFFLOADS` may be offered.
        mac: the guest's Ethernet address, for frontends and drivers that take it from the device.
        packed: whether packed rings are offered.
        device_state: whether frontends that move the guest are offered this device's state (DEVICE_STATE).
        queues: what starts and stops its queue pairs together with all others.
        tracer: where facts go.
    """

    own_state = VIRTIO_NET

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the user's word
        netdev: Netdev,
        socket: ListenAt | ConnectTo,
        local_migration: bool,
        queues: Queues,
        tracer: Tracer,
        offloads: NetFeature = OFFLOADS,
        mac: bytes | None = None,
        packed: bool = False,
        device_state: bool = False,
    ) -> None:
        super().__init__(id=id, socket=socket, local_migration=local_migration, queues=queues, tracer=tracer)
        self._netdev = netdev
        self._control: CallbackGroup | None = None
        self._is_thawed = False
        self._is_obeying = False
        self._pairs_used = 0
        self._guest_offloads = ALL_OFFLOADS
        self._is_to_announce = False
        self._offloads = offloads
        self._packed = packed
        self._device_state = device_state
        self._own_mac = mac
        self._known_mac: bytes | None = None
        """The guest's address as far as anybody said it, for the network."""
        self._know_mac(mac)
        self._awaits_netdev = False
        self._receiving: dict[int, int] = {}
        """Queue pairs whose receive ring is served, and where a ring of its format begins."""
        self._heirs: dict[int, Heir] = {}
        """Whom the waiting frames of other queue pairs are for."""
        self._vring_count_asked = 0
        """As the last session's, if that had too many."""
        netdev.observer = self

    def ring_name(self, vring: int) -> str:
        """With its direction, as the guest sees it."""
        if vring == control_queue(self._netdev.queue_count):
            return f"vring {vring} (control)"
        return f"vring {vring} ({'tx' if vring % 2 else 'rx'})"

    # -- what it is -----------------------------------------------------------------------------------------------

    def offer(self) -> Offer:
        """As options and netdev allow."""
        return self._offer(has_uso=self._netdev.has_uso)

    def possible_offer(self) -> Offer:
        """Whether the netdev knows USO is known once it is here."""
        return self._offer(has_uso=True)

    def make_groups(self, event_fd: int) -> Iterator[RingGroup]:
        """A queue pair for each queue of the netdev."""
        for index in range(self._netdev.queue_count):
            yield QueuePairRings(self.id, index, self._netdev, event_fd)
        if has_control_queue(self._netdev.queue_count):
            self._control = CallbackGroup({control_queue(self._netdev.queue_count): "control"}, event_fd)
            yield self._control

    def keeps_chains(self, state: SessionState) -> bool:
        """If the frontend handed the control queue over."""
        return bool(state.features_acked & NetFeature.CTRL_VQ)

    def groups_dropped(self) -> None:
        """The control queue is closed next."""
        self._is_thawed = False
        self._obey_or_not()
        self._control = None

    def config_space(self) -> bytes:
        """The NIC's, with the netdev's present MTU and link."""
        there = NetConfig.decode(self.config_there) if self.config_there else NetConfig()
        return NetConfig(
            # A session that was offered an address goes on with it.
            mac=self._own_mac or there.mac,
            # A link that waits for its interface, in a handover, is not told to be down.
            status=(LinkStatus.LINK_UP if self._netdev.link_is_up or not self._netdev.is_open else 0)
            | (LinkStatus.ANNOUNCE if self._is_to_announce else 0),
            queue_pair_count_max=self._netdev.queue_count,
            # One that is awaited is most likely the interface that the source has.
            mtu=self._netdev.mtu if self._netdev.is_open else there.mtu,
        ).encode()

    def check_config(self, config: bytes) -> None:
        """Whether it is a NIC's."""
        NetConfig.decode(config)

    @property
    def can_serve(self) -> bool:
        """Whether the netdev is open."""
        return self._netdev.is_open

    # -- serving ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Listens, or sees to a connection. The netdev is open already."""
        if self._netdev.is_fresh or self._netdev.was_left:
            # What the kernel sends by itself when an interface comes up, IPv6 for one, is for no driver; nor is what
            # came for a NIC that is gone.
            self._heirs = dict.fromkeys(range(self._netdev.queue_count), NOBODY)
        super().open()

    def close(self) -> None:
        """Ends the session, removes the socket, and leaves the netdev, which may stay for another NIC."""
        super().close()
        if self._netdev.observer is self:
            self._netdev.observer, self._netdev.mac_told, self._netdev.was_left = None, b"", True

    def thawing(self) -> None:
        """The netdev shows what the session says."""
        if (state := self.session_state) is not None:
            self._netdev.mtu_told = state.mtu
        self._tell_network()

    def thaw(self) -> None:
        """Serves socket, connection and control queue."""
        super().thaw()
        self._apply_options()
        self._is_thawed = True
        self._obey_or_not()

    def freeze(self) -> None:
        """Leaves them alone from now on."""
        super().freeze()
        self._is_thawed = False
        self._obey_or_not()

    # -- to be seen ---------------------------------------------------------------------------------------------

    def info(self) -> VirtioNetInfo:
        """The session as the frontend told it, and each ring as its queue pair has it."""
        return VirtioNetInfo(
            **self.facts(),
            netdev=self._netdev.id,
            mac=self._known_mac,
            queue_pairs=tuple(
                QueuePairInfo(index=pair.index, running=self.moves(pair), counters=Counters(*pair.engine.counters()))
                for pair in self._pairs
            ),
        )

    def moves(self, group: RingGroup) -> bool:
        """Whether packets move: what a guest sends to an interface that is gone is only taken out of its ring."""
        return group.is_running() and not self._netdev.is_gone

    # -- what travels besides sessions and rings ------------------------------------------------------------------

    def save(self, *, with_descriptors: bool) -> VirtioNetState:
        """The guest's address, and for whom frames wait."""
        return VirtioNetState(
            mac=self._known_mac or b"",
            heirs=tuple(self._saved_heirs()) if with_descriptors else (),
            pairs_used=self._pairs_used,
            guest_offloads=self._guest_offloads,
            is_to_announce=self._is_to_announce,
        )

    def check(self, state: VirtioNetState) -> None:
        """Whether it is of a NIC with as many queue pairs."""
        if len(state.mac) not in (0, MAC_LENGTH):
            raise PeerError(f"device '{self.id}': Ethernet address of {len(state.mac)} bytes, must be {MAC_LENGTH}")
        if len(state.heirs) not in (0, self._netdev.queue_count) or any(
            heir.kind > max(HeirKind) for heir in state.heirs
        ):
            raise PeerError(f"device '{self.id}': {state.heirs} is not an heir for each queue pair")
        if state.pairs_used > self._netdev.queue_count:
            raise PeerError(
                f"device '{self.id}': the driver uses {state.pairs_used} of {self._netdev.queue_count} pairs"
            )

    def load(self, state: VirtioNetState) -> None:
        """Takes them over."""
        self._know_mac(self._own_mac or state.mac or None)
        self._heirs = dict(enumerate(state.heirs))
        self._receiving.clear()
        self._pairs_used, self._guest_offloads = state.pairs_used, state.guest_offloads
        self._is_to_announce = state.is_to_announce

    def load_moved(self, state: VirtioNetState) -> None:
        """Takes them over, but for the heirs: what waits here is not what waited there."""
        heirs = self._heirs
        self.load(state)
        self._heirs = heirs

    def adopt_setup(self, state: Any) -> None:
        """As every device; besides, the netdev may still be the source's."""
        self._awaits_netdev = not self._netdev.is_open
        super().adopt_setup(state)

    def session_adopted(self) -> None:
        """A driver may receive that did so in the source: nothing that waits is for another one."""
        for pair in self._pairs:
            if self.is_served(receive_queue(pair.index)) and self._heirs.get(pair.index) == ANYONE:
                del self._heirs[pair.index]
                self._receiving[pair.index] = self._start_of_rings()

    def source_released(self) -> None:
        """A netdev that the source had open until now is there at last, and rings that waited for it can run."""
        if self._awaits_netdev and self._netdev.is_open:
            self.change_config()
            if self.session_state is not None:
                self.features_changed()
            self.apply_all()
            # Not before: after an error this is called again.
            self._awaits_netdev = False

    # -- the network --------------------------------------------------------------------------------------------

    def needs_announcement(self) -> bool:
        """A TAP that came is where it was; one of this process's own is on another port of the network."""
        return self._netdev.is_open and not self._netdev.has_arrived

    def announcement_blocker(self) -> str | None:
        """Without an address, and a driver that announces itself, there is nothing to tell."""
        if self._known_mac is None and not self._driver_announces:
            return f"device '{self.id}': the guest's Ethernet address is not known; say it with mac="
        return None

    def announce(self) -> None:
        """Broadcasts a RARP for the guest, as QEMU does, and asks a driver that can to announce itself."""
        if not (self.is_open and self.is_serving):
            return
        if self._driver_announces:
            self._is_to_announce = True
            self.change_config()
        if self._known_mac is not None:
            self._send_rarp(self._known_mac)

    def interface_changed(self) -> None:
        """The guest is told the interface's MTU and whether its link is up. See `NetdevObserver`."""
        if not self.is_open:
            return
        if any(pair.is_too_short for pair in self._pairs):
            self.lay_out_again()
        self.change_config()
        self.tracer.emit(InterfaceChanged(device=self.id, mtu=self._netdev.mtu, link_is_up=self._netdev.link_is_up))

    def queues_changed(self) -> None:
        """The queue pairs read and write the interface that was attached. See `NetdevObserver`."""
        # A successor lays its queue pairs out again too: the descriptors that it has of the netdev close next.
        self.note_change()
        self.lay_out_again()

    # -- the frontend's events ----------------------------------------------------------------------------------

    def check_event(self, event: Event) -> None:
        """What only a NIC's frontend says."""
        match event:
            case MtuSet(mtu=mtu):
                self._check_mtu(mtu)
            case RarpRequested():
                pass  # any address will do
            case _:
                super().check_event(event)

    def on_event(self, event: Event) -> None:
        """It reaches the netdev."""
        match event:
            case MtuSet(mtu=mtu):
                self._netdev.mtu_told = mtu
            case RarpRequested(mac=mac):
                self._know_mac(mac)
                self._send_rarp(mac)
            case _:
                super().on_event(event)

    def session_began(self) -> None:
        """What the frontend said before reaches the netdev now."""
        state = self._state()
        self._netdev.mtu_told = state.mtu
        if state.announced_mac:
            self._know_mac(state.announced_mac)
            try:
                self._send_rarp(state.announced_mac)
            except KernelError as error:
                # The frontend has its answer, and the guest is no worse off than without.
                _logger.warning("device '%s': %s", self.id, error)

    def features_changed(self) -> None:
        """The netdev's vnet header and offloads become what the guest acknowledged. Rings stand still meanwhile."""
        state = self._state()
        if self._netdev.is_open:
            self.stop_groups(self._pairs)
            self._netdev.set_vnet_header_length(header_length(state.features_acked))
            self._netdev.set_offloads(self._offloads_now(state))

    def before_stop(self, group: RingGroup) -> None:
        """Attaches the pair's queue where the guest receives from it, and detaches it where it does not.

        Before the pair stops: while the kernel detaches a queue, what waits in it is still read. A VMM that only pauses
        leaves the ring enabled: what comes meanwhile waits.
        """
        if not isinstance(group, QueuePairRings):
            return
        if group.index == 0 or not self._netdev.is_open:
            return
        if self._receives(group.index):
            self._netdev.attach(group.index)
        else:
            self._netdev.detach(group.index)

    def before_layout(self, group: RingGroup) -> None:
        """Its netdev queue is attached or not."""
        if isinstance(group, QueuePairRings):
            group.is_attached = self._receives(group.index)

    def after_stop(self, group: RingGroup) -> None:
        """A receive ring that is not served any more leaves its frames to somebody."""
        if isinstance(group, QueuePairRings) and not self.is_served(receive_queue(group.index)):
            self.driver_left(group)

    def after_layout(self, group: RingGroup) -> None:
        """A driver may receive from now on, or command."""
        if not isinstance(group, QueuePairRings):
            self._obey_or_not()
            # Frontends set this ring up last, and how many pairs are used is the driver's to say where there is one.
            for pair in self._pairs[1:] if self._has_control else ():
                if pair.is_attached != self._receives(pair.index):
                    self.apply(pair)
            return
        if self.is_served(receive_queue(group.index)):
            self._begin_receiving(group)
        if group.index == 0:
            self._tell_network()

    def driver_left(self, group: RingGroup) -> None:
        """No driver receives from now on."""
        if not isinstance(group, QueuePairRings):
            return
        state, start = self.session_state, self._receiving.pop(group.index, None)
        if start is not None and state is not None:
            self._heirs[group.index] = heir_of(state.vrings[receive_queue(group.index)].next_avail, start=start)

    def session_ended(self) -> None:
        """What its driver said is of no meaning any more."""
        for pair in self._pairs:
            self._note_asked(pair.index)
        self._begin_control()
        self._netdev.mtu_told = 0

    def left_alone(self) -> None:
        """Nobody is there to take anything over: the netdev has one queue, and every frame comes whole."""
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

    def rings_reported(self) -> None:
        """A queue pair whose interface is gone signals too. The netdev knows, and may attach another one."""
        self._netdev.look_soon()

    # -- who receives -------------------------------------------------------------------------------------------

    @property
    def _pairs(self) -> list[QueuePairRings]:
        return [group for group in self.groups if isinstance(group, QueuePairRings)]

    def _receives(self, index: int) -> bool:
        """Whether the pair's netdev queue is attached: the first one always is."""
        state = self.session_state
        vring = state.vrings[receive_queue(index)] if state is not None else VringState()
        # A driver with a control queue of ours says how many pairs it uses, and begins with one.
        used = index < max(1, self._pairs_used) or not self._has_control
        return index == 0 or (vring.enabled and vring.is_configured and used)

    def _begin_receiving(self, pair: QueuePairRings) -> None:
        """A driver receives from now on: what waits is for this one, or the queue pair reads it out."""
        if pair.index in self._receiving:
            return
        self._note_asked(pair.index)
        self._state().vrings[receive_queue(pair.index)].base_told = False
        start = self._receiving[pair.index] = self._start_of_rings()
        heir = self._heirs.pop(pair.index, STRANGER)
        if heir.kind == HeirKind.STRANGER:
            pair.engine.refuse_waiting(start)
        elif heir.kind != HeirKind.ANYONE:
            pair.engine.reserve_waiting(heir.position if heir.kind == HeirKind.RING else None)

    def _note_asked(self, index: int) -> None:
        """Takes note that the frontend has asked where the receive ring stood."""
        state = self.session_state
        if state is not None and state.vrings[receive_queue(index)].base_told and index in self._heirs:
            self._heirs[index] = once_asked(self._heirs[index])

    def _saved_heirs(self) -> Iterator[Heir]:
        for index in range(self._netdev.queue_count):
            yield ANYONE if index in self._receiving else self._heirs.get(index, STRANGER)

    def _start_of_rings(self) -> int:
        return packed_ring.START if self._state().is_packed else split_ring.START

    # -- the control queue --------------------------------------------------------------------------------------

    @property
    def _has_control(self) -> bool:
        """Whether the driver commands through a control queue that is served here."""
        return self._control is not None and self.is_served(control_queue(self._netdev.queue_count))

    @property
    def _driver_announces(self) -> bool:
        """Whether the driver can tell the network where it is, and would say so here that it did."""
        state = self.session_state
        return state is not None and self._has_control and bool(state.features_acked & NetFeature.GUEST_ANNOUNCE)

    def _obey_or_not(self) -> None:
        """Commands are looked for while this process serves a control queue: for most guests there is none."""
        wanted = self._is_thawed and self._has_control
        if self._control is None or wanted == self._is_obeying:
            return
        self._is_obeying = wanted
        loop, fd = asyncio.get_running_loop(), self._control.engine.fileno()
        if wanted:
            loop.add_reader(fd, self._obey)
        else:
            loop.remove_reader(fd)

    def ring_left(self, vring: int) -> None:
        """A driver that begins anew has said nothing yet."""
        if vring == control_queue(self._netdev.queue_count):
            self._begin_control()

    def _begin_control(self) -> None:
        self._pairs_used, self._guest_offloads, self._is_to_announce = 0, ALL_OFFLOADS, False

    def _obey(self) -> None:
        """Does what the driver asks for. In the event loop, because all of it is done at once."""
        assert self._control is not None, self.id
        for _ in range(COMMANDS_AT_ONCE):
            chain = self._control.take()
            if chain is None:
                return
            # A successor must know of it also if this process dies with it.
            self.note_change()
            done = False
            try:
                done = self._follow_command(read_command(chain.readable))
            except LocalmigError as error:
                _logger.warning("device '%s': a command of the driver's failed: %s", self.id, error)
            chain.complete((OK if done else ERROR)[: chain.writable])

    def _follow_command(self, command: Command | None) -> bool:
        """Whether it is done. Raises LocalmigError where that cannot be."""
        state = self.session_state
        if state is None:
            return False
        match command:
            case PairsSet(count=count):
                if not 1 <= count <= self._netdev.queue_count or not state.features_acked & NetFeature.MQ:
                    return False
                self._pairs_used = count
                self._apply_pairs(self._pairs[1:])
            case OffloadsSet(features=features):
                if features & ~state.features_acked or features & ~int(OFFLOADS):
                    return False
                self._guest_offloads = features
                self.features_changed()
                self._apply_pairs(self._pairs)
            case Announced():
                self._is_to_announce = False
                self.change_config()
            case _:
                return False
        return True

    def _apply_pairs(self, pairs: Sequence[QueuePairRings]) -> None:
        """Lays queue pairs out for what the driver commanded. The ring that it commanded by runs on."""
        for pair in pairs:
            self.apply(pair)

    def _offloads_now(self, state: SessionState) -> Offload:
        """What the netdev leaves to the guest: what it acknowledged, left on, and the options allow."""
        guests = int(self._offloads) & (self._guest_offloads | ~_GUEST_OFFLOADS)
        return tap_offloads(state.features_acked, NetFeature(guests))

    # -- small things -------------------------------------------------------------------------------------------

    def _state(self) -> SessionState:
        state = self.session_state
        assert state is not None, self.id
        return state

    def find_notes(self) -> Iterator[str]:
        """Besides what may be the matter with any device: a frontend that has more queue pairs."""
        if asked := self._asked_now():
            yield excess_note(self.id, self._netdev.id, asked=-(-asked // 2), there=len(self._pairs))
        yield from super().find_notes()

    def _asked_now(self) -> int:
        """How many vrings the frontend has, or the last one had, where those are too many; else 0."""
        told = (state.vring_count_asked for state in self.seen_states() if state.vring_count_asked or state.was_served)
        return next(told, self._vring_count_asked)

    def frontend_left(self, state: SessionState) -> None:
        """What it had too many of is remembered: it may come again, for ever."""
        if state.vring_count_asked or state.was_served:
            self._vring_count_asked = state.vring_count_asked

    def _offer(self, *, has_uso: bool) -> Offer:
        return offer(
            queue_pair_count=self._netdev.queue_count,
            offloads=self._offloads,
            has_offloads=self._netdev.has_offloads,
            has_uso=has_uso,
            has_mac=self._own_mac is not None,
            packed=self._packed,
            device_state=self._device_state,
        )

    def _tell_network(self) -> None:
        """The interface has a carrier while a driver serves the NIC, where that is asked for."""
        if not self._netdev.is_open:
            return
        try:
            if self.is_served(receive_queue(0)):
                self._netdev.driver_begins()
            else:
                self._netdev.driver_ends()
        except KernelError as error:
            # Neither a session nor a handover ends for that: a macvtap that arrived has no carrier to turn.
            _logger.warning("device '%s': %s", self.id, error)

    def _apply_options(self) -> None:
        """Leaves to a guest that a handover brought what our options allow, which may be less or more than theirs did.

        Not before the guest runs again: setting it may wait for whoever configures an interface just now, and until
        then the guest gets nothing that it did not acknowledge.
        """
        state = self.session_state
        if state is None or not self._netdev.is_open:
            return
        if self._offloads_now(state) != self._netdev.offloads:
            try:
                self.features_changed()
            except KernelError as error:
                _logger.warning("device '%s': %s", self.id, error)
            self.apply_all()

    def _know_mac(self, mac: bytes | None) -> None:
        self._known_mac = mac
        self._netdev.mac_told = mac or b""

    def _send_rarp(self, mac: bytes) -> None:
        if self._netdev.is_open:
            self._netdev.inject(_rarp_frame(mac))
            self.tracer.emit(GuestAnnounced(device=self.id, mac=mac.hex(":")))

    def _check_mtu(self, mtu: int) -> None:
        # Whatever the kernel has told of it so far may be late.
        self._netdev.look()
        if self._netdev.is_open and mtu > self._netdev.mtu:
            raise ConfigError(
                f"device '{self.id}': the frontend wants MTU {mtu}, netdev '{self._netdev.id}' has {self._netdev.mtu}"
            )


def _rarp_frame(mac: bytes) -> bytes:
    """A reverse ARP request (RFC 903) for `mac`, broadcast, which teaches switches where the guest is now."""
    addresses = mac + bytes(4)
    return b"\xff" * 6 + mac + bytes.fromhex("8035 0001 0800 06 04 0003") + 2 * addresses + bytes(18)


def excess_note(device: str, netdev: str, *, asked: int, there: int) -> str:
    """What is said of a frontend that sets up more queue pairs than the device has.

    That is QEMU: it takes the answer to GET_QUEUE_NUM, which counts virtqueues, for a number of pairs.
    """
    return (
        f"QEMU asks for {asked} pairs, {device} has {there}: what the guest sends through the others is lost; give QEMU"
        f" queues={there}, or netdev '{netdev}' queues={asked}"
    )
