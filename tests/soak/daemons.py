"""Daemons of a soak: each starts while the one before it takes over, and is waited for when its turn comes.

Owns:        a daemon that is starting, and its end; a process that only listens.
Never sees:  handovers.
Read next:   chain.py, which hands over from one to the next; kit/fork_server.py, where most of them come from.

A forked daemon begins with the heap of a process that has imported and done nothing. So every so many generations one
is started as a program, see `chain.Soak`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Final

from tests.kit.fork_server import fork_server
from tests.kit.processes import wait_ready

from localmig.fds import OwnedFd
from localmig.testing.process import Process, Start

END_SECONDS_MAX: Final = 20.0
"""An orderly end closes descriptors and joins threads."""


class Daemon:
    """`localmig run` with these arguments, from now on."""

    def __init__(self, arguments: Sequence[str], start: Start) -> None:
        self._ready, theirs = (OwnedFd(fd) for fd in os.pipe())
        with theirs:
            words = ["run", *arguments, "--ready-fd", str(theirs.fileno())]
            self._process = start("localmig.cli", words, inherited=[theirs.fileno()])

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Waits until guests, sources and QMP clients can come."""
        with self._ready:
            wait_ready(self._ready, self._process)

    def wait(self) -> int:
        """Waits for its end; the exit status."""
        return self._process.wait(END_SECONDS_MAX)

    def end(self) -> None:
        """Kills it, if it lives."""
        self._process.send_signal(signal.SIGKILL)
        self.wait()
        self._ready.close()


def listen(sock: socket.socket) -> Process:
    """A process that does nothing but listen on a bound socket, which is lent."""
    ready, theirs = (OwnedFd(fd) for fd in os.pipe())
    with ready:
        with theirs:
            numbers = [sock.fileno(), theirs.fileno()]
            process = fork_server().start("tests.soak.daemons", list(map(str, numbers)), inherited=numbers)
        wait_ready(ready, process)
    return process


def _listen(sock: socket.socket, ready: OwnedFd) -> None:
    """Listens until it is killed."""
    sock.listen(1)
    with ready:
        os.write(ready.fileno(), b"\n")
    while True:
        signal.pause()


if __name__ == "__main__":
    _listen(socket.socket(fileno=int(sys.argv[1])), OwnedFd(int(sys.argv[2])))
