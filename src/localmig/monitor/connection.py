"""One QMP client's socket: bytes and descriptors in, bytes out.

Owns:        the socket, what waits to be written.
Never sees:  what is said.
Read next:   server.py, its user.

asyncio's streams cannot be used: they read without looking for descriptors, which the kernel drops then.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from localmig import fds
from localmig.errors import PeerLostError
from localmig.fds import OwnedFd

READ_BYTES: Final = 4096
"""Read at once from a client: more than a command has, and so few that one client's flood is cut in small pieces."""

DRAINED_BYTES: Final = 64 * 1024
"""What may wait to be written before `drain` waits too, as in asyncio's streams."""


class Connection:
    """A connection. Whoever reads or drains is woken by its end, whichever side brings it."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes over `sock`, which is non-blocking."""
        self.socket = sock
        self._output = bytearray()
        self._closing = False
        self._writing = False
        self._reader: asyncio.Future[None] | None = None
        self._changed = asyncio.Event()
        """Set when what waits to be written became less, or never will."""

    @property
    def is_closing(self) -> bool:
        """Whether nothing more can be said."""
        return self._closing

    @property
    def waiting_bytes(self) -> int:
        """What waits to be written."""
        return len(self._output)

    async def read(self) -> tuple[bytes, list[OwnedFd]]:
        """The next bytes, with the descriptors that came with them; no bytes at the end.

        Raises:
            PeerLostError: the connection broke.
            KernelError: this process has no room for a descriptor that came.
        """
        while not self._closing:
            try:
                return fds.receive(self.socket, READ_BYTES)
            except BlockingIOError:
                await self._wait_readable()
            except OSError as error:
                raise PeerLostError(f"connection lost: {error.strerror}") from error
        return b"", []

    def write(self, data: bytes) -> None:
        """Sends `data` as soon as the client takes it."""
        if not self._closing:
            self._output += data
            if not self._writing:
                self._flush()

    async def drain(self) -> None:
        """Waits until little waits to be written."""
        await self._wait_output(DRAINED_BYTES)

    async def finish(self) -> None:
        """Says nothing more, waits until the client took all, and closes. Bears `abort` meanwhile."""
        self.close()
        await self._wait_output(0)
        self.abort()

    def close(self) -> None:
        """Reads and says nothing more; what waits is still written. `finish` or `abort` must follow. Idempotent."""
        self._closing = True
        self._wake_reader()

    def abort(self) -> None:
        """Closes at once. Idempotent."""
        self.close()
        self._output.clear()
        self._watch_output()
        self._changed.set()
        self.socket.close()

    async def _wait_output(self, most: int) -> None:
        while len(self._output) > most:
            self._changed.clear()
            await self._changed.wait()

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        loop.add_reader(self.socket.fileno(), self._wake_reader)
        try:
            await self._reader
        finally:
            self._wake_reader()

    def _wake_reader(self) -> None:
        if self._reader is not None:
            asyncio.get_running_loop().remove_reader(self.socket.fileno())
            if not self._reader.done():
                self._reader.set_result(None)
            self._reader = None

    def _flush(self) -> None:
        try:
            # Not a view: a bytearray that is exported cannot shrink.
            sent = fds.send(self.socket, bytes(self._output))
        except BlockingIOError:
            sent = 0
        except OSError:
            self.abort()  # the reader finds the end
            return
        del self._output[:sent]
        self._watch_output()
        self._changed.set()

    def _watch_output(self) -> None:
        writing = bool(self._output)
        if writing != self._writing:
            self._writing = writing
            loop = asyncio.get_running_loop()
            if writing:
                loop.add_writer(self.socket.fileno(), self._flush)
            else:
                loop.remove_writer(self.socket.fileno())
