"""Listening UNIX sockets: whose path it is, how it changes hands, when it goes.

Owns:        ListeningSocket; taking a path from the dead; rename(2) over a living one.
Never sees:  what is said on a connection, who is at the other end.
Read next:   its users: vhost_user/session.py, monitor/server.py, migration/transport.py.

A path is only ever taken from a dead process, or by rename from the process this one succeeds, so that at every
instant it leads to somebody who listens. Only what was bound here is removed, which the inode tells: a path that a
successor took over is left alone.
"""

from __future__ import annotations

import enum
import errno
import os
import socket
import stat
import time
from pathlib import Path
from typing import Final, Self

from localmig import unix_diag
from localmig.access import PRIVATE_MODE, group_id, user_name
from localmig.errors import ConfigError, KernelError
from localmig.fds import OwnedFd

PATH_BYTES_MAX: Final = 107
"""Longest path a UNIX socket can have: `sun_path` holds 108 bytes, the last one is NUL (unix(7))."""

INCOMING_SUFFIX: Final = ".incoming"
"""What a process that may succeed another one appends to the paths that the other one still has."""

_REMOVE: Final = "remove it as that user or as root, or choose another path"

_ADVICE: Final = {
    errno.ENOENT: "; make its directory first",
    errno.EACCES: "; this process's user must be able to write to its directory",
    errno.EADDRINUSE: "; another process began to listen there just now",
}
"""What to do about an error of bind(2)."""

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
            ConfigError: the path is too long, a living process has it, it is a socket of another user or no socket at
                all, or there is no such group. Nothing was changed.
            KernelError: the kernel refused. Nobody can connect to `path`.
        """
        return cls._bind(path, path, mode, group)

    @classmethod
    def inherit(cls, fd: int, path: str) -> Self:
        """Takes over a socket that the parent process let listen at `path`.

        Raises:
            ConfigError: it is no such socket. It is left alone.
        """
        if socket_kind(fd) is not SocketKind.LISTENING:
            raise ConfigError(f"descriptor {fd} is no listening UNIX stream socket")
        identity = _identity(path)
        if identity is None:
            raise ConfigError(f"descriptor {fd} listens at '{path}', where nothing is: nobody can connect")
        os.set_blocking(fd, False)
        return cls(OwnedFd(fd), path=path, identity=identity)

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
        _clear(bound_path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # The path gets the mode that its socket has, less the umask.
            os.fchmod(listening.fileno(), PRIVATE_MODE)
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
                f"cannot listen at '{bound_path}': {error.strerror}{_ADVICE.get(error.errno or 0, '')}",
                errno=error.errno or errno.EIO,
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


class SocketKind(enum.Enum):
    """What a UNIX stream socket is for."""

    LISTENING = enum.auto()
    CONNECTED = enum.auto()


def socket_kind(fd: int) -> SocketKind | None:
    """What the UNIX stream socket behind a descriptor is for; None for everything else."""
    try:
        borrowed = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        if (borrowed.family, borrowed.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            return None
        if borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return SocketKind.LISTENING
        borrowed.getpeername()
    except OSError:
        return None
    finally:
        borrowed.detach()
    return SocketKind.CONNECTED


class _Use(enum.Enum):
    """What a socket's file is still for."""

    NONE = "the process that made it is dead"
    HELD = "a process has it"
    STALE = "this process may not connect to it; no process of this network namespace has it"
    UNKNOWN = "this process may not connect to it, and the kernel does not say whether a process has it"


def is_listening(path: str) -> bool:
    """Whether a process has the socket at `path`, which does not notice; also where that cannot be known.

    Raises:
        ConfigError: something that is no socket is there.
    """
    status = _socket_status(path)
    return status is not None and _use_of(path, status) is not _Use.NONE


def _clear(path: str) -> None:
    """Removes a socket that a dead process left at `path`. ConfigError where something else is there, or it stays."""
    status = _socket_status(path)
    if status is None:
        return
    owner = user_name(status.st_uid)
    match _use_of(path, status):
        case _Use.NONE:
            try:
                Path(path).unlink(missing_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"socket '{path}' was left by a dead process of user '{owner}' and cannot be removed: "
                    f"{error.strerror}; {_REMOVE}"
                ) from error
        case _Use.HELD:
            raise ConfigError(
                f"socket '{path}' is in use by a living process of user '{owner}': end it, or choose another path"
            )
        case _Use.STALE:
            raise ConfigError(
                f"socket '{path}' of user '{owner}' is stale, no process of this network namespace has it; {_REMOVE}"
            )
        case _Use.UNKNOWN:
            raise ConfigError(
                f"socket '{path}' belongs to user '{owner}', and whether a process has it cannot be seen; if none has, "
                f"{_REMOVE}"
            )


def _socket_status(path: str) -> os.stat_result | None:
    """What lstat(2) says of the socket at `path`, None where nothing is there. ConfigError for anything else."""
    try:
        status = os.lstat(path)
    except OSError:
        return None  # or binding will say what is wrong
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(f"'{path}' is a symbolic link: name the path it leads to, or remove it")
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"'{path}' exists and is no socket: remove it, or choose another path")
    return status


def _use_of(path: str, status: os.stat_result) -> _Use:
    # A datagram socket cannot connect to a stream socket, so nobody is disturbed; the dead refuse in another way.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        error = probe.connect_ex(path)
    if error in (errno.ECONNREFUSED, errno.ENOENT):
        return _Use.NONE
    if error in (0, errno.EPROTOTYPE):
        return _Use.HELD
    try:
        return _Use.HELD if unix_diag.is_held(path, status) else _Use.STALE
    except OSError:
        return _Use.UNKNOWN


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
