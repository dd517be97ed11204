"""Facts of the virtio specification about network devices (virtio 1.2, section 5.1).

Owns:        feature bits, the configuration space, the length of the header before each frame, which ring is which.
Never sees:  a packet.
Read next:   devices/virtio_net/.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from functools import reduce
from operator import or_
from typing import ClassVar, Final, Self

from localmig.errors import PeerError
from localmig.virtio import Feature


class NetFeature(IntFlag):
    """Feature bits of a NIC (section 5.1.3). GUEST_ names what the driver can receive, HOST_ what it may send."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56
    HASH_REPORT = 1 << 57
    RSS = 1 << 60
    SPEED_DUPLEX = 1 << 63


_REQUIREMENTS: Final = (
    (NetFeature.GUEST_TSO4, NetFeature.GUEST_CSUM),
    (NetFeature.GUEST_TSO6, NetFeature.GUEST_CSUM),
    (NetFeature.GUEST_USO4, NetFeature.GUEST_CSUM),
    (NetFeature.GUEST_USO6, NetFeature.GUEST_CSUM),
    (NetFeature.GUEST_ECN, NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6),
    (NetFeature.HOST_TSO4, NetFeature.CSUM),
    (NetFeature.HOST_TSO6, NetFeature.CSUM),
    (NetFeature.HOST_USO, NetFeature.CSUM),
    (NetFeature.HOST_ECN, NetFeature.HOST_TSO4 | NetFeature.HOST_TSO6),
)
"""Section 5.1.3.1: the first needs one of the second; who is needed stands above who needs it."""

OFFLOADS: Final = NetFeature(
    reduce(or_, (feature for feature, _ in _REQUIREMENTS), NetFeature.CSUM | NetFeature.GUEST_CSUM)
)
"""What either side leaves to the other: checksums and segmentation."""


def without_orphans(features: int) -> int:
    """`features` without those whose requirement is not among them."""
    for feature, required in _REQUIREMENTS:
        if not features & required:
            features &= ~feature
    return features


class LinkStatus(IntFlag):
    """Bits of `status` in the configuration space (section 5.1.4)."""

    LINK_UP = 1
    ANNOUNCE = 2


MAC_LENGTH: Final = 6
"""Bytes of an Ethernet address."""

MTU_MIN: Final = 68
"""The least MTU a device may tell (section 5.1.4.1): the least IPv4 allows."""

MTU_MAX: Final = 65535
"""The greatest MTU the configuration space has room for."""

QUEUE_PAIR_COUNT_MAX: Final = 0x8000
"""The greatest `max_virtqueue_pairs` (section 5.1.4.1)."""


def header_length(features: int) -> int:
    """Bytes of the header before each frame (section 5.1.6): `num_buffers` is there or is not."""
    return 12 if features & (Feature.VERSION_1 | NetFeature.MRG_RXBUF) else 10


def receive_queue(pair: int) -> int:
    """Index of the ring that carries frames to the guest (section 5.1.2)."""
    return 2 * pair


def transmit_queue(pair: int) -> int:
    """Index of the ring that carries frames from the guest (section 5.1.2)."""
    return 2 * pair + 1


def control_queue(pair_count: int) -> int:
    """Index of the ring that carries commands, behind those of all pairs (section 5.1.2)."""
    return 2 * pair_count


@dataclass(frozen=True, kw_only=True, slots=True)
class NetConfig:
    """The configuration space (section 5.1.4). A field means something where its feature was negotiated.

    Attributes:
        mac: six bytes.
        status: `LinkStatus` bits.
        queue_pair_count_max: pairs the driver may use.
        mtu: in bytes, 0 where none is told.
        speed: in Mbit/s, `SPEED_UNKNOWN` where it is not known.
        duplex: 0 half, 1 full, `DUPLEX_UNKNOWN`.
    """

    SPEED_UNKNOWN: ClassVar = 0xFFFFFFFF
    DUPLEX_UNKNOWN: ClassVar = 0xFF

    mac: bytes = bytes(MAC_LENGTH)
    status: int = LinkStatus.LINK_UP
    queue_pair_count_max: int = 1
    mtu: int = 0
    speed: int = SPEED_UNKNOWN
    duplex: int = DUPLEX_UNKNOWN

    _LAYOUT: ClassVar = struct.Struct("<6sHHHIBBHI")

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads what `encode` wrote. PeerError if it has another length."""
        if len(data) != cls._LAYOUT.size:
            raise PeerError(f"configuration space has {len(data)} bytes, expected {cls._LAYOUT.size}")
        mac, status, queue_pair_count_max, mtu, speed, duplex, *_ = cls._LAYOUT.unpack(data)
        return cls(
            mac=mac,
            status=status,
            queue_pair_count_max=queue_pair_count_max,
            mtu=mtu,
            speed=speed,
            duplex=duplex,
        )

    def encode(self) -> bytes:
        """All 24 bytes, little-endian as VERSION_1 has them; the three RSS fields at the end are 0."""
        assert len(self.mac) == MAC_LENGTH, self.mac
        return self._LAYOUT.pack(
            self.mac, self.status, self.queue_pair_count_max, self.mtu, self.speed, self.duplex, 0, 0, 0
        )
