"""The netdev `stream`: a UNIX stream socket as the host side of a NIC, and how it moves to another process.

Owns:        the socket and the connection on it; what became of its peer.
Never sees:  rings; the bytes of a frame, which are the packet path's to read and to write.
Read next:   device_api/ for when each method is called, contact.py for how a peer comes, dataplane/ for what is in
             hand.

At the other end is passt, QEMU's `-netdev stream`, or any program that puts the length of each frame in front of it.
So a NIC needs no privilege. A frame is complete there: its checksums are written, and nobody is to segment it.

A handover moves the connection with what is in hand of it: bytes that were read and not delivered, and the rest of a
frame that was sent in part. After the death of the process that had those the stream is out of step, and the connection
is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from localmig.contact import LISTENER, ConnectTo, Contact, Departure, ListenAt, ListenerState, borrowed_socket
from localmig.dataplane import STREAM_IN_HAND_MAX, FrameStream
from localmig.device_api import Netdev
from localmig.device_api.objects import BuildContext, ObjectType
from localmig.errors import KernelError, PeerError, StateError
from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd, close_all
from localmig.netdevs.stream_options import MTU, StreamSpec
from localmig.qapi import Boolean, Member, String, Uint64
from localmig.vmstate import Description, fd, optional, u32
from localmig.vmstate import struct as nested

_logger = logging.getLogger(__name__)

_FRAME_OVERHEAD: Final = 14 + 4
"""An Ethernet header and a VLAN tag."""

DEPARTURE_SECONDS_MAX: Final = 1.0
"""From a peer's departure until what it sent before is given up. A guest that receives takes it out within
milliseconds; one that does not must not keep the next peer waiting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamDescriptors:
    """What comes with a stream only where the stream itself moves.

    Attributes:
        listener: of server=on.
        connection: to the peer, None while there is none.
        in_hand: a memory file, into which the source writes at the switchover what it has in hand.
    """

    listener: ListenerState | None
    connection: OwnedFd | None
    in_hand: OwnedFd


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamState:
    """A stream as it travels: untrusted until `Stream.check_setup`."""

    descriptors: StreamDescriptors | None


@dataclass(frozen=True, kw_only=True, slots=True)
class InHand:
    """How much is in the file: bytes that were read and not delivered, and bytes of a frame that are unsent."""

    read: int
    unsent: int


STREAM: Final = Description(
    name="stream",
    version=1,
    oldest_version=1,
    state=StreamState,
    fields=(
        optional(
            nested(
                "descriptors",
                Description(
                    name="stream-descriptors",
                    version=1,
                    oldest_version=1,
                    state=StreamDescriptors,
                    fields=(
                        optional(nested("listener", LISTENER)),
                        optional(fd("connection", kind=FdKind.SOCKET)),
                        fd("in_hand", kind=FdKind.MEMORY),
                    ),
                ),
            )
        ),
    ),
)

IN_HAND: Final = Description(
    name="stream-in-hand", version=1, oldest_version=1, state=InHand, fields=(u32("read"), u32("unsent"))
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamInfo:
    """What there is to see of a stream, for people and programs that ask.

    Attributes:
        id: the user's name for it.
        path: where its socket is.
        is_open: whether this process has it.
        is_server: whether this daemon listens there.
        is_connected: whether there is a peer.
        mtu: the guest's, in bytes.
        notes: what is so and should perhaps not be, and what to do, a sentence each.
    """

    id: str
    is_open: bool
    path: str
    is_server: bool
    is_connected: bool
    mtu: int
    notes: tuple[str, ...] = ()


class Stream(Netdev):
    """A stream, closed until `open` opens it or `adopt_setup` receives it.

    Args:
        id: the user's name for it.
        plan: where and how peers come.
        mtu: what the guest may use, in bytes.
        stays_home: tells why its descriptors do not move, None where they do.
    """

    setup = STREAM
    switchover = IN_HAND
    has_offloads = False
    queue_count = 1

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the user's word
        plan: ListenAt | ConnectTo,
        mtu: int = MTU,
        stays_home: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.id = id
        self.observer = None
        self._plan = plan
        self._mtu = mtu
        self._stays_home = stays_home
        self._contact: Contact | None = None
        self._connection: OwnedFd | None = None
        self._frames = FrameStream()
        self._in_hand: OwnedFd | None = None
        """Shared with the other side of a handover."""
        self._arrived = False
        self._is_thawed = False
        self._departure: Departure | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._gone_because: str | None = None
        self._changing: Callable[[], None] = _do_nothing

    # -- for the device on the other side -----------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether peers can come, or one is there."""
        return self._contact is not None

    @property
    def has_arrived(self) -> bool:
        """Whether it came by a handover: the peer knows already where the guest is."""
        return self._arrived

    @property
    def is_fresh(self) -> bool:
        """Whether this process opened it, so that nothing in it is for a guest of an earlier one."""
        return self.is_open and not self._arrived

    @property
    def is_gone(self) -> bool:
        """Whether there is no peer."""
        return self.is_open and self._connection is None

    @property
    def link_is_up(self) -> bool:
        """Whether there is a peer to send to."""
        return self._connection is not None and self._frames.ended() is None

    def host(self, queue: int = 0) -> FrameStream:
        """What the packet path reads and writes. StateError while it is not open, as for all that follows."""
        assert queue == 0, queue
        if not self.is_open:
            raise StateError(f"netdev '{self.id}': its stream is not open")
        return self._frames

    @property
    def mtu(self) -> int:
        """As the options say it, in bytes."""
        return self._mtu

    @property
    def frame_length_max(self) -> int:
        """Bytes of the longest frame that the guest may send, with a VLAN tag."""
        return self._mtu + _FRAME_OVERHEAD

    def inject(self, frame: bytes) -> None:
        """Sends one Ethernet frame as if from the guest. KernelError: it was not sent, because there is no peer."""
        try:
            self.host().inject(frame)
        except OSError as error:
            raise KernelError(
                f"netdev '{self.id}': cannot send a frame to the peer at '{self._plan.path}': "
                f"{os.strerror(error.errno or 0)}",
                errno=error.errno or errno.EIO,
            ) from error

    def look(self) -> bool:
        """Ends the connection if the packet path found that the stream has ended. Only for the process that serves."""
        if self._is_thawed and self._connection is not None and (reason := self._frames.ended()) is not None:
            self._lose(reason)
        return False

    def look_soon(self) -> None:
        """Has `look` called by the event loop, while this process serves."""
        asyncio.get_running_loop().call_soon(self.look)

    # -- serving ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Listens, or sees to a connection. ConfigError or KernelError where that cannot be."""
        assert self._contact is None, self.id
        self._contact = self._plan.open()

    def resume(self) -> None:
        """Nothing: the device on the other side reads and writes the frames."""

    def stop(self) -> None:
        """Nothing, as `resume`."""

    def freeze(self) -> None:
        """Leaves socket and connection alone from now on."""
        self._is_thawed = False
        self._unwatch()
        if self._contact is not None:
            self._contact.pause()

    def thaw(self) -> None:
        """Sees to its peer, or waits for one."""
        assert self._contact is not None, self.id
        if self._is_thawed:
            return
        self._contact.claim()
        self._close_in_hand()
        self._is_thawed = True
        if self._connection is None:
            self._contact.accept_connections(self._begin)
        else:
            self._watch(self._connection)
            self.look()

    def close(self) -> None:
        """Ends the connection, removes the socket."""
        if self._connection is not None:
            _shut_down(self._connection)
        if self._contact is not None:
            self._contact.close()
            self._contact = None
        self.release()

    # -- to be seen ---------------------------------------------------------------------------------------------

    def info(self) -> StreamInfo:
        """The stream as it is."""
        return StreamInfo(
            id=self.id,
            is_open=self.is_open,
            path=self._plan.path,
            is_server=isinstance(self._plan, ListenAt),
            is_connected=self.link_is_up,
            mtu=self._mtu,
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        if not self.is_gone:
            return
        gone = f"; the last one is gone: {self._gone_because}" if self._gone_because else ""
        path = self._plan.path
        match self._plan:
            case ListenAt():
                yield f"no peer is connected to '{path}'{gone}; start one that connects there"
            case ConnectTo(reconnect_ms=0) if self._gone_because:
                yield f"there is no peer at '{path}'{gone}; it is not tried again: give reconnect-ms="
            case ConnectTo():
                yield f"there is no peer at '{path}'{gone}; start one that listens there"

    # -- source -------------------------------------------------------------------------------------------------

    def local_migration_blocker(self) -> str | None:
        """What it was told, and: a stream that is not open cannot move."""
        return self._stays_home() or (None if self.is_open else "its stream is not open")

    def watch_setup(self, changing: Callable[[], None] | None) -> None:
        """Its peer, and whether there is one, is what changes."""
        self._changing = changing or _do_nothing
        if changing is None:
            self._close_in_hand()

    def save_setup(self, *, with_descriptors: bool) -> StreamState:
        """Socket and connection, lent. KernelError where there is no file for what is in hand."""
        if self._contact is None:
            raise StateError(f"netdev '{self.id}': its stream is not open")
        if not with_descriptors:
            return StreamState(descriptors=None)
        if self._in_hand is None:
            try:
                self._in_hand = OwnedFd(os.memfd_create("frames-in-hand", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            except OSError as error:
                reason = f"netdev '{self.id}': cannot make a file for what is in hand: {error.strerror}"
                raise KernelError(reason, errno=error.errno or errno.EIO) from error
        return StreamState(
            descriptors=StreamDescriptors(
                listener=self._contact.save(), connection=self._connection, in_hand=self._in_hand
            )
        )

    def save_switchover(self) -> InHand:
        """Writes what is in hand into its file. KernelError where that has no room."""
        if self._in_hand is None:
            return InHand(read=0, unsent=0)
        try:
            read, unsent = self._frames.save(self._in_hand.fileno())
        except OSError as error:
            reason = f"netdev '{self.id}': cannot save what is in hand: {os.strerror(error.errno or 0)}"
            raise KernelError(reason, errno=error.errno or errno.EIO) from error
        return InHand(read=read, unsent=unsent)

    def release(self) -> None:
        """Drops this process's copies: another process serves them, or nobody does any more."""
        self.freeze()
        if self._contact is not None:
            self._contact.release()
            self._contact = None
        self._frames = FrameStream()
        self._close_in_hand()
        close_all((self._connection,))
        self._connection = None

    # -- destination --------------------------------------------------------------------------------------------

    def check_setup(self, state: StreamState) -> None:
        """Raises PeerError where a listener came and none is wanted, or the other way round."""
        if state.descriptors is not None:
            try:
                self._plan.check(state.descriptors.listener)
            except PeerError as error:
                raise PeerError(f"netdev '{self.id}': {error}") from error

    def adopt_setup(self, state: StreamState) -> None:
        """Takes over socket and connection, or sees to its own where none came. Again: what arrived is replaced.

        Without descriptors it listens beside the path, which is the source's until `thaw` claims it.
        """
        if self._contact is not None:
            self.discard()
        if state.descriptors is None:
            self._contact = self._plan.open_beside()
            return
        self._contact = self._plan.adopt(state.descriptors.listener)
        self._arrived = True
        self._in_hand = state.descriptors.in_hand.take()
        if state.descriptors.connection is not None:
            self._connection = state.descriptors.connection.take()
            self._frames = FrameStream(self._connection.fileno())

    def check_switchover(self, state: InHand) -> None:
        """Raises PeerError where more is in hand than can be, or of no connection."""
        most = max(state.read, state.unsent)
        if most > STREAM_IN_HAND_MAX:
            raise PeerError(f"netdev '{self.id}': {most} bytes are in hand, limit is {STREAM_IN_HAND_MAX}")
        if most and (self._in_hand is None or self._connection is None):
            raise PeerError(f"netdev '{self.id}': {most} bytes are in hand, and no connection came that they are of")

    def adopt_switchover(self, state: InHand) -> None:
        """Takes in hand what the source had."""
        if self._in_hand is None or self._connection is None:
            return
        try:
            self._frames.load(self._in_hand.fileno(), state.read, state.unsent)
        except OSError as error:
            raise PeerError(f"netdev '{self.id}': what is in hand is not in its file: {error}") from error

    def recover(self) -> None:
        """Gives the connection up: the process that died knew what was in hand. `thaw` sees to another one.

        Raises:
            ConfigError, KernelError: the path is a living process's, or cannot be bound.
        """
        assert self._contact is not None, self.id
        if self._connection is not None:
            self._frames.end("the process died that had frames of it in hand")
            if isinstance(self._plan, ConnectTo):
                # Whatever reconnect-ms= says: the peer did not leave.
                self._contact.release()
                self._contact = self._plan.open_beside()
        self._contact = self._plan.recover(self._contact)

    def discard(self) -> None:
        """Drops what was adopted: the source serves on."""
        if self._contact is not None:
            self._contact.discard()
            self._contact = None
        self.release()

    # -- inside -------------------------------------------------------------------------------------------------

    def _begin(self, connection: OwnedFd) -> None:
        """A peer is there; others wait in the kernel until it leaves."""
        assert self._contact is not None, self.id
        self._changing()
        self._contact.pause()
        self._connection, self._frames = connection, FrameStream(connection.fileno())
        self._watch(connection)
        if self._gone_because is not None:
            _logger.info("netdev '%s': there is a peer again at '%s'", self.id, self._plan.path)
        self._tell()

    def _watch(self, connection: OwnedFd) -> None:
        try:
            self._departure = Departure(connection, self._expect_end)
        except OSError as error:
            # The packet path sees it too, once the guest receives.
            _logger.warning("netdev '%s': cannot see whether its peer leaves: %s", self.id, error.strerror)

    def _expect_end(self) -> None:
        """The peer left: what it sent before is taken out by the packet path, which comes to the end then."""
        self._patience = asyncio.get_running_loop().call_later(DEPARTURE_SECONDS_MAX, self._lose, "it left")

    def _lose(self, reason: str) -> None:
        """Ends the connection and waits for another one, as far as the options allow that."""
        assert self._contact is not None, self.id
        assert self._connection is not None, self.id
        self._changing()
        self._unwatch()
        former, self._connection, self._frames = self._connection, None, FrameStream()
        # A peer that comes again and again with the same mistake fills no log.
        level = logging.WARNING if reason != self._gone_because else logging.DEBUG
        _logger.log(level, "netdev '%s': the peer at '%s' is gone: %s", self.id, self._plan.path, reason)
        self._gone_because = reason
        self._tell()
        _shut_down(former)
        former.close()
        self._contact.accept_connections(self._begin)

    def _tell(self) -> None:
        if self.observer is not None:
            self.observer.queues_changed()
            self.observer.interface_changed()

    def _unwatch(self) -> None:
        if self._departure is not None:
            self._departure.close()
            self._departure = None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _close_in_hand(self) -> None:
        close_all((self._in_hand,))
        self._in_hand = None


def _do_nothing() -> None:
    """Nobody wants to know of changes."""


def _shut_down(connection: OwnedFd) -> None:
    """Lets the peer know at once, whoever has a copy."""
    sock = borrowed_socket(connection)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.detach()


def _build(spec: StreamSpec, context: BuildContext) -> Stream:
    plan: ListenAt | ConnectTo
    if spec.server:
        plan = ListenAt(path=spec.addr_path, peer="peer")
    else:
        plan = ConnectTo(path=spec.addr_path, reconnect_ms=spec.reconnect_ms, peer="peer")
    return Stream(id=spec.id, plan=plan, mtu=spec.mtu, stays_home=context.stays_home)


OBJECT: Final = ObjectType(
    spec=StreamSpec,
    build=_build,
    info=(
        Member(name="open", attribute="is_open", type=Boolean()),
        Member(name="path", attribute="path", type=String()),
        Member(name="server", attribute="is_server", type=Boolean()),
        Member(name="connected", attribute="is_connected", type=Boolean()),
        Member(name="mtu", attribute="mtu", type=Uint64()),
    ),
)
