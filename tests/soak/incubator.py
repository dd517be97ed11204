"""Daemons that are there at once: forked from a process that has imported all of localmig.

Owns:        the process that forks; what a daemon that is born there shares with one that was started as a program.
Never sees:  handovers.
Read next:   chain.py, which hands over from one to the next.

Starting Python and importing localmig takes a hundred times as long as a handover. A daemon from here has its own
process, memory, descriptors, event loop, threads and sockets, and runs `localmig run` from its command line on. What it
has not is an exec of its own: it begins with the heap of a process that has imported and done nothing. So every so many
generations are started as programs besides, see `chain.Soak`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn, Self

from localmig.errors import PeerError
from localmig.fds import OwnedFd

START_SECONDS_MAX: Final = 30.0
"""A forked daemon takes milliseconds, one that imports on a loaded machine seconds."""

END_SECONDS_MAX: Final = 20.0
"""An orderly end closes descriptors and joins threads."""

_REQUEST_BYTES_MAX: Final = 64 * 1024
_FDS: Final = 1


class Born:
    """A daemon, however it was started."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._ready, self._ready_there = (OwnedFd(fd) for fd in os.pipe())
        self.pid = 0

    def wait_ready(self) -> None:
        """Waits until guests, sources and QMP clients can come."""
        with self._ready:
            if not select.select([self._ready], [], [], START_SECONDS_MAX)[0] or not os.read(self._ready.fileno(), 1):
                raise PeerError(f"the daemon did not start: {' '.join(self._arguments)}")

    def wait(self) -> int:
        """Waits for its end; the exit status."""
        raise NotImplementedError


class Program(Born):
    """A daemon that was started as any operator starts one."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(arguments)
        with self._ready_there as ready:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "localmig.cli", "run", *arguments, "--ready-fd", str(ready.fileno())],
                pass_fds=[ready.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.pid = self._process.pid

    def wait(self) -> int:
        """Waits for its end; the exit status."""
        return self._process.wait(END_SECONDS_MAX)

    def end(self) -> None:
        """Kills it where it has not ended."""
        self._process.kill()
        self._process.wait(END_SECONDS_MAX)


class Incubator:
    """The process that forks daemons, seen from outside. A context manager: in the end it is gone with all it bore."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(START_SECONDS_MAX)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.incubator", str(theirs.fileno())],
                cwd=Path(__file__).parents[2],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def bear(self, arguments: Sequence[str]) -> Born:
        """A daemon, `localmig run` with these arguments, that starts now."""
        return _Forked(arguments, self)

    def listen(self, sock: socket.socket) -> int:
        """The process id of a process that does nothing but listen on a bound socket, which is lent."""
        return self.ask("listen", [sock.fileno()])

    def end(self, pid: int) -> None:
        """Kills a process that `listen` gave, and waits until it is gone."""
        os.kill(pid, signal.SIGKILL)
        self.ask(pid)

    def ask(self, request: object, fds: Sequence[int] = ()) -> int:
        """Sends arguments of a daemon or "listen", for a process id; or a process id, for its exit status."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], list(fds))
        return int(self._socket.recv(_REQUEST_BYTES_MAX))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()
        self._process.wait(END_SECONDS_MAX)


class _Forked(Born):
    """A daemon from the incubator."""

    def __init__(self, arguments: Sequence[str], incubator: Incubator) -> None:
        super().__init__(arguments)
        self._incubator = incubator
        with self._ready_there as ready:
            self.pid = incubator.ask(list(arguments), [ready.fileno()])

    def wait(self) -> int:
        """Waits for its end; the exit status."""
        with OwnedFd(os.pidfd_open(self.pid)) as process:
            if not select.select([process], [], [], END_SECONDS_MAX)[0]:
                raise PeerError(f"daemon {self.pid} does not end in {END_SECONDS_MAX:g} s")
        return self._incubator.ask(self.pid)


# -- inside -----------------------------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> None:
    """Forks a daemon for each list of arguments, tells the exit status of each that is asked for."""
    from localmig.cli import main

    children: set[int] = set()
    while True:
        request, fds, _, _ = socket.recv_fds(control, _REQUEST_BYTES_MAX, _FDS)
        if not request:
            break
        asked = json.loads(request)
        if isinstance(asked, int):
            _, status = os.waitpid(asked, 0)
            children.discard(asked)
            control.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        (fd,) = fds
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if asked == "listen":
                    _listen(fd, control)
                control.close()
                status = main(["run", *asked, "--ready-fd", str(fd)])
            except BaseException:  # noqa: BLE001 - this process must not go on as the incubator
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(fd)
        children.add(pid)
        if asked != "listen":  # which answers itself, once it does
            control.send(str(pid).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _listen(fd: int, control: socket.socket) -> NoReturn:
    """Listens until it is killed."""
    with socket.socket(fileno=fd) as sock:
        sock.listen(1)
        control.send(str(os.getpid()).encode())
        control.close()
        while True:
            signal.pause()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
