"""A file that a daemon appends lines to for as long as it runs: its log, its trace.

Owns:        how it is opened, and opened again once somebody moved it away.
Never sees:  what the lines say.
Read next:   log.py and run.py, its two users.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from localmig.errors import KernelError
from localmig.fds import OwnedFd

_STDERR: Final = 2


class AppendedFile:
    """Gets lines, each whole and at once, so that they can be read beside a crash, and after a truncation.

    Args:
        option: the option that named the file, for errors.
        path: the file.
        mode: its permissions where it is created, less the umask.

    Raises:
        KernelError: it cannot be opened.
    """

    def __init__(self, option: str, path: str, *, mode: int) -> None:
        self.option = option
        self.path = str(Path(path).absolute())
        self._mode = mode
        self._fd = self._open()

    def write(self, line: str) -> None:
        """Appends `line`. Raises OSError if the file does not take it."""
        os.write(self._fd.fileno(), line.encode(errors="backslashreplace") + b"\n")

    def reopen(self) -> None:
        """Opens the path again: logrotate renamed the file, and lines belong into a new one.

        If stderr leads to the old file, as after `upgrade`, it leads to the new one then.

        Raises:
            KernelError: the path cannot be opened. Lines go on into the old file.
        """
        try:
            fd = self._open()
        except KernelError as error:
            old = Path(f"/proc/self/fd/{self._fd.fileno()}").readlink()
            raise KernelError(
                f"{error}; lines go on into '{old}': let user id {os.geteuid()} write to '{self.path}' "
                "(logrotate: 'create' with its name, or 'copytruncate')",
                errno=error.errno,
            ) from error
        if os.path.samestat(os.fstat(_STDERR), os.fstat(self._fd.fileno())):
            os.dup2(fd.fileno(), _STDERR)
        self._fd.close()
        self._fd = fd

    def close(self) -> None:
        """Closes it. Idempotent."""
        self._fd.close()

    def _open(self) -> OwnedFd:
        # Of a terminal this process must not become the foreman, and a pipe that nobody reads must not hold it up.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        try:
            fd = OwnedFd(os.open(self.path, flags, self._mode))
        except OSError as error:
            text = f"{self.option} {self.path}: {error.strerror}"
            raise KernelError(text, errno=error.errno or errno.EIO) from error
        os.set_blocking(fd.fileno(), True)
        return fd


def write_to_stderr(line: str) -> None:
    """Writes `line` to stderr, past all buffers. Raises OSError where stderr takes nothing: its terminal is gone."""
    os.write(_STDERR, line.encode(errors="backslashreplace") + b"\n")
