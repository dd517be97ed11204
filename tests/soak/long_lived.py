"""A destination that never becomes one: it speaks until an agreed word, and then fails in an agreed way.

Owns:        the destination's side of the channel, as far as it goes; a process that dies in its place.
Never sees:  parts, memory, rings: it closes what it is given.
Read next:   chain.py for handovers that succeed.

Against it one source fails to hand over thousands of times in one life, at every step, and serves on.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Self

from tests.soak.daemons import listen

from localmig.fds import OwnedFd, receive, send
from localmig.migration.channel import FrameBuffer, FrameKind
from localmig.migration.hello import Hello, encode_reason, program_version

PATIENCE_S: Final = 30.0
"""For a source to say the next word, on a machine under load."""


class How(StrEnum):
    """How it fails."""

    REFUSES = "refuses"
    LEAVES = "leaves"
    """It closes the channel."""
    IS_CANCELLED = "is cancelled"
    """It says nothing, and the operator takes the handover back."""
    DIES = "dies"
    """Its process is killed, which closes the channel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Where and how.

    Attributes:
        at: the last frame that it takes.
        how: what it does then.
        status: what the source's migration ends in.
    """

    at: FrameKind
    how: How
    status: str = "failed"


FAILURES: Final = (
    Failure(at=FrameKind.HELLO, how=How.REFUSES),
    Failure(at=FrameKind.HELLO, how=How.LEAVES),
    Failure(at=FrameKind.DESCRIPTION, how=How.LEAVES),
    Failure(at=FrameKind.SETUP, how=How.REFUSES),
    Failure(at=FrameKind.SETUP, how=How.LEAVES),
    Failure(at=FrameKind.SETUP, how=How.IS_CANCELLED, status="cancelled"),
    Failure(at=FrameKind.SWITCHOVER, how=How.REFUSES),
    Failure(at=FrameKind.SWITCHOVER, how=How.LEAVES),
    # The source takes back what it had handed over.
    Failure(at=FrameKind.COMMIT, how=How.DIES),
)

_ANSWERS: Final = {FrameKind.SETUP: FrameKind.SETUP_ACK, FrameKind.SWITCHOVER: FrameKind.READY}


class Impostor:
    """Is called where a destination would be. A context manager."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(PATIENCE_S)
        self._listener.bind(str(path))
        # The kernel tells a source who listens, and the source believes in no other process.
        self._process = listen(self._listener)

    def fail(self, failure: Failure, cancel: Callable[[], object]) -> None:
        """Takes a source's call and fails it. `cancel` is what the operator does."""
        connection, _ = self._listener.accept()
        connection.settimeout(PATIENCE_S)
        buffer = FrameBuffer()
        try:
            with connection:
                self._speak(connection, buffer, failure.at)
                match failure.how:
                    case How.REFUSES:
                        _say(connection, FrameKind.REFUSE, encode_reason("as agreed"))
                    case How.LEAVES:
                        pass
                    case How.IS_CANCELLED:
                        cancel()
                        assert _hear(connection, buffer) is FrameKind.CANCEL
                    case How.DIES:
                        self._end()
                        self._process = listen(self._listener)
        finally:
            buffer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.close()
        self._end()

    def _end(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(PATIENCE_S)

    def _speak(self, connection: socket.socket, buffer: FrameBuffer, last: FrameKind) -> None:
        """Answers as a destination does, up to the frame that it does not answer any more."""
        while (kind := _hear(connection, buffer)) is not last:
            if kind is FrameKind.HELLO:
                data = Hello(version=program_version(), local=True, running=True).encode() + b" "
                with OwnedFd(os.pidfd_open(self._process.pid)) as pidfd:
                    _say(connection, FrameKind.HELLO, data[:-1], rest=b" ", fd=pidfd)
            elif kind in _ANSWERS:
                _say(connection, _ANSWERS[kind])


def _hear(connection: socket.socket, buffer: FrameBuffer) -> FrameKind:
    """The kind of the next frame; what came with it is closed."""
    while (frame := buffer.next_frame()) is None:
        data, fds = receive(connection, 64 * 1024)
        assert data, "the source left"
        buffer.feed(data, fds)
    frame.close()
    return frame.kind


def _say(
    connection: socket.socket, kind: FrameKind, data: bytes = b"", *, rest: bytes = b"", fd: OwnedFd | None = None
) -> None:
    connection.sendall(struct.pack(">4sB3xI", b"LMIG", kind, len(data) + len(rest)) + data)
    if fd is not None:
        send(connection, rest, [fd.fileno()])
