"""A vhost-user session as a backend sees it: bytes and descriptors in, events out, bytes out.

Owns:        the session's state as plain data (what a handover moves), what each request does to it, the replies.
Never sees:  a socket, a ring, a TAP.
Read next:   session.py for the driver; devices/ for what handles the events.

One message at a time: `receive` takes the bytes of the present message, at most `bytes_wanted` of them, and gives
an event where the device has to act. The state says already what shall be; the device makes it so. Then `complete`
(or `refuse`) sends the reply, for a frontend takes a reply as proof that the work is done:

    event = backend.receive(data, fds)
    if event is not None:
        device.handle(event)
        backend.complete()

Descriptors a message replaced are open until `complete`, so that a device may stop using them first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from localmig.errors import PeerError
from localmig.fds import OwnedFd, close_foreign
from localmig.vhost_user.memory import REGION_COUNT_MAX, MemoryRegion, check_regions
from localmig.vhost_user.message import (
    CONFIG_SIZE_MAX,
    HEADER_SIZE,
    LOG_ALL_BIT,
    PAYLOAD_SIZE_MAX,
    PROTOCOL_FEATURES_BIT,
    RULES,
    TABLE_REGION_COUNT_MAX,
    U64,
    VRING_INDEX_MAX,
    BackendRequest,
    ConfigSpace,
    Header,
    LogFile,
    MemoryTable,
    Payload,
    ProtocolFeature,
    RegionDescription,
    Request,
    SingleRegion,
    StateDirection,
    StateTransfer,
    VringAddress,
    VringFile,
    VringNumber,
    decode_request,
    encode_backend_request,
    encode_reply,
)
from localmig.virtio import Feature, packed_ring, split_ring
from localmig.virtio.net import MAC_LENGTH

VRING_SIZE_MAX: Final = 32768
"""Entries of a ring: the most a virtqueue may have (virtio 1.2, sections 2.7 and 2.8)."""

PROTOCOL_FEATURES_SERVED: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
)
"""What this module serves. Not postcopy: a guest's memory comes from elsewhere then, and a page that is not there yet
would stop a queue pair's thread for as long as the network takes. QEMU refuses to begin with it."""

PROTOCOL_FEATURES_OFFERED: Final = PROTOCOL_FEATURES_SERVED & ~ProtocolFeature.DEVICE_STATE
"""What is offered unless somebody asks for more. A QEMU whose backend offers DEVICE_STATE puts that state into its
stream, and a destination whose backend does not offer it fails to load the stream."""

STATE_WITHOUT_DESCRIPTOR: Final = 1 << 8
"""In the reply to SET_DEVICE_STATE_FD: the frontend's descriptor is used, none comes back."""

LOG_ALL: Final = 1 << LOG_ALL_BIT
"""As a feature: a frontend's and a backend's own affair, of which the guest knows nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What a backend offers to a session that begins, and what it can serve of one that began elsewhere.

    Attributes:
        features: virtio feature bits of the device; the bit for protocol features comes on top by itself.
        servable_features: more of them, which a session may have been offered by another process and goes on with.
        vring_count: rings the device has, and what GET_QUEUE_NUM answers: rust-vmm, Cloud Hypervisor and crosvm read
            it as a number of virtqueues.
        protocol_features: some of `PROTOCOL_FEATURES_SERVED`.
        vring_size_max: entries a ring may have.
        region_count_max: memory regions a frontend may share.
        drained_vrings: rings that the device goes on serving while they are disabled, until they are stopped; behind
            each the ring that must be enabled meanwhile. A frontend that disables that one too pauses, leaves or resets
            its driver, and may use the memory of both for something else.
        conditional_vrings: rings that are there for a frontend which acknowledged a feature; behind each the feature.
    """

    features: int
    vring_count: int
    servable_features: int = 0
    protocol_features: ProtocolFeature = PROTOCOL_FEATURES_OFFERED
    vring_size_max: int = VRING_SIZE_MAX
    region_count_max: int = REGION_COUNT_MAX
    drained_vrings: Mapping[int, int] = field(default_factory=dict)
    conditional_vrings: Mapping[int, int] = field(default_factory=dict)

    def serves(self, index: int, vrings: Sequence[VringState]) -> bool:
        """Whether the ring `index`, with all rings in these states, is the device's to serve."""
        leader = self.drained_vrings.get(index)
        return vrings[index].started and (vrings[index].enabled or (leader is not None and vrings[leader].enabled))

    def has(self, index: int, features_acked: int) -> bool:
        """Whether the ring `index`, one of `vring_count`, is there for a frontend that acknowledged these features."""
        return not self.conditional_vrings.get(index, 0) & ~features_acked

    @property
    def all_features(self) -> int:
        """The feature bits GET_FEATURES answers."""
        logs = LOG_ALL if ProtocolFeature.LOG_SHMFD in self.protocol_features else 0
        return self.features | logs | 1 << PROTOCOL_FEATURES_BIT

    @property
    def all_servable_features(self) -> int:
        """The feature bits that any session may have."""
        return self.all_features | self.servable_features | LOG_ALL


# -- state ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class VringState:
    """One ring, plain numbers and descriptors; addresses are the frontend's user addresses.

    Attributes:
        size: entries; 0 until SET_VRING_NUM.
        descriptor_area, driver_area, device_area: all 0 until SET_VRING_ADDR.
        next_avail: the position to go on from; of a packed ring the index with the wrap counter in bit 15. While the
            ring runs it is behind; who stops the ring writes it here.
        started: a kick descriptor came and GET_VRING_BASE did not.
        enabled: what SET_VRING_ENABLE said last.
        failed: the device gave the running ring up: what the guest wrote cannot be, or its memory is gone. So it stays
            until the frontend stops the ring or sets it up again.
        base_told: GET_VRING_BASE told the frontend where the ring stands, so that it can go on there. The device clears
            it once a receive ring runs.
        is_logged: whether writes to the ring itself are logged, while the session logs: as if its device area was at
            guest address `log_address`. A packed ring's descriptors are logged where they are.
        kick, call, error: eventfds, or pipes; User-Mode Linux is called through a UNIX socket. No call descriptor:
            the guest polls.
    """

    size: int = 0
    descriptor_area: int = 0
    driver_area: int = 0
    device_area: int = 0
    next_avail: int = 0
    started: bool = False
    enabled: bool = False
    failed: bool = False
    base_told: bool = False
    is_logged: bool = False
    log_address: int = 0
    kick: OwnedFd | None = None
    call: OwnedFd | None = None
    error: OwnedFd | None = None

    @property
    def is_configured(self) -> bool:
        """Whether size and addresses are known."""
        return bool(self.size and self.descriptor_area and self.driver_area and self.device_area)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogState:
    """The dirty log as the frontend announced it: `size` bytes of the file `fd`, from `mmap_offset` on."""

    size: int
    mmap_offset: int
    fd: OwnedFd


@dataclass(kw_only=True, slots=True)
class SessionState:
    """A session between two messages, or in the middle of one: all that moves.

    Attributes:
        features_offered: what GET_FEATURES answers, by the process in which the session began: a frontend has no word
            by which it could be told of less.
        protocol_features_offered: likewise of GET_PROTOCOL_FEATURES.
        features_acked: virtio feature bits from SET_FEATURES, with the bit for protocol features.
        protocol_features_acked: bits from SET_PROTOCOL_FEATURES.
        device_status: virtio device status from SET_STATUS.
        mtu: from NET_SET_MTU, 0 where none came.
        announced_mac: from SEND_RARP, empty where none came.
        regions: guest memory.
        vrings: every ring of the device, by index.
        vring_count_asked: how many the frontend has, where it has more than the device; else 0.
        was_served: whether one was ever started and enabled.
        backend_request_fd: where the backend may send requests of its own.
        state_pipe: where the frontend sends the device's state, until it asks what became of that; None where it sends
            none.
        moved_state: what it sent, for the device to take over once this session owns; empty where nothing came.
        log: where written pages are marked while the frontend wants that. It is gone once all rings are stopped: QEMU
            frees it then, and starts rings again before it announces another.
        unparsed, unparsed_fds: the beginning of a message and the descriptors that came with it.
        unsent: the rest of a reply the socket had no room for.
    """

    features_offered: int = 0
    protocol_features_offered: int = 0
    features_acked: int = 0
    protocol_features_acked: int = 0
    device_status: int = 0
    mtu: int = 0
    announced_mac: bytes = b""
    regions: list[MemoryRegion] = field(default_factory=list)
    vrings: list[VringState] = field(default_factory=list)
    vring_count_asked: int = 0
    was_served: bool = False
    backend_request_fd: OwnedFd | None = None
    state_pipe: OwnedFd | None = None
    moved_state: bytes = b""
    log: LogState | None = None
    unparsed: bytes = b""
    unparsed_fds: list[OwnedFd] = field(default_factory=list)
    unsent: bytes = b""

    @property
    def is_packed(self) -> bool:
        """Whether rings are packed virtqueues; split ones otherwise."""
        return bool(self.features_acked & Feature.RING_PACKED)

    @property
    def logs(self) -> bool:
        """Whether the frontend wants to know which pages are written."""
        return bool(self.features_acked & LOG_ALL)

    @property
    def awaits_log(self) -> bool:
        """Whether it wants that and gave no log yet: no ring may run before it does, or wants it no longer."""
        return self.logs and self.log is None

    def close(self) -> None:
        """Closes every descriptor. Bears being called twice."""
        vring_fds = (fd for vring in self.vrings for fd in (vring.kick, vring.call, vring.error))
        region_fds = (region.fd for region in self.regions)
        log_fd = None if self.log is None else self.log.fd
        others = (self.backend_request_fd, self.state_pipe, log_fd)
        close_foreign((*region_fds, *vring_fds, *others, *self.unparsed_fds))


def check_state(state: SessionState, offer: Offer) -> None:
    """Checks a state that came from elsewhere: could this session have come to it, and can `offer` serve it?

    Raises:
        PeerError: it could not, or cannot; the text names both values. Nothing was changed.
    """
    _check_acked(state.features_acked, state.features_offered, "features")
    _check_acked(state.protocol_features_acked, state.protocol_features_offered, "protocol features")
    check_servable(state.features_acked, offer.all_servable_features, "features")
    check_servable(state.protocol_features_acked, PROTOCOL_FEATURES_SERVED, "protocol features")
    _check_range("device status", state.device_status, 0xFF)
    _check_range("mtu", state.mtu, 0xFFFF)
    if len(state.announced_mac) not in (0, MAC_LENGTH):
        raise PeerError(f"announced address has {len(state.announced_mac)} bytes, must be {MAC_LENGTH}")
    if len(state.vrings) != offer.vring_count:
        raise PeerError(f"session has {len(state.vrings)} vrings, the device has {offer.vring_count}")
    for index, vring in enumerate(state.vrings):
        if vring.size:
            _check_vring_size(index, vring.size, offer, is_packed=state.is_packed)
        areas = vring.descriptor_area, vring.driver_area, vring.device_area
        _check_vring_addresses(index, areas, is_packed=state.is_packed)
        _check_range(f"position of vring {index}", vring.next_avail, 0xFFFF)
        if state.is_packed:
            _check_packed_position(index, vring.next_avail, vring.size)
        if vring.started and (not vring.is_configured or vring.kick is None):
            raise PeerError(f"vring {index} is started without size, addresses or kick descriptor")
        if vring.failed and not vring.started:
            raise PeerError(f"vring {index} has failed and is not started")
    _check_range("count of vrings asked for", state.vring_count_asked, VRING_INDEX_MAX + 1)
    check_regions(state.regions, count_max=offer.region_count_max)
    _check_unparsed(state.unparsed)
    _check_fd_count(state.unparsed_fds)
    if len(state.unsent) > HEADER_SIZE + PAYLOAD_SIZE_MAX:
        raise PeerError(f"session has {len(state.unsent)} unsent bytes, more than one reply")


def check_servable(acked: int, servable: int, name: str) -> None:
    """Raises PeerError where bits were acknowledged elsewhere that are not among the servable ones."""
    # As numbers, because the complement of a flag has no bits beyond the flag's own.
    if missing := int(acked) & ~int(servable):
        raise PeerError(f"the guest uses {name} {acked:#x}, of which {missing:#x} cannot be served here")


def _describe(region: MemoryRegion) -> RegionDescription:
    return RegionDescription(
        guest_address=region.guest_address,
        size=region.size,
        user_address=region.user_address,
        mmap_offset=region.mmap_offset,
    )


def _check_unparsed(unparsed: bytes) -> None:
    size = HEADER_SIZE
    if len(unparsed) >= HEADER_SIZE:
        size += Header.decode(unparsed[:HEADER_SIZE]).size
    if len(unparsed) >= size:
        raise PeerError(f"session has {len(unparsed)} unparsed bytes, the message ends after {size}")


def _check_fd_count(fds: Sequence[OwnedFd]) -> None:
    if len(fds) > TABLE_REGION_COUNT_MAX:
        raise PeerError(f"message came with {len(fds)} descriptors, limit is {TABLE_REGION_COUNT_MAX}")


def _check_acked(acked: int, offered: int, name: str) -> None:
    # As in `check_servable`.
    if missing := int(acked) & ~int(offered):
        raise PeerError(
            f"frontend acknowledged {name} {acked:#x}, of which {missing:#x} are not among the offered {offered:#x}"
        )


def _check_range(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise PeerError(f"{name} is {value}, limit is {limit}")


def _check_vring_size(index: int, size: int, offer: Offer, *, is_packed: bool) -> None:
    # virtio 1.2, sections 2.7 and 2.8: only a split virtqueue's size is a power of two.
    if not 0 < size <= offer.vring_size_max or (size & (size - 1) and not is_packed):
        must = "must be" if is_packed else "must be a power of two of"
        raise PeerError(f"vring {index} has {size} entries, {must} at most {offer.vring_size_max}")


def _check_vring_addresses(index: int, areas: tuple[int, int, int], *, is_packed: bool) -> None:
    ring = packed_ring if is_packed else split_ring
    for (name, alignment), address in zip(ring.PARTS.items(), areas, strict=True):
        if address % alignment:
            raise PeerError(f"{name} of vring {index} is at {address:#x}, must be aligned to {alignment} bytes")


def _check_packed_position(index: int, position: int, size: int) -> None:
    """Checks a packed ring's position against its size; a size of 0 is not known yet.

    Raises:
        PeerError: it is outside the ring.
    """
    if size and packed_ring.index_of(position) >= size:
        raise PeerError(f"position {packed_ring.index_of(position)} of vring {index} is outside its {size} entries")


_MEMORY_SLOT_REQUESTS: Final = (Request.ADD_MEM_REG, Request.REM_MEM_REG)

_ACCEPTED: Final = 0
_REFUSED: Final = 1


# -- events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What the device has to do now. `refusable`: whether it may say no and the session goes on."""

    refusable: ClassVar = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesSet(Event):
    """`features_acked` is new, and with it perhaps `enabled` of every ring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingChanged(Event):
    """Whether written pages are marked is new, or where: `logs`, or what a ring says of it. Rings that run go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSet(LoggingChanged):
    """`log` is new; the former one is not written any more afterwards. Refused: no ring can run with it."""

    refusable: ClassVar = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryChanged(Event):
    """`regions` is new. The mappings of regions that are not in it must be gone afterwards; the others may stay.

    A ring whose addresses the new table does not hold stands still until a table holds them again: a frontend that
    takes memory away and adds it in another shape sends this event in between.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionAdded(MemoryChanged):
    """`regions` has one more, the last. Refused, it is taken out again."""

    refusable: ClassVar = True


@dataclass(frozen=True, kw_only=True, slots=True)
class VringChanged(Event):
    """A ring looks different: it started, stopped, moved, has other descriptors, is enabled or not.

    The device stops it, writes `next_avail`, and if the offer says that it `serves` the ring, the ring goes on from
    there. So do rings that are drained while this one is enabled.

    Attributes:
        anew: the frontend sets the ring up again, so a failure until now is over: the device does not write `failed`,
            and writes `next_avail` only if the ring did not fail and stays started.
    """

    index: int
    anew: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class NotifiersChanged(Event):
    """A ring that is served has another call or error descriptor, or none. It goes on meanwhile.

    Frontends send a call descriptor each time a driver masks or unmasks an interrupt. A call made before may not have
    been heard, so the new descriptor is called once.
    """

    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRefused(Event):
    """The frontend is told by its reply that its request cannot be; nothing changed. The device tells people."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceReset(Event):
    """Every ring is back at the beginning, stopped and disabled; no feature is acknowledged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MtuSet(Event):
    """The guest is told this MTU, in bytes."""

    mtu: int
    refusable: ClassVar = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RarpRequested(Event):
    """The guest arrived here and cannot announce itself: broadcast a RARP with its MAC address."""

    mac: bytes
    refusable: ClassVar = True


@dataclass(frozen=True, kw_only=True, slots=True)
class StateWanted(Event):
    """The frontend moves the guest: the device's state goes into this pipe, which is open until `complete`."""

    pipe: OwnedFd
    refusable: ClassVar = True


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSent(Event):
    """The guest came with its frontend: this pipe has all of the device's state, which belongs into `moved_state`."""

    pipe: OwnedFd
    refusable: ClassVar = True


# -- the session ------------------------------------------------------------------------------------------


class Backend:
    """One session. After any `PeerError` it is to be closed: `close` is all it still does.

    Attributes:
        offer: what a session is offered that begins here, and what of its limits holds for one that came.
        state: the session as plain data. The device reads it, and writes `next_avail` of rings it stopped.
        config: the device's configuration space, what GET_CONFIG reads; at most `CONFIG_SIZE_MAX` bytes.
        has_spoken: whether the frontend sent a whole message, here or before a handover.
    """

    def __init__(self, offer: Offer, *, config: bytes = b"") -> None:
        assert len(config) <= CONFIG_SIZE_MAX, len(config)
        self.offer = offer
        self.config = config
        self.has_spoken = False
        self.state = SessionState(
            features_offered=offer.all_features,
            protocol_features_offered=offer.protocol_features,
            vrings=[VringState() for _ in range(offer.vring_count)],
        )
        self._header: Header | None = None
        self._payload: Payload | None = None
        self._event: Event | None = None
        self._retired: list[OwnedFd | None] = []

    @classmethod
    def from_state(cls, state: SessionState, offer: Offer, *, config: bytes = b"") -> Self:
        """Goes on with a session that began elsewhere, where it stood, even inside a message.

        Raises:
            PeerError: `check_state` finds that it cannot; `state` still owns its descriptors.
        """
        check_state(state, offer)
        backend = cls(offer, config=config)
        # What only another program can serve is offered no longer, and no guest uses it.
        state.features_offered &= offer.all_servable_features
        state.protocol_features_offered &= PROTOCOL_FEATURES_SERVED
        # A stream brings tuples.
        state.regions, state.vrings = list(state.regions), list(state.vrings)
        state.unparsed_fds = list(state.unparsed_fds)
        backend.state = state
        backend.has_spoken = True
        backend._parse_header()
        return backend

    @property
    def bytes_wanted(self) -> int:
        """Bytes the present message lacks, never 0. Reading no more keeps descriptors with their message."""
        size = HEADER_SIZE + (self._header.size if self._header else 0)
        return size - len(self.state.unparsed)

    def receive(self, data: bytes, fds: Iterable[OwnedFd] = ()) -> Event | None:
        """Takes up to `bytes_wanted` bytes and the descriptors that came with any of them.

        Returns an event where the message is complete and the device has to act; `complete` or `refuse` must follow.

        Raises:
            PeerError: the frontend broke the protocol; the session is to be closed.
        """
        state = self.state
        assert self._event is None, f"{self._event} is neither completed nor refused"
        assert len(data) <= self.bytes_wanted, (len(data), self.bytes_wanted)
        state.unparsed += data
        state.unparsed_fds += fds
        _check_fd_count(state.unparsed_fds)
        self._parse_header()
        if self._header is None or self.bytes_wanted:
            return None
        content = state.unparsed[HEADER_SIZE:]
        self._payload = decode_request(self._header, content, fd_count=len(state.unparsed_fds))
        self._check_feature(self._header.request)
        try:
            self._event = self._apply(self._header.request, self._payload)
        except PeerError as error:
            # A frontend that adds memory to a running guest must not lose its NIC by it. One that wants no reply would
            # go on as if the memory were there, so its session ends.
            if self._header.request not in _MEMORY_SLOT_REQUESTS or not self._is_acknowledged:
                raise
            self._event = RequestRefused(reason=f"{self._header.request.name}: {error}")
        if self._event is None:
            # A NIC has nothing in its configuration space that a driver may write.
            self._finish(_REFUSED if self._header.request is Request.SET_CONFIG else _ACCEPTED)
        return self._event

    def complete(self) -> None:
        """The device did what the present event asks: the frontend gets its reply."""
        assert self._event is not None, "no event to complete"
        if isinstance(self._event, MtuSet):
            self.state.mtu = self._event.mtu
        if isinstance(self._event, RarpRequested):
            self.state.announced_mac = self._event.mac
        self._finish(_REFUSED if isinstance(self._event, RequestRefused) else _ACCEPTED)

    def refuse(self) -> None:
        """The device does not do what the present, refusable event asks: the frontend is told if it wants to know."""
        assert self._event is not None, "no event to refuse"
        assert self._event.refusable, self._event
        if isinstance(self._event, RegionAdded):
            self._retired.append(self.state.regions.pop().fd)
        self._finish(_REFUSED)

    def data_to_send(self) -> bytes:
        """What the frontend must get, before anything more is read from it: that bounds what waits here."""
        return self.state.unsent

    def data_sent(self, count: int) -> None:
        """The first `count` bytes of `data_to_send` are on their way."""
        self.state.unsent = self.state.unsent[count:]

    def change_config(self, config: bytes) -> bytes:
        """The configuration space is `config` now. Returns what goes to the frontend over its channel.

        That is nothing if the space was so before, or if the frontend listens to no change of it: QEMU and Cloud
        Hypervisor serve a NIC's space by themselves and acknowledge no CONFIG.
        """
        assert len(config) <= CONFIG_SIZE_MAX, len(config)
        if config == self.config:
            return b""
        self.config = config
        listens = ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
        if listens & ~ProtocolFeature(self.state.protocol_features_acked) or self.state.backend_request_fd is None:
            return b""
        return encode_backend_request(BackendRequest.CONFIG_CHANGE)

    def close(self) -> None:
        """Closes every descriptor of the session. Bears being called twice."""
        self.state.close()
        close_foreign(self._retired)

    # -- one message ---------------------------------------------------------------------------------------

    def _parse_header(self) -> None:
        if self._header is None and len(self.state.unparsed) >= HEADER_SIZE:
            self._header = Header.decode(self.state.unparsed[:HEADER_SIZE])

    def _check_feature(self, request: Request) -> None:
        missing = RULES[request].feature & ~ProtocolFeature(self.state.protocol_features_acked)
        if missing:
            raise PeerError(f"{request.name} needs protocol feature {missing.name}, which was not acknowledged")

    @property
    def _is_acknowledged(self) -> bool:
        """Whether the frontend is told what became of the present message."""
        assert self._header is not None
        return self._header.needs_reply and bool(self.state.protocol_features_acked & ProtocolFeature.REPLY_ACK)

    def _finish(self, ack: int) -> None:
        assert self._header is not None
        request = self._header.request
        if RULES[request].reply is not None:
            self.state.unsent += encode_reply(request, self._reply(request, self._payload, ack))
        # Looked up after the message was applied: frontends that acknowledge REPLY_ACK itself with NEED_REPLY set
        # wait for the answer.
        elif self._is_acknowledged:
            self.state.unsent += encode_reply(request, U64(value=ack))
        if request is Request.CHECK_DEVICE_STATE:
            self.state.state_pipe = self._replace(self.state.state_pipe)
        close_foreign((*self._retired, *self.state.unparsed_fds))
        self._retired.clear()
        self.state.unparsed_fds.clear()
        self.state.unparsed = b""
        self.has_spoken = True
        self._header = self._payload = self._event = None

    def _apply(self, request: Request, payload: Payload | None) -> Event | None:
        """Changes the state as the request says; the event where the device has to follow."""
        match request, payload:
            case Request.SET_FEATURES, U64(value=features):
                return self._set_features(features)
            case Request.SET_PROTOCOL_FEATURES, U64(value=features):
                _check_acked(features, self.state.protocol_features_offered, "protocol features")
                self.state.protocol_features_acked = features
            case Request.SET_STATUS, U64(value=status):
                # 0 resets nothing here: QEMU sends it before it asks for the rings' positions.
                _check_range("device status", status, 0xFF)
                self.state.device_status = status
            case Request.NET_SET_MTU, U64(value=mtu):
                _check_range("mtu", mtu, 0xFFFF)
                return MtuSet(mtu=mtu)
            case Request.SEND_RARP, U64():
                return RarpRequested(mac=payload.encode()[:MAC_LENGTH])
            case Request.SET_BACKEND_REQ_FD, None:
                self._retired.append(self.state.backend_request_fd)
                self.state.backend_request_fd = self.state.unparsed_fds.pop()
            case Request.SET_LOG_BASE, LogFile(size=size, mmap_offset=mmap_offset):
                self._drop_log()
                self.state.log = LogState(size=size, mmap_offset=mmap_offset, fd=self.state.unparsed_fds.pop())
                return LogSet()
            case Request.SET_DEVICE_STATE_FD, StateTransfer():
                return self._transfer_state(payload)
            case Request.CHECK_DEVICE_STATE, None if self.state.state_pipe is not None:
                return StateSent(pipe=self.state.state_pipe)
            case Request.SET_MEM_TABLE, MemoryTable(regions=descriptions):
                self._set_regions(self._regions_of(descriptions))
                return MemoryChanged()
            case Request.ADD_MEM_REG, SingleRegion(region=description):
                # QEMU 7.2 says every region once more for each queue pair.
                if self._has_several_pairs and description in map(_describe, self.state.regions):
                    return None
                self._set_regions([*self.state.regions, *self._regions_of((description,))])
                return RegionAdded() if self._is_acknowledged else MemoryChanged()
            case Request.REM_MEM_REG, SingleRegion(region=description):
                return self._remove_region(description)
            case Request.RESET_DEVICE, None:
                return self._reset_device()
            case _, VringNumber() | VringAddress() | VringFile():
                return self._apply_to_vring(request, payload)
        return None

    def _transfer_state(self, transfer: StateTransfer) -> Event | None:
        """Begins to save the device's state, or keeps the pipe that it comes through."""
        if transfer.phase != 0 or transfer.direction not in set(StateDirection):
            said = f"direction {transfer.direction} and phase {transfer.phase}"
            return RequestRefused(reason=f"SET_DEVICE_STATE_FD has {said}, expected direction 0 or 1 and phase 0")
        started = [index for index, vring in enumerate(self.state.vrings) if vring.started]
        if started:
            return RequestRefused(reason=f"SET_DEVICE_STATE_FD while vring {started[0]} is started")
        if transfer.direction == StateDirection.SAVE:
            return StateWanted(pipe=self.state.unparsed_fds[0])
        self.state.state_pipe = self._replace(self.state.state_pipe)
        return None

    def _apply_to_vring(self, request: Request, payload: VringNumber | VringAddress | VringFile) -> Event | None:
        """As `_apply`, for the requests about one ring."""
        index = payload.index
        if index >= len(self.state.vrings) or not self.offer.has(index, self.state.features_acked):
            self._pass_over(request, index)
            return None
        vring = self.state.vrings[index]
        concerns_device = was_served = self._is_served(index)
        # User-Mode Linux and Cloud Hypervisor reset a driver without GET_VRING_BASE: they disable its rings and set
        # them up again. So a message that only comes with a set-up ends a failure.
        anew = False
        match request, payload:
            case Request.SET_VRING_NUM, VringNumber(number=size):
                _check_vring_size(index, size, self.offer, is_packed=self.state.is_packed)
                vring.size = size
                if self.state.is_packed and packed_ring.index_of(vring.next_avail) >= size:
                    vring.next_avail = packed_ring.START
                vring.failed = False
                anew = True
                if was_served:
                    # Addresses and position follow, so it stops until the kick descriptor comes.
                    vring.started = False
                    vring.kick = self._replace(vring.kick)
            case Request.SET_VRING_BASE, VringNumber(number=base):
                position = self._position_of(index, base)
                if was_served:
                    # A set-up begins with SET_VRING_NUM, and that has stopped the ring.
                    raise PeerError(f"{request.name} for vring {index}, which is running")
                vring.next_avail = position
            case Request.SET_VRING_ENABLE, VringNumber(number=number):
                _check_range(f"enable of vring {index}", number, 1)
                if vring.enabled == bool(number):
                    return None
                vring.enabled = bool(number)
                # Also of a ring that is not started: a device may steer packets by it.
                concerns_device = True
            case Request.GET_VRING_BASE, VringNumber():
                # Call and error stay: a frontend that starts the ring again need not send them again.
                vring.started = vring.failed = False
                vring.base_told = True
                vring.kick = self._replace(vring.kick)
                if not any(each.started for each in self.state.vrings):
                    self._drop_log()
            case Request.SET_VRING_ADDR, VringAddress():
                was_logged = vring.is_logged, vring.log_address
                if not self._set_addresses(vring, payload):
                    # QEMU sends the same addresses again to switch logging, to rings that run.
                    is_same = was_logged == (vring.is_logged, vring.log_address)
                    return None if is_same or not was_served else LoggingChanged()
                anew = not vring.enabled
                vring.failed &= vring.enabled
            case Request.SET_VRING_KICK, VringFile(has_fd=True):
                if not vring.is_configured:
                    raise PeerError(f"{request.name} starts vring {index}, which has no size or no addresses")
                anew = True
                vring.kick = self._replace(vring.kick)
                vring.started = True
                vring.failed = False
            case Request.SET_VRING_KICK, _:
                raise PeerError(f"{request.name} wants vring {index} to be polled, which is not supported")
            case Request.SET_VRING_CALL, _:
                vring.call = self._replace(vring.call)
                return NotifiersChanged(index=index) if was_served else None
            case Request.SET_VRING_ERR, _:
                vring.error = self._replace(vring.error)
                return NotifiersChanged(index=index) if was_served else None
        if self._is_served(index):
            self.state.was_served = concerns_device = True
        return VringChanged(index=index, anew=anew) if concerns_device else None

    def _pass_over(self, request: Request, index: int) -> None:
        """A request for a ring that the device does not have.

        QEMU takes the answer to GET_QUEUE_NUM, which counts virtqueues, for a number of pairs, so it may set up more
        pairs than there are. The session lives, and so do the pairs that are there: a closed one would come again at
        once, for ever.
        """
        if ProtocolFeature.MQ not in ProtocolFeature(self.state.protocol_features_acked) or index > VRING_INDEX_MAX:
            raise PeerError(f"{request.name} names vring {index}, the device has {len(self.state.vrings)} vrings")
        self.state.vring_count_asked = max(self.state.vring_count_asked, index + 1)

    @property
    def _has_several_pairs(self) -> bool:
        return self.offer.vring_count > 2

    def _is_served(self, index: int) -> bool:
        return self.offer.serves(index, self.state.vrings)

    def _set_features(self, features: int) -> Event | None:
        _check_acked(features, self.state.features_offered, "features")
        changed = features ^ self.state.features_acked
        if changed & Feature.RING_PACKED:
            self._change_format(features)
        if any(map(self._is_served, range(len(self.state.vrings)))):
            # QEMU says them once more for each queue pair, and switches logging.
            if changed & ~LOG_ALL:
                raise PeerError(
                    f"SET_FEATURES has {features:#x} while rings run with {self.state.features_acked:#x}: only"
                    f" VHOST_F_LOG_ALL ({LOG_ALL:#x}) may change; let the frontend stop its rings first"
                )
            self.state.features_acked = features
            return LoggingChanged() if changed else None
        self.state.features_acked = features
        # vhost-user, "Ring states": without the bit there is no SET_VRING_ENABLE, so all rings are enabled at once.
        if not features & 1 << PROTOCOL_FEATURES_BIT:
            for vring in self.state.vrings:
                vring.enabled = True
        return FeaturesSet()

    def _change_format(self, features: int) -> None:
        """Rings of another format begin anew, their size and their addresses too: not each fits the other format."""
        for index, vring in enumerate(self.state.vrings):
            if vring.started:
                raise PeerError(f"SET_FEATURES changes RING_PACKED while vring {index} is started")
        for vring in self.state.vrings:
            vring.next_avail = packed_ring.START if features & Feature.RING_PACKED else split_ring.START
            vring.size = vring.descriptor_area = vring.driver_area = vring.device_area = 0

    def _position_of(self, index: int, base: int) -> int:
        """The position that SET_VRING_BASE tells."""
        if not self.state.is_packed:
            _check_range(f"position of vring {index}", base, 0xFFFF)
            return base
        # Where chains are in flight the used half differs, and DPDK leaves it 0. Nothing is in flight here: a ring
        # goes on where the next chain is available.
        position = packed_ring.position_of(base)
        _check_packed_position(index, position, self.state.vrings[index].size)
        return position

    def _set_addresses(self, vring: VringState, address: VringAddress) -> bool:
        """Writes down where a ring is and how it is logged; whether it is in a new place."""
        known = VringAddress.LOGGED if self.state.features_offered & LOG_ALL else 0
        if address.flags & ~known:
            raise PeerError(f"vring {address.index} has flags {address.flags:#x}, only {known:#x} have a meaning here")
        areas = address.descriptor_area, address.driver_area, address.device_area
        _check_vring_addresses(address.index, areas, is_packed=self.state.is_packed)
        if vring.started and not all(areas):
            # 0 is what none was told; no successor would believe in a started ring without them.
            told = ", ".join(f"{area:#x}" for area in areas)
            raise PeerError(f"SET_VRING_ADDR for vring {address.index}, which is started, has addresses {told}")
        vring.is_logged = bool(address.flags & VringAddress.LOGGED)
        vring.log_address = address.log if vring.is_logged else 0
        if areas == (vring.descriptor_area, vring.driver_area, vring.device_area):
            return False
        vring.descriptor_area, vring.driver_area, vring.device_area = areas
        return True

    def _regions_of(self, descriptions: Iterable[RegionDescription]) -> list[MemoryRegion]:
        # The descriptors keep their owner in `unparsed_fds` until the whole table is known to be right.
        return [
            MemoryRegion(
                guest_address=description.guest_address,
                size=description.size,
                user_address=description.user_address,
                mmap_offset=description.mmap_offset,
                fd=fd,
            )
            for description, fd in zip(descriptions, self.state.unparsed_fds, strict=True)
        ]

    def _set_regions(self, regions: list[MemoryRegion]) -> None:
        check_regions(regions, count_max=self.offer.region_count_max)
        kept = {id(region.fd) for region in regions}  # compared whole, hundreds of regions would take milliseconds
        self._retired += [region.fd for region in self.state.regions if id(region.fd) not in kept]
        self.state.regions = regions
        self.state.unparsed_fds.clear()

    def _remove_region(self, description: RegionDescription) -> Event | None:
        # The mmap offset does not name a region (vhost-user, REM_MEM_REG).
        for region in self.state.regions:
            if (region.guest_address, region.size, region.user_address) == (
                description.guest_address,
                description.size,
                description.user_address,
            ):
                self.state.regions.remove(region)
                self._retired.append(region.fd)
                return MemoryChanged()
        if self._has_several_pairs:
            return None  # as in ADD_MEM_REG: taken away for another queue pair already
        raise PeerError(
            f"REM_MEM_REG names {description.size:#x} bytes at guest address {description.guest_address:#x}, user"
            f" address {description.user_address:#x}: there is no such region"
        )

    def _drop_log(self) -> None:
        if self.state.log is not None:
            self._retired.append(self.state.log.fd)
            self.state.log = None

    def _reset_device(self) -> Event:
        self._drop_log()
        # Memory, call and error descriptors stay: QEMU sends them only when they change.
        self.state.features_acked = 0
        self.state.device_status = 0
        for index, vring in enumerate(self.state.vrings):
            self._retired.append(vring.kick)
            self.state.vrings[index] = VringState(call=vring.call, error=vring.error)
        return DeviceReset()

    def _replace(self, old: OwnedFd | None) -> OwnedFd | None:
        self._retired.append(old)
        return self.state.unparsed_fds.pop() if self.state.unparsed_fds else None

    def _reply(self, request: Request, payload: Payload | None, ack: int) -> Payload:
        """What the frontend asked for, or what became of its request."""
        match request, payload:
            case ((Request.SET_LOG_BASE | Request.CHECK_DEVICE_STATE), _):
                return U64(value=ack)
            case Request.SET_DEVICE_STATE_FD, _:
                return U64(value=STATE_WITHOUT_DESCRIPTOR | ack)
            case Request.GET_FEATURES, None:
                return U64(value=self.state.features_offered)
            case Request.GET_PROTOCOL_FEATURES, None:
                return U64(value=self.state.protocol_features_offered)
            case Request.GET_QUEUE_NUM, None:
                return U64(value=len(self.state.vrings))
            case Request.GET_MAX_MEM_SLOTS, None:
                return U64(value=self.offer.region_count_max)
            case Request.GET_STATUS, None:
                return U64(value=self.state.device_status)
            case Request.GET_VRING_BASE, VringNumber(index=index):
                # A ring that was passed over stands at the beginning.
                position = self.state.vrings[index].next_avail if index < len(self.state.vrings) else 0
                base = packed_ring.base_of(position) if self.state.is_packed else position
                return VringNumber(index=index, number=base)
            case Request.GET_CONFIG, ConfigSpace(offset=offset, data=data):
                return self._read_config(offset, len(data))
            case _:
                raise AssertionError(f"{request.name} has no reply")

    def _read_config(self, offset: int, size: int) -> ConfigSpace:
        # A frontend may know a longer space than this device: it reads zeros there, what a field has that is not.
        return ConfigSpace(offset=offset, data=self.config[offset : offset + size].ljust(size, b"\0"))
