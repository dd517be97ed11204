"""The processes a program started: none is left of them, however it ends.

Owns:        finding and killing children, adopting the children of children that ended.
Never sees:  what they are.
Read next:   demo.py, a user.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36


def adopt_orphans() -> None:
    """Daemons outlive the upgrade that starts them: lets them become our children then, so that none is lost."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """Kills what the main thread started and is left, where something was broken off in the middle."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := children.read_text().split():
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
