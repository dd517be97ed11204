"""How a vhost-user device travels while the guest runs, whatever device it is.

Owns:        the descriptions of its socket, its sessions and their descriptors.
Never sees:  a live object; what a particular device has besides, which is a section of its own.
Read next:   vhost_user_device.py, which saves and adopts them; queues.py for what travels inside the downtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.contact import LISTENER, ListenerState
from localmig.errors import PeerError
from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd
from localmig.unix_socket import PATH_BYTES_MAX
from localmig.vhost_user.description import SESSION
from localmig.vhost_user.memory import check_sizes
from localmig.vhost_user.message import CONFIG_SIZE_MAX
from localmig.vhost_user.ownership import SESSION_COUNT_MAX
from localmig.vhost_user.protocol import Offer, SessionState, check_servable, check_state
from localmig.vmstate import Description, array, blob, boolean, fd, optional, struct, text, u64


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionState:
    """A frontend's connection and the session on it.

    Attributes:
        number: of the session, from 1 on.
        path: the address by which the frontend came.
        since_ns: since when it owns, is held, or is idle, by CLOCK_MONOTONIC.
        was_succeeded: whether it owned, and another session continued its rings.
        connection: to the frontend.
        session: what was said on it.
        ledger: where its packed rings stand, for whoever outlives the other; None where it has none.
        in_flight: which chains of its rings a device's Python code has taken, likewise.
    """

    number: int
    path: str
    since_ns: int
    was_succeeded: bool
    connection: OwnedFd
    session: SessionState
    ledger: OwnedFd | None
    in_flight: OwnedFd | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SocketState:
    """The device's socket, where descriptors move; without a listener the device is the side that connects.

    Attributes:
        listener: where frontends connect.
        connections: those that did.
        opened_count: how many sessions there have been: the number of the last one.
        owner: the number of the session whose rings run, 0 where none does.
    """

    listener: ListenerState | None
    connections: tuple[ConnectionState, ...]
    opened_count: int
    owner: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceState:
    """What travels while the guest runs.

    Attributes:
        features_acked: virtio feature bits of the session that owns, 0 where none does.
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
        u64("number"),
        text("path", size_max=PATH_BYTES_MAX),
        u64("since_ns"),
        boolean("was_succeeded"),
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
        u64("opened_count"),
        u64("owner"),
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


def check_acked(state: DeviceState, offered: Offer) -> None:
    """A session that comes goes on with what it was offered; one that begins again is offered what is here.

    Raises:
        PeerError: the guest uses what cannot be served, or is not offered here.
    """
    if state.socket is not None:
        check_servable(state.features_acked, offered.all_servable_features, "features")
    elif missing := state.features_acked & ~offered.all_features:
        raise PeerError(
            f"the guest uses features {state.features_acked:#x}, of which {missing:#x} are not offered here"
        )


def check_socket(state: SocketState, offered: Offer) -> None:
    """Raises PeerError where the sessions that came cannot be, or cannot be served. Changes nothing."""
    numbers = [connection.number for connection in state.connections]
    if len(set(numbers)) < len(numbers):
        raise PeerError(f"sessions came with the numbers {numbers}, of which each may be there once")
    if numbers and not 1 <= min(numbers) <= max(numbers) <= state.opened_count:
        raise PeerError(f"sessions came with the numbers {numbers}, must be from 1 to {state.opened_count}")
    if state.owner and state.owner not in numbers:
        raise PeerError(f"session {state.owner} is said to own, and the sessions that came are {numbers}")
    for connection in state.connections:
        check_state(connection.session, offered)
        check_sizes(connection.session.regions)
        if connection.session.is_packed and connection.ledger is None:
            raise PeerError("the guest's rings are packed, and no ledger came that tells where they stand")
