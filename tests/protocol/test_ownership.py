"""Which session of a device owns it: every way that three frontends can take, walked to the end.

A guest is a number that its ring has counted to: a frontend that continues it tells that number, one of another guest
begins at 0. Each step that a frontend can take is taken in each world that can be, and what must hold is looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from localmig.vhost_user.ownership import Ownership, Role, Standing, least_needed
from localmig.vhost_user.protocol import Offer, SessionState, VringState
from localmig.virtio import Feature, packed_ring

COUNT_MAX = 2
"""As far as a guest counts: enough that positions are equal, and differ."""

NUMBERS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Frontend:
    """A session with one ring."""

    runs: bool = False
    position: int = 0

    def standing(self) -> Standing:
        started = frozenset({0} if self.runs else ())
        return Standing(wants=self.runs, started=started, positions=(self.position,), start=0)


@dataclass(frozen=True, kw_only=True)
class World:
    """Sessions by number, and what the rule made of them."""

    sessions: tuple[tuple[int, Frontend], ...] = ()
    owner: int | None = None
    succeeded: frozenset[int] = frozenset()
    held: tuple[int, ...] = ()

    def get(self, number: int) -> Frontend | None:
        return dict(self.sessions).get(number)

    def with_session(self, number: int, frontend: Frontend | None) -> World:
        """As the rule has it after a session changed, or ended."""
        former = self.get(number)
        others = {each: there for each, there in self.sessions if each != number}
        if frontend is not None:
            others[number] = frontend
        sessions = dict(sorted(others.items()))
        ownership = Ownership(owner=self.owner, succeeded=set(self.succeeded), held=list(self.held))
        is_left = frontend is None and number == self.owner and former is not None
        left = former.standing() if is_left and former is not None else None
        ownership.decide({each: there.standing() for each, there in sessions.items()}, left=left)
        return World(
            sessions=tuple(sessions.items()),
            owner=ownership.owner,
            succeeded=frozenset(ownership.succeeded),
            held=tuple(ownership.held),
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    what: str
    number: int
    after: World


def steps(world: World) -> Iterator[Step]:
    """All that can happen next."""
    for number in NUMBERS:
        there = world.get(number)
        if there is None:
            yield Step(what="opens", number=number, after=world.with_session(number, Frontend()))
            continue
        yield Step(what="leaves", number=number, after=world.with_session(number, None))
        if there.runs:
            yield Step(what="stops", number=number, after=world.with_session(number, replace(there, runs=False)))
            if number == world.owner and there.position < COUNT_MAX:
                counted = replace(there, position=there.position + 1)
                yield Step(what="counts", number=number, after=world.with_session(number, counted))
        else:
            for position in range(COUNT_MAX + 1):
                started = Frontend(runs=True, position=position)
                yield Step(what="starts", number=number, after=world.with_session(number, started))


def all_worlds() -> dict[World, list[Step]]:
    found: dict[World, list[Step]] = {}
    ahead = deque([World()])
    while ahead:
        world = ahead.popleft()
        if world in found:
            continue
        found[world] = list(steps(world))
        ahead.extend(step.after for step in found[world])
    return found


@pytest.fixture(scope="module")
def worlds() -> dict[World, list[Step]]:
    found = all_worlds()
    assert len(found) > 1000
    return found


def test_a_session_that_runs_owns_or_is_held(worlds: dict[World, list[Step]]) -> None:
    for world in worlds:
        wanting = {number for number, each in world.sessions if each.runs}
        assert wanting - {world.owner} == set(world.held), world
        assert len(world.held) == len(set(world.held))
        assert world.owner is None or world.get(world.owner) is not None
        assert world.owner not in world.succeeded


def test_rings_that_run_are_taken_from_nobody(worlds: dict[World, list[Step]]) -> None:
    for world, following in worlds.items():
        owner = None if world.owner is None else world.get(world.owner)
        for step in following:
            if owner is not None and owner.runs and step.after.owner != world.owner:
                assert step.number == world.owner, step
                assert step.what in ("leaves", "stops"), step


def test_before_the_owner_leaves_only_one_that_continues_it_gets_the_rings(worlds: dict[World, list[Step]]) -> None:
    for world, following in worlds.items():
        for step in following:
            if world.owner in (None, step.after.owner) or (step.what == "leaves" and step.number == world.owner):
                continue
            assert world.owner is not None
            assert step.after.owner is not None, step
            former, heir = step.after.get(world.owner), step.after.get(step.after.owner)
            assert former is not None
            assert heir is not None
            assert not former.runs
            assert heir.runs
            assert heir.position == former.position != 0, step
            assert step.after.owner not in world.succeeded, "it had its turn"
            assert world.owner in step.after.succeeded


def test_held_rings_start_as_soon_as_the_owner_has_left(worlds: dict[World, list[Step]]) -> None:
    for world, following in worlds.items():
        for step in following:
            if step.what != "leaves" or step.number != world.owner:
                continue
            left = world.get(step.number)
            assert left is not None
            waiting = [(number, step.after.get(number)) for number in world.held]
            continuing = [number for number, each in waiting if each and each.position == left.position != 0]
            expected = [*continuing, *world.held, None][0]
            assert step.after.owner == expected, step


def test_rings_that_continue_start_as_soon_as_the_owner_stops(worlds: dict[World, list[Step]]) -> None:
    for world in worlds:
        owner = None if world.owner is None else world.get(world.owner)
        if owner is None or owner.runs:
            continue
        for number in world.held:
            held = world.get(number)
            assert held is not None
            may = held.position == owner.position != 0 and number not in world.succeeded
            assert not may, world


def test_who_stopped_starts_again_where_nobody_has_run_since(worlds: dict[World, list[Step]]) -> None:
    for world, following in worlds.items():
        for step in following:
            if step.what == "starts" and step.number == world.owner:
                assert step.after.owner == world.owner, step


def test_nobody_is_kept_out_by_a_session_that_started_nothing(worlds: dict[World, list[Step]]) -> None:
    for world, following in worlds.items():
        for step in following:
            if step.what == "starts" and world.owner is None:
                assert step.after.owner == step.number, step


# -- several rings, and what a session's state says -------------------------------------------------------------

OFFER = Offer(features=int(Feature.RING_PACKED), vring_count=4)


def standing(*positions: int, started: tuple[int, ...] = (0, 1), start: int = 0) -> Standing:
    return Standing(wants=bool(started), started=frozenset(started), positions=positions, start=start)


@pytest.mark.parametrize(
    ("held", "does"),
    [
        (standing(5, 7), True),
        (standing(5, 7, 0, 0, started=(0, 1, 2, 3)), True),
        (standing(5, 8), False),
        (standing(0, 0), False),
        # Not all of them are there yet.
        (standing(5, 0, started=(0,)), False),
        # One that had not moved.
        (standing(5, 7, 1, 0, started=(0, 1, 2)), False),
        (standing(5, 7, start=packed_ring.START), False),
    ],
)
def test_all_rings_that_moved_must_be_continued(held: Standing, does: bool) -> None:
    former = standing(5, 7, 0, 0, started=())
    padded = replace(held, positions=(*held.positions, 0, 0, 0, 0)[:4])
    assert padded.continues(former) is does


def test_rings_at_their_beginning_are_continued_by_none() -> None:
    for start in (0, packed_ring.START):
        one = standing(start, start, start=start)
        assert not one.continues(one)


def test_a_ring_counts_if_it_is_served_and_memory_is_shared() -> None:
    state = SessionState(vrings=[VringState() for _ in range(4)])
    assert not Standing.of(state, OFFER).wants
    state.vrings[1].started = state.vrings[1].enabled = True
    assert not Standing.of(state, OFFER).wants
    state.regions = [None]  # type: ignore[list-item]
    assert Standing.of(state, OFFER).wants
    assert Standing.of(state, OFFER).started == {1}
    state.vrings[1].enabled = False
    assert not Standing.of(state, OFFER).wants
    state.features_acked = int(Feature.RING_PACKED)
    assert Standing.of(state, OFFER).start == packed_ring.START


def test_a_role_is_what_the_rule_says() -> None:
    ownership = Ownership()
    ownership.decide({1: standing(0, 0), 2: standing(0, 0), 3: standing(0, 0, started=())})
    assert [ownership.role(number) for number in (1, 2, 3)] == [Role.OWNS, Role.HELD, Role.IDLE]


def test_room_is_made_by_the_oldest_that_has_nothing() -> None:
    bare, sharing, running = SessionState(), SessionState(regions=[None]), SessionState()  # type: ignore[list-item]
    running.vrings = [VringState(started=True)]
    assert least_needed([(1, running), (2, sharing), (5, bare), (4, bare)]) == 4
    assert least_needed([(1, running), (2, sharing)]) is None
