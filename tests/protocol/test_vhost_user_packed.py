"""Packed rings in a vhost-user session: where they begin, how a position is told, which sizes and places can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import pytest
from tests.kit.cases import each_case
from tests.protocol.test_vhost_user_protocol import (
    ADDRESS,
    BIT,
    OFFER,
    SETUP,
    Message,
    converse,
    deliver,
    encode,
    take_reply,
)

from localmig.errors import PeerError
from localmig.fds import close_all
from localmig.vhost_user.message import U64, Request, VringNumber
from localmig.vhost_user.protocol import Backend, check_state
from localmig.virtio import Feature, packed_ring

PACKED_OFFER: Final = replace(OFFER, features=OFFER.features | Feature.RING_PACKED)
PACKED: Final = BIT | 1 | int(Feature.RING_PACKED)
FIRST_RING: Final = 0x8000_8000
"""What QEMU tells of a ring that nobody used: index 0, wrap counter 1, available and used."""


def base(number: int, *, index: int = 0) -> Message:
    return Request.SET_VRING_BASE, VringNumber(index=index, number=number), 0


def packed(message: Message) -> Message:
    """A step of a split ring's bring-up as a packed ring has it."""
    match message[0]:
        case Request.SET_FEATURES:
            return Request.SET_FEATURES, U64(value=PACKED), 0
        case Request.SET_VRING_NUM:
            return Request.SET_VRING_NUM, VringNumber(index=0, number=100), 0
        case Request.SET_VRING_BASE:
            return base(FIRST_RING)
    return message


@contextmanager
def new_negotiated() -> Iterator[Backend]:
    """A session whose frontend acknowledged packed rings and said nothing of any ring yet."""
    backend = Backend(PACKED_OFFER)
    steps = [packed(message) for message in SETUP]
    for request, payload, fd_count in steps[: 1 + [step[0] for step in steps].index(Request.SET_MEM_TABLE)]:
        converse(backend, request, payload, fd_count=fd_count)
    backend.data_sent(len(backend.data_to_send()))
    yield backend
    backend.close()


@contextmanager
def new_served() -> Iterator[Backend]:
    """The same with a ring of 100 entries, started and enabled: no power of two."""
    steps = [packed(message) for message in SETUP]
    with new_negotiated() as negotiated:
        for request, payload, fd_count in steps[1 + [step[0] for step in steps].index(Request.SET_MEM_TABLE) :]:
            converse(negotiated, request, payload, fd_count=fd_count)
        negotiated.data_sent(len(negotiated.data_to_send()))
        yield negotiated


@pytest.fixture
def negotiated() -> Iterator[Backend]:
    with new_negotiated() as made:
        yield made


@pytest.fixture
def served() -> Iterator[Backend]:
    with new_served() as made:
        yield made


def stopped_at(backend: Backend) -> int:
    """What GET_VRING_BASE answers for the first ring, whatever was acknowledged before."""
    backend.data_sent(len(backend.data_to_send()))
    converse(backend, Request.GET_VRING_BASE, VringNumber(index=0, number=0))
    reply = take_reply(backend)
    assert isinstance(reply, VringNumber)
    assert reply.index == 0
    return reply.number


@each_case(
    ("told", "position"),
    [
        (FIRST_RING, 0x8000),  # QEMU's beginning
        (0x8000, 0x8000),  # the beginning of DPDK's virtio-user
        (0x8005_8005, 0x8005),
        (0x0005_0005, 0x0005),
        (0x0063_0063, 0x0063),  # the last entry
        (0x0000_0063, 0x0063),  # DPDK's vhost answers no used half, and a frontend hands on what it was answered
        (0x8060_0003, 0x0003),  # chains in flight at whoever served before: they are available still
    ],
    fresh={"negotiated": new_negotiated},
)
def test_the_low_half_of_a_base_is_the_position_and_the_answer_has_both(
    negotiated: Backend, told: int, position: int
) -> None:
    converse(negotiated, Request.SET_VRING_NUM, VringNumber(index=0, number=100))
    converse(negotiated, *base(told)[:2])
    assert negotiated.state.vrings[0].next_avail == position
    assert stopped_at(negotiated) == position | position << 16


def test_a_ring_whose_position_nobody_tells_begins_with_wrap_counter_1(negotiated: Backend) -> None:
    assert [vring.next_avail for vring in negotiated.state.vrings] == [packed_ring.START] * 2
    assert stopped_at(negotiated) == FIRST_RING


def test_a_reset_begins_anew_and_so_does_the_other_format(served: Backend) -> None:
    served.state.vrings[0].next_avail = 0x0042
    converse(served, Request.RESET_DEVICE)
    assert served.state.vrings[0].next_avail == 0
    for features, position in ((PACKED, 0x8000), (BIT | 1, 0), (PACKED, 0x8000)):
        converse(served, Request.SET_FEATURES, U64(value=features))
        assert [vring.next_avail for vring in served.state.vrings] == [position] * 2


def test_the_other_format_knows_no_size_and_no_address_of_this_one(served: Backend) -> None:
    # A packed ring may have 100 entries, a split one may not: what is kept must be what a successor takes.
    stopped_at(served)
    converse(served, Request.SET_FEATURES, U64(value=BIT | 1))
    assert [(vring.size, vring.is_configured) for vring in served.state.vrings] == [(0, False)] * 2
    check_state(served.state, PACKED_OFFER)


def test_features_that_say_the_same_of_rings_leave_positions_alone(served: Backend) -> None:
    served.state.vrings[0].next_avail = 0x0042
    converse(served, Request.SET_VRING_ENABLE, VringNumber(index=0, number=0))
    converse(served, Request.SET_FEATURES, U64(value=PACKED | 4))
    assert served.state.vrings[0].next_avail == 0x0042


WRONG: Final[tuple[tuple[Message, str], ...]] = (
    ((Request.SET_VRING_NUM, VringNumber(index=1, number=0), 0), "vring 1 has 0 entries, must be at most 1024"),
    ((Request.SET_VRING_NUM, VringNumber(index=1, number=1025), 0), "1025 entries, must be at most 1024"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, descriptor_area=8), 0), "descriptor ring of vring 0 is at 0x8"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, driver_area=2), 0), "driver event suppression of vring 0 is at 0x2"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, device_area=6), 0), "device event suppression of vring 0 is at 0x6"),
    (base(0x8064_8064), "position 100 of vring 0 is outside its 100 entries"),
    (base(0x7FFF), "position 32767 of vring 0 is outside its 100 entries"),
    (base(FIRST_RING), "which is running"),
    ((Request.SET_FEATURES, U64(value=BIT | 1), 0), "changes RING_PACKED while vring 0 is started"),
)


@each_case(("message", "text"), WRONG, fresh={"served": new_served})
def test_a_wrong_message_is_refused_and_changes_nothing(served: Backend, message: Message, text: str) -> None:
    vrings = [replace(vring) for vring in served.state.vrings]
    features = served.state.features_acked
    data, fds = encode(message)
    with pytest.raises(PeerError, match=text):
        deliver(served, data, fds)
    assert (served.state.vrings, served.state.features_acked) == (vrings, features)
    close_all(fds)


def test_another_format_is_refused_whichever_ring_is_started_and_moves_none(served: Backend) -> None:
    first, second = served.state.vrings
    served.state.vrings[:] = [second, first]
    second.next_avail = 0x8005
    data, _ = encode((Request.SET_FEATURES, U64(value=BIT | 1), 0))
    with pytest.raises(PeerError, match="changes RING_PACKED while vring 1 is started"):
        deliver(served, data, [])
    assert second.next_avail == 0x8005


def test_a_split_ring_has_no_upper_half(served: Backend) -> None:
    converse(served, Request.RESET_DEVICE)
    converse(served, Request.SET_FEATURES, U64(value=BIT | 1))
    data, _ = encode(base(FIRST_RING))
    with pytest.raises(PeerError, match="position of vring 0 is 2147516416, limit is 65535"):
        deliver(served, data, [])


def test_the_state_of_a_packed_session_is_good_where_packed_rings_are_offered(served: Backend) -> None:
    check_state(served.state, PACKED_OFFER)
    with pytest.raises(PeerError, match="cannot be served here"):
        check_state(served.state, OFFER)
    served.state.vrings[0].next_avail = 0x8064
    with pytest.raises(PeerError, match="position 100 of vring 0 is outside its 100 entries"):
        check_state(served.state, PACKED_OFFER)
    served.state.vrings[0].next_avail = 0x0063
    check_state(served.state, PACKED_OFFER)
