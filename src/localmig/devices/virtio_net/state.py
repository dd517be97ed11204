"""How a virtio-net device travels.

Owns:        its descriptions: setup (session, memory, descriptors) and switchover (positions, counters).
Never sees:  a live object.
Read next:   device.py, which saves and adopts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.dataplane import Counters
from localmig.fds import OwnedFd
from localmig.vhost_user.description import LISTENER, SESSION
from localmig.vhost_user.message import VRING_INDEX_MAX
from localmig.vhost_user.protocol import SessionState
from localmig.vhost_user.session import ListenerState
from localmig.virtio.net import MAC_LENGTH
from localmig.vmstate import Description, array, blob, fd, optional, struct, u16, u64

QUEUE_PAIR_COUNT_MAX: Final = (VRING_INDEX_MAX + 1) // 2
"""Queue pairs the vring numbers of vhost-user can name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionState:
    """The frontend's connection and the session on it."""

    connection: OwnedFd
    session: SessionState


@dataclass(frozen=True, kw_only=True, slots=True)
class SocketState:
    """The device's socket, where descriptors move; without a listener the device is the side that connects."""

    listener: ListenerState | None
    connection: ConnectionState | None


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtioNetState:
    """What travels while the guest runs.

    Attributes:
        features_acked: virtio feature bits of the present session, 0 where there is none.
        mac: the guest's Ethernet address where it is known, else empty.
        socket: None where descriptors stay home: the frontend then connects anew and says everything again.
    """

    features_acked: int
    mac: bytes
    socket: SocketState | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RingsState:
    """What travels inside the downtime: where each ring goes on, and what each queue pair counted."""

    next_avail: tuple[int, ...]
    counters: tuple[Counters, ...]


CONNECTION: Final = Description(
    name="virtio-net-connection",
    version=1,
    oldest_version=1,
    state=ConnectionState,
    fields=(fd("connection", kind="socket"), struct("session", SESSION)),
)

SOCKET: Final = Description(
    name="virtio-net-socket",
    version=1,
    oldest_version=1,
    state=SocketState,
    fields=(optional(struct("listener", LISTENER)), optional(struct("connection", CONNECTION))),
)

VIRTIO_NET: Final = Description(
    name="virtio-net",
    version=1,
    oldest_version=1,
    state=VirtioNetState,
    fields=(
        u64("features_acked"),
        blob("mac", size_max=MAC_LENGTH),
        optional(struct("socket", SOCKET)),
    ),
)

COUNTERS: Final = Description(
    name="virtio-net-counters",
    version=1,
    oldest_version=1,
    state=Counters,
    fields=(
        u64("rx_packets"),
        u64("rx_bytes"),
        u64("rx_dropped_length"),
        u64("rx_kicks"),
        u64("rx_calls"),
        u64("tx_packets"),
        u64("tx_bytes"),
        u64("tx_dropped_interface"),
        u64("tx_dropped_header"),
        u64("tx_dropped_memory"),
        u64("tx_kicks"),
        u64("tx_calls"),
    ),
)

RINGS: Final = Description(
    name="virtio-net-rings",
    version=1,
    oldest_version=1,
    state=RingsState,
    fields=(
        array("next_avail", u16, count_max=2 * QUEUE_PAIR_COUNT_MAX),
        array("counters", COUNTERS, count_max=QUEUE_PAIR_COUNT_MAX),
    ),
)
