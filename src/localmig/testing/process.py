"""How the kit's processes are started: as programs, unless a test brings another way.

Owns:        what a way to start a process promises; starting `python -m MODULE` as a program.
Never sees:  what the processes are for.
Read next:   daemon.py and guest.py, which start them.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final, Protocol

from localmig.fds import OwnedFd

START_SECONDS_MAX: Final = 30.0
"""A Python process that opens a TAP and two sockets; a loaded machine takes seconds for it."""

_LOOK_SECONDS: Final = 0.005
"""How often it is looked whether a process has stopped, of which no descriptor tells."""


class Process(Protocol):
    """A process that was started, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """The exit status, None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; the exit status, negative for a signal. `subprocess.TimeoutExpired` after `timeout` s."""

    def wait_stopped(self, timeout: float) -> None:
        """Waits until SIGSTOP has stopped it, or it has ended. `subprocess.TimeoutExpired` after `timeout` s."""

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it has not ended."""


class Start(Protocol):
    """A way to start `python -m MODULE ARGUMENTS`."""

    def __call__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        inherited: Sequence[int] = (),
    ) -> Process:
        """A process in the network namespace of this thread.

        Args:
            module: what it runs.
            arguments: what follows.
            stdin: a descriptor; None: /dev/null.
            stdout: a descriptor; None: ours.
            stderr: a descriptor; None: ours.
            inherited: descriptors of ours that it has too, under the same numbers.
        """


class Program(subprocess.Popen[bytes]):
    """A process that was started as a program."""

    def wait_stopped(self, timeout: float) -> None:
        """As `Process.wait_stopped`."""
        deadline = time.monotonic() + timeout
        while not os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG):
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            signal.sigtimedwait([signal.SIGCHLD], _LOOK_SECONDS)


def start_program(
    module: str,
    arguments: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    inherited: Sequence[int] = (),
    launcher: Sequence[str] = (),
) -> Program:
    """As `Start`; `launcher` is a command that does something first and then becomes the one that follows it."""
    return Program(
        [*launcher, sys.executable, "-m", module, *arguments],
        pass_fds=inherited,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=stdout,
        stderr=stderr,
    )


def is_ready(reader: OwnedFd) -> bool:
    """Waits until a process writes one byte to the other end of a pipe and closes it; False if it does not in time."""
    poll = select.poll()
    poll.register(reader.fileno(), select.POLLIN)
    said = b""
    deadline = time.monotonic() + START_SECONDS_MAX
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        if not (data := os.read(reader.fileno(), 2)):
            return len(said) == 1
        said += data
    return False
