"""Runs a program as another user: `python as_user.py UID COMMAND…`, as root; UID 0 stays root.

Where the interpreter or this tree is in a folder that others may not enter (a home of root's), the program gets a view
of its own in which they may: a mount namespace, of which nothing is left when it ends.
"""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

CLONE_NEWNS: Final = 0x00020000
ROOT: Final = Path(__file__).resolve().parents[2]


def closed_folder(path: Path) -> Path | None:
    """The first folder on the way to `path` that others may not enter."""
    for folder in (*reversed(path.parents), path):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def open_the_way() -> None:
    """Lets others enter what the program needs, in a mount namespace of this process's own."""
    needed = [path for path in {Path(sys.base_prefix).resolve(), ROOT} if closed_folder(path)]
    if not needed:
        return
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    mount("--make-rprivate", "/")
    with tempfile.TemporaryDirectory() as aside:
        places = []
        for number, path in enumerate(needed):
            place = Path(aside, str(number))
            place.mkdir()
            mount("--bind", path, place)
            places.append((place, path))
        for folder in {closed_folder(path) for path in needed}:
            assert folder is not None
            mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", folder)
        for place, path in places:
            path.mkdir(parents=True)
            mount("--bind", place, path)
            subprocess.run(["umount", str(place)], check=True)


def become(user: int) -> None:
    # A pipe that is opened again by its name must be the user's.
    for pipe in [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_fifo()]:
        os.fchown(int(pipe.name), user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


if __name__ == "__main__":
    open_the_way()
    if user := int(sys.argv[1]):
        become(user)
    os.execvp(sys.argv[2], sys.argv[2:])
