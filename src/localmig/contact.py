"""How the other end of a UNIX socket comes: by connecting to it, or by being connected to.

Owns:        Listener and Connector, and the plans of either that options make; how a listener travels.
Never sees:  what is said on a connection.
Read next:   vhost_user/session.py and netdevs/stream.py, whose peers come so.

Nothing here touches a socket between adoption and `accept_connections`: until the handover commits it is shared with
the process that serves it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Protocol, Self

from localmig import fds
from localmig.access import PRIVATE_MODE
from localmig.errors import ConfigError, KernelError, PeerError, is_shortage, reason_of
from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd
from localmig.unix_socket import PATH_BYTES_MAX, AcceptPace, ListeningSocket, SocketKind, socket_kind
from localmig.vmstate import Description, fd, text, u64

_logger = logging.getLogger(__name__)

_ACCEPT_RETRY_SECONDS: Final = 1.0
"""Pause when there is no descriptor left to accept with: long enough not to spin, short for whoever waits."""

FRONTEND: Final = "frontend"
"""What the peers of most sockets here are."""


class Contact(Protocol):
    """Brings peers: by listening for them, or by connecting to them.

    Attributes:
        brings_one: whether it has one peer at most. It brings the next one if it is asked after that one left.
    """

    brings_one: ClassVar[bool]

    def save(self) -> ListenerState | None:
        """What of it travels, its descriptor lent; None where nothing does."""

    def claim(self) -> None:
        """Moves to its own path what was bound beside it. KernelError where the kernel refuses."""

    def accept_connections(self, on_connection: Callable[[OwnedFd], None]) -> None:
        """Hands each connection (non-blocking) to `on_connection`, until `pause`."""

    def pause(self) -> None:
        """Brings nobody any more. Calling it again does nothing."""

    def has_waiting(self) -> bool:
        """Whether a peer connected and nobody took its connection, while this is paused."""
        return False

    def release(self) -> None:
        """Drops what it has and leaves its path: another process serves it."""

    def discard(self) -> None:
        """Drops what was adopted; what this process bound beside the other one's path goes too."""

    def close(self) -> None:
        """Ends for good, with the path if it is ours. Calling it again does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenerState:
    """A listener as it travels. `device` and `inode` name the file it bound, so that nobody else's is removed."""

    path: str
    device: int
    inode: int
    fd: OwnedFd


LISTENER: Final = Description(
    name="vhost-user-listener",
    version=1,
    oldest_version=1,
    state=ListenerState,
    fields=(text("path", size_max=PATH_BYTES_MAX), u64("device"), u64("inode"), fd("fd", kind=FdKind.LISTENING_SOCKET)),
)


class Listener(Contact):
    """Hands the peers that connect to a listening socket to whoever serves them.

    Args:
        listening: the socket, this listener's from now on.
        peer: what a peer is called, for the log.
    """

    brings_one = False

    def __init__(self, listening: ListeningSocket, *, peer: str = FRONTEND) -> None:
        self.listening = listening
        self._peer = peer
        self._socket = borrowed_socket(listening.fd)
        self._on_connection: Callable[[OwnedFd], None] | None = None
        self._accepting = False
        self._retry: asyncio.TimerHandle | None = None
        self._pace = AcceptPace()

    @classmethod
    def from_state(cls, state: ListenerState, *, peer: str = FRONTEND) -> Self:
        """Takes over a socket that listens already, without touching it; `state.fd` is empty afterwards.

        Raises:
            PeerError: it is no socket; `state.fd` is closed.
        """
        listening = ListeningSocket(state.fd, path=state.path, identity=(state.device, state.inode))
        try:
            return cls(listening, peer=peer)
        except PeerError:
            listening.release()
            raise

    def save(self) -> ListenerState:
        """The listener as it travels; its descriptor is lent, and stays this listener's."""
        device, inode = self.listening.identity
        return ListenerState(path=self.listening.path, device=device, inode=inode, fd=self.listening.fd)

    def claim(self) -> None:
        """Moves the socket to its path, over whatever is there."""
        self.listening.claim()

    def accept_connections(self, on_connection: Callable[[OwnedFd], None]) -> None:
        """Hands each connection (non-blocking) to `on_connection`, until `pause`."""
        self._on_connection = on_connection
        if self._accepting:
            return
        self.pause()
        loop = asyncio.get_running_loop()
        if delay_s := self._pace.delay_s():
            self._retry = loop.call_later(delay_s, self.accept_connections, on_connection)
        else:
            loop.add_reader(self.listening.fd.fileno(), self._accept)
            self._accepting = True

    def pause(self) -> None:
        """Accepts nothing more; connections wait in the kernel. Calling it again does nothing."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._accepting:
            asyncio.get_running_loop().remove_reader(self.listening.fd.fileno())
            self._accepting = False

    def has_waiting(self) -> bool:
        """Whether a connection waits to be accepted."""
        return is_readable(self.listening.fd)

    def release(self) -> None:
        """Drops the socket and leaves its path: another process serves it."""
        self.pause()
        self._socket.detach()
        self.listening.release()

    def discard(self) -> None:
        """Drops the socket; one of our own, beside the source's, goes with its path."""
        if self.listening.is_beside:
            self.close()
        else:
            self.release()

    def close(self) -> None:
        """Ends listening for good and removes the path if it is still ours. Calling it again does nothing."""
        self.pause()
        self._socket.detach()
        self.listening.close()

    def _accept(self) -> None:
        assert self._on_connection is not None
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if not is_shortage(error):
                raise
            _logger.warning("no %s can be accepted at '%s': %s", self._peer, self.listening.path, reason_of(error))
            self.pause()
            self._retry = asyncio.get_running_loop().call_later(
                _ACCEPT_RETRY_SECONDS, self.accept_connections, self._on_connection
            )
            return
        connection.setblocking(False)
        self._pace.note()
        if self._pace.delay_s():
            self.pause()
            self.accept_connections(self._on_connection)  # once it is due
        self._on_connection(OwnedFd(connection.detach()))


class Connector(Contact):
    """Connects to a socket on which a peer listens, and again after it left.

    One attempt at a time. An attempt does not wait: on a UNIX socket connect(2) is done or refused at once. The log
    has a line when attempts begin to fail, or fail for another reason, and one when they end; not one for each.

    Args:
        path: where the peer listens.
        reconnect_ms: milliseconds from a connection's end, or from an attempt that failed, to the next attempt; 0:
            there is none.
        is_due: whether the first attempt comes at once, or as after a connection's end.
        peer: what a peer is called, for the log.
    """

    brings_one = True

    def __init__(self, path: str, *, reconnect_ms: int, is_due: bool, peer: str = FRONTEND) -> None:
        self._path = path
        self._peer = peer
        self._reconnect_ms = reconnect_ms
        self._is_due = is_due
        self._connection: OwnedFd | None = None
        self._on_connection: Callable[[OwnedFd], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told: str | None = None

    @classmethod
    def connect(cls, path: str, *, reconnect_ms: int, peer: str = FRONTEND) -> Self:
        """A connector that is connected already.

        Raises:
            KernelError: it cannot connect. Nothing is kept.
        """
        connector = cls(path, reconnect_ms=reconnect_ms, is_due=False, peer=peer)
        try:
            connector._connection = _connect(path)
        except OSError as error:
            raise KernelError(
                f"cannot connect to '{path}': {error.strerror}; let the {peer} listen there first, "
                "or wait for it with reconnect-ms=",
                errno=error.errno or errno.EIO,
            ) from error
        return connector

    @classmethod
    def given(cls, path: str, fd: int, *, reconnect_ms: int, peer: str = FRONTEND) -> Self:
        """A connector that has an inherited connection. ConfigError where `fd` is none; it is left alone then."""
        if socket_kind(fd) is not SocketKind.CONNECTED:
            raise ConfigError(f"descriptor {fd} is no connected UNIX stream socket")
        os.set_blocking(fd, False)
        connector = cls(path, reconnect_ms=reconnect_ms, is_due=False, peer=peer)
        connector._connection = OwnedFd(fd)
        return connector

    def save(self) -> None:
        """Nothing travels: a connection that stands is a session's, and who has none begins anew."""
        return

    def claim(self) -> None:
        """There is nothing to move: the path is the peer's."""

    def accept_connections(self, on_connection: Callable[[OwnedFd], None]) -> None:
        """Hands each connection (non-blocking) to `on_connection`, until `pause`; the first one perhaps at once."""
        self._on_connection = on_connection
        if self._connection is not None:
            connection, self._connection = self._connection, None
            on_connection(connection)
        elif self._is_due:
            self._attempt()
        elif self._reconnect_ms == 0:
            self._tell("it left")
        else:
            self._schedule()

    def pause(self) -> None:
        """Attempts nothing more. Calling it again does nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def release(self) -> None:
        """Attempts nothing more: another process does."""
        self.pause()
        fds.close_all((self._connection,))

    def discard(self) -> None:
        """As `release`: nothing was bound."""
        self.release()

    def close(self) -> None:
        """Ends for good; the path is the peer's and stays. Calling it again does nothing."""
        self.release()

    def _attempt(self) -> None:
        assert self._on_connection is not None
        self._timer = None
        self._is_due = False
        try:
            connection = _connect(self._path)
        except OSError as error:
            self._tell(error.strerror or str(error))
            self._schedule()
            return
        if self._told is not None:
            self._told = None
            _logger.info("connected to the %s at '%s'", self._peer, self._path)
        self._on_connection(connection)

    def _schedule(self) -> None:
        """Sees to the next attempt."""
        if self._reconnect_ms and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._reconnect_ms / 1000, self._attempt)

    def _tell(self, reason: str) -> None:
        """Says why there is no peer, if that is new."""
        if reason != self._told:
            self._told = reason
            then = f"trying every {self._reconnect_ms} ms" if self._reconnect_ms else "not trying again, reconnect-ms=0"
            _logger.warning("no %s at '%s': %s; %s", self._peer, self._path, reason, then)


def _connect(path: str) -> OwnedFd:
    """A non-blocking connection to whoever listens at `path`. OSError where nobody does, or the queue there is full."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return OwnedFd(connection.detach())


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenAt:
    """`server=on`: this daemon listens at `path`, which belongs to `group` and has `mode`; peers connect.

    `fd` is a socket that listens there already, given by whoever started this process.
    """

    path: str
    mode: int = PRIVATE_MODE
    group: str | None = None
    peer: str = FRONTEND
    fd: int | None = None

    def each(self) -> tuple[ListenAt]:
        """The plan for the one address."""
        return (self,)

    def open(self) -> Listener:
        """Listens. ConfigError or KernelError where that cannot be."""
        if self.fd is not None:
            return Listener(ListeningSocket.inherit(self.fd, self.path), peer=self.peer)
        return Listener(ListeningSocket.bind(self.path, mode=self.mode, group=self.group), peer=self.peer)

    def open_beside(self) -> Listener:
        """Listens beside the path, which is the source's. ConfigError or KernelError where that cannot be."""
        listening = ListeningSocket.bind_beside(self.path, mode=self.mode, group=self.group)
        return Listener(listening, peer=self.peer)

    def check(self, listener: ListenerState | None) -> None:
        """Raises PeerError where no listener came."""
        if listener is None:
            raise PeerError("server=on, and the source has no listening socket")

    def adopt(self, listener: ListenerState | None) -> Listener:
        """The listener that came. PeerError where it is no socket."""
        assert listener is not None, self.path
        return Listener.from_state(listener, peer=self.peer)

    def recover(self, contact: Contact) -> Contact:
        """`contact`, paused, or another listener at the path where a process that died had claimed that.

        Raises:
            ConfigError, KernelError: the path is a living process's, or cannot be bound. `contact` is as it was.
        """
        assert isinstance(contact, Listener), self.path
        if not contact.listening.is_displaced:
            return contact
        fresh = replace(self, fd=None).open()
        contact.release()
        return fresh


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectTo:
    """`server=off`: a peer listens at `path`; this daemon connects, and again `reconnect_ms` after it left (0: not).

    At `second_path` another peer listens, for what can have two at once. `fd` is a connection that stands already, from
    whoever started this process.
    """

    path: str
    reconnect_ms: int
    peer: str = FRONTEND
    second_path: str | None = None
    fd: int | None = None

    def each(self) -> tuple[ConnectTo, ...]:
        """A plan for each address."""
        alone = replace(self, second_path=None)
        return (alone,) if self.second_path is None else (alone, replace(alone, path=self.second_path, fd=None))

    def open(self) -> Connector:
        """Connects once it is asked for; where nothing is tried again, connects now or raises KernelError."""
        if self.fd is not None:
            return Connector.given(self.path, self.fd, reconnect_ms=self.reconnect_ms, peer=self.peer)
        if self.reconnect_ms == 0:
            return Connector.connect(self.path, reconnect_ms=0, peer=self.peer)
        return self.open_beside()

    def open_beside(self) -> Connector:
        """Connects once it is asked for: until then the peer has the source."""
        return Connector(self.path, reconnect_ms=self.reconnect_ms, is_due=True, peer=self.peer)

    def check(self, listener: ListenerState | None) -> None:
        """Raises PeerError where a listener came."""
        if listener is not None:
            raise PeerError(f"server=off, and the source listens at '{listener.path}'")

    def adopt(self, listener: ListenerState | None) -> Connector:
        """What goes on where the source's left off: trying, or not trying any more."""
        assert listener is None, self.path
        is_due = self.reconnect_ms > 0
        return Connector(self.path, reconnect_ms=self.reconnect_ms, is_due=is_due, peer=self.peer)

    def recover(self, contact: Contact) -> Contact:
        """`contact`: its path is the peer's, which nobody claims."""
        return contact


def borrowed_socket(fd: OwnedFd) -> socket.socket:
    """A socket object on a borrowed descriptor: to be detached, never closed."""
    try:
        # With family, type and protocol given, this asks the kernel for nothing but the socket's name.
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd.fileno())
    except OSError as error:
        raise PeerError(f"descriptor that came as a socket is none: {error.strerror}") from error


def is_readable(fd: OwnedFd) -> bool:
    """Whether there is something to read, and somebody at the other end."""
    poll = select.poll()
    poll.register(fd.fileno(), select.POLLIN)
    return any(events == select.POLLIN for _, events in poll.poll(0))


# -- how it leaves ----------------------------------------------------------------------------------------


class Departure:
    """Tells once that the other end of a connection left, or says no more, whoever reads the connection.

    Args:
        connection: a borrowed socket.
        on_departure: called by the event loop.

    Raises:
        OSError: the kernel has no descriptor or memory for it.
    """

    def __init__(self, connection: OwnedFd, on_departure: Callable[[], None]) -> None:
        self._on_departure = on_departure
        # What there is to read must wake nobody here, which a selector's reader would be.
        self._epoll = select.epoll()
        try:
            self._epoll.register(connection.fileno(), select.EPOLLRDHUP)
        except OSError:
            self._epoll.close()
            raise
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._tell)

    def close(self) -> None:
        """Tells nothing any more. Before the connection is closed: a copy of it may live on elsewhere. Idempotent."""
        if not self._epoll.closed:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _tell(self) -> None:
        self.close()
        self._on_departure()
