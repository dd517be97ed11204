"""The vhost-user socket of a device: asyncio and descriptors around the session protocol.

Owns:        Session (one connection), Endpoint (how frontends come, and at most one session: what a device has).
Never sees:  a ring. What a message means stands in protocol.py.
Read next:   contact.py for how frontends come, devices/virtio_net/ for a handler.

Nothing here touches a socket between adoption and `thaw`: until the handover commits it is shared with the process
that serves it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Protocol

from localmig import fds
from localmig.contact import Contact, borrowed_socket, is_readable
from localmig.errors import LocalmigError
from localmig.fd_kind import FdKind, is_of_kind
from localmig.fds import OwnedFd
from localmig.vhost_user.protocol import Backend, Event, Offer, SessionState

_logger = logging.getLogger(__name__)


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
        self._socket = borrowed_socket(connection)
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
        return is_readable(self.connection)

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
        sock = borrowed_socket(channel)
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
