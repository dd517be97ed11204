"""Whether a process has the UNIX socket whose file is at a path, by the kernel's list of all sockets (sock_diag(7)).

Owns:        the one netlink request.
Never sees:  permissions: the list is for every user, so it also tells of sockets that this process may not connect to.
Read next:   unix_socket.py, its user.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

# linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST_DUMP: Final = 0x301
_UDIAG_SHOW_NAME: Final = 0x1
_UDIAG_SHOW_VFS: Final = 0x2
_UNIX_DIAG_NAME: Final = 0
_UNIX_DIAG_VFS: Final = 1
_ANY_STATE: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BxxxIII8x")
_ANSWER: Final = struct.Struct("=BBBxIII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_VFS: Final = struct.Struct("=II")

_PART_SIZE_MAX: Final = 65536
"""The kernel sends a list in parts of at most 32 KiB."""


def is_held(path: str, status: os.stat_result) -> bool:
    """Whether a process of this network namespace has the socket at `path`, of which lstat(2) said `status`.

    The file tells, or the name that it was bound by: some file systems have inode numbers of their own for stat(2).

    Raises:
        OSError: this kernel does not say.
    """
    # As the kernel writes a device's number inside (kdev_t.h); inode numbers are cut to 32 bits.
    device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    file, name = _VFS.pack(status.st_ino & 0xFFFFFFFF, device), os.fsencode(path)
    return any(
        attributes.get(_UNIX_DIAG_VFS) == file or attributes.get(_UNIX_DIAG_NAME, b"").rstrip(b"\0") == name
        for attributes in _sockets()
    )


def _sockets() -> Iterator[dict[int, bytes]]:
    """What the kernel tells of each socket. Raises OSError."""
    request = _REQUEST.pack(socket.AF_UNIX, _ANY_STATE, 0, _UDIAG_SHOW_NAME | _UDIAG_SHOW_VFS)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        size = _HEADER.size + len(request)
        sock.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + request)
        while True:
            part = sock.recv(_PART_SIZE_MAX)
            while part:
                size, kind, *_ = _HEADER.unpack_from(part)
                message, part = part[_HEADER.size : size], part[_padded(size) :]
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (number,) = struct.unpack_from("=i", message)
                    raise OSError(-number, os.strerror(-number))
                yield _attributes(message[_ANSWER.size :])


def _attributes(data: bytes) -> dict[int, bytes]:
    attributes = {}
    while data:
        size, kind = _ATTRIBUTE.unpack_from(data)
        attributes[kind] = data[_ATTRIBUTE.size : size]
        data = data[_padded(size) :]
    return attributes


def _padded(size: int) -> int:
    return size + 3 & ~3
