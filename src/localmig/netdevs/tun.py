"""/dev/net/tun: what a TAP's descriptor can be asked and told.

Owns:        opening the device, its ioctls (linux/if_tun.h), an interface request's layout.
Never sees:  what a TAP is for; netlink.
Read next:   tap.py.

Every function raises OSError as the kernel answers: as a rule EBADFD where the interface of the descriptor is gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from enum import IntFlag
from typing import Final

from localmig.device_api import Offload

DEVICE: Final = "/dev/net/tun"

_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNGETIFF: Final = 0x800454D2
_TUNSETSNDBUF: Final = 0x400454D4
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETQUEUE: Final = 0x400454D9
_TUNSETVNETLE: Final = 0x400454DC
_TUNSETCARRIER: Final = 0x400454E2
_TUNGETDEVNETNS: Final = 0x54E3
_SIOCGIFHWADDR: Final = 0x8927

_NAME_SIZE: Final = 16
_REQUEST: Final = struct.Struct(f"{_NAME_SIZE}s24s")
"""struct ifreq: the name, then a union of 24 bytes on 64-bit machines and less on others (linux/if.h)."""

_NO_INTERFACE: Final = (errno.EBADFD, errno.ENODEV, errno.ENXIO, errno.ENOLINK)
"""What a queue answers whose interface is gone; the last one a macvtap's."""


class Flag(IntFlag):
    """What a TAP was opened with, and what becomes of a queue."""

    TAP = 0x0002
    MULTI_QUEUE = 0x0100
    ATTACH_QUEUE = 0x0200
    DETACH_QUEUE = 0x0400
    NO_PI = 0x1000
    VNET_HDR = 0x4000


def open_device() -> int:
    """A descriptor of no interface yet, non-blocking."""
    return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def attach_to(fd: int, name: str, flags: Flag) -> None:
    """Makes a descriptor a queue of the interface `name`, which is made where there is none; "" is any new name."""
    fcntl.ioctl(fd, _TUNSETIFF, _pack(name, struct.pack("H", flags)))


def interface(fd: int) -> tuple[str, Flag] | None:
    """The present name of a queue's interface and its flags, DETACH_QUEUE where it is detached; None: it is gone."""
    try:
        answer = fcntl.ioctl(fd, _TUNGETIFF, _pack(""))
    except OSError as error:
        if error.errno in _NO_INTERFACE:
            return None
        raise
    name, value = _unpack(answer)
    (flags,) = struct.unpack_from("H", value)
    return name, Flag(flags)


def is_attached(fd: int) -> bool:
    """Whether the kernel steers frames into a queue."""
    found = interface(fd)
    return found is not None and Flag.DETACH_QUEUE not in found[1]


def attach(fd: int) -> None:
    """Lets the kernel steer frames into a queue of a TAP of several."""
    fcntl.ioctl(fd, _TUNSETQUEUE, _pack("", struct.pack("H", Flag.ATTACH_QUEUE)))


def detach(fd: int) -> None:
    """Lets the kernel steer no more frames into it."""
    fcntl.ioctl(fd, _TUNSETQUEUE, _pack("", struct.pack("H", Flag.DETACH_QUEUE)))


def set_vnet_header_length(fd: int, length: int) -> None:
    """Sets the bytes in front of each frame."""
    _set(fd, _TUNSETVNETHDRSZ, length)


def set_little_endian(fd: int) -> None:
    """Has them little-endian on any machine."""
    _set(fd, _TUNSETVNETLE, 1)


def set_send_buffer(fd: int, size: int) -> None:
    """Sets the bytes that each attached queue may have on their way into the network."""
    _set(fd, _TUNSETSNDBUF, size)


def set_offloads(fd: int, offloads: Offload) -> None:
    """Says what whoever reads the frames can take over. EINVAL where the kernel does not know one."""
    fcntl.ioctl(fd, _TUNSETOFFLOAD, int(offloads))


def turn_carrier_on(fd: int) -> None:
    """The interface has a carrier: the network sends into it. EINVAL of what is no TAP but a macvtap."""
    _set(fd, _TUNSETCARRIER, 1)


def turn_carrier_off(fd: int) -> None:
    """It has none. Otherwise as `turn_carrier_on`."""
    _set(fd, _TUNSETCARRIER, 0)


def hardware_address(fd: int) -> bytes:
    """The Ethernet address of a queue's interface, whichever network namespace that is in."""
    _, value = _unpack(fcntl.ioctl(fd, _SIOCGIFHWADDR, _pack("")))
    return value[2:8]


def namespace(fd: int) -> int | None:
    """Which network namespace a queue's interface is in, as `network.namespace_here` tells it.

    None where the kernel does not say: before Linux 5.3, or to a process without CAP_NET_ADMIN there.
    """
    try:
        held = fcntl.ioctl(fd, _TUNGETDEVNETNS)
    except OSError:
        return None
    try:
        return os.fstat(held).st_ino
    finally:
        os.close(held)


def _set(fd: int, request: int, value: int) -> None:
    fcntl.ioctl(fd, request, struct.pack("i", value))


def _pack(name: str, value: bytes = b"") -> bytes:
    return _REQUEST.pack(name.encode(errors="surrogateescape"), value)


def _unpack(request: bytes) -> tuple[str, bytes]:
    name, value = _REQUEST.unpack(request)
    return name.split(b"\0", 1)[0].decode(errors="surrogateescape"), value
