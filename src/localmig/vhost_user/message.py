"""vhost-user messages as bytes, the same for frontend and backend.

Owns:        header, request numbers, protocol features, payload layouts; `RULES`, the one table of what each
             request carries.
Never sees:  a socket, a session, the meaning of a message.
Read next:   protocol.py for what a backend does with them.

All numbers are in the machine's byte order (vhost-user, "Message Specification").
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from enum import Enum, IntEnum, IntFlag
from typing import Any, ClassVar, Final, Self, cast

from localmig.errors import PeerError

VERSION: Final = 1
FLAG_VERSION_MASK: Final = 0x3
FLAG_REPLY: Final = 0x4
FLAG_NEED_REPLY: Final = 0x8

HEADER_SIZE: Final = 12

PROTOCOL_FEATURES_BIT: Final = 30
"""VHOST_USER_F_PROTOCOL_FEATURES: a virtio feature bit no device uses; vhost-user negotiates itself by it."""

LOG_ALL_BIT: Final = 26
"""VHOST_F_LOG_ALL: another such bit. A frontend that acknowledges it wants each page logged that the backend writes."""

TABLE_REGION_COUNT_MAX: Final = 32
"""Regions one SET_MEM_TABLE may carry, and so descriptors one message may. The specification's layout ends at region7;
rust-vmm takes and sends up to 32 descriptors with a message (MAX_ATTACHED_FD_ENTRIES). QEMU sends more than 8 regions
only one by one."""

CONFIG_SIZE_MAX: Final = 256
"""Bytes of configuration space one message may carry, and a space may have: QEMU's VHOST_USER_MAX_CONFIG_SIZE."""

MOVED_STATE_SIZE_MAX: Final = 4096
"""Bytes of a device's state in the hands of a frontend. A pipe takes so many at once (PIPE_BUF, pipe(7)), so nobody
waits for a frontend that does not read."""

VRING_INDEX_MAX: Final = 0xFF
"""The highest vring index: SET_VRING_KICK, _CALL and _ERR have eight bits for it."""


class Request(IntEnum):
    """What a frontend asks for (vhost-user, "Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(IntEnum):
    """What a backend tells over the socket of SET_BACKEND_REQ_FD (vhost-user, "Back-end message types")."""

    CONFIG_CHANGE = 2


class ProtocolFeature(IntFlag):
    """What vhost-user itself negotiates (vhost-user, "Protocol features")."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


# -- payloads -----------------------------------------------------------------------------------------------


class Payload:
    """Base of the payload layouts. Each knows its own bytes."""

    __slots__ = ()

    def encode(self) -> bytes:
        """The payload's bytes, without a header."""
        raise NotImplementedError

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads a payload.

        Raises:
            PeerError: `data` has a length or a value the layout does not allow.
        """
        raise NotImplementedError


class Numbers(Payload):
    """A payload that is its fields, one after the other, as `LAYOUT` says."""

    __slots__ = ()

    LAYOUT: ClassVar[struct.Struct]

    def encode(self) -> bytes:
        """The fields in their order."""
        return self.LAYOUT.pack(*(getattr(self, name) for name in _field_names(type(self))))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads exactly the fields; `PeerError` where `data` is shorter or longer."""
        if len(data) != cls.LAYOUT.size:
            raise PeerError(f"payload has {len(data)} bytes, expected {cls.LAYOUT.size}")
        return cls(**dict(zip(_field_names(cls), cls.LAYOUT.unpack(data), strict=True)))


def _field_names(layout: type[Numbers]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cast(Any, layout)))


@dataclass(frozen=True, kw_only=True, slots=True)
class U64(Numbers):
    """One 64-bit number."""

    value: int

    LAYOUT: ClassVar = struct.Struct("=Q")


class StateDirection(IntEnum):
    """Which way a device's state goes (vhost-user, "Device state transfer parameters")."""

    SAVE = 0
    LOAD = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StateTransfer(Numbers):
    """The device's state is to go through the descriptor that comes along; in phase 0 its rings are stopped."""

    direction: int
    phase: int = 0

    LAYOUT: ClassVar = struct.Struct("=II")


@dataclass(frozen=True, kw_only=True, slots=True)
class VringNumber(Numbers):
    """A number for one vring ("vring state description"): its size, its position, or 1 for enabled."""

    index: int
    number: int = 0

    LAYOUT: ClassVar = struct.Struct("=II")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFile(Numbers):
    """The dirty log ("log description"): `size` bytes of the file that comes along, from `mmap_offset` on."""

    size: int
    mmap_offset: int

    LAYOUT: ClassVar = struct.Struct("=QQ")


@dataclass(frozen=True, kw_only=True, slots=True)
class VringAddress(Numbers):
    """Where a vring is, in the frontend's user addresses ("vring address description").

    With the flag `LOGGED`, what is written to the device area is logged as if that was at guest address `log`.
    """

    LOGGED: ClassVar = 1

    index: int
    flags: int = 0
    descriptor_area: int
    device_area: int
    driver_area: int
    log: int = 0

    LAYOUT: ClassVar = struct.Struct("=IIQQQQ")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionDescription(Numbers):
    """One region of guest memory, in bytes. `MemoryTable` and `SingleRegion` carry it."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int

    LAYOUT: ClassVar = struct.Struct("=QQQQ")


@dataclass(frozen=True, kw_only=True, slots=True)
class VringFile(Payload):
    """A descriptor for one vring: the index in bits 0 to 7 of a 64-bit number, "none comes" in bit 8."""

    index: int
    has_fd: bool = True

    _NO_FD: ClassVar = 1 << 8

    def encode(self) -> bytes:
        """The index and the flag as one number."""
        return U64(value=self.index | (0 if self.has_fd else self._NO_FD)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads the number; `PeerError` where a bit without a meaning is set."""
        value = U64.decode(data).value
        if value & ~(VRING_INDEX_MAX | cls._NO_FD):
            raise PeerError(f"payload is {value:#x}, only bits 0 to 8 have a meaning")
        return cls(index=value & VRING_INDEX_MAX, has_fd=not value & cls._NO_FD)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTable(Payload):
    """All of guest memory ("memory regions description"); one descriptor per region, in the same order."""

    regions: tuple[RegionDescription, ...]

    _HEAD: ClassVar = struct.Struct("=II")

    def encode(self) -> bytes:
        """The number of regions, padding, the regions."""
        return self._HEAD.pack(len(self.regions), 0) + b"".join(region.encode() for region in self.regions)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads the table; `PeerError` where it announces more than it carries, or more than there may be."""
        size = RegionDescription.LAYOUT.size
        content = data[cls._HEAD.size :]
        if len(data) < cls._HEAD.size or len(content) % size:
            raise PeerError(f"payload has {len(data)} bytes, which is no whole number of regions")
        count, _padding = cls._HEAD.unpack_from(data)
        if count > TABLE_REGION_COUNT_MAX:
            raise PeerError(f"memory table has {count} regions, limit is {TABLE_REGION_COUNT_MAX}")
        # More than announced is fine: User-Mode Linux sends its whole array of two and means the first.
        if count * size > len(content):
            raise PeerError(f"memory table announces {count} regions and carries {len(content) // size}")
        starts = range(0, count * size, size)
        return cls(regions=tuple(RegionDescription.decode(content[at : at + size]) for at in starts))


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleRegion(Payload):
    """One region to add or remove ("single memory region description")."""

    region: RegionDescription

    _PADDING: ClassVar = bytes(8)

    def encode(self) -> bytes:
        """Padding, then the region."""
        return self._PADDING + self.region.encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads the region; `PeerError` where the length is wrong."""
        size = len(cls._PADDING) + RegionDescription.LAYOUT.size
        if len(data) != size:
            raise PeerError(f"payload has {len(data)} bytes, expected {size}")
        return cls(region=RegionDescription.decode(data[len(cls._PADDING) :]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigSpace(Payload):
    """A piece of the device's configuration space ("virtio device config space")."""

    offset: int
    flags: int = 0
    data: bytes

    _HEAD: ClassVar = struct.Struct("=III")

    def encode(self) -> bytes:
        """Offset, size, flags, the bytes."""
        return self._HEAD.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads the piece, wherever it begins; `PeerError` if it announces another length, or too long a one."""
        content = data[cls._HEAD.size :]
        if len(data) < cls._HEAD.size:
            raise PeerError(f"payload has {len(data)} bytes, expected {cls._HEAD.size} or more")
        offset, size, flags = cls._HEAD.unpack_from(data)
        if size != len(content):
            raise PeerError(f"config space access announces {size} bytes and carries {len(content)}")
        if size > CONFIG_SIZE_MAX:
            raise PeerError(f"config space access has {size} bytes, limit is {CONFIG_SIZE_MAX}")
        return cls(offset=offset, flags=flags, data=content)


# -- the table ----------------------------------------------------------------------------------------------


_NO_FEATURE: Final = ProtocolFeature(0)


class Descriptors(Enum):
    """How many descriptors come with a request."""

    NONE = "none"
    ONE = "one"
    ONE_UNLESS_FLAGGED = "one, or none where the payload says so"
    ONE_PER_REGION = "one per region"
    # Some frontends send one that nobody needs; it is closed unused.
    AT_MOST_ONE = "none, or one that means nothing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What a request looks like.

    Attributes:
        payload: layout of the request, None for an empty one.
        reply: layout of the reply it always gets; None where it gets one only by REPLY_ACK.
        descriptors: how many descriptors come with it.
        feature: the protocol feature without which it must not be sent; an empty flag where there is none.
    """

    payload: type[Payload] | None = None
    reply: type[Payload] | None = None
    descriptors: Descriptors = Descriptors.NONE
    feature: ProtocolFeature = _NO_FEATURE


RULES: Final = {
    Request.GET_FEATURES: Rule(reply=U64),
    Request.SET_FEATURES: Rule(payload=U64),
    Request.SET_OWNER: Rule(),
    Request.RESET_OWNER: Rule(),
    Request.SET_MEM_TABLE: Rule(payload=MemoryTable, descriptors=Descriptors.ONE_PER_REGION),
    # The reply does not wait for REPLY_ACK: the former log is the frontend's again once it comes.
    Request.SET_LOG_BASE: Rule(
        payload=LogFile, reply=U64, descriptors=Descriptors.ONE, feature=ProtocolFeature.LOG_SHMFD
    ),
    # An eventfd for a backend to tell that it logged something. Nobody reads it; it is closed.
    Request.SET_LOG_FD: Rule(descriptors=Descriptors.AT_MOST_ONE),
    Request.SET_VRING_NUM: Rule(payload=VringNumber),
    Request.SET_VRING_ADDR: Rule(payload=VringAddress),
    Request.SET_VRING_BASE: Rule(payload=VringNumber),
    Request.GET_VRING_BASE: Rule(payload=VringNumber, reply=VringNumber),
    Request.SET_VRING_KICK: Rule(payload=VringFile, descriptors=Descriptors.ONE_UNLESS_FLAGGED),
    Request.SET_VRING_CALL: Rule(payload=VringFile, descriptors=Descriptors.ONE_UNLESS_FLAGGED),
    Request.SET_VRING_ERR: Rule(payload=VringFile, descriptors=Descriptors.ONE_UNLESS_FLAGGED),
    Request.GET_PROTOCOL_FEATURES: Rule(reply=U64),
    Request.SET_PROTOCOL_FEATURES: Rule(payload=U64),
    # QEMU asks for the number of queues as soon as MQ is offered, before it acknowledges anything.
    Request.GET_QUEUE_NUM: Rule(reply=U64),
    Request.SET_VRING_ENABLE: Rule(payload=VringNumber),
    Request.SEND_RARP: Rule(payload=U64, feature=ProtocolFeature.RARP),
    Request.NET_SET_MTU: Rule(payload=U64, feature=ProtocolFeature.MTU),
    Request.SET_BACKEND_REQ_FD: Rule(descriptors=Descriptors.ONE, feature=ProtocolFeature.BACKEND_REQ),
    Request.GET_CONFIG: Rule(payload=ConfigSpace, reply=ConfigSpace, feature=ProtocolFeature.CONFIG),
    Request.SET_CONFIG: Rule(payload=ConfigSpace, feature=ProtocolFeature.CONFIG),
    Request.RESET_DEVICE: Rule(feature=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: Rule(reply=U64, feature=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Rule(
        payload=SingleRegion, descriptors=Descriptors.ONE, feature=ProtocolFeature.CONFIGURE_MEM_SLOTS
    ),
    Request.REM_MEM_REG: Rule(
        payload=SingleRegion, descriptors=Descriptors.AT_MOST_ONE, feature=ProtocolFeature.CONFIGURE_MEM_SLOTS
    ),
    Request.SET_STATUS: Rule(payload=U64, feature=ProtocolFeature.STATUS),
    Request.GET_STATUS: Rule(reply=U64, feature=ProtocolFeature.STATUS),
    Request.SET_DEVICE_STATE_FD: Rule(
        payload=StateTransfer, reply=U64, descriptors=Descriptors.ONE, feature=ProtocolFeature.DEVICE_STATE
    ),
    Request.CHECK_DEVICE_STATE: Rule(reply=U64, feature=ProtocolFeature.DEVICE_STATE),
}
"""Every request this package speaks. The others belong to protocol features it does not know."""

PAYLOAD_SIZE_MAX: Final = max(8 + TABLE_REGION_COUNT_MAX * RegionDescription.LAYOUT.size, 12 + CONFIG_SIZE_MAX)
"""Bytes of the longest payload: a full memory table, or all of a configuration space."""


# -- messages -----------------------------------------------------------------------------------------------


_HEADER_LAYOUT: Final = struct.Struct("=III")


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The twelve bytes every message begins with."""

    request: Request
    flags: int
    size: int

    @property
    def is_reply(self) -> bool:
        """Whether this is an answer."""
        return bool(self.flags & FLAG_REPLY)

    @property
    def needs_reply(self) -> bool:
        """Whether the sender wants an acknowledgement (it gets one if REPLY_ACK was negotiated)."""
        return bool(self.flags & FLAG_NEED_REPLY)

    def encode(self) -> bytes:
        """The header's twelve bytes."""
        return _HEADER_LAYOUT.pack(self.request, self.flags, self.size)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads twelve bytes.

        Raises:
            PeerError: the request has no rule here, version or flags are unknown, or the payload is too long.
        """
        number, flags, size = _HEADER_LAYOUT.unpack(data)
        try:
            request = Request(number)
        except ValueError:
            raise PeerError(f"request {number} is unknown, the highest known is {max(Request)}") from None
        if request not in RULES:
            raise PeerError(f"request {request.name} is not supported")
        if flags & FLAG_VERSION_MASK != VERSION:
            raise PeerError(f"{request.name} has version {flags & FLAG_VERSION_MASK}, expected {VERSION}")
        if flags & ~(FLAG_VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY):
            raise PeerError(f"{request.name} has flags {flags:#x}, only bits 0 to 3 have a meaning")
        if size > PAYLOAD_SIZE_MAX:
            raise PeerError(f"{request.name} has a payload of {size} bytes, limit is {PAYLOAD_SIZE_MAX}")
        return cls(request=request, flags=flags, size=size)


def encode_request(request: Request, payload: Payload | None = None, *, needs_reply: bool = False) -> bytes:
    """A request as the frontend sends it, header included."""
    rule = RULES[request]
    assert isinstance(payload, rule.payload) if rule.payload else payload is None, (request, payload)
    flags = VERSION | (FLAG_NEED_REPLY if needs_reply else 0)
    return _encode(request, flags, payload)


def encode_reply(request: Request, payload: Payload) -> bytes:
    """The backend's reply to `request`, header included."""
    return _encode(request, VERSION | FLAG_REPLY, payload)


def encode_backend_request(request: BackendRequest) -> bytes:
    """A request of the backend's own, which carries nothing and wants no answer."""
    return _HEADER_LAYOUT.pack(request, VERSION, 0)


def _encode(request: Request, flags: int, payload: Payload | None) -> bytes:
    data = payload.encode() if payload is not None else b""
    assert len(data) <= PAYLOAD_SIZE_MAX, (request, len(data))
    return Header(request=request, flags=flags, size=len(data)).encode() + data


def decode_request(header: Header, data: bytes, *, fd_count: int) -> Payload | None:
    """Reads the payload of a request and checks that as many descriptors came as it wants.

    Raises:
        PeerError: it is a reply, or payload or number of descriptors break the rule for this request.
    """
    rule = RULES[header.request]
    name = header.request.name
    if header.is_reply:
        raise PeerError(f"{name} came as a reply, expected a request")
    payload = _decode(name, rule.payload, data)
    counts = _descriptor_counts(rule.descriptors, payload)
    if fd_count not in counts:
        raise PeerError(f"{name} came with {fd_count} descriptors, expected {counts[0]}")
    return payload


def decode_reply(header: Header, data: bytes) -> Payload | None:
    """Reads the payload of a reply: the layout of the rule, or a 64-bit number where it acknowledges.

    Raises:
        PeerError: it is not a reply, or its payload breaks the rule for this request.
    """
    rule = RULES[header.request]
    name = header.request.name
    if header.flags != VERSION | FLAG_REPLY:
        raise PeerError(f"reply to {name} has flags {header.flags:#x}, expected {VERSION | FLAG_REPLY:#x}")
    return _decode(name, rule.reply or U64, data)


def _decode(name: str, layout: type[Payload] | None, data: bytes) -> Payload | None:
    if layout is None:
        if data:
            raise PeerError(f"{name} has a payload of {len(data)} bytes, expected none")
        return None
    try:
        return layout.decode(data)
    except PeerError as error:
        raise PeerError(f"{name}: {error}") from None


def _descriptor_counts(descriptors: Descriptors, payload: Payload | None) -> tuple[int, ...]:
    match descriptors, payload:
        case Descriptors.ONE, _:
            return (1,)
        case Descriptors.ONE_UNLESS_FLAGGED, VringFile(has_fd=has_fd):
            return (1,) if has_fd else (0,)
        case Descriptors.ONE_PER_REGION, MemoryTable(regions=regions):
            return (len(regions),)
        case Descriptors.AT_MOST_ONE, _:
            return (0, 1)
        case _:
            return (0,)
