"""A UNIX socket proxy that passes bytes and loses descriptors: what a tunnel does to a migration.

Owns:        the listening socket, the connections on both sides.
Never sees:  what the bytes mean.
Read next:   tests that hand over through it.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from pathlib import Path
from typing import Final, Self

CONNECTIONS_MAX: Final = 16
"""Connections served at once: a test makes one or two."""

_CHUNK_BYTES: Final = 64 * 1024
_STALL_SECONDS_MAX: Final = 10.0


class StrippingProxy:
    """Listens on one path and carries what comes to another, from a thread of its own, until `stop`.

    A connection whose target does not answer is closed at once. Descriptors are dropped by the kernel: the proxy
    receives without room for them, as every program does that does not expect any.

    Args:
        path: where to listen; the file goes away with `stop`.
        target: path of the socket to connect to.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, path: str, target: str) -> None:
        self._path = path
        self._target = target
        self.bytes_carried = 0
        """In both directions together, counted before they go on."""
        self._peers: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(path)
            self._listener.listen(CONNECTIONS_MAX)
        except OSError:
            for sock in (self._listener, self._wake, self._waker):
                sock.close()
            self._selector.close()
            raise
        for sock in (self._listener, self._wake):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Closes everything. Idempotent."""
        if self._thread.is_alive():
            self._waker.close()
            self._thread.join()
            Path(self._path).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._wake:
                    self._close()
                    return
                if sock is self._listener:
                    self._accept()
                elif sock in self._peers:  # its peer may have ended both a moment ago
                    self._carry(sock, self._peers[sock])

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            far.connect(self._target)
        except OSError:
            near.close()
            far.close()
            return
        for sock, peer in ((near, far), (far, near)):
            sock.settimeout(_STALL_SECONDS_MAX)
            self._peers[sock] = peer
            self._selector.register(sock, selectors.EVENT_READ)

    def _carry(self, source: socket.socket, destination: socket.socket) -> None:
        try:
            data = source.recv(_CHUNK_BYTES)
            self.bytes_carried += len(data)
            destination.sendall(data)
        except OSError:
            data = b""
        if not data:
            for sock in (source, destination):
                del self._peers[sock]
                self._selector.unregister(sock)
                sock.close()

    def _close(self) -> None:
        for sock in (*self._peers, self._listener, self._wake):
            with contextlib.suppress(OSError):
                sock.close()
        self._selector.close()
