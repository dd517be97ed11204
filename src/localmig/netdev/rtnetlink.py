"""Route netlink: what the kernel knows of the interfaces of this process's network namespace, and how it is told.

Owns:        the messages, and a socket for the length of one request.
Never sees:  a TAP's descriptors; what an interface is for.
Read next:   watch.py, which hears of changes; tap.py, which asks and sets.

An interface is named by its index, because its name may change at any time. It is looked up by a name only where a
user wrote one, or where a TAP's descriptor has just told it.

These few lines stand for pyroute2, whose import takes longer than a whole handover and which would run in the process
that must not stop to think.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if.h
_NLMSG_ERROR: Final = 2
RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_RTM_SETLINK: Final = 19
_NLM_F_REQUEST: Final = 1
_NLM_F_ACK: Final = 4
_IFF_UP: Final = 0x1
_IFLA_ADDRESS: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFLA_MASTER: Final = 10
_IFLA_LINKINFO: Final = 18
_IFLA_EXT_MASK: Final = 29
_IFLA_CARRIER: Final = 33
_IFLA_INFO_KIND: Final = 1
_IFLA_INFO_DATA: Final = 2
_IFLA_TUN_OWNER: Final = 1
_IFLA_TUN_MULTI_QUEUE: Final = 7
_IFLA_TUN_NUM_QUEUES: Final = 8
_IFLA_TUN_NUM_DISABLED_QUEUES: Final = 9
_RTEXT_FILTER_SKIP_STATS: Final = 8

_HEADER: Final = struct.Struct("=IHHII")
_LINK_HEADER: Final = struct.Struct("=BxHiII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_NESTED: Final = 0xC000
"""NLA_F_NESTED and NLA_F_NET_BYTEORDER, which stand in an attribute's type."""

ANSWER_SIZE_MAX: Final = 65536
"""What the kernel tells of one link has some 2 KiB; with every attribute there is, a page or two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """An interface, as the kernel describes it.

    Attributes:
        ifindex: which one it is, 1 or more; no other gets this number while it exists.
        name: what it is called now.
        mtu: in bytes.
        is_up: whether it is up administratively (IFF_UP).
        has_carrier: whether its carrier is on.
        address: its Ethernet address.
        master: ifindex of the bridge it is a port of (or of another interface that owns it), 0 where it is in none.
        kind: its driver's name for it, as "tun" or "bridge"; empty where there is none.
        owner: of a TUN or TAP, the id of the user that may open it, None for anyone.
        multi_queue: of a TUN or TAP, whether it was made for several queues.
        queue_count: of a TUN or TAP for several queues, how many any process has open.
    """

    ifindex: int
    name: str
    mtu: int
    is_up: bool
    has_carrier: bool
    address: bytes
    master: int
    kind: str
    owner: int | None
    multi_queue: bool
    queue_count: int


def link(*, ifindex: int = 0, name: str = "") -> Link | None:
    """The interface of that number, or of that name where no number is given; None where there is none.

    Raises:
        OSError: the kernel does not say.
    """
    attributes = _attribute(_IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS))
    if not ifindex:
        attributes += _attribute(_IFLA_IFNAME, name.encode(errors="surrogateescape") + b"\0")
    try:
        answer = _exchange(_RTM_GETLINK, 0, _LINK_HEADER.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0) + attributes)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    try:
        return decode_link(answer)
    except ValueError as error:
        raise OSError(errno.EBADMSG, f"the kernel describes an interface in a way that cannot be: {error}") from error


def set_mtu(ifindex: int, mtu: int) -> None:
    """Gives an interface an MTU of `mtu` bytes. OSError where the kernel refuses, as for all that follows."""
    _set(ifindex, _attribute(_IFLA_MTU, struct.pack("=I", mtu)))


def bring_up(ifindex: int) -> None:
    """Brings an interface up."""
    _set(ifindex, flags=_IFF_UP)


def set_master(ifindex: int, master: int) -> None:
    """Makes an interface a port of the bridge `master`, and of no other."""
    _set(ifindex, _attribute(_IFLA_MASTER, struct.pack("=I", master)))


def name_of(ifindex: int) -> str | None:
    """What an interface is called now, None where there is none."""
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return None


def namespace() -> int:
    """What tells this thread's network namespace from others that exist: an interface's number means something only
    together with it. OSError where /proc does not say.
    """
    return Path("/proc/thread-self/ns/net").stat().st_ino


def _set(ifindex: int, attributes: bytes = b"", *, flags: int = 0) -> None:
    _exchange(_RTM_SETLINK, _NLM_F_ACK, _LINK_HEADER.pack(socket.AF_UNSPEC, 0, ifindex, flags, flags) + attributes)


def _exchange(kind: int, flags: int, payload: bytes) -> bytes:
    """Sends a request; the payload of its answer. Raises OSError, also as the kernel answers one."""
    request = _HEADER.pack(_HEADER.size + len(payload), kind, _NLM_F_REQUEST | flags, 1, 0) + payload
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.send(request)
        # The kernel has answered when send(2) returns: nothing is waited for.
        answer = sock.recv(ANSWER_SIZE_MAX, socket.MSG_DONTWAIT)
    for answered, body in messages(answer):
        if answered == _NLMSG_ERROR:
            if len(body) < struct.calcsize("=i"):
                break
            (number,) = struct.unpack_from("=i", body)
            if number:
                raise OSError(-number, os.strerror(-number))
        return body
    raise OSError(errno.EBADMSG, "the kernel's answer is no netlink message")


# -- bytes ----------------------------------------------------------------------------------------------------


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each message in what a netlink socket received; what is cut short ends them."""
    while len(data) >= _HEADER.size:
        size, kind, _, _, _ = _HEADER.unpack_from(data)
        if not _HEADER.size <= size <= len(data):
            return
        yield kind, data[_HEADER.size : size]
        data = data[size + 3 & ~3 :]


def decode_link(payload: bytes) -> Link:
    """The interface that the payload of RTM_NEWLINK or RTM_DELLINK describes. ValueError where it describes none."""
    if len(payload) < _LINK_HEADER.size:
        raise ValueError(f"{len(payload)} bytes, a link has at least {_LINK_HEADER.size}")
    _, _, ifindex, flags, _ = _LINK_HEADER.unpack_from(payload)
    found = _attributes(payload[_LINK_HEADER.size :])
    info = _attributes(found.get(_IFLA_LINKINFO, b""))
    data = _attributes(info.get(_IFLA_INFO_DATA, b""))
    name, kind = _text(found.get(_IFLA_IFNAME, b"")), _text(info.get(_IFLA_INFO_KIND, b""))
    if ifindex < 1 or not name:
        raise ValueError(f"interface {ifindex} is called '{name}'")
    # Only a TUN's numbers mean what is read here.
    tun = data if kind == "tun" else {}
    return Link(
        ifindex=ifindex,
        name=name,
        mtu=_number(found.get(_IFLA_MTU, b"")),
        is_up=bool(flags & _IFF_UP),
        has_carrier=bool(_number(found.get(_IFLA_CARRIER, b"\1"))),
        address=found.get(_IFLA_ADDRESS, b""),
        master=_number(found.get(_IFLA_MASTER, b"")),
        kind=kind,
        owner=_number(tun[_IFLA_TUN_OWNER]) if _IFLA_TUN_OWNER in tun else None,
        multi_queue=bool(_number(tun.get(_IFLA_TUN_MULTI_QUEUE, b""))),
        queue_count=sum(_number(tun.get(each, b"")) for each in (_IFLA_TUN_NUM_QUEUES, _IFLA_TUN_NUM_DISABLED_QUEUES)),
    )


def changed_link(payload: bytes) -> tuple[int, str]:
    """(ifindex, name) that the payload of RTM_NEWLINK or RTM_DELLINK is about; 0 or "" where it does not say."""
    if len(payload) < _LINK_HEADER.size:
        return 0, ""
    _, _, ifindex, _, _ = _LINK_HEADER.unpack_from(payload)
    # The name comes first, so that hundreds of events of other interfaces cost little.
    names = (value for kind, value in _walk(payload[_LINK_HEADER.size :]) if kind == _IFLA_IFNAME)
    return ifindex, _text(next(names, b""))


def _attribute(kind: int, value: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    return dict(_walk(data))


def _walk(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each attribute; one that is cut short ends them."""
    while len(data) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= size <= len(data):
            return
        yield kind & ~_NESTED, data[_ATTRIBUTE.size : size]
        data = data[size + 3 & ~3 :]


def _number(value: bytes) -> int:
    return int.from_bytes(value[:8], sys.byteorder)


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="surrogateescape")
