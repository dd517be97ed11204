"""Who may talk to a daemon: users and groups by their numbers, and which process is at the other end of a socket.

Owns:        Access, the rule for QMP and migration sockets; names of users and groups; the kernel's word on a peer.
Never sees:  what is said on a connection, paths.
Read next:   unix_socket.py for the modes of paths; monitor/server.py and migration/transport.py, which ask here.

A socket's mode says who may connect. The user id is looked at besides, because a directory that is bound into a
container, or a descriptor that was passed on, brings users whom no mode was meant for.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localmig.errors import ConfigError, KernelError, PeerError, is_shortage
from localmig.fd_kind import fdinfo
from localmig.fds import OwnedFd

PRIVATE_MODE: Final = 0o600
"""The mode of a path that only its user may connect to."""

ACCOUNT_ID_MAX: Final = 2**32 - 2
"""User and group ids have 32 bits; all of them set means none (chown(2))."""

_ROOT: Final = 0

_CREDENTIALS: Final = struct.Struct("3i")
"""`struct ucred`: pid, uid, gid (unix(7))."""

_DESCRIPTOR: Final = struct.Struct("i")

_SO_PEERPIDFD: Final = 77
"""asm-generic/socket.h; Linux 6.5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Who may use a daemon's QMP and migration sockets: root, the daemon's own user, and whom the operator lists.

    Attributes:
        users: ids of those listed.
        mode: permissions of the sockets' paths.
        group: the paths' group, by name or number; None: as the directory says.
    """

    users: frozenset[int] = frozenset()
    mode: int = PRIVATE_MODE
    group: str | None = None

    def check(self, connection: socket.socket) -> None:
        """Raises PeerError where the process at the other end of a UNIX socket is another user's.

        Whoever connected sees the process that called listen(2) last, as it was then.
        """
        pid, uid = peer_credentials(connection)
        if uid not in (allowed := {_ROOT, os.geteuid()} | self.users):
            raise PeerError(
                f"process {pid} has user id {uid}, here only {', '.join(map(str, sorted(allowed)))} may: "
                "--allow-user lists others"
            )


def user_id(user: str) -> int:
    """The number of a user, who may be given by it. Raises ConfigError where there is no such user."""
    if user.isascii() and user.isdigit():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"there is no user '{user}' on this machine") from None


def user_name(number: int) -> str:
    """A user as people know it: the name, or the number of one who has none here."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def group_id(group: str) -> int:
    """The number of a group, which may be given by it. Raises ConfigError where there is no such group."""
    if group.isascii() and group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"there is no group '{group}' on this machine") from None


def nameless_user_id() -> int:
    """The id that the kernel shows for every user of another user namespace who has none in ours."""
    return int(Path("/proc/sys/kernel/overflowuid").read_text())


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of whoever is at the other end of a UNIX socket: who connected, or who listened."""
    size = _CREDENTIALS.size
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def peer_process(connection: socket.socket) -> OwnedFd | None:
    """A pidfd of the process that `peer_credentials` is about, None where only a kernel from 6.5 on would give one.

    That is for a process of a PID namespace that ours does not see.

    Raises:
        PeerError: there is none, because the process is gone: whoever speaks in its place has its socket and no name.
        KernelError: this process has no room for it.
    """
    try:
        try:
            data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _DESCRIPTOR.size)
            return OwnedFd(_DESCRIPTOR.unpack(data)[0])
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
        pid, _ = peer_credentials(connection)
        return OwnedFd(os.pidfd_open(pid)) if pid > 0 else None
    except OSError as error:
        text = f"the process at the other end of the socket cannot be seen: {error.strerror}"
        if is_shortage(error):
            raise KernelError(text, errno=error.errno or errno.EMFILE) from error
        raise PeerError(text) from error


def pid_of(pidfd: int) -> int | None:
    """The number of the process behind a borrowed pidfd: 0 where ours has none for it; None where it is no pidfd.

    Raises OSError where this process has no descriptor or memory to look.
    """
    return next(map(int, fdinfo(pidfd, "Pid:")), None)


def is_same_process(pidfd: int, other: int) -> bool:
    """Whether two borrowed pidfds are of one process, as far as the kernel tells.

    Their numbers must be equal. From Linux 6.9 on so must the inodes, of which each process has its own; there that
    is certain also between PID namespaces, where a number is 0.
    """
    return pid_of(pidfd) == pid_of(other) and os.fstat(pidfd).st_ino == os.fstat(other).st_ino
