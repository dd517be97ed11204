"""How the tests of this repository start daemons, guests and commands: forked, unless a test is about starting.

Owns:        the kit's processes from the fork server, `localmig` commands.
Never sees:  what is tested.
Read next:   fork_server.py; localmig/testing/daemon.py for what a daemon can be asked.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.kit.fork_server import fork_server

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.testing import daemon, guest
from localmig.testing.process import Process, Start, is_ready, start_program


class DaemonProcess(daemon.DaemonProcess):
    """As the kit's, from the fork server unless `start` says how."""

    def __init__(self, arguments: Sequence[str], *, start: Start | None = None, **more: Any) -> None:
        super().__init__(arguments, start=start or fork_server().start, **more)


class GuestProcess(guest.GuestProcess):
    """As the kit's, from the fork server."""

    def __init__(self, settings: guest.GuestSettings) -> None:
        super().__init__(settings, start=fork_server().start)


def as_user(user: int, *, tun_mode: int = 0o666) -> list[str]:
    """What a command is to follow that is to run as that user, 0 for root, where others can run it as well.

    Args:
        user: its number.
        tun_mode: what mode the command finds /dev/net/tun to have.
    """
    return [sys.executable, str(Path(__file__).with_name("as_user.py")), str(user), f"{tun_mode:o}"]


def start_as(user: int) -> Start:
    """Starts programs as that user."""
    return partial(start_program, launcher=as_user(user))


def start_ready(
    arguments: Sequence[str],
    *,
    start: Start | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Process:
    """`localmig run` with these arguments, ready; for tests that ask and watch it by other means than `DaemonProcess`.

    Args:
        arguments: what follows `run`.
        start: how it is started; None: forked.
        stdin: as of `Start`.
        stdout: as of `Start`.
        stderr: as of `Start`.
    """
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    with reader:
        with writer:
            process = (start or fork_server().start)(
                "localmig.cli",
                ["run", *arguments, "--ready-fd", str(writer.fileno())],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                inherited=[writer.fileno()],
            )
        wait_ready(reader, process)
    return process


def wait_ready(reader: OwnedFd, process: Process) -> None:
    """Waits for a daemon to say once that it is ready. It is killed if it does not; PeerError."""
    if not is_ready(reader):
        process.send_signal(signal.SIGKILL)
        raise PeerError(f"daemon {process.pid} did not start: it ended with {process.wait(daemon.END_SECONDS_MAX)}")


def localmig(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What `localmig WORDS` prints in a folder, and how it ends. A command that takes a minute is killed."""
    return fork_server().run("localmig.cli", words, folder=folder)
