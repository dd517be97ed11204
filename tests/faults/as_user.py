"""Runs a program as another user: `python as_user.py UID COMMAND…`, as root; UID 0 stays root.

Where the interpreter or this tree is in a folder that others may not enter (a home of root's), the program gets a view
of its own in which they may: a mount namespace, of which nothing is left when it ends. Nothing is ever removed here:
what is mounted is the tree itself.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

# linux/sched.h, linux/mount.h
CLONE_NEWNS: Final = 0x00020000
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18

_libc: Final = ctypes.CDLL(None, use_errno=True)


def closed_folder(path: Path) -> Path | None:
    """The first folder on the way to `path` that others may not enter."""
    for folder in (*reversed(path.parents), path):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None


def mount(
    source: Path | None, target: Path, flags: int, *, kind: str | None = None, options: str | None = None
) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    if _libc.mount(*texts, ctypes.c_ulong(flags), None if options is None else options.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"cannot mount at {target}")


def open_the_way() -> None:
    """Lets others enter what the program needs, in a mount namespace of this process's own."""
    needed = [path for path in {Path(sys.base_prefix).resolve(), ROOT} if closed_folder(path)]
    if not needed:
        return
    if _libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    mount(None, Path("/"), MS_REC | MS_PRIVATE)
    # Held by descriptors, for their paths lead nowhere once the folders around them are covered.
    held = [(path, os.open(path, os.O_PATH | os.O_DIRECTORY)) for path in needed]
    entries = [(path, fd, sorted(path.iterdir())) for path, fd in held]
    links = {entry: entry.readlink() for _, _, found in entries for entry in found if entry.is_symlink()}
    folders = {entry for _, _, found in entries for entry in found if entry.is_dir()}
    for folder in {closed_folder(path) for path in needed}:
        assert folder is not None
        mount(None, folder, 0, kind="tmpfs", options="mode=755")
    # One by one: the folder that they are in may be the closed one.
    for path, fd, found in entries:
        path.mkdir(parents=True, exist_ok=True)
        for entry in found:
            if entry in links:
                entry.symlink_to(links[entry])
                continue
            if entry in folders:
                entry.mkdir()
            else:
                entry.touch()
            mount(Path(f"/proc/self/fd/{fd}/{entry.name}"), entry, MS_BIND)
        os.close(fd)


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
