"""Route netlink: what the kernel tells of network interfaces, and how it is asked and told, as bytes.

Owns:        the messages.
Never sees:  a socket; what an interface is for.
Read next:   network.py, which sends and receives them.

These few lines stand for pyroute2: a fifth of a second of every start, and a process that must not stop to think.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if.h
_NLMSG_ERROR: Final = 2
RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_RTM_SETLINK: Final = 19
_NLM_F_REQUEST: Final = 1
_NLM_F_ACK: Final = 4
_NLM_F_EXCL: Final = 0x200
_NLM_F_CREATE: Final = 0x400
_IFF_UP: Final = 0x1
_IFF_ALLMULTI: Final = 0x200
_IFLA_ADDRESS: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFLA_LINK: Final = 5
_IFLA_MASTER: Final = 10
_IFLA_LINKINFO: Final = 18
_IFLA_EXT_MASK: Final = 29
_IFLA_CARRIER: Final = 33
_IFLA_MACVLAN_MODE: Final = 1
_IFLA_INFO_KIND: Final = 1
_IFLA_INFO_DATA: Final = 2
_IFLA_TUN_OWNER: Final = 1
_IFLA_TUN_MULTI_QUEUE: Final = 7
_IFLA_TUN_NUM_QUEUES: Final = 8
_IFLA_TUN_NUM_DISABLED_QUEUES: Final = 9
_RTEXT_FILTER_SKIP_STATS: Final = 8

MACVTAP_MODES: Final = {"bridge": 4, "vepa": 2, "private": 1, "passthru": 8}
"""What a macvtap may send to others on its lower device (MACVLAN_MODE_…, linux/if_link.h)."""

_HEADER: Final = struct.Struct("=IHHII")
_LINK_HEADER: Final = struct.Struct("=BxHiII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_NESTED: Final = 0xC000
"""NLA_F_NESTED and NLA_F_NET_BYTEORDER, which stand in an attribute's type."""

DATAGRAM_SIZE_MAX: Final = 65536
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
        lower: ifindex of the device that it sends and receives by, as a macvtap does, 0 where there is none.
        has_all_multicast: whether it takes in frames to every group.
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
    lower: int = 0
    has_all_multicast: bool = False


# -- requests -------------------------------------------------------------------------------------------------


def ask_link(sequence: int, *, ifindex: int = 0, name: str = "") -> bytes:
    """Asks for the interface of that number, or of that name where no number is given."""
    attributes = _attribute(_IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS))
    if not ifindex:
        attributes += _attribute(_IFLA_IFNAME, name.encode(errors="surrogateescape") + b"\0")
    return _request(_RTM_GETLINK, 0, sequence, _LINK_HEADER.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0) + attributes)


def set_mtu(sequence: int, ifindex: int, mtu: int) -> bytes:
    """Gives an interface an MTU of `mtu` bytes."""
    return _set(sequence, ifindex, _attribute(_IFLA_MTU, struct.pack("=I", mtu)))


def bring_up(sequence: int, ifindex: int) -> bytes:
    """Brings an interface up."""
    return _set(sequence, ifindex, flags=_IFF_UP)


def bring_down(sequence: int, ifindex: int) -> bytes:
    """Brings an interface down."""
    return _set(sequence, ifindex, change=_IFF_UP)


def set_master(sequence: int, ifindex: int, master: int) -> bytes:
    """Makes an interface a port of the bridge `master`, and of no other."""
    return _set(sequence, ifindex, _attribute(_IFLA_MASTER, struct.pack("=I", master)))


def take_all_multicast(sequence: int, ifindex: int) -> bytes:
    """Has an interface take in frames to every group."""
    return _set(sequence, ifindex, flags=_IFF_ALLMULTI)


def add_macvtap(sequence: int, name: str, lower: int, mode: str) -> bytes:
    """Makes a macvtap of that name on the device `lower`; an interface of that name is an error."""
    data = _attribute(_IFLA_MACVLAN_MODE, struct.pack("=I", MACVTAP_MODES[mode]))
    info = _attribute(_IFLA_INFO_KIND, b"macvtap\0") + _attribute(_IFLA_INFO_DATA, data)
    attributes = (
        _attribute(_IFLA_LINK, struct.pack("=I", lower))
        + _attribute(_IFLA_IFNAME, name.encode(errors="surrogateescape") + b"\0")
        + _attribute(_IFLA_LINKINFO, info)
    )
    flags = _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL
    return _request(RTM_NEWLINK, flags, sequence, _LINK_HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attributes)


def remove(sequence: int, ifindex: int) -> bytes:
    """Deletes an interface."""
    return _request(RTM_DELLINK, _NLM_F_ACK, sequence, _LINK_HEADER.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0))


def _set(sequence: int, ifindex: int, attributes: bytes = b"", *, flags: int = 0, change: int | None = None) -> bytes:
    change = flags if change is None else change
    payload = _LINK_HEADER.pack(socket.AF_UNSPEC, 0, ifindex, flags, change) + attributes
    return _request(_RTM_SETLINK, _NLM_F_ACK, sequence, payload)


def _request(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(payload), kind, _NLM_F_REQUEST | flags, sequence, 0) + payload


# -- answers and events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What came in one datagram, or a part of it.

    Attributes:
        kind: RTM_NEWLINK and the like.
        sequence: that of the request which it answers, 0 of an event.
        payload: what stands behind the header.
    """

    kind: int
    sequence: int
    payload: bytes

    @property
    def error(self) -> int | None:
        """The errno it tells, 0 for success; None where it tells neither."""
        if self.kind != _NLMSG_ERROR or len(self.payload) < 4:
            return None
        return -int.from_bytes(self.payload[:4], sys.byteorder, signed=True)


def messages(data: bytes) -> Iterator[Message]:
    """The messages in what a netlink socket received; one that is cut short ends them."""
    while len(data) >= _HEADER.size:
        size, kind, _, sequence, _ = _HEADER.unpack_from(data)
        if not _HEADER.size <= size <= len(data):
            return
        yield Message(kind=kind, sequence=sequence, payload=data[_HEADER.size : size])
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
        lower=_number(found.get(_IFLA_LINK, b"")),
        has_all_multicast=bool(flags & _IFF_ALLMULTI),
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
