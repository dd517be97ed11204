"""What there is to see of a virtio-net device, for people and programs that ask.

Owns:        VirtioNetInfo, and its names in QMP.
Never sees:  the device itself.
Read next:   device.py, which fills it in; monitor/commands/objects.py for who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.dataplane import Counters
from localmig.device_api.device_info import DeviceInfo, device_members
from localmig.qapi import Array, Boolean, Member, String, Struct, Uint64
from localmig.qapi.bits import named
from localmig.virtio.net import NetFeature


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuePairInfo:
    """One queue pair.

    Attributes:
        index: its number; its rings are the vrings twice that and one more.
        running: its rings are served.
        counters: what it moved and dropped, since the guest's NIC was first served, handovers included.
    """

    index: int
    running: bool
    counters: Counters


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtioNetInfo(DeviceInfo):
    """A NIC.

    Attributes:
        netdev: its host side's.
        mac: the guest's Ethernet address, None where nobody said it.
        queue_pairs: those that exist.
    """

    netdev: str
    mac: bytes | None
    queue_pairs: tuple[QueuePairInfo, ...]


_FEATURES: Final = named("VIRTIO_NET_F_", NetFeature)

_COUNTERS: Final = Struct(
    tuple(Member(name=name.replace("_", "-"), attribute=name, type=Uint64()) for name in Counters._fields)
)

_QUEUE_PAIR: Final = Struct(
    (
        Member(name="index", attribute="index", type=Uint64()),
        Member(name="running", attribute="running", type=Boolean()),
        Member(name="counters", attribute="counters", type=_COUNTERS),
    )
)

SHOWN: Final = (
    Member(name="netdev", attribute="netdev", type=String()),
    Member(name="mac", attribute="mac", type=String(), required=False, convert=lambda mac: mac.hex(":")),
    *device_members(_FEATURES),
    Member(name="queue-pairs", attribute="queue_pairs", type=Array(_QUEUE_PAIR)),
)
"""What query-devices shows of it, besides what it shows of every object."""
