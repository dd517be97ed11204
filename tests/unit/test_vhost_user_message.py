"""Every message against the bytes that the specification's layout gives, and spoiled one field at a time."""

from __future__ import annotations

import struct
import sys

import pytest
from tests.kit.cases import each_case

from localmig.errors import PeerError
from localmig.vhost_user.message import (
    CONFIG_SIZE_MAX,
    FLAG_REPLY,
    HEADER_SIZE,
    PAYLOAD_SIZE_MAX,
    RULES,
    TABLE_REGION_COUNT_MAX,
    U64,
    VERSION,
    ConfigSpace,
    Header,
    LogFile,
    MemoryTable,
    Payload,
    RegionDescription,
    Request,
    SingleRegion,
    StateDirection,
    StateTransfer,
    VringAddress,
    VringFile,
    VringNumber,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the golden bytes are a little-endian machine's")

REGION = RegionDescription(guest_address=0x1000, size=0x2000, user_address=0x7F0000000000, mmap_offset=0x3000)
REGION_HEX = "0010000000000000 0020000000000000 00000000007f0000 0030000000000000"

GOLDEN = {
    Request.GET_FEATURES: (None, ""),
    Request.SET_FEATURES: (U64(value=0x1_4000_0000), "0000004001000000"),
    Request.SET_OWNER: (None, ""),
    Request.RESET_OWNER: (None, ""),
    Request.SET_MEM_TABLE: (MemoryTable(regions=(REGION,)), "01000000 00000000" + REGION_HEX),
    Request.SET_LOG_BASE: (LogFile(size=0x1000, mmap_offset=0x2000), "0010000000000000 0020000000000000"),
    Request.SET_LOG_FD: (None, ""),
    Request.SET_VRING_NUM: (VringNumber(index=1, number=256), "01000000 00010000"),
    Request.SET_VRING_ADDR: (
        VringAddress(index=1, descriptor_area=0x10, device_area=0x20, driver_area=0x30, log=0x40),
        "01000000 00000000 1000000000000000 2000000000000000 3000000000000000 4000000000000000",
    ),
    Request.SET_VRING_BASE: (VringNumber(index=1, number=0x1234), "01000000 34120000"),
    Request.GET_VRING_BASE: (VringNumber(index=1), "01000000 00000000"),
    Request.SET_VRING_KICK: (VringFile(index=1), "0100000000000000"),
    Request.SET_VRING_CALL: (VringFile(index=1, has_fd=False), "0101000000000000"),
    Request.SET_VRING_ERR: (VringFile(index=255), "ff00000000000000"),
    Request.GET_PROTOCOL_FEATURES: (None, ""),
    Request.SET_PROTOCOL_FEATURES: (U64(value=0x228), "2802000000000000"),
    Request.GET_QUEUE_NUM: (None, ""),
    Request.SET_VRING_ENABLE: (VringNumber(index=1, number=1), "01000000 01000000"),
    Request.SEND_RARP: (U64(value=0x0000_5634_1200_5452), "5254001234560000"),
    Request.NET_SET_MTU: (U64(value=1500), "dc05000000000000"),
    Request.SET_BACKEND_REQ_FD: (None, ""),
    Request.GET_CONFIG: (ConfigSpace(offset=0, data=bytes(6)), "00000000 06000000 00000000 000000000000"),
    Request.SET_CONFIG: (ConfigSpace(offset=2, flags=1, data=b"ab"), "02000000 02000000 01000000 6162"),
    Request.RESET_DEVICE: (None, ""),
    Request.GET_MAX_MEM_SLOTS: (None, ""),
    Request.ADD_MEM_REG: (SingleRegion(region=REGION), "0000000000000000" + REGION_HEX),
    Request.REM_MEM_REG: (SingleRegion(region=REGION), "0000000000000000" + REGION_HEX),
    Request.SET_STATUS: (U64(value=15), "0f00000000000000"),
    Request.GET_STATUS: (None, ""),
    Request.SET_DEVICE_STATE_FD: (StateTransfer(direction=StateDirection.LOAD), "01000000 00000000"),
    Request.CHECK_DEVICE_STATE: (None, ""),
}

FD_COUNTS = {
    Request.SET_LOG_BASE: (1,),
    Request.SET_LOG_FD: (0, 1),
    Request.SET_MEM_TABLE: (1,),
    Request.SET_VRING_KICK: (1,),
    Request.SET_VRING_CALL: (0,),
    Request.SET_VRING_ERR: (1,),
    Request.SET_BACKEND_REQ_FD: (1,),
    Request.SET_DEVICE_STATE_FD: (1,),
    Request.ADD_MEM_REG: (1,),
    Request.REM_MEM_REG: (0, 1),
}

ALL = each_case(("request_", "payload", "data"), [(r, p, bytes.fromhex(h)) for r, (p, h) in GOLDEN.items()])


def test_every_request_of_the_table_has_a_golden_message() -> None:
    assert GOLDEN.keys() == RULES.keys()


@ALL
def test_a_request_is_the_bytes_of_the_specification(request_: Request, payload: Payload | None, data: bytes) -> None:
    assert encode_request(request_, payload) == struct.pack("<III", request_, 1, len(data)) + data
    assert encode_request(request_, payload, needs_reply=True) == struct.pack("<III", request_, 9, len(data)) + data


@ALL
def test_a_request_reads_back(request_: Request, payload: Payload | None, data: bytes) -> None:
    header = Header(request=request_, flags=VERSION, size=len(data))
    assert decode_request(header, data, fd_count=FD_COUNTS.get(request_, (0,))[0]) == payload


@ALL
def test_a_payload_of_another_length_is_refused(request_: Request, payload: Payload | None, data: bytes) -> None:
    for changed in (data[:-1], data + b"\0"):
        if changed != data:
            header = Header(request=request_, flags=VERSION, size=len(changed))
            with pytest.raises(PeerError, match=request_.name):
                decode_request(header, changed, fd_count=FD_COUNTS.get(request_, (0,))[0])


@ALL
def test_another_number_of_descriptors_is_refused(request_: Request, payload: Payload | None, data: bytes) -> None:
    header = Header(request=request_, flags=VERSION, size=len(data))
    for fd_count in {0, 1, 2} - set(FD_COUNTS.get(request_, (0,))):
        with pytest.raises(PeerError, match=f"{request_.name} came with {fd_count} descriptors"):
            decode_request(header, data, fd_count=fd_count)


@ALL
def test_a_reply_is_no_request(request_: Request, payload: Payload | None, data: bytes) -> None:
    header = Header(request=request_, flags=VERSION | FLAG_REPLY, size=len(data))
    with pytest.raises(PeerError, match="came as a reply"):
        decode_request(header, data, fd_count=0)


@each_case(
    ("number", "flags", "size", "text"),
    [
        (0, 1, 0, "request 0 is unknown"),
        (46, 1, 0, "request 46 is unknown, the highest known is 45"),
        (Request.IOTLB_MSG, 1, 0, "IOTLB_MSG is not supported"),
        (Request.POSTCOPY_ADVISE, 1, 0, "POSTCOPY_ADVISE is not supported"),
        (Request.GET_FEATURES, 0, 0, "version 0, expected 1"),
        (Request.GET_FEATURES, 2, 0, "version 2, expected 1"),
        (Request.GET_FEATURES, 0x11, 0, "flags 0x11"),
        (Request.GET_FEATURES, 0x8000_0001, 0, "flags 0x80000001"),
        (Request.SET_MEM_TABLE, 1, PAYLOAD_SIZE_MAX + 1, f"limit is {PAYLOAD_SIZE_MAX}"),
        (Request.SET_MEM_TABLE, 1, 0xFFFFFFFF, "payload of 4294967295 bytes"),
    ],
)
def test_a_spoiled_header_is_refused(number: int, flags: int, size: int, text: str) -> None:
    with pytest.raises(PeerError, match=text):
        Header.decode(struct.pack("<III", number, flags, size))


@each_case(
    ("layout", "data", "text"),
    [
        (VringFile, "0002000000000000", "0x200"),
        (VringFile, "0000000000000080", "only bits 0 to 8"),
        (MemoryTable, "01000000 00000000", "announces 1 regions and carries 0"),
        (MemoryTable, "21000000 00000000" + REGION_HEX, f"33 regions, limit is {TABLE_REGION_COUNT_MAX}"),
        (MemoryTable, "010000", "no whole number"),
        (ConfigSpace, "00000000 02000000 00000000 61", "announces 2 bytes and carries 1"),
        (ConfigSpace, "00000000 01010000 00000000" + 257 * "61", f"has 257 bytes, limit is {CONFIG_SIZE_MAX}"),
        (ConfigSpace, "0000", "expected 12 or more"),
    ],
)
def test_a_spoiled_payload_is_refused(layout: type[Payload], data: str, text: str) -> None:
    with pytest.raises(PeerError, match=text):
        layout.decode(bytes.fromhex(data))


def test_a_piece_of_the_configuration_space_may_begin_anywhere() -> None:
    piece = ConfigSpace(offset=0xFFFFFFFF, data=bytes(CONFIG_SIZE_MAX))
    assert ConfigSpace.decode(piece.encode()) == piece


def test_a_memory_table_may_carry_more_regions_than_it_announces() -> None:
    padded = bytes.fromhex("01000000 00000000" + REGION_HEX) + bytes(32)
    assert MemoryTable.decode(padded) == MemoryTable(regions=(REGION,))


def test_the_longest_messages_fit_the_limit() -> None:
    assert len(MemoryTable(regions=(REGION,) * TABLE_REGION_COUNT_MAX).encode()) == PAYLOAD_SIZE_MAX
    assert len(ConfigSpace(offset=0, data=bytes(CONFIG_SIZE_MAX)).encode()) <= PAYLOAD_SIZE_MAX


def test_replies_are_the_bytes_of_the_specification() -> None:
    acknowledgement = encode_reply(Request.SET_OWNER, U64(value=0))
    assert acknowledgement == struct.pack("<IIIQ", Request.SET_OWNER, 5, 8, 0)
    position = encode_reply(Request.GET_VRING_BASE, VringNumber(index=1, number=7))
    assert position == struct.pack("<IIIII", Request.GET_VRING_BASE, 5, 8, 1, 7)


def test_replies_read_back() -> None:
    for request_, payload in (
        (Request.SET_OWNER, U64(value=1)),
        (Request.GET_FEATURES, U64(value=2)),
        (Request.GET_VRING_BASE, VringNumber(index=1, number=7)),
        (Request.GET_CONFIG, ConfigSpace(offset=0, data=b"x")),
    ):
        data = encode_reply(request_, payload)
        assert decode_reply(Header.decode(data[:HEADER_SIZE]), data[HEADER_SIZE:]) == payload


@pytest.mark.parametrize("flags", [VERSION, VERSION | FLAG_REPLY | 8])
def test_a_reply_with_other_flags_is_refused(flags: int) -> None:
    with pytest.raises(PeerError, match="expected 0x5"):
        decode_reply(Header(request=Request.GET_FEATURES, flags=flags, size=8), bytes(8))
