"""How the tests of this repository start daemons, guests and commands: forked, unless a test is about starting.

Owns:        the kit's processes from the fork server, `localmig` commands.
Never sees:  what is tested.
Read next:   fork_server.py; localmig/testing/daemon.py for what a daemon can be asked.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.kit.fork_server import fork_server

from localmig.testing import daemon, guest
from localmig.testing.process import Start, start_program


class DaemonProcess(daemon.DaemonProcess):
    """As the kit's, from the fork server unless `start` says how."""

    def __init__(self, arguments: Sequence[str], *, start: Start | None = None, **more: Any) -> None:
        super().__init__(arguments, start=start or fork_server().start, **more)


class GuestProcess(guest.GuestProcess):
    """As the kit's, from the fork server."""

    def __init__(self, settings: guest.GuestSettings) -> None:
        super().__init__(settings, start=fork_server().start)


def as_user(user: int) -> list[str]:
    """What a command is to follow that is to run as that user, 0 for root, where others can run it as well."""
    return [sys.executable, str(Path(__file__).with_name("as_user.py")), str(user)]


def start_as(user: int) -> Start:
    """Starts programs as that user."""
    return partial(start_program, launcher=as_user(user))


def localmig(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What `localmig WORDS` prints in a folder, and how it ends. A command that takes a minute is killed."""
    return fork_server().run("localmig.cli", words, folder=folder)
