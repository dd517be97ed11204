"""How a virtio-net device travels while the guest runs.

Owns:        the descriptions of its session, memory and descriptors.
Never sees:  a live object.
Read next:   device.py, which saves and adopts them; device_api/queues.py for what travels inside the downtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.contact import LISTENER, ListenerState
from localmig.devices.virtio_net.heir import HEIR, Heir
from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd
from localmig.vhost_user.description import SESSION
from localmig.vhost_user.message import CONFIG_SIZE_MAX
from localmig.vhost_user.protocol import SessionState
from localmig.virtio.net import MAC_LENGTH
from localmig.vmstate import Description, array, blob, fd, optional, struct, u64

QUEUE_PAIR_COUNT_MAX: Final = 256
"""Of one device: as many as a TAP has queues."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionState:
    """The frontend's connection and the session on it.

    Attributes:
        connection: to the frontend.
        session: what was said on it.
        ledger: where its rings stand, for whoever outlives the other; only packed rings have one.
    """

    connection: OwnedFd
    session: SessionState
    ledger: OwnedFd | None


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
        config: the configuration space, as a frontend read it last or was told of it.
        heirs: for each queue pair whom the frames are for that wait; empty where descriptors stay home.
        socket: None where descriptors stay home: the frontend then connects anew and says everything again.
    """

    features_acked: int
    mac: bytes
    config: bytes
    heirs: tuple[Heir, ...]
    socket: SocketState | None


CONNECTION: Final = Description(
    name="virtio-net-connection",
    version=1,
    oldest_version=1,
    state=ConnectionState,
    fields=(
        fd("connection", kind=FdKind.SOCKET),
        struct("session", SESSION),
        optional(fd("ledger", kind=FdKind.MEMORY)),
    ),
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
        blob("config", size_max=CONFIG_SIZE_MAX),
        array("heirs", HEIR, count_max=QUEUE_PAIR_COUNT_MAX),
        optional(struct("socket", SOCKET)),
    ),
)
