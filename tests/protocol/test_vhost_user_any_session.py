"""Whatever a frontend sends: a session refuses it or comes to a state that could move elsewhere, and leaks nothing."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.vhost_user.message import (
    CONFIG_SIZE_MAX,
    HEADER_SIZE,
    PROTOCOL_FEATURES_BIT,
    RULES,
    U64,
    ConfigSpace,
    Header,
    LogFile,
    MemoryTable,
    Payload,
    RegionDescription,
    Request,
    SingleRegion,
    StateTransfer,
    VringAddress,
    VringFile,
    VringNumber,
    decode_reply,
    encode_request,
)
from localmig.vhost_user.protocol import LOG_ALL, PROTOCOL_FEATURES_SERVED, Backend, Offer, check_state

OFFER = Offer(
    features=1,
    protocol_features=PROTOCOL_FEATURES_SERVED,
    vring_count=2,
    vring_size_max=256,
    region_count_max=3,
    drained_vrings={1: 0},
)

# Few values, most of them right, so that messages build on each other.
INDEXES = st.sampled_from([0, 0, 1, 1, 2])
ADDRESSES = st.sampled_from([0x1000, 0x2000, 0x3000, 0x1001, 0, (1 << 64) - 16])
NUMBERS = st.sampled_from(
    [
        *(0, 1, 1, 2, 256, 300, 0xFFFF, 0x10000, PROTOCOL_FEATURES_SERVED),
        *(1 << PROTOCOL_FEATURES_BIT, 1 << PROTOCOL_FEATURES_BIT | LOG_ALL),
    ]
)
REGIONS = st.builds(
    RegionDescription,
    guest_address=ADDRESSES,
    size=st.sampled_from([0x1000, 0x1000, 1, 0]),
    user_address=ADDRESSES,
    mmap_offset=st.just(0),
)
PAYLOADS: dict[type[Payload] | None, st.SearchStrategy[Payload | None]] = {
    None: st.none(),
    U64: st.builds(U64, value=NUMBERS),
    VringNumber: st.builds(VringNumber, index=INDEXES, number=st.sampled_from([0, 1, 1, 2, 256, 0x10000])),
    VringAddress: st.builds(
        VringAddress,
        index=INDEXES,
        flags=st.sampled_from([0, 0, 1]),
        descriptor_area=ADDRESSES,
        device_area=ADDRESSES,
        driver_area=ADDRESSES,
        log=ADDRESSES,
    ),
    LogFile: st.builds(LogFile, size=NUMBERS, mmap_offset=ADDRESSES),
    StateTransfer: st.builds(StateTransfer, direction=INDEXES, phase=st.sampled_from([0, 0, 1])),
    VringFile: st.builds(VringFile, index=INDEXES, has_fd=st.sampled_from([True, True, False])),
    MemoryTable: st.builds(MemoryTable, regions=st.lists(REGIONS, max_size=3).map(tuple)),
    SingleRegion: st.builds(SingleRegion, region=REGIONS),
    ConfigSpace: st.builds(ConfigSpace, offset=st.integers(0, 30), data=st.binary(max_size=30)),
}
assert {rule.payload for rule in RULES.values()} == PAYLOADS.keys()


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, int]:
    """The bytes of a message and a number of descriptors, right more often than not."""
    request = draw(st.sampled_from(sorted(RULES)))
    payload = draw(PAYLOADS[RULES[request].payload])
    match payload:
        case MemoryTable(regions=regions):
            fd_count = len(regions)
        case VringFile(has_fd=has_fd):
            fd_count = int(has_fd)
        case _:
            fd_count = int(request in (Request.ADD_MEM_REG, Request.SET_BACKEND_REQ_FD, Request.SET_LOG_BASE))
    if draw(st.integers(0, 30)) == 0:
        fd_count = draw(st.integers(0, 9))
    return encode_request(request, payload, needs_reply=draw(st.booleans())), fd_count


def converse(backend: Backend, data: bytes, fds: list[OwnedFd]) -> None:
    """Gives one message and answers its event; what is replied reads back."""
    while data:
        size = backend.bytes_wanted
        event = backend.receive(data[:size], fds)
        data, fds = data[size:], []
        if event is not None:
            backend.complete()
    reply = backend.data_to_send()
    if reply:
        header = Header.decode(reply[:HEADER_SIZE])
        decode_reply(header, reply[HEADER_SIZE:])
        assert len(reply) == HEADER_SIZE + header.size
    backend.data_sent(len(reply))


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


REGION = RegionDescription(guest_address=0x1000, size=0x1000, user_address=0x1000, mmap_offset=0)
ADDRESS = VringAddress(index=0, descriptor_area=0x1000, device_area=0x2000, driver_area=0x3000)
RUNNING = (
    (encode_request(Request.SET_PROTOCOL_FEATURES, U64(value=PROTOCOL_FEATURES_SERVED)), 0),
    (encode_request(Request.SET_FEATURES, U64(value=1 << PROTOCOL_FEATURES_BIT)), 0),
    (encode_request(Request.ADD_MEM_REG, SingleRegion(region=REGION)), 1),
    (encode_request(Request.SET_VRING_NUM, VringNumber(index=0, number=256)), 0),
    (encode_request(Request.SET_VRING_ADDR, ADDRESS), 0),
    (encode_request(Request.SET_VRING_KICK, VringFile(index=0)), 1),
    (encode_request(Request.SET_VRING_ENABLE, VringNumber(index=0, number=1)), 0),
)
"""How a session comes to a running ring: random messages alone would hardly get there."""


@settings(derandomize=True)
@given(begun=st.integers(1, len(RUNNING)), sent=st.lists(messages(), max_size=40))
def test_any_messages_end_in_a_refusal_or_in_a_state_that_could_move(begun: int, sent: list[tuple[bytes, int]]) -> None:
    before = open_descriptors()
    backend = Backend(OFFER, config=bytes(24))
    for data, fd_count in [*RUNNING[:begun], *sent]:
        try:
            converse(backend, data, [OwnedFd(os.eventfd(0, os.EFD_CLOEXEC)) for _ in range(fd_count)])
        except PeerError:
            break
        check_state(backend.state, OFFER)
        assert all(vring.is_configured and vring.kick for vring in backend.state.vrings if vring.started)
    backend.close()
    assert open_descriptors() == before


@settings(derandomize=True)
@given(
    request=st.sampled_from(sorted(RULES)),
    flags=st.one_of(st.just(1), st.just(9), st.integers(0, 0xFFFFFFFF)),
    payload=st.binary(max_size=CONFIG_SIZE_MAX),
)
def test_any_bytes_behind_any_header_are_a_message_or_refused(request: Request, flags: int, payload: bytes) -> None:
    backend = Backend(OFFER, config=bytes(24))
    backend.state.protocol_features_acked = PROTOCOL_FEATURES_SERVED
    try:
        converse(backend, struct.pack("=III", request, flags, len(payload)) + payload, [])
        check_state(backend.state, OFFER)
    except PeerError:
        pass
    backend.close()
