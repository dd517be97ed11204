"""Listening UNIX sockets: whose path it is, how it changes hands, when it goes.

Owns:        ListeningSocket; taking a path from the dead; rename(2) over a living one.
Never sees:  what is said on a connection, who is at the other end.
Read next:   its users: vhost_user/session.py, monitor/server.py, migration/transport.py.

A path is only ever taken from a dead process, or by rename from the process this one succeeds, so that at every
instant it leads to somebody who listens. Only what was bound here is removed, which the inode tells: a path that a
successor took over is left alone.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from pathlib import Path
from typing import Final, Self

from localmig.access import PRIVATE_MODE, group_id
from localmig.errors import ConfigError, KernelError
from localmig.fds import OwnedFd

PATH_BYTES_MAX: Final = 107
"""Longest path a UNIX socket can have: `sun_path` holds 108 bytes, the last one is NUL (unix(7))."""

INCOMING_SUFFIX: Final = ".incoming"
"""What a process that may succeed another one appends to the paths that the other one still has."""

_BACKLOG: Final = 16
"""Connections that may wait while the process is busy: more than come at once to one VM's sockets."""

ACCEPT_BURST: Final = 64
"""Connections of one socket that are accepted as they come: more than a management layer's clients at once."""

ACCEPT_INTERVAL_S: Final = 0.01
"""From one to the next of a flood of connections: it costs a hundredth of a processor, and whoever waits in the backlog
behind it a fraction of a second."""


def check_path(path: str) -> None:
    """Raises ConfigError where `path` cannot be the path of a UNIX socket."""
    if not path or "\0" in path:
        raise ConfigError("invalid Unix socket address")
    size = len(os.fsencode(path))
    if size > PATH_BYTES_MAX:
        raise ConfigError(
            f"UNIX socket path '{path}' is too long: {size} bytes, limit is {PATH_BYTES_MAX}; use a shorter directory"
        )


class AcceptPace:
    """How soon a socket's next connection may be accepted: at once, until too many came in a moment."""

    def __init__(self) -> None:
        self._due_s = 0.0
        """When the last one was due, had they all come at their interval."""

    def note(self) -> None:
        """One was accepted."""
        self._due_s = max(self._due_s, time.monotonic()) + ACCEPT_INTERVAL_S

    def delay_s(self) -> float:
        """How long to wait with the next one, 0 for not at all."""
        return max(0.0, self._due_s - time.monotonic() - ACCEPT_BURST * ACCEPT_INTERVAL_S)


class ListeningSocket:
    """A listening stream socket, non-blocking, and its path.

    Attributes:
        path: where it is meant to be reached.
        bound_path: where it is reached: another path until `claim`, where it was bound beside.
        identity: device and inode of the file it bound.
        fd: the socket; whoever holds this object lends it.
    """

    def __init__(self, fd: OwnedFd, *, path: str, identity: tuple[int, int], bound_path: str | None = None) -> None:
        """Takes over a socket that listens already, without touching it; `fd` is empty afterwards."""
        self.fd = fd.take()
        self.path = path
        self.bound_path = bound_path or path
        self.identity = identity

    @classmethod
    def bind(cls, path: str, *, mode: int = PRIVATE_MODE, group: str | None = None) -> Self:
        """Listens at `path`; what a dead process left there is replaced.

        Args:
            path: where.
            mode: the path's permissions, whatever the umask is.
            group: the path's group, by name or number; None: as the directory says.

        Raises:
            ConfigError: the path is too long, a living process listens there, it is something else than a socket, or
                there is no such group. Nothing was changed.
            KernelError: the kernel refused. Nobody can connect to `path`.
        """
        return cls._bind(path, path, mode, group)

    @classmethod
    def bind_beside(cls, path: str, *, mode: int = PRIVATE_MODE, group: str | None = None) -> Self:
        """Listens at `path` + INCOMING_SUFFIX while another process has `path`; `claim` moves it there.

        Raises:
            ConfigError, KernelError: as `bind`.
        """
        return cls._bind(path, path + INCOMING_SUFFIX, mode, group)

    @classmethod
    def _bind(cls, path: str, bound_path: str, mode: int, group: str | None) -> Self:
        check_path(bound_path)
        gid = None if group is None else group_id(group)
        if is_listening(bound_path):
            raise ConfigError(f"socket '{bound_path}' is in use by a living process: end it, or choose another path")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # The path gets the mode that its socket has, less the umask.
            os.fchmod(listening.fileno(), PRIVATE_MODE)
            Path(bound_path).unlink(missing_ok=True)  # dead, or there would be a holder
            listening.bind(bound_path)
            if gid is not None:
                os.chown(bound_path, -1, gid, follow_symlinks=False)
            Path(bound_path).chmod(mode)
            # Before this nobody can connect, so at no moment may anyone but the mode and the group say.
            listening.listen(_BACKLOG)
            identity = _identity(bound_path)
        except OSError as error:
            if listening.getsockname():
                Path(bound_path).unlink(missing_ok=True)
            listening.close()
            raise KernelError(
                f"cannot listen at '{bound_path}': {error.strerror}", errno=error.errno or errno.EIO
            ) from error
        assert identity is not None, bound_path
        return cls(OwnedFd(listening.detach()), path=path, identity=identity, bound_path=bound_path)

    @property
    def is_beside(self) -> bool:
        """Whether it was bound beside its path and has not claimed it."""
        return self.bound_path != self.path

    @property
    def is_displaced(self) -> bool:
        """Whether its path leads elsewhere, or nowhere: another process claimed or removed it."""
        return not self.is_beside and _identity(self.path) != self.identity

    def claim(self) -> None:
        """Moves the socket to its path, over whatever is there, in one step. Does nothing where it is there already.

        Raises:
            KernelError: the kernel refused; it listens where it did.
        """
        if not self.is_beside:
            return
        try:
            Path(self.bound_path).rename(self.path)
        except OSError as error:
            raise KernelError(
                f"cannot rename '{self.bound_path}' to '{self.path}': {error.strerror}", errno=error.errno or errno.EIO
            ) from error
        self.bound_path = self.path

    def release(self) -> None:
        """Drops the socket and leaves its path: another process serves it. Idempotent."""
        self.fd.close()

    def close(self) -> None:
        """Ends listening and removes the path, if it is still ours. Idempotent."""
        if self.fd.is_open:
            self.release()
            if _identity(self.bound_path) == self.identity:
                Path(self.bound_path).unlink()


def is_listening(path: str) -> bool:
    """Whether a living process has the socket at `path`; it does not notice being asked about.

    Raises:
        ConfigError: something that is no socket is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False  # nothing there, or binding will say what is wrong
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"'{path}' exists and is no socket: remove it, or choose another path")
    # A datagram socket cannot connect to a stream socket, so nobody is disturbed; the dead refuse in another way.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(path) != errno.ECONNREFUSED


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
