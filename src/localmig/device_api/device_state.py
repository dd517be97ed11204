"""How a vhost-user device travels while the guest runs, whatever device it is.

Owns:        the descriptions of its socket, its sessions and their descriptors.
Never sees:  a live object; what a particular device has besides, which is a section of its own.
Read next:   vhost_user_device.py, which saves and adopts them; queues.py for what travels inside the downtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.contact import LISTENER, ListenerState
from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd
from localmig.vhost_user.description import SESSION
from localmig.vhost_user.message import CONFIG_SIZE_MAX
from localmig.vhost_user.protocol import SessionState
from localmig.vmstate import Description, array, blob, fd, optional, struct, u64

SESSION_COUNT_MAX: Final = 8
"""Sessions of a device: a VMM that is replaced makes two, and a few more may be half-open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionState:
    """A frontend's connection and the session on it.

    Attributes:
        connection: to the frontend.
        session: what was said on it.
        ledger: where its packed rings stand, for whoever outlives the other; None where it has none.
        in_flight: which chains of its rings a device's Python code has taken, likewise.
    """

    connection: OwnedFd
    session: SessionState
    ledger: OwnedFd | None
    in_flight: OwnedFd | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SocketState:
    """The device's socket, where descriptors move; without a listener the device is the side that connects."""

    listener: ListenerState | None
    connections: tuple[ConnectionState, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceState:
    """What travels while the guest runs.

    Attributes:
        features_acked: virtio feature bits of the present session, 0 where there is none.
        config: the configuration space, as a frontend read it last or was told of it.
        socket: None where descriptors stay home: the frontend then connects anew and says everything again.
    """

    features_acked: int
    config: bytes
    socket: SocketState | None


CONNECTION: Final = Description(
    name="vhost-user-connection",
    version=1,
    oldest_version=1,
    state=ConnectionState,
    fields=(
        fd("connection", kind=FdKind.SOCKET),
        struct("session", SESSION),
        optional(fd("ledger", kind=FdKind.MEMORY)),
        optional(fd("in_flight", kind=FdKind.MEMORY)),
    ),
)

SOCKET: Final = Description(
    name="vhost-user-socket",
    version=1,
    oldest_version=1,
    state=SocketState,
    fields=(
        optional(struct("listener", LISTENER)),
        array("connections", CONNECTION, count_max=SESSION_COUNT_MAX),
    ),
)

DEVICE: Final = Description(
    name="vhost-user-device",
    version=1,
    oldest_version=1,
    state=DeviceState,
    fields=(
        u64("features_acked"),
        blob("config", size_max=CONFIG_SIZE_MAX),
        optional(struct("socket", SOCKET)),
    ),
)
