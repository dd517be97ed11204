"""What there is to see of a virtio-net device, for people and programs that ask.

Owns:        VirtioNetInfo, and its names in QMP.
Never sees:  the device itself.
Read next:   device.py, which fills it in; monitor/commands/objects.py for who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.dataplane import Counters
from localmig.qapi import Array, Boolean, Member, String, Struct, Uint64
from localmig.qapi.bits import named
from localmig.vhost_user.info import VRING, SessionInfo, VringInfo, feature_names, session_members
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
class VirtioNetInfo:
    """A NIC.

    Attributes:
        id: the user's name for it.
        netdev: its host side's.
        socket: the path of its vhost-user socket.
        server: whether it listens there.
        mac: the guest's Ethernet address, None where nobody said it.
        session: None while no frontend is connected.
        vrings: the session's rings.
        queue_pairs: those that exist.
        notes: what keeps it from working, each with what to do.
    """

    id: str
    netdev: str
    socket: str
    server: bool
    mac: bytes | None
    session: SessionInfo | None
    vrings: tuple[VringInfo, ...]
    queue_pairs: tuple[QueuePairInfo, ...]
    notes: tuple[str, ...]


_FEATURES: Final = named("VIRTIO_NET_F_", NetFeature)


def net_feature_names(bits: int) -> list[str]:
    """A virtio-net device's feature bits."""
    return feature_names(bits, _FEATURES)


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
    Member(name="socket", attribute="socket", type=String()),
    Member(name="server", attribute="server", type=Boolean()),
    Member(name="mac", attribute="mac", type=String(), required=False, convert=lambda mac: mac.hex(":")),
    Member(name="session", attribute="session", type=session_members(net_feature_names), required=False),
    Member(name="vrings", attribute="vrings", type=Array(VRING)),
    Member(name="queue-pairs", attribute="queue_pairs", type=Array(_QUEUE_PAIR)),
)
"""What query-devices shows of it, besides what it shows of every device."""
