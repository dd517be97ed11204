"""The vhost-user socket of a device: asyncio and descriptors around the session protocol.

Owns:        Listener and Connector (how a frontend comes), Session (one connection), Endpoint (one of the two and at
             most one session, which is what a device has).
Never sees:  a ring. What a message means stands in protocol.py.
Read next:   devices/virtio_net/ for a handler.

Nothing here touches a socket between adoption and `thaw`: until the handover commits it is shared with the process
that serves it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, Self

from localmig import fds
from localmig.access import PRIVATE_MODE
from localmig.errors import KernelError, LocalmigError, PeerError, is_shortage, reason_of
from localmig.fd_kind import FdKind, is_of_kind
from localmig.fds import OwnedFd
from localmig.unix_socket import AcceptPace, ListeningSocket
from localmig.vhost_user.protocol import Backend, Event, Offer, SessionState

_logger = logging.getLogger(__name__)

_ACCEPT_RETRY_SECONDS: Final = 1.0
"""Pause when there is no descriptor left to accept with: long enough not to spin, short for whoever waits."""


class SessionHandler(Protocol):
    """What a device does for its session. Each method runs in the event loop and returns when the work is done."""

    def session_opened(self) -> None:
        """A frontend connected; the session's state is fresh."""

    def handle(self, event: Event) -> None:
        """Makes the device what the session's state says.

        Raises:
            LocalmigError: it cannot. A refusable event is refused; after any other the session is closed.
        """

    def session_closed(self, reason: str | None) -> None:
        """The session ends: no ring may run any more, for its descriptors close next. None: the frontend left."""


# -- how a frontend comes ---------------------------------------------------------------------------------


class Contact(Protocol):
    """Brings frontends to a device: by listening for them, or by connecting to them."""

    def save(self) -> ListenerState | None:
        """What of it travels, its descriptor lent; None where nothing does."""

    def claim(self) -> None:
        """Moves to its own path what was bound beside it. KernelError where the kernel refuses."""

    def accept_connections(self, on_connection: Callable[[OwnedFd], None]) -> None:
        """Hands each connection (non-blocking) to `on_connection`, until `pause`."""

    def pause(self) -> None:
        """Brings nobody any more. Calling it again does nothing."""

    def has_waiting(self) -> bool:
        """Whether a frontend connected and nobody took its connection, while this is paused."""
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


class Listener(Contact):
    """Hands the frontends that connect to a listening socket to whoever serves them.

    Attributes:
        listening: the socket, this listener's.
    """

    def __init__(self, listening: ListeningSocket) -> None:
        self.listening = listening
        self._socket = _wrap(listening.fd)
        self._on_connection: Callable[[OwnedFd], None] | None = None
        self._accepting = False
        self._retry: asyncio.TimerHandle | None = None
        self._pace = AcceptPace()

    @classmethod
    def from_state(cls, state: ListenerState) -> Self:
        """Takes over a socket that listens already, without touching it; `state.fd` is empty afterwards.

        Raises:
            PeerError: it is no socket; `state.fd` is closed.
        """
        listening = ListeningSocket(state.fd, path=state.path, identity=(state.device, state.inode))
        try:
            return cls(listening)
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
        return _is_readable(self.listening.fd)

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
            _logger.warning("no frontend can be accepted at '%s': %s", self.listening.path, reason_of(error))
            self.pause()
            self._retry = asyncio.get_running_loop().call_later(
                _ACCEPT_RETRY_SECONDS, self.accept_connections, self._on_connection
            )
            return
        connection.setblocking(False)
        self._pace.note()
        self._on_connection(OwnedFd(connection.detach()))


class Connector(Contact):
    """Connects to a socket on which the VMM listens, and again after it left.

    One attempt at a time. An attempt does not wait: on a UNIX socket connect(2) is done or refused at once. The log
    has a line when attempts begin to fail, or fail for another reason, and one when they end; not one for each.

    Args:
        path: where the VMM listens.
        reconnect_ms: milliseconds from a connection's end, or from an attempt that failed, to the next attempt; 0:
            there is none.
        is_due: whether the first attempt comes at once, or as after a connection's end.
    """

    def __init__(self, path: str, *, reconnect_ms: int, is_due: bool) -> None:
        self._path = path
        self._reconnect_ms = reconnect_ms
        self._is_due = is_due
        self._connection: OwnedFd | None = None
        self._on_connection: Callable[[OwnedFd], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told: str | None = None

    @classmethod
    def connect(cls, path: str, *, reconnect_ms: int) -> Self:
        """A connector that is connected already.

        Raises:
            KernelError: it cannot connect. Nothing is kept.
        """
        connector = cls(path, reconnect_ms=reconnect_ms, is_due=False)
        try:
            connector._connection = _connect(path)
        except OSError as error:
            raise KernelError(
                f"cannot connect to '{path}': {error.strerror}; let the VMM listen there first, "
                "or wait for it with reconnect-ms=",
                errno=error.errno or errno.EIO,
            ) from error
        return connector

    def save(self) -> None:
        """Nothing travels: a connection that stands is a session's, and who has none begins anew."""
        return

    def claim(self) -> None:
        """There is nothing to move: the path is the VMM's."""

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
        """Ends for good; the path is the VMM's and stays. Calling it again does nothing."""
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
            _logger.info("connected to the frontend at '%s'", self._path)
        self._on_connection(connection)

    def _schedule(self) -> None:
        """Sees to the next attempt."""
        if self._reconnect_ms and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._reconnect_ms / 1000, self._attempt)

    def _tell(self, reason: str) -> None:
        """Says why there is no frontend, if that is new."""
        if reason != self._told:
            self._told = reason
            then = f"trying every {self._reconnect_ms} ms" if self._reconnect_ms else "not trying again, reconnect-ms=0"
            _logger.warning("no frontend at '%s': %s; %s", self._path, reason, then)


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
    """`server=on`: the device listens at `path`, which belongs to `group` and has `mode`; VMMs connect."""

    path: str
    mode: int = PRIVATE_MODE
    group: str | None = None

    def open(self) -> Listener:
        """Listens. ConfigError or KernelError where that cannot be."""
        return Listener(ListeningSocket.bind(self.path, mode=self.mode, group=self.group))

    def open_beside(self) -> Listener:
        """Listens beside the path, which is the source's. ConfigError or KernelError where that cannot be."""
        return Listener(ListeningSocket.bind_beside(self.path, mode=self.mode, group=self.group))

    def check(self, listener: ListenerState | None) -> None:
        """Raises PeerError where no listener came."""
        if listener is None:
            raise PeerError("server=on, and the source has no listening socket")

    def adopt(self, listener: ListenerState | None) -> Listener:
        """The listener that came. PeerError where it is no socket."""
        assert listener is not None, self.path
        return Listener.from_state(listener)

    def recover(self, contact: Contact) -> Contact:
        """`contact`, paused, or another listener at the path where a process that died had claimed that.

        Raises:
            ConfigError, KernelError: the path is a living process's, or cannot be bound. `contact` is as it was.
        """
        assert isinstance(contact, Listener), self.path
        if not contact.listening.is_displaced:
            return contact
        fresh = self.open()
        contact.release()
        return fresh


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectTo:
    """`server=off`: a VMM listens at `path`, the device connects, and again `reconnect_ms` after it left (0: not)."""

    path: str
    reconnect_ms: int

    def open(self) -> Connector:
        """Connects once it is asked for; where nothing is tried again, connects now or raises KernelError."""
        if self.reconnect_ms == 0:
            return Connector.connect(self.path, reconnect_ms=0)
        return self.open_beside()

    def open_beside(self) -> Connector:
        """Connects once it is asked for: until then the VMM has the source."""
        return Connector(self.path, reconnect_ms=self.reconnect_ms, is_due=True)

    def check(self, listener: ListenerState | None) -> None:
        """Raises PeerError where a listener came."""
        if listener is not None:
            raise PeerError(f"server=off, and the source listens at '{listener.path}'")

    def adopt(self, listener: ListenerState | None) -> Connector:
        """What goes on where the source's left off: trying, or not trying any more."""
        assert listener is None, self.path
        return Connector(self.path, reconnect_ms=self.reconnect_ms, is_due=self.reconnect_ms > 0)

    def recover(self, contact: Contact) -> Contact:
        """`contact`: its path is the VMM's, which nobody claims."""
        return contact


def _wrap(fd: OwnedFd) -> socket.socket:
    """A socket object on a borrowed descriptor: to be detached, never closed."""
    try:
        # With family, type and protocol given, this asks the kernel for nothing but the socket's name.
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd.fileno())
    except OSError as error:
        raise PeerError(f"descriptor that came as a socket is none: {error.strerror}") from error


def _is_readable(fd: OwnedFd) -> bool:
    """Whether there is something to read, and somebody at the other end."""
    poll = select.poll()
    poll.register(fd.fileno(), select.POLLIN)
    return any(events == select.POLLIN for _, events in poll.poll(0))


# -- one connection ---------------------------------------------------------------------------------------


class Session:
    """One connection: carries bytes between its socket and `backend`, and events to the device.

    Attributes:
        backend: the protocol's side of it.
        connection: the socket, this session's; a handover borrows it.
    """

    def __init__(
        self,
        connection: OwnedFd,
        backend: Backend,
        handler: SessionHandler,
        *,
        changing: Callable[[], None],
        on_closed: Callable[[], None],
    ) -> None:
        """Takes over `connection` (non-blocking) without touching it; it is served from `thaw` on.

        `changing` is called before anything is taken out of the socket or put into it, `on_closed` after the session
        was closed, but not after it was released.

        Raises:
            PeerError: `connection` is no socket; it is still the caller's.
        """
        self.backend = backend
        self._socket = _wrap(connection)
        self.connection = connection.take()
        self._handler = handler
        self._changing = changing
        self._on_closed = on_closed
        self._reading = False
        self._writing = False

    @property
    def is_closed(self) -> bool:
        """Whether it was closed or released."""
        return not self.connection.is_open

    def thaw(self) -> None:
        """Carries bytes from now on. Calling it again does nothing."""
        waiting = bool(self.backend.data_to_send())
        self._watch(reading=not waiting, writing=waiting)

    def freeze(self) -> None:
        """Reads and writes nothing more, at once: what is unread stays in the kernel, the rest in the state."""
        self._watch(reading=False, writing=False)

    def has_unread(self) -> bool:
        """Whether the frontend said something that nobody has read. One that left does not count."""
        return _is_readable(self.connection)

    def release(self) -> None:
        """Drops this process's copies, socket and all: another process serves the session."""
        self.freeze()
        self._socket.detach()
        self.connection.close()
        self.backend.close()

    def close(self, reason: str | None) -> None:
        """Ends the session for good; the device is told first. Calling it again does nothing.

        Args:
            reason: what was wrong; None where the frontend simply left.
        """
        if self.is_closed:
            return
        self._changing()
        self.freeze()
        try:
            # A copy of the socket in another process must not keep the frontend waiting.
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
        self._socket.detach()
        self.connection.close()
        self._handler.session_closed(reason)
        self.backend.close()
        self._on_closed()

    def change_config(self, config: bytes) -> None:
        """The device's configuration space is `config` now; a frontend that listens to changes is told.

        A frontend that does not read what it is told, or gave something else than a socket, misses the change.
        """
        request = self.backend.change_config(config)
        channel = self.backend.state.backend_request_fd
        if not request or channel is None or not is_of_kind(channel.fileno(), FdKind.SOCKET):
            return
        sock = _wrap(channel)
        try:
            # It may be a blocking socket, and the frontend's.
            sock.send(request, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            _logger.debug("a frontend was not told of its configuration space: %s", error.strerror)
        finally:
            sock.detach()

    def _watch(self, *, reading: bool, writing: bool) -> None:
        # The loop is asked for nothing where nothing changes: a session that never ran needs none.
        if reading != self._reading:
            loop = asyncio.get_running_loop()
            if reading:
                loop.add_reader(self.connection.fileno(), self._read)
            else:
                loop.remove_reader(self.connection.fileno())
            self._reading = reading
        if writing != self._writing:
            loop = asyncio.get_running_loop()
            if writing:
                loop.add_writer(self.connection.fileno(), self._write)
            else:
                loop.remove_writer(self.connection.fileno())
            self._writing = writing

    def _read(self) -> None:
        self._changing()
        try:
            data, received = fds.receive(self._socket, self.backend.bytes_wanted)
            if not data:
                cut = len(self.backend.state.unparsed)
                self.close(f"frontend left {cut} bytes into a message" if cut else None)
                return
            event = self.backend.receive(data, received)
            if event is not None:
                self._handle(event)
        except BlockingIOError:
            return
        except (LocalmigError, OSError) as error:
            self.close(str(error))
        except BaseException:
            self.close("internal error")
            raise
        if not self.is_closed and self.backend.data_to_send():
            self._write()

    def _handle(self, event: Event) -> None:
        try:
            self._handler.handle(event)
        except LocalmigError:
            if not event.refusable:
                raise
            self.backend.refuse()
        else:
            # The device may have closed the session instead.
            if not self.is_closed:
                self.backend.complete()

    def _write(self) -> None:
        self._changing()
        try:
            self.backend.data_sent(fds.send(self._socket, self.backend.data_to_send()))
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(str(error))
            return
        # Nothing more is read before all is sent. A frozen session stays frozen.
        if self._reading or self._writing:
            self.thaw()


# -- what a device has ------------------------------------------------------------------------------------


class Endpoint:
    """A device's vhost-user socket: how frontends come, and at most one session. Further frontends wait in the kernel.

    It does nothing until `thaw`.

    Attributes:
        contact: brings frontends.
        session: the frontend that is served, None while there is none.
        offer: what the device offers.
        config: the device's configuration space.
    """

    def __init__(self, contact: Contact, handler: SessionHandler, offer: Offer, *, config: bytes = b"") -> None:
        self.contact = contact
        self.session: Session | None = None
        self.offer = offer
        self.config = config
        self._handler = handler
        self._frozen = True
        self._watcher: Callable[[], None] | None = None

    @property
    def state(self) -> SessionState | None:
        """The session's state, None while there is no session."""
        return self.session.backend.state if self.session else None

    def adopt_session(self, connection: OwnedFd, state: SessionState, *, config: bytes) -> None:
        """Takes over a session that began elsewhere, without touching its socket.

        `config` is the configuration space it had there; a frontend that can hear of a difference does at `thaw`.

        Raises:
            PeerError: the state cannot be served (see `check_state`), or `connection` is no socket; connection and
                state still own their descriptors.
        """
        backend = Backend.from_state(state, self.offer, config=config)
        self.session = self._make_session(connection, backend)

    def watch(self, changing: Callable[[], None] | None) -> None:
        """From now on calls `changing` before the session, or whether there is one, changes; None ends that."""
        self._watcher = changing

    def note_change(self) -> None:
        """Something changes next that a successor must know: tells whoever watches."""
        if self._watcher is not None:
            self._watcher()

    def frontend_waits(self) -> bool:
        """Whether a frontend waits for this frozen endpoint: for an answer, or to be let in."""
        return self.contact.has_waiting() if self.session is None else self.session.has_unread()

    def change_config(self, config: bytes) -> None:
        """The device's configuration space is `config` now. A session's frontend is told, at the latest at `thaw`."""
        self.note_change()
        self.config = config
        if self.session is not None and not self._frozen:
            self.session.change_config(config)

    def thaw(self) -> None:
        """Serves the session, or waits for one. Calling it again does nothing."""
        self._frozen = False
        if self.session is not None:
            self.session.change_config(self.config)
            self.session.thaw()
        else:
            self.contact.accept_connections(self._on_connection)

    def freeze(self) -> None:
        """Accepts, reads and writes nothing more, at once."""
        self._frozen = True
        self.contact.pause()
        if self.session is not None:
            self.session.freeze()

    def release(self) -> None:
        """Drops this process's copies without a side effect: another process serves them."""
        self.freeze()
        self.contact.release()
        self._release_session()

    def discard(self) -> None:
        """Drops what was adopted: the source serves on."""
        self.freeze()
        self.contact.discard()
        self._release_session()

    def close(self) -> None:
        """Ends everything for good; the device is told of its session's end. Bears being called twice."""
        self.freeze()
        self.contact.close()
        if self.session is not None:
            self.session.close("the device was closed")

    def _release_session(self) -> None:
        if self.session is not None:
            self.session.release()
            self.session = None

    def _on_connection(self, connection: OwnedFd) -> None:
        self.note_change()
        self.contact.pause()
        self.session = self._make_session(connection, Backend(self.offer, config=self.config))
        self._handler.session_opened()
        self.session.thaw()

    def _make_session(self, connection: OwnedFd, backend: Backend) -> Session:
        return Session(connection, backend, self._handler, changing=self.note_change, on_closed=self._on_session_closed)

    def _on_session_closed(self) -> None:
        self.session = None
        if not self._frozen:
            self.thaw()
