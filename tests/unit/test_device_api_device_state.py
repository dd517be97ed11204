"""What a destination finds wrong with the sessions that a source hands over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from localmig.device_api.device_state import ConnectionState, SocketState, check_socket
from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.vhost_user.protocol import Offer, SessionState, VringState

OFFER = Offer(features=1, vring_count=1)


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connection(number: int, ends: ExitStack) -> ConnectionState:
    fd = ends.enter_context(OwnedFd(os.eventfd(0)))
    session = SessionState(vrings=[VringState()])
    return ConnectionState(
        number=number,
        path="/x",
        since_ns=1,
        was_succeeded=False,
        connection=fd,
        session=session,
        ledger=None,
        in_flight=None,
    )


def test_sessions_that_can_be_are_taken(ends: ExitStack) -> None:
    connections = tuple(connection(number, ends) for number in (2, 5))
    for owner in (0, 2, 5):
        check_socket(SocketState(listener=None, connections=connections, opened_count=5, owner=owner), OFFER)


@pytest.mark.parametrize(
    ("numbers", "opened_count", "owner", "reason"),
    [
        ((3, 3), 5, 3, r"sessions came with the numbers \[3, 3\], of which each may be there once"),
        ((0, 3), 5, 3, r"the numbers \[0, 3\], must be from 1 to 5"),
        ((3, 6), 5, 3, r"the numbers \[3, 6\], must be from 1 to 5"),
        ((3, 4), 5, 1, r"session 1 is said to own, and the sessions that came are \[3, 4\]"),
        ((), 5, 1, r"session 1 is said to own, and the sessions that came are \[\]"),
    ],
)
def test_sessions_that_cannot_be_are_refused(
    ends: ExitStack, numbers: tuple[int, ...], opened_count: int, owner: int, reason: str
) -> None:
    connections = tuple(connection(number, ends) for number in numbers)
    state = SocketState(listener=None, connections=connections, opened_count=opened_count, owner=owner)
    with pytest.raises(PeerError, match=reason):
        check_socket(state, OFFER)


def test_any_of_the_sessions_must_be_one_that_can_be_served(ends: ExitStack) -> None:
    good, bad = connection(1, ends), connection(2, ends)
    bad.session.mtu = 1 << 17
    state = SocketState(listener=None, connections=(good, bad), opened_count=2, owner=1)
    with pytest.raises(PeerError, match="mtu is 131072"):
        check_socket(state, OFFER)
