"""A network interface by its name, in this process's network namespace: MTU, up, hardware address, who has it open.

Owns:        the SIOC… ioctls, the one netlink request.
Never sees:  a TAP's descriptors; what the interface is for.
Read next:   tap.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final, Self

# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCGIFMTU: Final = 0x8921
_SIOCSIFMTU: Final = 0x8922
_SIOCGIFHWADDR: Final = 0x8927
_IFF_UP: Final = 0x1

_NAME_SIZE: Final = 16
_REQUEST: Final = struct.Struct(f"{_NAME_SIZE}s24s")
"""struct ifreq: the name, then a union of 24 bytes on 64-bit machines and less on others."""


def pack_request(name: str, value: bytes = b"") -> bytes:
    """A `struct ifreq` about the interface `name`, with `value` in its union."""
    return _REQUEST.pack(name.encode(errors="surrogateescape"), value)


def unpack_request(request: bytes) -> tuple[str, bytes]:
    """(name, union) of a `struct ifreq`."""
    name, value = _REQUEST.unpack(request)
    return name.split(b"\0", 1)[0].decode(errors="surrogateescape"), value


# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h
_NLMSG_ERROR: Final = 2
_RTM_GETLINK: Final = 18
_NLM_F_REQUEST: Final = 1
_IFLA_LINKINFO: Final = 18
_IFLA_INFO_DATA: Final = 2
_IFLA_TUN_NUM_QUEUES: Final = 8
_IFLA_TUN_NUM_DISABLED_QUEUES: Final = 9
_NETLINK_HEADER: Final = struct.Struct("=IHHII")
_LINK_HEADER: Final = struct.Struct("=BxHiII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_NESTED: Final = 0x8000

_ANSWER_SIZE_MAX: Final = 65536
"""What the kernel tells of one link has some 2 KiB; with every attribute there is, a page or two."""


def open_queue_count(name: str) -> int:
    """How many queues of the multi-queue TAP `name` any process has open; 0 also where there is no such interface.

    Raises OSError where the kernel does not say.
    """
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return 0
    link = _LINK_HEADER.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    size = _NETLINK_HEADER.size + len(link)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.send(_NETLINK_HEADER.pack(size, _RTM_GETLINK, _NLM_F_REQUEST, 1, 0) + link)
        answer = sock.recv(_ANSWER_SIZE_MAX)
    _, kind, _, _, _ = _NETLINK_HEADER.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        (number,) = struct.unpack_from("=i", answer, _NETLINK_HEADER.size)
        if -number == errno.ENODEV:  # it went meanwhile
            return 0
        raise OSError(-number, os.strerror(-number))
    info = _attributes(answer[_NETLINK_HEADER.size + _LINK_HEADER.size :]).get(_IFLA_LINKINFO, b"")
    data = _attributes(_attributes(info).get(_IFLA_INFO_DATA, b""))
    counts = (data.get(each, bytes(4)) for each in (_IFLA_TUN_NUM_QUEUES, _IFLA_TUN_NUM_DISABLED_QUEUES))
    return sum(int.from_bytes(count, sys.byteorder) for count in counts)


def _attributes(data: bytes) -> dict[int, bytes]:
    """Netlink attributes by their type."""
    return dict(_walk(data))


def _walk(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & ~_NESTED, data[_ATTRIBUTE.size : size]
        data = data[max(_ATTRIBUTE.size, size + 3 & ~3) :]


def hardware_address(descriptor: int, name: str) -> bytes:
    """The MAC of the interface `name`, asked through a socket or its TAP. Raises OSError."""
    _, value = unpack_request(fcntl.ioctl(descriptor, _SIOCGIFHWADDR, pack_request(name)))
    return value[2:8]


class Interface:
    """The interface called `name`. Every method raises OSError, ENODEV where there is none."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def hardware_address(self) -> bytes:
        """Its MAC."""
        return hardware_address(self._socket.fileno(), self.name)

    def mtu(self) -> int:
        """Its MTU, in bytes."""
        (mtu,) = struct.unpack_from("i", self._ask(_SIOCGIFMTU))
        return int(mtu)

    def set_mtu(self, mtu: int) -> None:
        """Gives it an MTU of `mtu` bytes."""
        self._ask(_SIOCSIFMTU, struct.pack("i", mtu))

    def is_up(self) -> bool:
        """Whether it is up (administratively: IFF_UP)."""
        return bool(self._flags() & _IFF_UP)

    def bring_up(self) -> None:
        """Brings it up."""
        self._ask(_SIOCSIFFLAGS, struct.pack("H", self._flags() | _IFF_UP))

    def _flags(self) -> int:
        (flags,) = struct.unpack_from("H", self._ask(_SIOCGIFFLAGS))
        return int(flags)

    def _ask(self, request: int, value: bytes = b"") -> bytes:
        return unpack_request(fcntl.ioctl(self._socket, request, pack_request(self.name, value)))[1]
