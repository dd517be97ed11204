"""What a descriptor is, by what the kernel says of it.

Owns:        the kinds that can be told apart, and how; whether two are one; /proc/self/fdinfo.
Never sees:  who sent a descriptor, or what for.
Read next:   vmstate/description.py, which looks at the descriptors of a state that arrived.

Nothing here touches what the descriptor's file shares with other processes: no ioctl, no read, no flag. Nor does it
wait for a file system's server, as fstat(2) may, but to tell a macvtap, which is known by nothing else. Only a
destination asks for that, of what the source sent, and it serves nobody then.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from enum import StrEnum
from pathlib import Path
from typing import Final, assert_never

from localmig.errors import is_shortage

_INTERFACE: Final = "iff:"
"""What fdinfo of /dev/net/tun has: the interface's name, empty where there is none (drivers/net/tun.c)."""

_TAP_DRIVERS: Final = ("macvtap", "ipvtap")
"""Whose devices are TAPs as well; their major numbers are given out by the kernel as it goes."""

_F_DUPFD_QUERY: Final = 1027
"""linux/fcntl.h; Linux 6.10."""


class FdKind(StrEnum):
    """A kind that can be told; the value stands in the vmdesc."""

    TAP = "tap"
    SOCKET = "socket"
    """A UNIX stream socket that does not listen."""
    LISTENING_SOCKET = "listening-socket"
    """A UNIX stream socket that listens."""
    NETLINK = "netlink"
    """A socket of route netlink, which asks about interfaces."""
    MEMORY = "memory"
    """What memfd_create(2), tmpfs and hugetlbfs make: it alone has seals."""


def is_of_kind(fd: int, kind: FdKind) -> bool:
    """Whether a borrowed descriptor is of that kind."""
    match kind:
        case FdKind.TAP:
            return _is_tap(fd)
        case FdKind.SOCKET:
            return _socket_facts(fd) == (socket.AF_UNIX, socket.SOCK_STREAM, 0, False)
        case FdKind.LISTENING_SOCKET:
            return _socket_facts(fd) == (socket.AF_UNIX, socket.SOCK_STREAM, 0, True)
        case FdKind.NETLINK:
            return _socket_facts(fd) == (socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE, False)
        case FdKind.MEMORY:
            return _seals(fd) is not None
    assert_never(kind)


def is_same_file(fd: int, other: int) -> bool:
    """Whether two borrowed descriptors share one open file. False where the kernel cannot tell (before 6.10)."""
    try:
        return bool(fcntl.fcntl(fd, _F_DUPFD_QUERY, other))
    except OSError:
        return False


def interface_of(fd: int) -> str | None:
    """The interface that a borrowed descriptor is an attached queue of, by name; None where the kernel names none.

    Raises as `fdinfo`.
    """
    return next(iter(fdinfo(fd, _INTERFACE)), None) or None


def is_tun_queue(fd: int) -> bool:
    """Whether a borrowed descriptor is one of /dev/net/tun, with an interface or without. Raises as `fdinfo`."""
    return bool(fdinfo(fd, _INTERFACE))


def fdinfo(fd: int, name: str) -> list[str]:
    """What the kernel tells of a borrowed descriptor under `name`, nothing for one of another kind.

    Raises OSError where this process has no descriptor or memory to look.
    """
    try:
        # With each descriptor of a handover; a Path takes three times as long.
        with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        if is_shortage(error):
            raise
        return []
    return [line.removeprefix(name).strip() for line in lines if line.startswith(name)]


def is_cut_short(fd: int, size: int) -> bool:
    """Whether a borrowed descriptor's memory has less than `size` bytes, and by its seals always had."""
    seals = _seals(fd)
    return seals is not None and bool(seals & fcntl.F_SEAL_SHRINK) and os.fstat(fd).st_size < size


def describe_fd(fd: int) -> str:
    """What a borrowed descriptor is, for people: a kind, or the kernel's name for it."""
    for kind in FdKind:
        if is_of_kind(fd, kind):
            return kind
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return f"of file type {stat.S_IFMT(os.fstat(fd).st_mode):#o}"


def _is_tap(fd: int) -> bool:
    if is_tun_queue(fd):
        return True
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and _driver(os.major(status.st_rdev)) in _TAP_DRIVERS


def _driver(major: int) -> str | None:
    """Of a character device, None where nobody says."""
    try:
        lines = Path("/proc/devices").read_text(encoding="ascii").partition("Block devices:")[0].splitlines()
    except OSError:
        return None
    names = dict(line.split(maxsplit=1) for line in lines if line.strip()[:1].isdigit())
    return names.get(str(major))


def _socket_facts(fd: int) -> tuple[int, int, int, bool] | None:
    """Family, type, protocol and whether it listens; None of what is no socket."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        if error.errno == errno.ENOTSOCK:
            return None
        raise
    try:
        listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        return sock.family, sock.type, sock.proto, listens
    finally:
        sock.detach()


def _seals(fd: int) -> int | None:
    """The seals on a file, None of one that cannot have any."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return None
