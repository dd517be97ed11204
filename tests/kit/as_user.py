"""Runs a program as another user: `python as_user.py UID MODE COMMAND…`, as root; UID 0 stays root.

Where the interpreter or this tree is in a folder that others may not enter (a home of root's), the program gets a view
of its own in which they may: a mount namespace, of which nothing is left when it ends. In it /dev/net/tun has the mode
that is asked for, in octal, because machines differ in who may open it.
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
TUN: Final = Path("/dev/net/tun")


def closed_folder(path: Path) -> Path | None:
    """The first folder on the way to `path` that others may not enter."""
    for folder in (*reversed(path.parents), path):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def open_the_way() -> None:
    """Lets others enter what the program needs."""
    needed = [path for path in {Path(sys.base_prefix).resolve(), ROOT} if closed_folder(path)]
    if not needed:
        return
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


def give_tun(mode: int) -> None:
    """Gives /dev/net/tun that mode."""
    if stat.S_IMODE(TUN.stat().st_mode) == mode:
        return
    with tempfile.TemporaryDirectory() as aside:
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", aside)
        node = Path(aside, "tun")
        os.mknod(node, stat.S_IFCHR, TUN.stat().st_rdev)
        node.chmod(mode)
        mount("--bind", node, TUN)
        subprocess.run(["umount", "--lazy", aside], check=True)  # what is bound keeps it


def become(user: int) -> None:
    # A pipe that is opened again by its name must be the user's.
    for pipe in [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_fifo()]:
        os.fchown(int(pipe.name), user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


if __name__ == "__main__":
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    mount("--make-rprivate", "/")
    open_the_way()
    give_tun(int(sys.argv[2], 8))
    if user := int(sys.argv[1]):
        become(user)
    os.execvp(sys.argv[3], sys.argv[3:])
