"""The socket file QMP is answered at: whose it is, how it changes hands, when it goes.

Owns:        one listening UNIX socket and its name in the file system.
Never sees:  clients, QMP.
Read next:   server.py.

A name is only ever taken from the dead, or by rename(2) from the daemon this one succeeds: at every instant the name
leads to a daemon that answers. Only what was bound here is removed, which the inode tells: a name that a successor
took over is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Final

from localmig.errors import ConfigError, KernelError
from localmig.options.address import check_socket_path

INCOMING_SUFFIX: Final = ".incoming"
"""What a daemon that waits for a migration appends to its path while the daemon it succeeds answers there."""

_BACKLOG: Final = 16
"""Clients that may wait while the daemon starts; more than connect at once to one daemon."""

_CREDENTIALS: Final = struct.Struct("3i")
"""`struct ucred`: pid, uid, gid (unix(7))."""


class Listener:
    """A listening socket at `path`, mode 0600.

    Args:
        path: where QMP shall be answered.
        succeeds: whether this daemon may succeed the one that answers at `path`. Then it listens at
            `path + INCOMING_SUFFIX` until `claim`.

    Raises:
        ConfigError: a living process listens there, or something that is no socket is there. Nothing changed.
        KernelError: the socket cannot be made there. Nothing changed.
    """

    def __init__(self, path: str, *, succeeds: bool) -> None:
        self._path = path
        try:
            holder = holder_of(path)
            if holder is not None and succeeds:
                self._bound_path = path + INCOMING_SUFFIX
                check_socket_path(self._bound_path)
                holder = holder_of(self._bound_path)
            else:
                self._bound_path = path
            if holder is not None:
                raise ConfigError(
                    f"{f'process {holder}' if holder else 'a process'} answers at '{self._bound_path}' already: "
                    "end it, or give this daemon another --qmp path"
                )
            self.socket = _bind(self._bound_path)
        except OSError as error:
            raise KernelError(
                f"cannot listen for QMP at '{path}': {error.strerror}", errno=error.errno or errno.EIO
            ) from error
        self._inode = _inode(self._bound_path)

    @property
    def path(self) -> str:
        """Where clients reach this daemon now."""
        return self._bound_path

    def claim(self) -> None:
        """Takes `path` over from the daemon this one succeeded, in one step. Does nothing where it has it already.

        Raises:
            KernelError: the directory does not let us; clients reach us at the old name.
        """
        if self._bound_path == self._path:
            return
        try:
            Path(self._bound_path).rename(self._path)
        except OSError as error:
            raise KernelError(
                f"cannot rename '{self._bound_path}' to '{self._path}': {error.strerror}",
                errno=error.errno or errno.EIO,
            ) from error
        self._bound_path = self._path

    def close(self) -> None:
        """Stops listening and removes the name, unless it leads to somebody else by now. Idempotent."""
        with contextlib.suppress(OSError):
            if _inode(self._bound_path) == self._inode:
                Path(self._bound_path).unlink()
        self.socket.close()


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of whoever connected."""
    size = _CREDENTIALS.size
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def holder_of(path: str) -> int | None:
    """The process that listens at `path`, 0 where it cannot be seen from here, None where there is none.

    Raises:
        ConfigError: something that is no socket is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"'{path}' is there and is no socket: remove it, or give another --qmp path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return None
        except BlockingIOError:
            # Its backlog is full, so it lives; who it is cannot be asked.
            return 0
        return peer_credentials(probe)[0]


def _bind(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # The file gets the mode of the socket's inode less the umask: 0600 from its first instant.
        os.fchmod(listening.fileno(), 0o600)
        # Dead, or it would have been the holder.
        Path(path).unlink(missing_ok=True)
        listening.bind(path)
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino
