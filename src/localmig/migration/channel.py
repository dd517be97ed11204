"""The channel between source and destination: frames of bytes with descriptors at their places.

Owns:        the frame header, the frames' limits, the socket; how long a wait may be.
Never sees:  what is in a frame, who owns the guest.
Read next:   outgoing.py and incoming.py, its two users; peer.py for the process at the other end.

A frame is a 12-byte header (magic, kind, length) and `length` bytes. A descriptor stands at an offset of the payload,
where the payload has the byte 0x20: that byte is sent alone, with exactly that descriptor attached, so that no
descriptor can be told from another by anything but its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from localmig import fds as fds_module
from localmig.errors import KernelError, PeerError, PeerLostError
from localmig.fds import OwnedFd, close_all, close_foreign

_HEADER: Final = struct.Struct(">4sB3xI")
_MAGIC: Final = b"LMIG"

_RECEIVE_SIZE: Final = 32 * 1024
"""Bytes asked of one recvmsg: what a switchover of some NICs needs. Much more would be memory to be mapped anew for
every call, which takes longer than another call."""

EAGER_WAIT_MS: Final = 5
"""How long a receiver inside the downtime sits in poll(2) before it lets the event loop run: ten times what the
other side usually needs, and too short for a monitor client to notice."""


_AWAKE_NS: Final = 500_000
"""How long an eager receiver stays awake: a processor that fell asleep takes as long to wake, above all in a virtual
machine, as the whole answer takes to come."""


_GONE: Final = (errno.EPIPE, errno.ECONNRESET)
"""What the kernel says where the other side closed its end; any other error leaves it there."""

_SHORT: Final = (errno.ENOBUFS, errno.ENOMEM)
"""Memory runs out and comes back: others free it."""

SHORTAGE_SECONDS_MAX: Final = 1.0
"""How long that is borne: what passes at all passes in milliseconds, and a guest may be waiting."""

_SHORTAGE_RETRY_S: Final = 0.001
"""The kernel tells nobody when there is memory again, or when the other side took descriptors."""


class FrameKind(IntEnum):
    """What a frame says; the order is the order of a handover."""

    HELLO = 1
    REFUSE = 2
    DESCRIPTION = 3
    SETUP = 4
    SETUP_ACK = 5
    SWITCHOVER = 6
    READY = 7
    COMMIT = 8
    DONE = 9
    CANCEL = 10


_MIB: Final = 1024 * 1024

LENGTH_MAX: Final = {
    FrameKind.HELLO: 4 * _MIB,  # some hundred bytes an object, ten thousand objects
    FrameKind.REFUSE: 64 * 1024,  # a reason for people
    FrameKind.DESCRIPTION: 10 * _MIB,  # a vmdesc may not be longer, or analyze-migration.py does not find it
    FrameKind.SETUP: 64 * _MIB,  # some kilobytes an object, ten thousand objects
    FrameKind.SETUP_ACK: 0,
    FrameKind.SWITCHOVER: 4 * _MIB,  # some hundred bytes a device, ten thousand devices
    FrameKind.READY: 0,
    FrameKind.COMMIT: 64,
    FrameKind.DONE: 64 * 1024,
    FrameKind.CANCEL: 64 * 1024,
}
"""Bytes a frame's payload may have: what the largest sensible daemon needs, so that a length cannot exhaust memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A frame as it arrived; whoever takes it owns its descriptors."""

    kind: FrameKind
    data: bytes
    fds: list[tuple[int, OwnedFd]] = field(default_factory=list)
    """(offset in `data`, descriptor), ascending."""

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        close_foreign(fd for _, fd in self.fds)


class FrameBuffer:
    """Cuts what arrives into frames. No I/O."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._fds: list[tuple[int, OwnedFd]] = []

    def feed(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> None:
        """Takes bytes and the descriptors that came with them; each belongs to the last byte of `data`.

        Raises:
            PeerError: more than one descriptor came at once, or it stands at another byte than 0x20. The descriptors
                are closed, the buffer is of no use any more.
        """
        self._data += data
        if not fds:
            return
        if len(fds) > 1 or data[-1:] != b"\x20":
            close_foreign(fds)
            raise PeerError(f"{len(fds)} descriptors came with byte {data[-1:].hex()}, expected one with byte 20")
        self._fds.append((len(self._data) - 1, fds[0]))

    def next_frame(self) -> Frame | None:
        """The next whole frame, None if it is not there yet.

        Raises:
            PeerError: the header is no header, or announces more than its kind may have.
        """
        if len(self._data) < _HEADER.size:
            return None
        magic, number, length = _HEADER.unpack_from(self._data)
        if magic != _MAGIC:
            raise PeerError(f"channel starts with {magic.hex()}, expected {_MAGIC.hex()}: is the other side localmig?")
        try:
            kind = FrameKind(number)
        except ValueError:
            raise PeerError(f"frame kind {number} is unknown, the last one known is {max(FrameKind)}") from None
        if length > LENGTH_MAX[kind]:
            raise PeerError(f"{kind.name} frame has {length} bytes, limit is {LENGTH_MAX[kind]}")
        end = _HEADER.size + length
        if len(self._data) < end:
            return None
        inside = [(offset - _HEADER.size, fd) for offset, fd in self._fds if offset < end]
        if inside and inside[0][0] < 0:
            raise PeerError(f"a descriptor came with the header of a {kind.name} frame")
        frame = Frame(kind=kind, data=bytes(self._data[_HEADER.size : end]), fds=inside)
        del self._data[:end]
        self._fds = [(offset - end, fd) for offset, fd in self._fds if offset >= end]
        return frame

    def close(self) -> None:
        """Closes every descriptor still in the buffer."""
        close_foreign(fd for _, fd in self._fds)
        self._fds = []
        self._data.clear()


class Channel:
    """One connected stream socket that carries frames. Takes the socket over; it must be non-blocking.

    Every wait has a bound. When a call raises, the channel can only be closed. Cancelling `receive` is safe; a
    cancelled `send` may have left half a frame behind.
    """

    def __init__(self, sock: socket.socket, *, process: OwnedFd | None = None) -> None:
        """Takes over both.

        Args:
            sock: the socket.
            process: a pidfd of the process at the other end, where the kernel vouches for it.
        """
        self._sock = sock
        self.process: Final = process
        """The pidfd, the channel's own; closed with it."""
        self._buffer = FrameBuffer()
        self.passes_descriptors: Final = sock.family == socket.AF_UNIX
        """Whether the kind of socket can carry descriptors; whether they arrive is seen only on the way."""
        self._is_mid_frame = False

    async def send(
        self,
        kind: FrameKind,
        data: bytes | bytearray = b"",
        fds: Sequence[tuple[int, int]] = (),
        *,
        timeout_s: float,
    ) -> None:
        """Sends one frame with borrowed descriptors at ascending offsets of `data`, where it has the byte 0x20.

        Raises:
            PeerLostError: the other side is gone. Nothing of a frame that fits the socket's buffer was delivered.
            KernelError: this process cannot send, and the other side is still there; likewise.
            TimeoutError: the other side does not read.
        """
        assert len(data) <= LENGTH_MAX[kind], (kind, len(data))
        # A frame without descriptors leaves in one piece: COMMIT must be all there or not at all.
        view = memoryview(_HEADER.pack(_MAGIC, kind, len(data)) + data)
        deadline = time.monotonic() + timeout_s
        self._is_mid_frame = True
        position = 0
        for offset, fd in fds:
            place = offset + _HEADER.size
            assert view[place] == 0x20, view[place]
            await self._send_piece(view[position:place], (), deadline)
            await self._send_piece(view[place : place + 1], (fd,), deadline)
            position = place + 1
        await self._send_piece(view[position:], (), deadline)
        self._is_mid_frame = False

    def try_send(self, kind: FrameKind, data: bytes = b"") -> bool:
        """Sends one small frame at once. False: the other side is there but does not read, so it cannot be told."""
        if self._is_mid_frame:
            return False
        frame = _HEADER.pack(_MAGIC, kind, len(data)) + data
        try:
            self._is_mid_frame = fds_module.send(self._sock, frame) < len(frame)
        except BlockingIOError:
            return False
        except OSError as error:
            return error.errno in _GONE  # nobody there needs to be told
        return not self._is_mid_frame

    async def _send_piece(self, piece: memoryview, fds: Sequence[int], deadline: float) -> None:
        shortage_ends: float | None = None
        while piece:
            try:
                piece = piece[fds_module.send(self._sock, piece, fds) :]
            except BlockingIOError:
                await self._wait(select.POLLOUT, deadline)
            except OSError as error:
                if error.errno in _GONE:
                    self._is_mid_frame = False  # nobody is left to take it for the middle of one
                    raise PeerLostError(f"the other side is gone: {error.strerror}") from error
                if error.errno == errno.ETOOMANYREFS:
                    # Descriptors in flight count against the sender until they are received.
                    await _bear(error, deadline, "send to")
                    continue
                shortage_ends = shortage_ends or min(deadline, time.monotonic() + SHORTAGE_SECONDS_MAX)
                await _bear(error, shortage_ends, "send to")

    async def receive(self, *, timeout_s: float | None, eager: bool = False) -> Frame:
        """The next frame. `timeout_s` None waits as long as the channel lives.

        `eager` first waits in poll(2) for at most `EAGER_WAIT_MS`: for the downtime, where a round through the event
        loop costs more than the answer.

        Raises:
            PeerLostError: the other side closed the channel before the frame was whole.
            KernelError: this process cannot receive, or had no room for descriptors.
            PeerError: what came is no frame.
            TimeoutError: nothing whole came in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        shortage_ends: float | None = None
        while True:
            frame = self._buffer.next_frame()
            if frame is not None:
                return frame
            try:
                data, fds = fds_module.receive(self._sock, _RECEIVE_SIZE)
            except BlockingIOError:
                if eager:
                    eager = False
                    self._poll_briefly(timeout_s)
                else:
                    await self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                if error.errno in _GONE:
                    raise PeerLostError(f"the other side is gone: {error.strerror}") from error
                shortage_ends = shortage_ends or time.monotonic() + SHORTAGE_SECONDS_MAX
                await _bear(error, shortage_ends, "receive from")
                continue
            if not data:
                raise PeerLostError("the other side closed the channel")
            self._buffer.feed(data, fds)

    async def receive_end(self, *, timeout_s: float) -> None:
        """Waits until the other side closes the channel. Raises TimeoutError, or PeerError if it says more."""
        try:
            frame = await self.receive(timeout_s=timeout_s)
        except PeerLostError:
            return
        frame.close()
        raise PeerError(f"{frame.kind.name} came where the channel should end")

    def close(self) -> None:
        """Closes the channel; what was sent before still arrives. Idempotent."""
        self._buffer.close()
        self._sock.close()
        close_all((self.process,))

    def _poll_briefly(self, timeout_s: float | None) -> None:
        """Waits for something to read without the event loop, first awake and then asleep."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        # poll(2) may fail for want of memory. Then it is the event loop that waits, which is only slower.
        with contextlib.suppress(OSError):
            self._poll(poll, timeout_s)

    def _poll(self, poll: select.poll, timeout_s: float | None) -> None:
        limit_ms = EAGER_WAIT_MS if timeout_s is None else max(0.0, min(EAGER_WAIT_MS, timeout_s * 1000))
        awake_until_ns = time.monotonic_ns() + min(_AWAKE_NS, int(limit_ms * 1e6))
        while time.monotonic_ns() < awake_until_ns:
            if poll.poll(0):
                return
            # Where the other side needs this very processor, it gets it.
            os.sched_yield()
        poll.poll(limit_ms)

    async def _wait(self, mask: int, deadline: float | None) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        add, remove = (
            (loop.add_reader, loop.remove_reader) if mask == select.POLLIN else (loop.add_writer, loop.remove_writer)
        )
        add(self._sock, resolve, ready)
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                await ready
        except TimeoutError:
            # A process that stood still past the deadline sees both at once, and what is there counts more.
            if not self._is_ready(mask):
                raise
        finally:
            # Out of the event loop at once: the descriptor may be closed next.
            remove(self._sock)

    def _is_ready(self, mask: int) -> bool:
        poll = select.poll()
        poll.register(self._sock, mask)
        return bool(poll.poll(0))


async def _bear(error: OSError, deadline: float, what: str) -> None:
    """Waits a little, for what passes by itself until `deadline`. Raises KernelError for all else."""
    if error.errno not in (*_SHORT, errno.ETOOMANYREFS) or time.monotonic() >= deadline:
        raise KernelError(f"cannot {what} the other side: {error.strerror}", errno=error.errno or errno.EIO) from error
    await asyncio.sleep(_SHORTAGE_RETRY_S)


def resolve(future: asyncio.Future[None]) -> None:
    """Ends the wait for `future`: what a descriptor's readiness calls, maybe more than once."""
    if not future.done():
        future.set_result(None)
