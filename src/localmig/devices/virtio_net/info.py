"""What there is to see of a virtio-net device, for people and programs that ask.

Owns:        VirtioNetInfo.
Never sees:  the device itself; QMP's names.
Read next:   device.py, which fills it in; monitor/commands/objects.py for who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from localmig.dataplane import Counters
from localmig.vhost_user.info import SessionInfo, VringInfo


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

    type_name: ClassVar[str] = "virtio-net"

    id: str
    netdev: str
    socket: str
    server: bool
    mac: bytes | None
    session: SessionInfo | None
    vrings: tuple[VringInfo, ...]
    queue_pairs: tuple[QueuePairInfo, ...]
    notes: tuple[str, ...]
