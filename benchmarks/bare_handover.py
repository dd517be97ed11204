"""bare_handover.c in Python: what the language costs where nothing but descriptors and bytes moves.

Owns:        the same messages, the same moments.
Never sees:  localmig's channel.
Read next:   bare_handover.c for the order of the messages; bare.py, which runs both.

`python -m benchmarks.bare_handover ROUNDS DESCRIPTORS SETUP_BYTES SWITCHOVER_BYTES A_MESSAGE asleep`
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from localmig import fds as descriptors
from localmig.fds import OwnedFd

_HELLO_BYTES: Final = 300
_ROW_BYTES: Final = 16
_STAMP_BYTES: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    rounds: int
    descriptors: int
    setup: int
    switchover: int
    a_message: int


class _End:
    """One process's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.received: list[OwnedFd] = []

    def send(self, size: int, fds: Sequence[int] = (), a_message: int = 1) -> None:
        """`size` bytes, descriptors at even distances in them."""
        at = 0
        for first in range(0, len(fds), a_message):
            some = fds[first : first + a_message]
            end = max(at + 1, size * (first + len(some)) // len(fds))
            if end > at + 1:
                self._sock.sendall(bytes(end - at - 1))
            descriptors.send(self._sock, b" ", some)
            at = end
        self._sock.sendall(bytes(size - at))

    def send_stamp(self, stamp: int) -> None:
        """A moment."""
        self._sock.sendall(stamp.to_bytes(_STAMP_BYTES, "big"))

    def receive(self, size: int) -> bytes:
        """`size` bytes and whatever comes with them."""
        data = b""
        left = size
        while left:
            data, fds = descriptors.receive(self._sock, left)
            if not data:
                raise EOFError("the other process is gone")
            self.received += fds
            left -= len(data)
        return data

    def close_received(self) -> None:
        """Closes what came."""
        descriptors.close_all(self.received)
        self.received.clear()


def _be_destination(end: _End, sizes: _Sizes) -> None:
    with OwnedFd(os.pidfd_open(os.getpid())) as pidfd:
        for _ in range(sizes.rounds):
            end.receive(_HELLO_BYTES)
            end.send(_HELLO_BYTES, [pidfd.fileno()])
            end.receive(sizes.setup)
            assert len(end.received) == sizes.descriptors + 1, len(end.received)
            end.send(_ROW_BYTES)
            end.receive(sizes.switchover)
            end.send(_ROW_BYTES)
            end.receive(_ROW_BYTES)
            end.send_stamp(time.monotonic_ns())
            end.close_received()
            end.send(1)  # ready for the next round


def _be_source(end: _End, sizes: _Sizes, fds: Sequence[int]) -> None:
    with OwnedFd(os.pidfd_open(os.getpid())) as pidfd:
        for _ in range(sizes.rounds):
            begun = time.monotonic_ns()
            end.send(_HELLO_BYTES, [pidfd.fileno()])
            end.receive(_HELLO_BYTES)
            end.send(sizes.setup, fds, sizes.a_message)
            end.receive(_ROW_BYTES)
            stopped = time.monotonic_ns()
            end.send(sizes.switchover)
            end.receive(_ROW_BYTES)
            end.send(_ROW_BYTES)
            started = int.from_bytes(end.receive(_STAMP_BYTES), "big")
            ended = time.monotonic_ns()
            end.close_received()
            end.receive(1)
            sys.stdout.write(f"{ended - begun} {started - stopped}\n")


def main(argv: Sequence[str]) -> int:
    """Runs both processes."""
    rounds, count, setup, switchover, a_message = map(int, argv[:5])
    sizes = _Sizes(rounds=rounds, descriptors=count, setup=setup, switchover=switchover, a_message=a_message)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    near, far = socket.socketpair()
    child = os.fork()
    if child == 0:
        near.close()
        _be_destination(_End(far), sizes)
        os._exit(0)
    far.close()
    fds = [os.eventfd(0) for _ in range(count)]
    _be_source(_End(near), sizes, fds)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
