"""What a frontend says of the dirty log, and what a device hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
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
from localmig.vhost_user.message import (
    HEADER_SIZE,
    U64,
    LogFile,
    ProtocolFeature,
    Request,
    VringFile,
    VringNumber,
    encode_request,
)
from localmig.vhost_user.protocol import (
    LOG_ALL,
    Backend,
    DeviceReset,
    FeaturesSet,
    LoggingChanged,
    LogSet,
    VringChanged,
    VringState,
    check_state,
)

LOG = LogFile(size=0x1000, mmap_offset=0x2000)
LOGGED = replace(ADDRESS, flags=1, log=0x2000)
LOG_BASE: Message = (Request.SET_LOG_BASE, LOG, 1)
ON: tuple[Message, ...] = (
    LOG_BASE,
    (Request.SET_FEATURES, U64(value=BIT | LOG_ALL | 1), 0),
    (Request.SET_VRING_ADDR, LOGGED, 0),
)
"""What QEMU says to begin with it while a ring runs."""

OFF: tuple[Message, ...] = (
    (Request.SET_FEATURES, U64(value=BIT | 1), 0),
    (Request.SET_VRING_ADDR, ADDRESS, 0),
)


@pytest.fixture
def served() -> Iterator[Backend]:
    """A session with a running ring."""
    backend = Backend(OFFER)
    for request, payload, count in SETUP:
        converse(backend, request, payload, fd_count=count)
    backend.data_sent(len(backend.data_to_send()))
    yield backend
    backend.close()


def say(backend: Backend, *messages: Message) -> list[object]:
    """The event of each; all events are completed, and every reply says that it was done."""
    events: list[object] = []
    for request, payload, count in messages:
        events.append(converse(backend, request, payload, fd_count=count))
        assert take_reply(backend) == U64(value=0)
    return events


def test_it_is_offered_to_the_frontend_and_only_with_its_protocol_feature() -> None:
    assert OFFER.all_features & LOG_ALL
    assert not OFFER.features & LOG_ALL, "a guest knows nothing of it"
    without = replace(OFFER, protocol_features=OFFER.protocol_features & ~ProtocolFeature.LOG_SHMFD)
    assert not without.all_features & LOG_ALL
    backend = Backend(without)
    for request, payload, count in SETUP[:5]:
        if request is Request.SET_PROTOCOL_FEATURES:
            payload = U64(value=without.protocol_features)
        converse(backend, request, payload, fd_count=count)
    data, fds = encode((Request.SET_VRING_ADDR, LOGGED, 0))
    with pytest.raises(PeerError, match="has flags 0x1, only 0x0 have a meaning here"):
        deliver(backend, data, fds)
    backend.close()


def test_it_is_switched_on_and_off_while_rings_run_and_nothing_else_changes(served: Backend) -> None:
    vring = replace(served.state.vrings[0])
    for _ in range(2):
        assert say(served, *ON) == [LogSet(), LoggingChanged(), LoggingChanged()]
        assert served.state.logs
        log = served.state.log
        assert log is not None
        assert (log.size, log.mmap_offset) == (LOG.size, LOG.mmap_offset)
        assert served.state.vrings[0] == replace(vring, is_logged=True, log_address=0x2000)
        assert say(served, *ON[1:]) == [None, None], "a second queue pair's frontend says the same"
        assert say(served, *OFF) == [LoggingChanged(), LoggingChanged()]
        assert not served.state.logs
        assert served.state.vrings[0] == vring
        assert log.fd.is_open, "no message takes the log away"
    assert say(served, (Request.SET_FEATURES, U64(value=BIT | 1), 0)) == [None]


def test_set_log_base_is_answered_whether_asked_or_not(served: Backend) -> None:
    for needs_reply in (False, True):
        data = encode_request(Request.SET_LOG_BASE, LOG, needs_reply=needs_reply)
        _, fds = encode(LOG_BASE)
        assert deliver(served, data, fds) == LogSet()
        assert served.data_to_send() == b"", "the former log may still be written"
        served.complete()
        assert take_reply(served) == U64(value=0)


def test_a_log_that_no_ring_can_run_with_is_kept_and_the_frontend_told(served: Backend) -> None:
    say(served, *ON)
    data, fds = encode(LOG_BASE)
    assert deliver(served, data, fds) == LogSet()
    served.refuse()
    assert take_reply(served) == U64(value=1)
    assert served.state.log is not None
    assert served.state.log.fd is fds[0], "its rings must not mark anything in the former log"


def test_a_former_log_is_open_until_the_device_has_left_it(served: Backend) -> None:
    say(served, LOG_BASE)
    assert served.state.log is not None
    former = served.state.log.fd
    data, fds = encode(LOG_BASE)
    deliver(served, data, fds)
    assert former.is_open
    served.complete()
    assert not former.is_open
    assert fds[0].is_open


def test_the_log_is_gone_when_the_last_ring_stops(served: Backend) -> None:
    # QEMU frees its log then, and sends another one only after it started the rings again.
    converse(served, Request.SET_VRING_NUM, VringNumber(index=1, number=256))
    converse(served, Request.SET_VRING_ADDR, replace(ADDRESS, index=1))
    converse(served, Request.SET_VRING_KICK, VringFile(index=1), fd_count=1)
    served.data_sent(len(served.data_to_send()))
    say(served, *ON)
    assert served.state.log is not None
    fd = served.state.log.fd
    converse(served, Request.GET_VRING_BASE, VringNumber(index=0))
    assert served.state.log is not None
    data, _ = encode((Request.GET_VRING_BASE, VringNumber(index=1), 0))
    if deliver(served, data, []) is not None:
        assert fd.is_open
        served.complete()
    assert not fd.is_open
    assert served.state.awaits_log
    served.data_sent(len(served.data_to_send()))
    # It comes back in QEMU's order: the kick before the log.
    assert say(served, (Request.SET_FEATURES, U64(value=BIT | LOG_ALL | 1), 0)) == [FeaturesSet()]
    assert say(served, (Request.SET_VRING_KICK, VringFile(index=0), 1)) == [VringChanged(index=0, anew=True)]
    assert served.state.awaits_log
    assert say(served, LOG_BASE) == [LogSet()]
    assert not served.state.awaits_log


def test_a_reset_of_the_device_ends_it(served: Backend) -> None:
    say(served, *ON)
    assert say(served, (Request.RESET_DEVICE, None, 0)) == [DeviceReset()]
    assert not served.state.logs
    assert served.state.log is None
    assert served.state.vrings[1] == VringState()


def test_addresses_that_are_new_bring_their_log_address(served: Backend) -> None:
    moved = replace(LOGGED, device_area=ADDRESS.device_area + 0x1000, log=0x3000)
    assert say(served, (Request.SET_VRING_ADDR, moved, 0)) == [VringChanged(index=0)]
    assert (served.state.vrings[0].is_logged, served.state.vrings[0].log_address) == (True, 0x3000)
    assert say(served, (Request.SET_VRING_ADDR, replace(moved, flags=0), 0)) == [LoggingChanged()]
    assert (served.state.vrings[0].is_logged, served.state.vrings[0].log_address) == (False, 0)


def test_a_ring_that_does_not_run_is_told_where_it_logs_without_an_event(served: Backend) -> None:
    assert say(served, (Request.SET_VRING_ADDR, replace(LOGGED, index=1), 0)) == [None]
    assert say(served, (Request.SET_VRING_ADDR, replace(LOGGED, index=1, log=1 << 63), 0)) == [None]
    assert served.state.vrings[1].log_address == 1 << 63


def test_a_descriptor_to_be_told_by_is_taken_and_closed(served: Backend) -> None:
    for count in (1, 0):
        data, fds = encode((Request.SET_LOG_FD, None, count))
        assert deliver(served, data, fds) is None
        assert take_reply(served) == U64(value=0)
        assert not any(fd.is_open for fd in fds)


def test_what_it_is_made_of_travels_and_is_good(served: Backend) -> None:
    say(served, *ON)
    check_state(served.state, OFFER)
    again = Backend.from_state(served.state, OFFER)
    assert again.state.logs
    assert not again.state.awaits_log


def test_other_features_are_refused_while_a_ring_runs_and_taken_once_none_does(served: Backend) -> None:
    other: Message = (Request.SET_FEATURES, U64(value=BIT | LOG_ALL | 0b101), 0)
    data, fds = encode(other)
    with pytest.raises(
        PeerError, match=r"SET_FEATURES has 0x44000005 while rings run with 0x40000001: only VHOST_F_LOG_"
    ):
        deliver(served, data, fds)
    close_all(fds)
    served.state.unparsed = b""
    fresh = Backend.from_state(served.state, OFFER)
    converse(fresh, Request.SET_VRING_ENABLE, VringNumber(index=0, number=0))
    fresh.data_sent(len(fresh.data_to_send()))
    assert say(fresh, other) == [FeaturesSet()]


@pytest.mark.parametrize("size", [0, 8, 24])
def test_a_log_that_is_not_described_is_no_message(served: Backend, size: int) -> None:
    data = encode_request(Request.SET_LOG_BASE, LOG)
    _, fds = encode(LOG_BASE)
    spoiled = data[:8] + size.to_bytes(4, "little") + data[HEADER_SIZE:].ljust(size, b"\0")[:size]
    with pytest.raises(PeerError, match=f"SET_LOG_BASE: payload has {size} bytes, expected 16"):
        deliver(served, spoiled, fds)
