"""The vhost-user socket of a device: asyncio and descriptors around the session protocol.

Owns:        Session (one connection), Endpoint (how frontends come, and the sessions of a device).
Never sees:  a ring. What a message means stands in protocol.py.
Read next:   contact.py for how frontends come, ownership.py for whose rings run,
             device_api/vhost_user_device.py for the handler.

Nothing here touches a socket between adoption and `thaw`: until the handover commits it is shared with the process
that serves it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

from localmig import fds
from localmig.access import peer_credentials
from localmig.contact import Contact, borrowed_socket, is_readable
from localmig.errors import LocalmigError
from localmig.fd_kind import FdKind, is_of_kind
from localmig.fds import OwnedFd
from localmig.vhost_user.ownership import SESSION_COUNT_MAX, least_needed
from localmig.vhost_user.protocol import Backend, Event, Offer, SessionState

_logger = logging.getLogger(__name__)


class SessionHandler(Protocol):
    """What a device does for its sessions. Each method runs in the event loop and returns when the work is done."""

    def session_opened(self, session: Session) -> None:
        """A frontend connected; the session's state is fresh."""

    def handle(self, session: Session, event: Event) -> None:
        """Makes the device what the session's state says.

        Raises:
            LocalmigError: it cannot. A refusable event is refused; after any other the session is closed.
        """

    def session_closed(self, session: Session, reason: str | None) -> None:
        """The session ends: none of its rings may run any more, because its descriptors close next.

        `reason` is None if the frontend left.
        """


class Peer(NamedTuple):
    """The process at the other end of a connection, as the kernel knows it.

    Attributes:
        pid: 0 if it has no number here, because it is in another PID namespace.
        uid: its user.
    """

    pid: int
    uid: int

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid else f"a process of user {self.uid}"


# -- one connection ---------------------------------------------------------------------------------------


class Session:
    """One connection: carries bytes between its socket and `backend`, and events to the device.

    Attributes:
        number: tells it from all other sessions that the device has or had, handovers included.
        path: the address by which the frontend came.
        backend: the protocol's side of it.
        connection: the socket, this session's; a handover borrows it.
        peer: the frontend's process, None until this process serves the session.
    """

    def __init__(
        self,
        connection: OwnedFd,
        backend: Backend,
        handler: SessionHandler,
        *,
        number: int,
        path: str,
        changing: Callable[[], None],
        on_closed: Callable[[], None],
    ) -> None:
        """Takes over `connection` (non-blocking) without touching it; it is served from `thaw` on.

        `changing` is called before anything is taken out of the socket or put into it, `on_closed` after the session
        was closed, but not after it was released.

        Raises:
            PeerError: `connection` is no socket; it is still the caller's.
        """
        self.number = number
        self.path = path
        self.backend = backend
        self.peer: Peer | None = None
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
        if self.peer is None:
            self.peer = Peer(*peer_credentials(self._socket))
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
        self._handler.session_closed(self, reason)
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
            self._handler.handle(self, event)
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
    """A device's vhost-user sockets: how frontends come, and their sessions.

    It does nothing until `thaw`. Each frontend is accepted and answered at once. One too many costs the oldest session
    that has neither memory nor rings, which may be its own: so frontends that say nothing keep nobody out.

    Attributes:
        contacts: what brings frontends, by address.
        sessions: the frontends that are connected, by number.
        opened_count: how many sessions there have been; the number of the last one.
        offer: what the device offers.
        config: the device's configuration space.
    """

    def __init__(
        self, contacts: Mapping[str, Contact], handler: SessionHandler, offer: Offer, *, config: bytes = b""
    ) -> None:
        self.contacts = dict(contacts)
        self.sessions: dict[int, Session] = {}
        self.opened_count = 0
        self.offer = offer
        self.config = config
        self._handler = handler
        self._frozen = True
        self._watcher: Callable[[], None] | None = None

    def adopt_session(
        self, connection: OwnedFd, state: SessionState, *, number: int, path: str, config: bytes
    ) -> Session:
        """Takes over a session that began elsewhere, without touching its socket.

        Args:
            connection: the frontend's, this session's from now on.
            state: what was said on it.
            number: of the session, none that is here.
            path: the address by which the frontend came.
            config: the configuration space it had there; a frontend that can hear of a difference does at `thaw`.

        Raises:
            PeerError: the state cannot be served (see `check_state`), or `connection` is no socket; connection and
                state still own their descriptors.
        """
        assert number not in self.sessions, number
        backend = Backend.from_state(state, self.offer, config=config)
        session = self.sessions[number] = self._make_session(connection, backend, number=number, path=path)
        self.opened_count = max(self.opened_count, number)
        return session

    def add_contact(self, path: str, contact: Contact) -> None:
        """Frontends come by one more address."""
        self.contacts[path] = contact
        if not self._frozen:
            self._accept(path)

    def remove_contact(self, path: str) -> None:
        """None comes by this address any more. The session that did goes on."""
        self.contacts.pop(path).close()

    def watch(self, changing: Callable[[], None] | None) -> None:
        """From now on calls `changing` before a session, or which there are, changes; None ends that."""
        self._watcher = changing

    def note_change(self) -> None:
        """Something changes next that a successor must know: tells whoever watches."""
        if self._watcher is not None:
            self._watcher()

    def frontend_waits(self) -> bool:
        """Whether a frontend waits for this frozen endpoint: for an answer, or to be accepted."""
        return any(contact.has_waiting() for contact in self.contacts.values()) or any(
            session.has_unread() for session in self.sessions.values()
        )

    def change_config(self, config: bytes) -> None:
        """The device's configuration space is `config` now. Frontends are told, at the latest at `thaw`."""
        self.note_change()
        self.config = config
        if not self._frozen:
            for session in self.sessions.values():
                session.change_config(config)

    def thaw(self) -> None:
        """Serves the sessions, and whoever else comes. Calling it again does nothing."""
        self._frozen = False
        for session in self.sessions.values():
            session.change_config(self.config)
            session.thaw()
        for path in tuple(self.contacts):
            self._accept(path)

    def freeze(self) -> None:
        """Accepts, reads and writes nothing more, at once."""
        self._frozen = True
        for contact in self.contacts.values():
            contact.pause()
        for session in self.sessions.values():
            session.freeze()

    def release(self) -> None:
        """Drops this process's copies without a side effect: another process serves them."""
        self.freeze()
        for contact in self.contacts.values():
            contact.release()
        self._release_sessions()

    def discard(self) -> None:
        """Drops what was adopted: the source serves on."""
        self.freeze()
        for contact in self.contacts.values():
            contact.discard()
        self._release_sessions()

    def close(self) -> None:
        """Ends everything for good; the device is told of each session's end. Tolerates being called twice."""
        self.freeze()
        for contact in self.contacts.values():
            contact.close()
        for session in tuple(self.sessions.values()):
            session.close("the device was closed")

    def _release_sessions(self) -> None:
        for session in self.sessions.values():
            session.release()
        self.sessions.clear()

    def _accept(self, path: str) -> None:
        """Lets frontends come by an address, unless the one that it can bring is there."""
        contact = self.contacts.get(path)
        if contact is None or (contact.brings_one and any(each.path == path for each in self.sessions.values())):
            return
        contact.accept_connections(partial(self._on_connection, path))

    def _on_connection(self, path: str, connection: OwnedFd) -> None:
        self.note_change()
        self.opened_count += 1
        backend = Backend(self.offer, config=self.config)
        session = self._make_session(connection, backend, number=self.opened_count, path=path)
        self.sessions[session.number] = session
        session.thaw()
        self._handler.session_opened(session)
        if len(self.sessions) > SESSION_COUNT_MAX:
            self._make_room()

    def _make_room(self) -> None:
        number = least_needed((each.number, each.backend.state) for each in self.sessions.values())
        # The one that came just now has nothing yet.
        assert number is not None
        self.sessions[number].close(
            f"{len(self.sessions)} frontends are connected, limit is {SESSION_COUNT_MAX}, and this is the one that has"
            " been there longest without memory and rings; end those that are of no use"
        )

    def _make_session(self, connection: OwnedFd, backend: Backend, *, number: int, path: str) -> Session:
        return Session(
            connection,
            backend,
            self._handler,
            number=number,
            path=path,
            changing=self.note_change,
            on_closed=partial(self._on_session_closed, number, path),
        )

    def _on_session_closed(self, number: int, path: str) -> None:
        del self.sessions[number]
        if not self._frozen:
            self._accept(path)
