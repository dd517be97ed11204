"""A backend's session: what each request does, bytes split anywhere, fields spoiled one by one, state moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.kit.cases import each_case

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.vhost_user.memory import MemoryRegion
from localmig.vhost_user.message import (
    HEADER_SIZE,
    PROTOCOL_FEATURES_BIT,
    TABLE_REGION_COUNT_MAX,
    U64,
    ConfigSpace,
    Header,
    LogFile,
    MemoryTable,
    Payload,
    ProtocolFeature,
    RegionDescription,
    Request,
    SingleRegion,
    VringAddress,
    VringFile,
    VringNumber,
    decode_reply,
    encode_request,
)
from localmig.vhost_user.protocol import (
    LOG_ALL,
    PROTOCOL_FEATURES_OFFERED,
    Backend,
    DeviceReset,
    Event,
    FeaturesSet,
    MemoryChanged,
    MtuSet,
    NotifiersChanged,
    Offer,
    RarpRequested,
    RegionAdded,
    RequestRefused,
    SessionState,
    VringChanged,
    VringState,
    check_state,
)

OFFER = Offer(
    features=0b101,
    vring_count=2,
    protocol_features=PROTOCOL_FEATURES_OFFERED & ~ProtocolFeature.MQ,
    vring_size_max=1024,
    region_count_max=4,
)
CONFIG = bytes(range(24))
BIT = 1 << PROTOCOL_FEATURES_BIT
REGION = RegionDescription(guest_address=0, size=0x10000, user_address=0x7F0000000000, mmap_offset=0)
ADDRESS = VringAddress(index=0, descriptor_area=0x7F0000000000, driver_area=0x7F0000001000, device_area=0x7F0000002000)

Message = tuple[Request, Payload | None, int]
"""Request, payload, number of descriptors."""

SETUP: tuple[Message, ...] = (
    (Request.SET_OWNER, None, 0),
    (Request.GET_FEATURES, None, 0),
    (Request.GET_PROTOCOL_FEATURES, None, 0),
    (Request.SET_PROTOCOL_FEATURES, U64(value=OFFER.protocol_features), 0),
    (Request.GET_QUEUE_NUM, None, 0),
    (Request.GET_MAX_MEM_SLOTS, None, 0),
    (Request.SET_BACKEND_REQ_FD, None, 1),
    (Request.SET_FEATURES, U64(value=BIT | 1), 0),
    (Request.SET_MEM_TABLE, MemoryTable(regions=(REGION,)), 1),
    (Request.SET_VRING_CALL, VringFile(index=0), 1),
    (Request.SET_VRING_ERR, VringFile(index=0), 1),
    (Request.SET_VRING_NUM, VringNumber(index=0, number=256), 0),
    (Request.SET_VRING_BASE, VringNumber(index=0, number=7), 0),
    (Request.SET_VRING_ADDR, ADDRESS, 0),
    (Request.SET_VRING_KICK, VringFile(index=0), 1),
    (Request.SET_VRING_ENABLE, VringNumber(index=0, number=1), 0),
    (Request.SET_STATUS, U64(value=15), 0),
)


def new_fd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def encode(message: Message) -> tuple[bytes, list[OwnedFd]]:
    request, payload, fd_count = message
    return encode_request(request, payload, needs_reply=True), [new_fd() for _ in range(fd_count)]


def deliver(backend: Backend, data: bytes, fds: list[OwnedFd], *, fds_at: int = 0, step: int = 1 << 16) -> Event | None:
    """Gives a whole message in steps, its descriptors with the byte `fds_at`; leaves an event uncompleted."""
    event = None
    at = 0
    while at < len(data):
        part = data[at : at + min(step, backend.bytes_wanted)]
        event = backend.receive(part, fds if at <= fds_at < at + len(part) else [])
        at += len(part)
    return event


def take_reply(backend: Backend) -> Payload | None:
    data = backend.data_to_send()
    backend.data_sent(len(data))
    if not data:
        return None
    header = Header.decode(data[:HEADER_SIZE])
    assert len(data) == HEADER_SIZE + header.size
    return decode_reply(header, data[HEADER_SIZE:])


def converse(backend: Backend, request: Request, payload: Payload | None = None, *, fd_count: int = 0) -> Event | None:
    """Gives a message and completes its event."""
    data, fds = encode((request, payload, fd_count))
    event = deliver(backend, data, fds)
    if event is not None:
        backend.complete()
    return event


def plain(state: SessionState) -> object:
    """A state without its descriptors, which differ from run to run; whether each is there stays."""
    return (
        state.features_offered,
        state.protocol_features_offered,
        state.features_acked,
        state.protocol_features_acked,
        state.device_status,
        state.mtu,
        [(r.guest_address, r.size, r.user_address, r.mmap_offset) for r in state.regions],
        [
            (
                replace(v, kick=None, call=None, error=None),
                [fd is not None and fd.is_open for fd in (v.kick, v.call, v.error)],
            )
            for v in state.vrings
        ],
        state.vring_count_asked,
        state.was_served,
        state.backend_request_fd is not None,
        state.unparsed,
        len(state.unparsed_fds),
        state.unsent,
    )


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = {entry.name for entry in Path("/proc/self/fd").iterdir()}
    yield
    assert {entry.name for entry in Path("/proc/self/fd").iterdir()} == before


@contextmanager
def new_backend() -> Iterator[Backend]:
    """A session at its very beginning."""
    made = Backend(OFFER, config=CONFIG)
    yield made
    made.close()


@contextmanager
def new_served() -> Iterator[Backend]:
    """A session whose ring 0 runs from position 7; ring 1 is untouched."""
    with new_backend() as backend:
        for request, payload, fd_count in SETUP:
            converse(backend, request, payload, fd_count=fd_count)
            take_reply(backend)
        yield backend


@pytest.fixture
def backend() -> Iterator[Backend]:
    with new_backend() as made:
        yield made


@pytest.fixture
def served() -> Iterator[Backend]:
    with new_served() as made:
        yield made


# -- what requests do -------------------------------------------------------------------------------------------


def test_a_set_up_session_has_all_that_was_said(served: Backend) -> None:
    (region,) = served.state.regions
    assert (region.guest_address, region.size, region.user_address) == (0, 0x10000, 0x7F0000000000)
    vring, other = served.state.vrings
    assert OFFER.serves(0, served.state.vrings)
    assert (vring.size, vring.next_avail, vring.device_area) == (256, 7, ADDRESS.device_area)
    assert None not in (vring.kick, vring.call, vring.error)
    assert other == VringState()
    assert served.state.device_status == 15
    assert served.state.backend_request_fd is not None


@each_case(
    ("request_", "answer"),
    [
        (Request.GET_FEATURES, U64(value=BIT | LOG_ALL | 0b101)),
        (Request.GET_PROTOCOL_FEATURES, U64(value=OFFER.protocol_features)),
        (Request.GET_QUEUE_NUM, U64(value=2)),
        (Request.GET_MAX_MEM_SLOTS, U64(value=4)),
        (Request.GET_STATUS, U64(value=15)),
    ],
    fresh={"served": new_served},
)
def test_questions_are_answered(served: Backend, request_: Request, answer: Payload) -> None:
    assert converse(served, request_) is None
    assert take_reply(served) == answer


def test_events_come_where_the_device_must_act(backend: Backend) -> None:
    events = [converse(backend, request, payload, fd_count=count) for request, payload, count in SETUP]
    assert [event for event in events if event] == [FeaturesSet(), MemoryChanged(), VringChanged(index=0)]


def test_a_reply_waits_until_the_device_is_done(served: Backend) -> None:
    data, fds = encode((Request.SET_VRING_CALL, VringFile(index=0), 1))
    assert deliver(served, data, fds) == NotifiersChanged(index=0)
    assert served.data_to_send() == b""
    served.complete()
    assert take_reply(served) == U64(value=0)


def test_nothing_is_acknowledged_unasked_or_unnegotiated(backend: Backend) -> None:
    converse(backend, Request.SET_OWNER)
    assert backend.data_to_send() == b""
    converse(backend, Request.SET_PROTOCOL_FEATURES, U64(value=ProtocolFeature.REPLY_ACK))
    assert take_reply(backend) == U64(value=0), "the message that negotiates it is acknowledged itself"
    backend.receive(encode_request(Request.SET_OWNER)[:HEADER_SIZE])
    assert backend.data_to_send() == b""


def test_replaced_descriptors_are_open_until_the_device_is_done(served: Backend) -> None:
    old = served.state.vrings[0].call
    assert old is not None
    data, fds = encode((Request.SET_VRING_CALL, VringFile(index=0), 1))
    deliver(served, data, fds)
    assert old.is_open
    assert served.state.vrings[0].call is fds[0]
    served.complete()
    assert not old.is_open
    assert fds[0].is_open


def test_get_vring_base_stops_the_ring_and_answers_where_the_device_left_it(served: Backend) -> None:
    vring = served.state.vrings[0]
    data, fds = encode((Request.GET_VRING_BASE, VringNumber(index=0), 0))
    assert deliver(served, data, fds) == VringChanged(index=0)
    assert not OFFER.serves(0, served.state.vrings)
    vring.next_avail = 4711
    served.complete()
    assert take_reply(served) == VringNumber(index=0, number=4711)
    assert vring.kick is None
    assert vring.call is not None, "a frontend that starts the ring again need not send it again"


def test_get_vring_base_of_a_stopped_ring_answers_without_an_event(served: Backend) -> None:
    assert converse(served, Request.SET_VRING_BASE, VringNumber(index=1, number=9)) is None
    take_reply(served)
    assert converse(served, Request.GET_VRING_BASE, VringNumber(index=1)) is None
    assert take_reply(served) == VringNumber(index=1, number=9)


def test_a_ring_that_stopped_starts_again_by_its_kick(served: Backend) -> None:
    converse(served, Request.GET_VRING_BASE, VringNumber(index=0))
    event = converse(served, Request.SET_VRING_KICK, VringFile(index=0), fd_count=1)
    assert event == VringChanged(index=0, anew=True)
    assert OFFER.serves(0, served.state.vrings)


def test_without_the_bit_for_protocol_features_rings_start_enabled(backend: Backend) -> None:
    for request, payload, fd_count in SETUP[:-2]:
        if request is Request.SET_FEATURES:
            payload = U64(value=1)
        event = converse(backend, request, payload, fd_count=fd_count)
    assert event == VringChanged(index=0, anew=True)
    assert OFFER.serves(0, backend.state.vrings)


def test_an_enable_that_says_nothing_new_is_no_event(served: Backend) -> None:
    assert converse(served, Request.SET_VRING_ENABLE, VringNumber(index=0, number=1)) is None
    assert converse(served, Request.SET_VRING_ENABLE, VringNumber(index=0, number=0)) == VringChanged(index=0)
    assert converse(served, Request.SET_VRING_ENABLE, VringNumber(index=0, number=0)) is None


def test_a_region_said_again_for_another_queue_pair_changes_nothing() -> None:
    backend = Backend(replace(OFFER, vring_count=4))
    for request, payload, count in SETUP[:4]:
        converse(backend, request, payload, fd_count=count)
    region = SingleRegion(region=REGION)
    try:
        assert converse(backend, Request.ADD_MEM_REG, region, fd_count=1) == RegionAdded()
        assert converse(backend, Request.ADD_MEM_REG, region, fd_count=1) is None
        assert len(backend.state.regions) == 1
        assert converse(backend, Request.REM_MEM_REG, region) == MemoryChanged()
        assert converse(backend, Request.REM_MEM_REG, region) is None
        assert not backend.state.regions
    finally:
        backend.close()


def test_enabling_a_ring_is_an_event_also_before_it_starts() -> None:
    backend = Backend(OFFER)
    assert converse(backend, Request.SET_VRING_ENABLE, VringNumber(index=0, number=1)) == VringChanged(index=0)
    assert not OFFER.serves(0, backend.state.vrings)


def test_a_disabled_ring_may_be_set_up_anew_while_started(served: Backend) -> None:
    # User-Mode Linux reloads its driver so: it disables rings and never asks for their position.
    converse(served, Request.SET_VRING_ENABLE, VringNumber(index=0, number=0))
    for request, payload, count in SETUP[11:15]:
        assert converse(served, request, payload, fd_count=count) is None
    assert converse(served, Request.SET_VRING_ENABLE, VringNumber(index=0, number=1)) == VringChanged(index=0)
    assert served.state.vrings[0].next_avail == 7


SAME_SET_UP = tuple(message for message in SETUP if isinstance(message[1], VringNumber | VringAddress | VringFile))[
    2:-1
]
"""SET_VRING_NUM, _BASE, _ADDR and _KICK of ring 0, as they were sent first."""


def test_a_set_up_of_a_running_ring_stops_it_until_its_kick(served: Backend) -> None:
    vring = served.state.vrings[0]
    old = vring.kick
    assert old is not None
    num, *rest = SAME_SET_UP
    assert converse(served, *num[:2]) == VringChanged(index=0, anew=True)
    assert not OFFER.serves(0, served.state.vrings)
    assert not old.is_open
    events = [converse(served, request, payload, fd_count=count) for request, payload, count in rest]
    assert events == [None, None, VringChanged(index=0, anew=True)]
    assert OFFER.serves(0, served.state.vrings)


@pytest.mark.parametrize("is_enabled", [False, True])
@pytest.mark.parametrize("message", [SAME_SET_UP[0], SAME_SET_UP[3]])
def test_a_set_up_ends_a_failure(served: Backend, message: Message, is_enabled: bool) -> None:
    vring = served.state.vrings[0]
    vring.failed = True
    vring.enabled = is_enabled
    request, payload, count = message
    event = converse(served, request, payload, fd_count=count)
    assert event == (VringChanged(index=0, anew=True) if is_enabled else None)
    assert not vring.failed
    check_state(served.state, OFFER)


@pytest.mark.parametrize("is_enabled", [False, True])
def test_the_same_addresses_again_disturb_nothing(served: Backend, is_enabled: bool) -> None:
    vring = served.state.vrings[0]
    vring.failed = True
    vring.enabled = is_enabled
    assert converse(served, Request.SET_VRING_ADDR, ADDRESS) is None
    assert vring.failed
    assert vring.started


@pytest.mark.parametrize("is_enabled", [False, True])
def test_other_addresses_end_a_failure_while_the_ring_is_disabled(served: Backend, is_enabled: bool) -> None:
    vring = served.state.vrings[0]
    vring.failed = True
    vring.enabled = is_enabled
    event = converse(served, Request.SET_VRING_ADDR, replace(ADDRESS, device_area=0x7F0000003000))
    assert event == (VringChanged(index=0) if is_enabled else None)
    assert vring.failed == is_enabled


def test_enabling_again_does_not_end_a_failure(served: Backend) -> None:
    served.state.vrings[0].failed = True
    for number in (0, 1):
        converse(served, Request.SET_VRING_ENABLE, VringNumber(index=0, number=number))
    assert served.state.vrings[0].failed


@pytest.fixture
def draining() -> Iterator[Backend]:
    """A session whose ring 0 is disabled, and goes on being served because ring 1 is enabled."""
    backend = Backend(replace(OFFER, drained_vrings={0: 1}))
    for request, payload, count in SETUP:
        converse(backend, request, payload, fd_count=count)
    converse(backend, Request.SET_VRING_ENABLE, VringNumber(index=1, number=1))
    assert converse(backend, Request.SET_VRING_ENABLE, VringNumber(index=0, number=0)) == VringChanged(index=0)
    yield backend
    backend.close()


def test_a_ring_that_is_drained_is_served_until_it_is_stopped(draining: Backend) -> None:
    vrings = draining.state.vrings
    assert draining.offer.serves(0, vrings)
    assert converse(draining, Request.SET_VRING_CALL, VringFile(index=0), fd_count=1) == NotifiersChanged(index=0)
    data, fds = encode((Request.GET_VRING_BASE, VringNumber(index=0), 0))
    assert deliver(draining, data, fds) == VringChanged(index=0)
    assert not draining.offer.serves(0, vrings)
    draining.complete()


def test_a_ring_is_not_drained_when_the_frontend_disables_its_leader_too(draining: Backend) -> None:
    # The guest may use the memory of both for something else.
    assert converse(draining, Request.SET_VRING_ENABLE, VringNumber(index=1, number=0)) == VringChanged(index=1)
    assert not draining.offer.serves(0, draining.state.vrings)


def test_a_set_up_stops_a_ring_that_is_drained_until_its_kick(draining: Backend) -> None:
    num, *rest = SAME_SET_UP
    assert converse(draining, *num[:2]) == VringChanged(index=0, anew=True)
    assert not draining.offer.serves(0, draining.state.vrings)
    events = [converse(draining, request, payload, fd_count=count) for request, payload, count in rest]
    assert events == [None, None, VringChanged(index=0, anew=True)]
    assert draining.offer.serves(0, draining.state.vrings)


def test_other_addresses_begin_a_new_life_of_a_ring_that_is_drained(draining: Backend) -> None:
    moved = replace(ADDRESS, device_area=0x7F0000003000)
    assert converse(draining, Request.SET_VRING_ADDR, moved) == VringChanged(index=0, anew=True)


def test_addresses_may_change_while_the_ring_runs(served: Backend) -> None:
    moved = replace(ADDRESS, device_area=0x7F0000003000)
    assert converse(served, Request.SET_VRING_ADDR, moved) == VringChanged(index=0)
    assert served.state.vrings[0].device_area == 0x7F0000003000


def test_the_guest_may_poll_instead_of_being_called(served: Backend) -> None:
    event = converse(served, Request.SET_VRING_CALL, VringFile(index=0, has_fd=False))
    assert event == NotifiersChanged(index=0)
    assert served.state.vrings[0].call is None


@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_a_notifier_is_an_event_of_its_own_and_open_until_the_device_is_done(
    served: Backend, request_: Request
) -> None:
    vring = served.state.vrings[0]
    old = vring.call if request_ is Request.SET_VRING_CALL else vring.error
    assert old is not None
    data, fds = encode((request_, VringFile(index=0), 1))
    assert deliver(served, data, fds) == NotifiersChanged(index=0)
    assert old.is_open
    served.complete()
    assert not old.is_open
    assert fds[0] in (vring.call, vring.error)


def test_a_notifier_of_a_ring_that_is_not_served_is_no_event(served: Backend) -> None:
    assert converse(served, Request.SET_VRING_CALL, VringFile(index=1), fd_count=1) is None
    assert served.state.vrings[1].call is not None


def test_a_new_memory_table_closes_the_old_one_when_the_device_is_done(served: Backend) -> None:
    (old,) = served.state.regions
    data, fds = encode((Request.SET_MEM_TABLE, MemoryTable(regions=(REGION,)), 1))
    assert deliver(served, data, fds) == MemoryChanged()
    assert old.fd.is_open
    served.complete()
    assert not old.fd.is_open
    assert served.state.regions[0].fd is fds[0]


def test_regions_come_and_go_one_by_one(served: Backend) -> None:
    second = replace(REGION, guest_address=0x10000, user_address=0x7F0000010000, mmap_offset=0x5000)
    assert converse(served, Request.ADD_MEM_REG, SingleRegion(region=second), fd_count=1) == RegionAdded()
    assert [region.guest_address for region in served.state.regions] == [0, 0x10000]
    named = replace(second, mmap_offset=0)
    old = served.state.regions[1]
    assert converse(served, Request.REM_MEM_REG, SingleRegion(region=named), fd_count=1) == MemoryChanged()
    assert [region.guest_address for region in served.state.regions] == [0]
    assert not old.fd.is_open


def test_a_table_has_as_many_regions_as_a_message_may_have_descriptors() -> None:
    backend = Backend(replace(OFFER, region_count_max=TABLE_REGION_COUNT_MAX))
    regions = tuple(
        replace(REGION, guest_address=n << 20, user_address=(n + 1) << 32) for n in range(TABLE_REGION_COUNT_MAX)
    )
    try:
        event = converse(backend, Request.SET_MEM_TABLE, MemoryTable(regions=regions), fd_count=TABLE_REGION_COUNT_MAX)
        assert event == MemoryChanged()
        assert len(backend.state.regions) == TABLE_REGION_COUNT_MAX == 32
    finally:
        backend.close()


SECOND = replace(REGION, guest_address=0x10000, user_address=0x7F0000010000)

IMPOSSIBLE_SLOTS: tuple[tuple[Message, str], ...] = (
    ((Request.ADD_MEM_REG, SingleRegion(region=REGION), 1), "in guest addresses"),
    ((Request.ADD_MEM_REG, SingleRegion(region=replace(SECOND, guest_address=0x1000)), 1), "in guest addresses"),
    (
        (Request.ADD_MEM_REG, SingleRegion(region=replace(SECOND, user_address=REGION.user_address)), 1),
        "in user addresses",
    ),
    ((Request.ADD_MEM_REG, SingleRegion(region=replace(SECOND, size=0)), 1), "is empty"),
    ((Request.ADD_MEM_REG, SingleRegion(region=replace(SECOND, size=1 << 44)), 1), "limit is 0x80000000000"),
    ((Request.REM_MEM_REG, SingleRegion(region=replace(REGION, size=1)), 0), "there is no such region"),
    ((Request.REM_MEM_REG, SingleRegion(region=replace(REGION, guest_address=1)), 0), "there is no such region"),
    ((Request.REM_MEM_REG, SingleRegion(region=replace(REGION, user_address=1)), 1), "there is no such region"),
)


@each_case(("message", "text"), IMPOSSIBLE_SLOTS, fresh={"served": new_served})
def test_a_memory_slot_that_cannot_be_is_refused_by_its_reply_and_changes_nothing(
    served: Backend, message: Message, text: str
) -> None:
    before = plain(served.state)
    data, fds = encode(message)
    event = deliver(served, data, fds)
    assert isinstance(event, RequestRefused)
    assert event.reason.startswith(f"{message[0].name}: ")
    assert text in event.reason
    served.complete()
    assert take_reply(served) == U64(value=1)
    assert plain(served.state) == before
    assert not any(fd.is_open for fd in fds)


@each_case(("message", "text"), IMPOSSIBLE_SLOTS, fresh={"served": new_served})
def test_a_memory_slot_that_cannot_be_ends_the_session_of_a_frontend_that_wants_no_reply(
    served: Backend, message: Message, text: str
) -> None:
    request, payload, fd_count = message
    with pytest.raises(PeerError, match=text):
        deliver(served, encode_request(request, payload), [new_fd() for _ in range(fd_count)])


def test_one_region_more_than_there_are_slots_is_refused_by_its_reply(served: Backend) -> None:
    for number in range(2, OFFER.region_count_max + 2):
        region = SingleRegion(
            region=replace(REGION, guest_address=number << 20, user_address=(number << 20) + 0x7F0000000000)
        )
        event = converse(served, Request.ADD_MEM_REG, region, fd_count=1)
        take_reply(served)
    assert event == RequestRefused(reason="ADD_MEM_REG: guest memory has 5 regions, limit is 4")
    assert len(served.state.regions) == OFFER.region_count_max


def test_a_region_that_the_device_refuses_is_taken_out_again(served: Backend) -> None:
    before = plain(served.state)
    data, fds = encode((Request.ADD_MEM_REG, SingleRegion(region=SECOND), 1))
    assert deliver(served, data, fds) == RegionAdded()
    assert len(served.state.regions) == 2
    served.refuse()
    assert take_reply(served) == U64(value=1)
    assert plain(served.state) == before
    assert not fds[0].is_open


def test_a_region_that_comes_without_a_wish_for_a_reply_cannot_be_refused(served: Backend) -> None:
    event = deliver(served, encode_request(Request.ADD_MEM_REG, SingleRegion(region=SECOND)), [new_fd()])
    assert event == MemoryChanged()
    assert not event.refusable
    served.complete()


def test_reset_device_keeps_memory_and_who_is_called(served: Backend) -> None:
    assert converse(served, Request.RESET_DEVICE) == DeviceReset()
    vring = served.state.vrings[0]
    assert replace(vring, call=None, error=None) == VringState()
    assert None not in (vring.call, vring.error)
    assert len(served.state.regions) == 1
    assert (served.state.features_acked, served.state.device_status) == (0, 0)


def test_reset_owner_is_ignored(served: Backend) -> None:
    before = plain(served.state)
    assert converse(served, Request.RESET_OWNER) is None
    take_reply(served)
    assert plain(served.state) == before


def test_status_0_leaves_rings_alone(served: Backend) -> None:
    # QEMU sends it before GET_VRING_BASE.
    assert converse(served, Request.SET_STATUS, U64(value=0)) is None
    assert OFFER.serves(0, served.state.vrings)


def test_an_mtu_counts_only_when_the_device_takes_it(served: Backend) -> None:
    data, fds = encode((Request.NET_SET_MTU, U64(value=9000), 0))
    assert deliver(served, data, fds) == MtuSet(mtu=9000)
    served.refuse()
    assert take_reply(served) == U64(value=1)
    assert served.state.mtu == 0
    assert converse(served, Request.NET_SET_MTU, U64(value=1400)) == MtuSet(mtu=1400)
    assert served.state.mtu == 1400


def test_a_rarp_carries_the_mac_address_in_the_first_six_bytes(served: Backend) -> None:
    payload = U64.decode(bytes.fromhex("5254001234560000"))
    assert converse(served, Request.SEND_RARP, payload) == RarpRequested(mac=bytes.fromhex("525400123456"))


@pytest.mark.parametrize(("offset", "size"), [(0, 24), (0, 6), (6, 2), (23, 1)])
def test_the_configuration_space_is_read_where_asked(served: Backend, offset: int, size: int) -> None:
    converse(served, Request.GET_CONFIG, ConfigSpace(offset=offset, data=bytes(size)))
    assert take_reply(served) == ConfigSpace(offset=offset, data=CONFIG[offset : offset + size])


@each_case(
    ("offset", "size"),
    [(0, 60), (20, 5), (24, 1), (0, 256), (200, 256), (0xFFFFFFFF, 256)],
    fresh={"served": new_served},
)
def test_behind_the_configuration_space_are_zeros(served: Backend, offset: int, size: int) -> None:
    converse(served, Request.GET_CONFIG, ConfigSpace(offset=offset, data=b"\xff" * size))
    there = CONFIG[offset : offset + size]
    assert take_reply(served) == ConfigSpace(offset=offset, data=there + bytes(size - len(there)))


def test_the_configuration_space_is_not_written(served: Backend) -> None:
    converse(served, Request.SET_CONFIG, ConfigSpace(offset=0, data=b"\xff"))
    assert take_reply(served) == U64(value=1)
    assert served.config == CONFIG


WIDE = replace(OFFER, vring_count=4, protocol_features=PROTOCOL_FEATURES_OFFERED)
ALL = U64(value=PROTOCOL_FEATURES_OFFERED)


def test_more_queue_pairs_than_there_are_are_counted_and_passed_over() -> None:
    backend = Backend(WIDE)
    try:
        converse(backend, Request.SET_PROTOCOL_FEATURES, ALL)
        for index in (4, 5, 7, 6):
            assert converse(backend, Request.SET_VRING_CALL, VringFile(index=index), fd_count=1) is None
        before = backend.state.vrings
        for request, payload, count in SETUP:
            if isinstance(payload, VringNumber | VringAddress | VringFile):
                assert converse(backend, request, replace(payload, index=7), fd_count=count) is None
        assert backend.state.vrings == before
        assert backend.state.vring_count_asked == 8
        backend.data_sent(len(backend.data_to_send()))
        converse(backend, Request.GET_VRING_BASE, VringNumber(index=7))
        assert take_reply(backend) == VringNumber(index=7, number=0)
        check_state(backend.state, WIDE)
        with pytest.raises(PeerError, match="names vring 256, the device has 4 vrings"):
            converse(backend, Request.SET_VRING_NUM, VringNumber(index=256, number=256))
    finally:
        backend.close()


# -- split anywhere, moved anywhere -----------------------------------------------------------------------------


@each_case("step", range(1, 42), fresh={"backend": new_backend})
def test_messages_split_anywhere_mean_the_same(backend: Backend, step: int) -> None:
    whole = Backend(OFFER, config=CONFIG)
    for message in SETUP:
        for target, parts in ((whole, 1 << 16), (backend, step)):
            data, fds = encode(message)
            if deliver(target, data, fds, step=parts) is not None:
                target.complete()
        assert plain(backend.state) == plain(whole.state)
        assert take_reply(backend) == take_reply(whole)
    whole.close()


@each_case("message", [message for message in SETUP if message[2]])
def test_descriptors_may_come_with_any_byte_of_their_message(message: Message) -> None:
    length = len(encode_request(message[0], message[1]))
    for fds_at in range(length):
        backend = Backend(OFFER)
        for earlier in SETUP[: SETUP.index(message)]:
            converse(backend, earlier[0], earlier[1], fd_count=earlier[2])
            take_reply(backend)
        data, fds = encode(message)
        if deliver(backend, data, fds, fds_at=fds_at, step=1) is not None:
            backend.complete()
        assert all(fd.is_open for fd in fds)
        backend.close()
        assert not any(fd.is_open for fd in fds)


def test_a_session_goes_on_elsewhere_from_any_byte(backend: Backend) -> None:
    travelling = Backend(OFFER, config=CONFIG)
    for message in SETUP:
        data, fds = encode(message)
        event = None
        for at in range(len(data)):
            travelling = Backend.from_state(travelling.state, OFFER, config=CONFIG)
            event = travelling.receive(data[at : at + 1], fds if at == 0 else [])
        if event is not None:
            travelling.complete()
        converse(backend, message[0], message[1], fd_count=message[2])
        travelling = Backend.from_state(travelling.state, OFFER, config=CONFIG)
        assert plain(travelling.state) == plain(backend.state)
        assert take_reply(travelling) == take_reply(backend)
    travelling.close()


def test_a_session_keeps_what_it_was_offered_where_less_is_offered_now(backend: Backend) -> None:
    for request, payload, fd_count in SETUP[:8]:
        converse(backend, request, payload, fd_count=fd_count)
        take_reply(backend)
    less = replace(
        OFFER,
        features=0b1000,
        servable_features=0b101,
        protocol_features=OFFER.protocol_features & ~ProtocolFeature.RARP,
    )
    elsewhere = Backend.from_state(backend.state, less)
    for request, offered in (
        (Request.GET_FEATURES, BIT | LOG_ALL | 0b101),
        (Request.GET_PROTOCOL_FEATURES, int(OFFER.protocol_features)),
        (Request.GET_QUEUE_NUM, len(backend.state.vrings)),
    ):
        converse(elsewhere, request)
        assert take_reply(elsewhere) == U64(value=offered)
    # A driver that is reset takes it again, and even what it left at first; what is new here it was not offered.
    converse(elsewhere, Request.RESET_DEVICE)
    converse(elsewhere, Request.SET_FEATURES, U64(value=BIT | 0b101))
    assert elsewhere.state.features_acked == BIT | 0b101
    data, fds = encode((Request.SET_FEATURES, U64(value=BIT | 0b1000), 0))
    with pytest.raises(PeerError, match="0x8 are not among the offered 0x44000005"):
        deliver(elsewhere, data, fds)
    elsewhere.close()
    fresh = Backend(less)
    converse(fresh, Request.GET_FEATURES)
    assert take_reply(fresh) == U64(value=BIT | LOG_ALL | 0b1000)


def test_what_only_another_program_can_serve_is_offered_no_longer(backend: Backend) -> None:
    state = backend.state
    state.features_offered |= 1 << 40
    state.protocol_features_offered |= 1 << 40
    elsewhere = Backend.from_state(state, OFFER)
    assert elsewhere.state.features_offered == BIT | LOG_ALL | 0b101
    assert elsewhere.state.protocol_features_offered == OFFER.protocol_features


def test_an_unsent_rest_of_a_reply_moves(served: Backend) -> None:
    converse(served, Request.GET_FEATURES)
    whole = served.data_to_send()
    served.data_sent(5)
    elsewhere = Backend.from_state(served.state, OFFER)
    assert elsewhere.data_to_send() == whole[5:]


# -- wrong messages ---------------------------------------------------------------------------------------------

WRONG: tuple[tuple[Message, str], ...] = (
    ((Request.SET_FEATURES, U64(value=BIT | 0b10), 0), "features 0x40000002, of which 0x2 are not among"),
    ((Request.SET_PROTOCOL_FEATURES, U64(value=1 << 19), 0), "protocol features 0x80000, of which 0x80000"),
    ((Request.SET_PROTOCOL_FEATURES, U64(value=1 << 63), 0), "of which 0x8000000000000000 are not among"),
    ((Request.SET_STATUS, U64(value=256), 0), "device status is 256, limit is 255"),
    ((Request.NET_SET_MTU, U64(value=65536), 0), "mtu is 65536"),
    ((Request.SET_VRING_NUM, VringNumber(index=2, number=256), 0), "names vring 2, the device has 2 vrings"),
    ((Request.SET_VRING_NUM, VringNumber(index=1, number=0), 0), "0 entries, must be a power of two"),
    ((Request.SET_VRING_NUM, VringNumber(index=1, number=255), 0), "255 entries"),
    ((Request.SET_VRING_NUM, VringNumber(index=1, number=2048), 0), "at most 1024"),
    ((Request.SET_VRING_BASE, VringNumber(index=0, number=0), 0), "SET_VRING_BASE for vring 0, which is running"),
    ((Request.SET_VRING_BASE, VringNumber(index=1, number=65536), 0), "position of vring 1 is 65536"),
    ((Request.SET_VRING_ENABLE, VringNumber(index=1, number=2), 0), "enable of vring 1 is 2"),
    ((Request.SET_VRING_ENABLE, VringNumber(index=0xFFFFFFFF, number=1), 0), "names vring 4294967295"),
    ((Request.GET_VRING_BASE, VringNumber(index=2), 0), "names vring 2"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, index=9), 0), "names vring 9"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, flags=3), 0), "flags 0x3, only 0x1 have a meaning here"),
    (
        (Request.SET_FEATURES, U64(value=BIT | 0b101), 0),
        "0x40000005 while rings run with 0x40000001: only VHOST_F_LOG_ALL",
    ),
    ((Request.SET_FEATURES, U64(value=1 | LOG_ALL), 0), "0x4000001 while rings run with 0x40000001"),
    ((Request.SET_LOG_BASE, LogFile(size=8, mmap_offset=0), 0), "0 descriptors, expected 1"),
    ((Request.SET_LOG_FD, None, 2), "2 descriptors, expected 0"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, descriptor_area=8), 0), "at 0x8, must be aligned to 16"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, driver_area=1), 0), "avail ring of vring 0 is at 0x1"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, device_area=2), 0), "used ring of vring 0 is at 0x2"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, descriptor_area=0), 0), "which is started, has addresses 0x0, 0x7f0"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, driver_area=0), 0), "which is started, has addresses .*, 0x0, 0x7f0"),
    ((Request.SET_VRING_ADDR, replace(ADDRESS, device_area=0), 0), "which is started, has addresses .*, 0x0$"),
    ((Request.SET_VRING_KICK, VringFile(index=1), 1), "vring 1, which has no size or no addresses"),
    ((Request.SET_VRING_KICK, VringFile(index=0, has_fd=False), 0), "polled, which is not supported"),
    ((Request.SET_VRING_KICK, VringFile(index=0), 0), "0 descriptors, expected 1"),
    ((Request.SET_VRING_CALL, VringFile(index=0, has_fd=False), 1), "1 descriptors, expected 0"),
    ((Request.SET_VRING_CALL, VringFile(index=7), 1), "names vring 7"),
    ((Request.SET_OWNER, None, 1), "1 descriptors, expected 0"),
    ((Request.SET_OWNER, None, 33), "33 descriptors, limit is 32"),
    ((Request.SET_BACKEND_REQ_FD, None, 0), "0 descriptors, expected 1"),
    ((Request.SET_MEM_TABLE, MemoryTable(regions=(REGION,)), 2), "2 descriptors, expected 1"),
    ((Request.SET_MEM_TABLE, MemoryTable(regions=(REGION, REGION)), 2), "overlap"),
    ((Request.SET_MEM_TABLE, MemoryTable(regions=(replace(REGION, size=0),)), 1), "is empty"),
    (
        (
            Request.SET_MEM_TABLE,
            MemoryTable(regions=tuple(replace(REGION, guest_address=n << 20) for n in range(5))),
            5,
        ),
        "5 regions, limit is 4",
    ),
    ((Request.ADD_MEM_REG, SingleRegion(region=REGION), 0), "0 descriptors, expected 1"),
)


@each_case(("message", "text"), WRONG, fresh={"served": new_served})
def test_a_wrong_message_is_refused_and_changes_nothing(served: Backend, message: Message, text: str) -> None:
    before = plain(served.state)
    data, fds = encode(message)
    with pytest.raises(PeerError, match=text):
        deliver(served, data, fds)
    served.state.unparsed = b""
    for fd in served.state.unparsed_fds:
        fd.close()
    served.state.unparsed_fds.clear()
    assert plain(served.state) == before


@each_case(
    ("request_", "payload", "fd_count"),
    [
        (Request.SET_LOG_BASE, LogFile(size=8, mmap_offset=0), 1),
        (Request.SEND_RARP, U64(value=0), 0),
        (Request.NET_SET_MTU, U64(value=1500), 0),
        (Request.SET_BACKEND_REQ_FD, None, 1),
        (Request.GET_CONFIG, ConfigSpace(offset=0, data=b"x"), 0),
        (Request.SET_CONFIG, ConfigSpace(offset=0, data=b"x"), 0),
        (Request.RESET_DEVICE, None, 0),
        (Request.GET_MAX_MEM_SLOTS, None, 0),
        (Request.ADD_MEM_REG, SingleRegion(region=REGION), 1),
        (Request.REM_MEM_REG, SingleRegion(region=REGION), 0),
        (Request.SET_STATUS, U64(value=1), 0),
        (Request.GET_STATUS, None, 0),
    ],
    fresh={"backend": new_backend},
)
def test_a_request_needs_its_protocol_feature(
    backend: Backend, request_: Request, payload: Payload | None, fd_count: int
) -> None:
    data, fds = encode((request_, payload, fd_count))
    with pytest.raises(PeerError, match=f"{request_.name} needs protocol feature"):
        deliver(backend, data, fds)


def test_bytes_that_are_no_message_are_refused(backend: Backend) -> None:
    with pytest.raises(PeerError, match="request 542393671 is unknown"):
        backend.receive(b"GET / HTTP/1")


# -- a state from elsewhere -------------------------------------------------------------------------------------


def test_the_state_of_a_running_session_is_good(served: Backend) -> None:
    check_state(served.state, OFFER)


Spoil = Callable[[SessionState], None]


def spoil_vring(**values: object) -> Spoil:
    def apply(state: SessionState) -> None:
        for name, value in values.items():
            setattr(state.vrings[0], name, value)

    return apply


def spoil(**values: object) -> Spoil:
    def apply(state: SessionState) -> None:
        for name, value in values.items():
            setattr(state, name, value)

    return apply


def spoil_region(**values: int) -> Spoil:
    def apply(state: SessionState) -> None:
        region: MemoryRegion = state.regions[0]
        state.regions[0] = replace(region, **values)  # type: ignore[arg-type]

    return apply


@each_case(
    ("change", "text"),
    [
        (spoil(features_acked=BIT | 2), "features 0x40000002"),
        (spoil(protocol_features_acked=1 << 6), "protocol features 0x40"),
        (spoil(features_offered=BIT), "features 0x40000001, of which 0x1 are not among the offered 0x40000000"),
        (spoil(protocol_features_offered=0), "protocol features .* are not among the offered 0x0"),
        (
            spoil(features_offered=BIT | 1 << 40, features_acked=1 << 40),
            "features 0x10000000000, of which 0x10000000000 cannot be served here",
        ),
        (
            spoil(protocol_features_offered=1 << 6, protocol_features_acked=1 << 6),
            "protocol features 0x40, of which 0x40 cannot be served here",
        ),
        (spoil(device_status=256), "device status is 256"),
        (spoil(mtu=65536), "mtu is 65536"),
        (spoil(vrings=[]), "session has 0 vrings, the device has 2"),
        (spoil(vring_count_asked=257), "count of vrings asked for is 257, limit is 256"),
        (spoil_vring(size=0), "vring 0 is started without"),
        (spoil_vring(size=3), "3 entries"),
        (spoil_vring(size=2048), "2048 entries"),
        (spoil_vring(descriptor_area=0), "vring 0 is started without"),
        (spoil_vring(descriptor_area=8), "descriptor table of vring 0 is at 0x8"),
        (spoil_vring(driver_area=0), "vring 0 is started without"),
        (spoil_vring(driver_area=1), "avail ring of vring 0 is at 0x1"),
        (spoil_vring(device_area=0), "vring 0 is started without"),
        (spoil_vring(device_area=2), "used ring of vring 0 is at 0x2"),
        (spoil_vring(next_avail=65536), "position of vring 0 is 65536"),
        (spoil_vring(kick=None), "vring 0 is started without"),
        (spoil_region(size=0), "is empty"),
        (spoil_region(guest_address=(1 << 64) - 1), "ends behind"),
        (spoil_region(user_address=(1 << 64) - 1), "ends behind"),
        (spoil_region(mmap_offset=1 << 63), "ends behind"),
        (spoil(unparsed=b"\0" * 12), "request 0 is unknown"),
        (spoil(unparsed=encode_request(Request.SET_OWNER)), "12 unparsed bytes, the message ends after 12"),
        (spoil(unparsed=encode_request(Request.SET_STATUS, U64(value=1)) + b"x"), "21 unparsed bytes"),
        (spoil(unsent=bytes(1100)), "1100 unsent bytes"),
    ],
    fresh={"served": new_served},
)
def test_a_state_spoiled_in_one_field_is_refused_and_keeps_its_descriptors(
    served: Backend, change: Spoil, text: str
) -> None:
    state = served.state
    fds = [state.vrings[0].kick, state.vrings[0].call, state.vrings[0].error, state.regions[0].fd]
    kept = list(state.vrings)
    change(state)
    with pytest.raises(PeerError, match=text):
        Backend.from_state(state, OFFER)
    assert all(fd is not None and fd.is_open for fd in fds)
    state.vrings = kept
    kept[0].kick = fds[0]


def test_a_state_with_too_many_waiting_descriptors_is_refused(served: Backend) -> None:
    served.state.unparsed_fds += [new_fd() for _ in range(33)]
    with pytest.raises(PeerError, match="33 descriptors, limit is 32"):
        check_state(served.state, OFFER)


@pytest.mark.parametrize(
    ("offer", "text"),
    [
        (replace(OFFER, features=0b100), "the guest uses features 0x40000001, of which 0x1 cannot be served here"),
        (replace(OFFER, vring_count=1), "session has 2 vrings, the device has 1"),
        (replace(OFFER, vring_size_max=128), "at most 128"),
        (replace(OFFER, region_count_max=0), "1 regions, limit is 0"),
    ],
)
def test_a_session_that_needs_more_than_is_offered_is_refused(served: Backend, offer: Offer, text: str) -> None:
    with pytest.raises(PeerError, match=text):
        check_state(served.state, offer)
