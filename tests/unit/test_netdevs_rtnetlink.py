"""Route netlink messages: what is read of them, and that no bytes are too odd."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmig.netdevs import rtnetlink
from localmig.netdevs.rtnetlink import RTM_NEWLINK, Link, changed_link, decode_link, messages

IFF_UP = 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO, IFLA_CARRIER = 1, 3, 4, 10, 18, 33
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_TUN_OWNER, IFLA_TUN_MULTI_QUEUE, IFLA_TUN_NUM_QUEUES, IFLA_TUN_NUM_DISABLED_QUEUES = 1, 7, 8, 9
NESTED = 0x8000
NLMSG_ERROR = 2


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def header(ifindex: int, flags: int) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 1, ifindex, flags, 0)


def message(kind: int, payload: bytes, *, sequence: int = 0) -> bytes:
    data = struct.pack("=IHHII", 16 + len(payload), kind, 0, sequence, 0) + payload
    return data + bytes(-len(data) % 4)


TUN = (
    attribute(IFLA_TUN_OWNER, u32(1000))
    + attribute(IFLA_TUN_MULTI_QUEUE, b"\1")
    + attribute(IFLA_TUN_NUM_QUEUES, u32(2))
    + attribute(IFLA_TUN_NUM_DISABLED_QUEUES, u32(3))
)
TAP = (
    header(7, IFF_UP)
    + attribute(IFLA_IFNAME, b"tap0\0")
    + attribute(IFLA_MTU, u32(9000))
    + attribute(IFLA_MASTER, u32(3))
    + attribute(IFLA_CARRIER, b"\0")
    + attribute(IFLA_ADDRESS, bytes.fromhex("525400123456"))
    + attribute(IFLA_LINKINFO | NESTED, attribute(IFLA_INFO_KIND, b"tun\0") + attribute(IFLA_INFO_DATA | NESTED, TUN))
)
"""As the kernel describes a TAP."""


def test_a_tap_is_read_as_the_kernel_describes_it() -> None:
    assert decode_link(TAP) == Link(
        ifindex=7,
        name="tap0",
        mtu=9000,
        is_up=True,
        has_carrier=False,
        address=bytes.fromhex("525400123456"),
        master=3,
        kind="tun",
        owner=1000,
        multi_queue=True,
        queue_count=5,
    )
    assert changed_link(TAP) == (7, "tap0")


def test_what_is_not_said_has_its_default() -> None:
    link = decode_link(header(1, 0) + attribute(IFLA_IFNAME, b"lo\0"))
    assert (link.is_up, link.has_carrier, link.master, link.kind, link.owner) == (False, True, 0, "", None)
    assert not link.multi_queue


def test_the_numbers_of_another_kind_are_not_those_of_a_tap() -> None:
    info = attribute(IFLA_INFO_KIND, b"bridge\0") + attribute(IFLA_INFO_DATA, TUN)
    link = decode_link(header(3, 0) + attribute(IFLA_IFNAME, b"br0\0") + attribute(IFLA_LINKINFO, info))
    assert (link.kind, link.owner, link.multi_queue, link.queue_count) == ("bridge", None, False, 0)


def test_a_name_may_have_any_bytes() -> None:
    link = decode_link(header(1, 0) + attribute(IFLA_IFNAME, b"t\xff\0"))
    assert link.name.encode(errors="surrogateescape") == b"t\xff"


@pytest.mark.parametrize(
    "payload", [b"", header(0, 0) + attribute(IFLA_IFNAME, b"tap0\0"), header(1, 0), header(-1, 0) + TAP[16:]]
)
def test_what_describes_no_interface_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"bytes, a link has|is called"):
        decode_link(payload)


def test_a_link_cut_anywhere_is_refused_or_read_as_far_as_it_goes() -> None:
    for size in range(len(TAP)):
        try:
            link = decode_link(TAP[:size])
        except ValueError:
            continue
        assert (link.ifindex, link.name) == (7, "tap0")


@pytest.mark.parametrize("size", [0, 3, 5, 0xFFFF])
def test_an_attribute_of_an_impossible_length_ends_them(size: int) -> None:
    spoilt = struct.pack("=HH", size, IFLA_MTU) + u32(9000)
    assert decode_link(header(1, 0) + attribute(IFLA_IFNAME, b"a\0") + spoilt).mtu in (0, 9000 & 0xFF)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_without_harm(data: bytes) -> None:
    changed_link(data)
    for each in messages(data):
        assert each.error is None or isinstance(each.error, int)
    with contextlib.suppress(ValueError):
        decode_link(data)


def test_several_messages_in_a_datagram_are_told_apart() -> None:
    data = message(RTM_NEWLINK, TAP) + message(NLMSG_ERROR, struct.pack("=i", -errno.ENODEV), sequence=5)
    first, second = messages(data)
    assert (first.kind, first.sequence, first.error, first.payload) == (RTM_NEWLINK, 0, None, TAP)
    assert (second.sequence, second.error) == (5, errno.ENODEV)
    assert [each.kind for each in messages(data[:-1])] == [RTM_NEWLINK]
    assert not list(messages(struct.pack("=IHHII", 3, RTM_NEWLINK, 0, 0, 0)))


def test_an_acknowledgement_is_no_error_and_one_cut_short_says_nothing() -> None:
    assert next(messages(message(NLMSG_ERROR, bytes(4)))).error == 0
    assert next(messages(message(NLMSG_ERROR, b"\0\0"))).error is None


def test_a_request_has_its_sequence_and_its_length() -> None:
    for request in (
        rtnetlink.ask_link(9, name="tap0"),
        rtnetlink.ask_link(9, ifindex=7),
        rtnetlink.set_mtu(9, 7, 1500),
        rtnetlink.bring_up(9, 7),
        rtnetlink.set_master(9, 7, 3),
    ):
        (sent,) = messages(request)
        assert sent.sequence == 9
        assert len(request) == 16 + len(sent.payload)
    (asked,) = messages(rtnetlink.ask_link(9, name="tap0"))
    assert changed_link(asked.payload) == (0, "tap0")
