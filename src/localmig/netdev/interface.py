"""A network interface by its name, in this process's network namespace: MTU, up, hardware address.

Owns:        the SIOC… ioctls.
Never sees:  TAPs; what the interface is for.
Read next:   tap.py.
"""

from __future__ import annotations

import fcntl
import socket
import struct
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
