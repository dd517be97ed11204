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

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from localmig.errors import PeerError
from localmig.fds import OwnedFd, close_all
from localmig.vhost_user.memory import REGION_COUNT_MAX, MemoryRegion, check_regions
from localmig.vhost_user.message import (
    HEADER_SIZE,
    PAYLOAD_SIZE_MAX,
    PROTOCOL_FEATURES_BIT,
    RULES,
    TABLE_REGION_COUNT_MAX,
    U64,
    ConfigSpace,
    Header,
    MemoryTable,
    Payload,
    ProtocolFeature,
    RegionDescription,
    Request,
    SingleRegion,
    VringAddress,
    VringFile,
    VringNumber,
    decode_request,
    encode_reply,
)

VRING_SIZE_MAX: Final = 32768
"""Entries of a ring: the most a split virtqueue may have (virtio 1.2, section 2.7)."""

PROTOCOL_FEATURES_SERVED: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""What this module serves. Not logging and not postcopy: guests are not moved between machines through us."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What a backend offers.

    Attributes:
        features: virtio feature bits of the device; the bit for protocol features comes on top by itself.
        vring_count: rings the device has.
        queue_count: what GET_QUEUE_NUM answers; a NIC counts pairs there.
        protocol_features: some of `PROTOCOL_FEATURES_SERVED`.
        vring_size_max: entries a ring may have, a power of two.
        region_count_max: memory regions a frontend may share.
    """

    features: int
    vring_count: int
    queue_count: int
    protocol_features: ProtocolFeature = PROTOCOL_FEATURES_SERVED
    vring_size_max: int = VRING_SIZE_MAX
    region_count_max: int = REGION_COUNT_MAX

    @property
    def all_features(self) -> int:
        """The feature bits GET_FEATURES answers."""
        return self.features | 1 << PROTOCOL_FEATURES_BIT


# -- state ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class VringState:
    """One ring, plain numbers and descriptors; addresses are the frontend's user addresses.

    Attributes:
        size: entries; 0 until SET_VRING_NUM.
        descriptor_table, avail_ring, used_ring: all 0 until SET_VRING_ADDR.
        next_avail: the position to go on from. While the ring runs it is behind; who stops the ring writes it here.
        started: a kick descriptor came and GET_VRING_BASE did not.
        enabled: what SET_VRING_ENABLE said last.
        kick, call, error: eventfds, or pipes under User-Mode Linux. No call descriptor: the guest polls.
    """

    size: int = 0
    descriptor_table: int = 0
    avail_ring: int = 0
    used_ring: int = 0
    next_avail: int = 0
    started: bool = False
    enabled: bool = False
    kick: OwnedFd | None = None
    call: OwnedFd | None = None
    error: OwnedFd | None = None

    @property
    def is_running(self) -> bool:
        """Whether the device serves the ring: it is started and enabled."""
        return self.started and self.enabled

    @property
    def is_configured(self) -> bool:
        """Whether size and addresses are known."""
        return bool(self.size and self.descriptor_table and self.avail_ring and self.used_ring)


@dataclass(kw_only=True, slots=True)
class SessionState:
    """A session between two messages, or in the middle of one: all that moves.

    Attributes:
        features_acked: virtio feature bits from SET_FEATURES, with the bit for protocol features.
        protocol_features_acked: bits from SET_PROTOCOL_FEATURES.
        device_status: virtio device status from SET_STATUS.
        mtu: from NET_SET_MTU, 0 where none came.
        regions: guest memory.
        vrings: every ring of the device, by index.
        backend_request_fd: where the backend may send requests of its own.
        unparsed, unparsed_fds: the beginning of a message and the descriptors that came with it.
        unsent: the rest of a reply the socket had no room for.
    """

    features_acked: int = 0
    protocol_features_acked: int = 0
    device_status: int = 0
    mtu: int = 0
    regions: list[MemoryRegion] = field(default_factory=list)
    vrings: list[VringState] = field(default_factory=list)
    backend_request_fd: OwnedFd | None = None
    unparsed: bytes = b""
    unparsed_fds: list[OwnedFd] = field(default_factory=list)
    unsent: bytes = b""

    def close(self) -> None:
        """Closes every descriptor. Bears being called twice."""
        close_all(region.fd for region in self.regions)
        for vring in self.vrings:
            close_all((vring.kick, vring.call, vring.error))
        close_all((self.backend_request_fd, *self.unparsed_fds))


def check_state(state: SessionState, offer: Offer) -> None:
    """Checks a state that came from elsewhere: could this session have come to it, and can `offer` serve it?

    Raises:
        PeerError: it could not, or cannot; the text names both values. Nothing was changed.
    """
    _check_acked(state.features_acked, offer.all_features, "features")
    _check_acked(state.protocol_features_acked, offer.protocol_features, "protocol features")
    _check_range("device status", state.device_status, 0xFF)
    _check_range("mtu", state.mtu, 0xFFFF)
    if len(state.vrings) != offer.vring_count:
        raise PeerError(f"session has {len(state.vrings)} vrings, the device has {offer.vring_count}")
    for index, vring in enumerate(state.vrings):
        if vring.size:
            _check_vring_size(index, vring.size, offer)
        _check_vring_addresses(index, vring.descriptor_table, vring.avail_ring, vring.used_ring)
        _check_range(f"position of vring {index}", vring.next_avail, 0xFFFF)
        if vring.started and not (vring.is_configured and vring.kick):
            raise PeerError(f"vring {index} is started without size, addresses or kick descriptor")
    check_regions(state.regions, count_max=offer.region_count_max)
    _check_unparsed(state)
    if len(state.unsent) > HEADER_SIZE + PAYLOAD_SIZE_MAX:
        raise PeerError(f"session has {len(state.unsent)} unsent bytes, more than one reply")


def _check_unparsed(state: SessionState) -> None:
    size = HEADER_SIZE
    if len(state.unparsed) >= HEADER_SIZE:
        size += Header.decode(state.unparsed[:HEADER_SIZE]).size
    if len(state.unparsed) >= size:
        raise PeerError(f"session has {len(state.unparsed)} unparsed bytes, the message ends after {size}")
    if len(state.unparsed_fds) > TABLE_REGION_COUNT_MAX:
        raise PeerError(
            f"message came with {len(state.unparsed_fds)} descriptors, limit is {TABLE_REGION_COUNT_MAX}"
        )


def _check_acked(acked: int, offered: int, name: str) -> None:
    if acked & ~offered:
        raise PeerError(
            f"frontend acknowledged {name} {acked:#x}, of which {acked & ~offered:#x} are not among the offered"
            f" {offered:#x}"
        )


def _check_range(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise PeerError(f"{name} is {value}, limit is {limit}")


def _check_vring_size(index: int, size: int, offer: Offer) -> None:
    if not 0 < size <= offer.vring_size_max or size & (size - 1):
        raise PeerError(
            f"vring {index} has {size} entries, must be a power of two of at most {offer.vring_size_max}"
        )


def _check_vring_addresses(index: int, descriptor_table: int, avail_ring: int, used_ring: int) -> None:
    # virtio 1.2, section 2.7: the alignment of each part of a split virtqueue.
    for name, address, alignment in (
        ("descriptor table", descriptor_table, 16),
        ("avail ring", avail_ring, 2),
        ("used ring", used_ring, 4),
    ):
        if address % alignment:
            raise PeerError(f"{name} of vring {index} is at {address:#x}, must be aligned to {alignment} bytes")


# -- events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What the device has to do now. `refusable`: whether it may say no and the session goes on."""

    refusable: ClassVar = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesSet(Event):
    """`features_acked` is new, and with it perhaps `enabled` of every ring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryChanged(Event):
    """`regions` is new: rings stop, memory is mapped anew, rings go on. The old mapping must be gone afterwards.

    A ring whose addresses the new table does not hold stands still until a table holds them again: a frontend that
    takes memory away and adds it in another shape sends this event in between.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class VringChanged(Event):
    """A ring that ran or shall run looks different: it started, stopped, moved, or has other descriptors.

    The device stops it, writes `next_avail`, and where it `is_running` lets it go on from there.
    """

    index: int


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


# -- the session ------------------------------------------------------------------------------------------------


class Backend:
    """One session. After any `PeerError` it is to be closed: `close` is all it still does.

    Attributes:
        offer: what GET_FEATURES and the like answer.
        state: the session as plain data. The device reads it, and writes `next_avail` of rings it stopped.
        config: the device's configuration space, what GET_CONFIG reads.
    """

    def __init__(self, offer: Offer, *, config: bytes = b"") -> None:
        self.offer = offer
        self.config = config
        self.state = SessionState(vrings=[VringState() for _ in range(offer.vring_count)])
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
        backend.state = state
        backend._parse_header()
        return backend

    @property
    def bytes_wanted(self) -> int:
        """Bytes the present message lacks; never 0. No more may be read, so that descriptors stay with their message."""
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
        self._parse_header()
        if len(state.unparsed_fds) > TABLE_REGION_COUNT_MAX:
            _check_unparsed(state)
        if self._header is None or self.bytes_wanted:
            return None
        header = self._header
        content = state.unparsed[HEADER_SIZE:]
        self._payload = decode_request(header, content, fd_count=len(state.unparsed_fds))
        self._check_feature(header.request)
        self._event = _HANDLERS[header.request](self, self._payload, state.unparsed_fds)
