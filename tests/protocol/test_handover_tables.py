"""Both tables of the handover: walked pair by pair, then every run of the two together."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

import pytest

from localmig.errors import StateError
from localmig.migration.handover import (
    DESTINATION,
    DESTINATION_ENDED,
    DESTINATION_SERVES,
    DESTINATION_STATUS,
    SOURCE,
    SOURCE_ENDED,
    SOURCE_SERVES,
    SOURCE_STATUS,
    DestinationEvent,
    DestinationState,
    Machine,
    SourceEvent,
    SourceState,
    destination_machine,
    source_machine,
)

S, E = SourceState, SourceEvent
D, F = DestinationState, DestinationEvent
StateT = TypeVar("StateT", bound=StrEnum)
EventT = TypeVar("EventT", bound=StrEnum)

UNDONE = {S.FAILED: "refused channel-lost peer-died timed-out failed-here", S.CANCELLED: "cancel"}

# Written down once more, as a person would draw it: from, to, the events that lead there.
SOURCE_DRAWING: Mapping[SourceState, Mapping[SourceState, str]] = {
    S.IDLE: {S.CONNECTING: "start"},
    S.CONNECTING: {S.GREETING: "connected", **UNDONE},
    S.GREETING: {S.SETTING_UP: "hello-accepted", **UNDONE},
    S.SETTING_UP: {S.PREPARED: "setup-acked", **UNDONE},
    S.PREPARED: {S.SWITCHING: "continued", **UNDONE},
    S.SWITCHING: {S.COMMITTING: "ready-received", **UNDONE},
    S.COMMITTING: {S.COMMITTED: "commit-sent", S.FAILED: "channel-lost failed-here"},
    S.COMMITTED: {
        S.COMPLETED: "done-received",
        S.IN_DOUBT: "channel-lost",
        S.TAKEN_BACK: "peer-died",
        S.FENCING: "timed-out refused",
    },
    S.FENCING: {S.TAKEN_BACK: "peer-died", S.FENCING: "done-received channel-lost", S.IN_DOUBT: "timed-out"},
    S.IN_DOUBT: {S.TAKEN_BACK: "peer-died", S.COMPLETED: "timed-out"},
    S.COMPLETED: {},
    S.TAKEN_BACK: {},
    S.FAILED: {},
    S.CANCELLED: {},
}

GIVEN_UP = {D.FAILED: "cancelled channel-lost timed-out failed-here"}

DESTINATION_DRAWING: Mapping[DestinationState, Mapping[DestinationState, str]] = {
    D.WAITING: {D.GREETING: "connected", D.FAILED: "failed-here"},
    D.GREETING: {D.SETTING_UP: "hello-accepted", D.FAILED: GIVEN_UP[D.FAILED] + " source-died"},
    D.SETTING_UP: {D.PREPARED: "setup-adopted", D.FAILED: GIVEN_UP[D.FAILED] + " source-died"},
    D.PREPARED: {D.READY: "switchover-adopted", D.RECOVERING: "source-died", **GIVEN_UP},
    D.READY: {D.OWNER: "commit-received", D.RECOVERING: "source-died", **GIVEN_UP},
    D.OWNER: {D.COMPLETED: "settled", D.OWNER: "channel-lost source-died"},
    D.RECOVERING: {D.COMPLETED: "settled", D.RECOVERING: "channel-lost"},
    D.COMPLETED: {},
    D.FAILED: {},
}


def steps(drawing: Mapping[StateT, Mapping[StateT, str]]) -> dict[tuple[str, str], StateT]:
    return {
        (state, event): target
        for state, targets in drawing.items()
        for target, events in targets.items()
        for event in events.split()
    }


@pytest.mark.parametrize("event", SourceEvent)
@pytest.mark.parametrize("state", SourceState)
def test_the_source_takes_the_steps_that_are_drawn_and_no_other(state: SourceState, event: SourceEvent) -> None:
    check_step(Machine(state, SOURCE), event, steps(SOURCE_DRAWING).get((state, event)))


@pytest.mark.parametrize("event", DestinationEvent)
@pytest.mark.parametrize("state", DestinationState)
def test_the_destination_takes_the_steps_that_are_drawn_and_no_other(
    state: DestinationState, event: DestinationEvent
) -> None:
    check_step(Machine(state, DESTINATION), event, steps(DESTINATION_DRAWING).get((state, event)))


def check_step(machine: Machine[StateT, EventT], event: EventT, target: StateT | None) -> None:
    before = machine.state
    assert machine.allows(event) == (target is not None)
    if target is None:
        with pytest.raises(StateError, match=f"'{event}' cannot happen while '{before}'"):
            machine.fire(event)
        assert machine.state is before
    else:
        assert machine.fire(event) is target
        assert machine.state is target


def test_both_sides_begin_at_rest() -> None:
    assert source_machine().state is S.IDLE
    assert destination_machine().state is D.WAITING


# -- what holds for each table alone --


def reachable(
    table: Mapping[tuple[StateT, EventT], StateT], start: StateT, *, but_not_by: frozenset[tuple[StateT, EventT]]
) -> set[StateT]:
    found, new = {start}, [start]
    while new:
        state = new.pop()
        for (before, event), after in table.items():
            if before is state and after not in found and (before, event) not in but_not_by:
                found.add(after)
                new.append(after)
    return found


def test_past_the_commit_the_source_serves_again_only_once_the_destination_is_dead() -> None:
    deaths = frozenset((state, E.PEER_DIED) for state in SourceState)
    sends_that_failed = frozenset({(S.COMMITTING, E.CHANNEL_LOST), (S.COMMITTING, E.FAILED_HERE)})
    assert not reachable(SOURCE, S.COMMITTING, but_not_by=deaths | sends_that_failed) & SOURCE_SERVES
    # Once COMMIT is out a failed send is no way back either.
    assert not reachable(SOURCE, S.COMMITTED, but_not_by=deaths) & SOURCE_SERVES
    assert reachable(SOURCE, S.COMMITTED, but_not_by=frozenset()) & SOURCE_SERVES == {S.TAKEN_BACK}


@pytest.mark.parametrize(
    "event", [E.REFUSED, E.CHANNEL_LOST, E.PEER_DIED, E.TIMED_OUT, E.FAILED_HERE, E.CANCEL], ids=str
)
@pytest.mark.parametrize("state", [S.CONNECTING, S.GREETING, S.SETTING_UP, S.PREPARED, S.SWITCHING], ids=str)
def test_before_the_commit_every_failure_leaves_the_source_serving(state: SourceState, event: SourceEvent) -> None:
    assert SOURCE[state, event] in SOURCE_SERVES & SOURCE_ENDED


def test_the_source_is_silent_from_switching_until_it_is_decided() -> None:
    assert set(SourceState) - SOURCE_SERVES == {
        S.SWITCHING,
        S.COMMITTING,
        S.COMMITTED,
        S.FENCING,
        S.IN_DOUBT,
        S.COMPLETED,
    }


def test_the_destination_serves_only_by_the_commit_or_by_the_sources_death() -> None:
    words = frozenset((state, event) for state in DestinationState for event in (F.COMMIT_RECEIVED, F.SOURCE_DIED))
    assert not reachable(DESTINATION, D.WAITING, but_not_by=words) & DESTINATION_SERVES


def test_who_serves_serves_on() -> None:
    for (state, event), after in DESTINATION.items():
        assert state not in DESTINATION_SERVES or after in DESTINATION_SERVES, (state, event)


def test_a_lost_channel_never_changes_the_owner() -> None:
    for (source, source_event), source_after in SOURCE.items():
        if source_event is E.CHANNEL_LOST and source not in (S.SWITCHING, S.COMMITTING):
            assert (source in SOURCE_SERVES) == (source_after in SOURCE_SERVES), source
    for (state, event), after in DESTINATION.items():
        if event is F.CHANNEL_LOST:
            assert (state in DESTINATION_SERVES) == (after in DESTINATION_SERVES), state


def test_every_state_is_reached_and_leads_to_an_end() -> None:
    nothing: frozenset[tuple[SourceState, SourceEvent]] = frozenset()
    assert reachable(SOURCE, S.IDLE, but_not_by=nothing) == set(SourceState)
    for state in SourceState:
        assert reachable(SOURCE, state, but_not_by=nothing) & SOURCE_ENDED, state
    nowhere: frozenset[tuple[DestinationState, DestinationEvent]] = frozenset()
    assert reachable(DESTINATION, D.WAITING, but_not_by=nowhere) == set(DestinationState)
    for other in DestinationState:
        assert reachable(DESTINATION, other, but_not_by=nowhere) & DESTINATION_ENDED, other


def test_ended_states_are_those_without_a_step() -> None:
    assert {state for state in SourceState if not SOURCE_DRAWING[state]} == SOURCE_ENDED
    assert {state for state in DestinationState if not DESTINATION_DRAWING[state]} == DESTINATION_ENDED


def test_every_state_has_a_status_of_qemu() -> None:
    # qapi/migration.json, MigrationStatus.
    words = {"none", "setup", "cancelling", "cancelled", "active", "completed", "failed", "device"}
    assert SOURCE_STATUS.keys() == set(SourceState)
    assert DESTINATION_STATUS.keys() == set(DestinationState)
    assert {*SOURCE_STATUS.values(), *DESTINATION_STATUS.values()} <= words
    for state in SourceState:
        assert (SOURCE_STATUS[state] in ("completed", "failed", "cancelled")) == (state in SOURCE_ENDED), state
    for other in DestinationState:
        assert (DESTINATION_STATUS[other] in ("completed", "failed")) == (other in DESTINATION_ENDED), other


# -- the two together --


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Two processes and a channel between them, in which each step of either is one step.

    Attributes:
        to_destination, to_source: what is on its way, oldest first.
        whole: the channel connects the two; what one side ended counts as not whole.
        shot: SIGKILL is on its way to the destination.
        served_there: the destination has served at some time.
    """

    source: SourceState = S.IDLE
    destination: DestinationState = D.WAITING
    source_lives: bool = True
    destination_lives: bool = True
    to_destination: tuple[str, ...] = ()
    to_source: tuple[str, ...] = ()
    whole: bool = True
    shot: bool = False
    served_there: bool = False

    @property
    def source_serves(self) -> bool:
        return self.source_lives and self.source in SOURCE_SERVES

    @property
    def destination_serves(self) -> bool:
        return self.destination_lives and self.destination in DESTINATION_SERVES


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What may happen besides.

    Attributes:
        loses_what_it_took: a channel that breaks forgets what is on its way (a proxy), or delivers it (a socket).
        kill_works: SIGKILL reaches the destination.
        destination_ends_in_time: a destination that cannot become the owner has ended before the source in doubt
            believes otherwise. It is what DEATH_TIMEOUT_S is for.
    """

    loses_what_it_took: bool
    kill_works: bool
    destination_ends_in_time: bool = True


# What a side sends when it comes into a state, and the word that takes it on.
SOURCE_SAYS = {S.GREETING: "HELLO", S.SETTING_UP: "SETUP", S.SWITCHING: "SWITCHOVER", S.COMMITTED: "COMMIT"}
SOURCE_HEARS = {
    (S.GREETING, "HELLO"): E.HELLO_ACCEPTED,
    (S.SETTING_UP, "SETUP-ACK"): E.SETUP_ACKED,
    (S.SWITCHING, "READY"): E.READY_RECEIVED,
    (S.COMMITTED, "DONE"): E.DONE_RECEIVED,
    (S.FENCING, "DONE"): E.DONE_RECEIVED,
}
DESTINATION_SAYS = {D.SETTING_UP: "HELLO", D.PREPARED: "SETUP-ACK", D.READY: "READY", D.OWNER: "DONE"}
DESTINATION_HEARS = {
    (D.GREETING, "HELLO"): F.HELLO_ACCEPTED,
    (D.SETTING_UP, "SETUP"): F.SETUP_ADOPTED,
    (D.PREPARED, "SWITCHOVER"): F.SWITCHOVER_ADOPTED,
    (D.READY, "COMMIT"): F.COMMIT_RECEIVED,
}
BEFORE_COMMIT = (S.CONNECTING, S.GREETING, S.SETTING_UP, S.PREPARED, S.SWITCHING)


def fire_source(world: World, event: SourceEvent) -> World:
    state = SOURCE[world.source, event]
    world = replace(world, source=state)
    if world.whole and state is not SOURCE.get((state, event)) and (said := SOURCE_SAYS.get(state)):
        world = replace(world, to_destination=(*world.to_destination, said))
    if state in (S.FAILED, S.CANCELLED) and world.whole:
        world = replace(world, to_destination=(*world.to_destination, "CANCEL"))
    if state in SOURCE_ENDED:
        world = replace(world, whole=False)
    return world


def fire_destination(world: World, event: DestinationEvent) -> World:
    before, state = world.destination, DESTINATION[world.destination, event]
    world = replace(world, destination=state, served_there=world.served_there or state in DESTINATION_SERVES)
    if world.whole and state is not before and (said := DESTINATION_SAYS.get(state)):
        world = replace(world, to_source=(*world.to_source, said))
    if state is D.FAILED and world.whole:
        world = replace(world, to_source=(*world.to_source, "REFUSE"), whole=False)
    return world


def source_steps(world: World) -> Iterator[World]:
    """What the source does next, and all that can go wrong with it."""
    if not world.source_lives or world.source in SOURCE_ENDED:
        return
    if world.source is S.IDLE:
        yield fire_source(world, E.START)
    elif world.source is S.CONNECTING and world.destination_lives:
        yield fire_destination(fire_source(world, E.CONNECTED), F.CONNECTED)
    elif world.source is S.PREPARED:
        yield fire_source(world, E.CONTINUED)
    elif world.source is S.COMMITTING:
        yield fire_source(world, E.COMMIT_SENT if world.whole else E.CHANNEL_LOST)
    elif world.to_source:
        said, rest = world.to_source[0], replace(world, to_source=world.to_source[1:])
        event = E.REFUSED if said == "REFUSE" else SOURCE_HEARS.get((world.source, said))
        if event is not None and (world.source, event) in SOURCE:
            yield fire_source(rest, event)
    elif not world.whole and (world.source, E.CHANNEL_LOST) in SOURCE:
        yield fire_source(world, E.CHANNEL_LOST)
    if not world.destination_lives and (world.source, E.PEER_DIED) in SOURCE:
        yield fire_source(world, E.PEER_DIED)
    if world.source in BEFORE_COMMIT:
        for event in (E.TIMED_OUT, E.FAILED_HERE, E.CANCEL):
            yield fire_source(world, event)
    if world.source is S.COMMITTED:
        yield replace(fire_source(world, E.TIMED_OUT), shot=True)


def doubt_steps(world: World, rules: Rules) -> Iterator[World]:
    """The destination is not seen to die in time."""
    if not world.source_lives:
        return
    if world.source is S.FENCING and not rules.kill_works:
        yield fire_source(world, E.TIMED_OUT)
    if world.source is S.IN_DOUBT:
        will_own = world.destination in DESTINATION_SERVES
        if will_own or not rules.destination_ends_in_time:
            yield fire_source(world, E.TIMED_OUT)


def destination_steps(world: World) -> Iterator[World]:
    if not world.destination_lives or world.destination in (D.WAITING, *DESTINATION_ENDED):
        return
    if world.destination is D.RECOVERING:
        yield fire_destination(world, F.SETTLED)
        return
    if world.to_destination:
        said, rest = world.to_destination[0], replace(world, to_destination=world.to_destination[1:])
        event = F.CANCELLED if said == "CANCEL" else DESTINATION_HEARS.get((world.destination, said))
        if event is not None and (world.destination, event) in DESTINATION:
            yield fire_destination(rest, event)
    elif not world.whole:
        if world.destination is D.OWNER:
            yield fire_destination(world, F.SETTLED)
        else:
            # A channel that ended is believed only once it was read to its end; then the pidfd tells which it was.
            yield fire_destination(world, F.CHANNEL_LOST if world.source_lives else F.SOURCE_DIED)
    if world.destination is not D.OWNER:
        yield fire_destination(world, F.FAILED_HERE)


def fates(world: World, rules: Rules) -> Iterator[World]:
    """Processes die, channels break."""
    if world.source_lives:
        yield replace(world, source_lives=False, to_source=(), whole=False)
    if world.destination_lives:
        yield replace(world, destination_lives=False, to_destination=(), whole=False)
    if world.whole and rules.loses_what_it_took:
        yield replace(world, whole=False, to_source=(), to_destination=())
    elif world.whole:
        yield replace(world, whole=False)


def explore(rules: Rules) -> tuple[set[World], set[World]]:
    """Every world that can come, and those in which nothing more happens by itself."""
    start = World()
    found, new, still = {start}, [start], set()
    while new:
        world = new.pop()
        own = [*source_steps(world), *doubt_steps(world, rules), *destination_steps(world)]
        if world.shot and rules.kill_works and world.destination_lives:
            own.append(replace(world, destination_lives=False, to_destination=(), whole=False))
        if world.destination is D.FAILED and world.destination_lives:
            # A destination that failed ends its process.
            own.append(replace(world, destination_lives=False, to_destination=(), whole=False))
        if not own:
            still.add(world)
        for after in itertools.chain(own, fates(world, rules)):
            if after not in found:
                found.add(after)
                new.append(after)
    return found, still


def two_owners(worlds: set[World]) -> list[World]:
    return [world for world in worlds if world.source_serves and world.destination_serves]


ALL_RULES = [
    Rules(loses_what_it_took=loses, kill_works=kills, destination_ends_in_time=in_time)
    for loses in (False, True)
    for kills in (True, False)
    for in_time in (True, False)
]


@pytest.mark.parametrize("rules", ALL_RULES, ids=str)
def test_never_two_owners_whatever_dies_breaks_or_hangs(rules: Rules) -> None:
    found, _ = explore(rules)
    assert {world.source for world in found} == set(SourceState)
    assert {world.destination for world in found} == set(DestinationState)
    assert not two_owners(found)


@pytest.mark.parametrize(
    ("state", "event", "target"),
    [
        (S.COMMITTED, E.CHANNEL_LOST, S.FAILED),
        (S.COMMITTED, E.TIMED_OUT, S.FAILED),
        (S.FENCING, E.TIMED_OUT, S.TAKEN_BACK),
        (S.IN_DOUBT, E.TIMED_OUT, S.TAKEN_BACK),
        (D.READY, F.CHANNEL_LOST, D.RECOVERING),
        (D.PREPARED, F.CANCELLED, D.RECOVERING),
        (D.READY, F.CANCELLED, D.RECOVERING),
    ],
)
def test_a_wrong_step_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, state: str, event: str, target: SourceState | DestinationState
) -> None:
    tables: dict[type, tuple[str, Mapping[Any, Any]]] = {
        SourceState: ("SOURCE", SOURCE),
        DestinationState: ("DESTINATION", DESTINATION),
    }
    name, table = tables[type(target)]
    monkeypatch.setattr(sys.modules[__name__], name, {**table, (state, event): target})
    found, _ = explore(Rules(loses_what_it_took=False, kill_works=False, destination_ends_in_time=False))
    assert two_owners(found)


@pytest.mark.parametrize("rules", [rules for rules in ALL_RULES if rules.destination_ends_in_time], ids=str)
def test_in_the_end_one_side_serves_as_long_as_one_lives(rules: Rules) -> None:
    _, still = explore(rules)
    assert {S.FAILED, S.CANCELLED, S.TAKEN_BACK, S.COMPLETED} <= {world.source for world in still}
    for world in still:
        if world.source_lives and world.source is not S.COMPLETED:
            assert world.source_serves or world.source is S.IN_DOUBT, world
        if world.source is S.COMPLETED:
            # Whatever became of it later: nobody let go before somebody else had the guest.
            assert world.served_there, world
        if world.source_lives and world.source is S.IN_DOUBT:
            assert world.destination_lives, world
            assert not rules.kill_works, world
        if not world.source_lives and world.source in (S.PREPARED, S.SWITCHING, S.COMMITTING, S.COMMITTED):
            assert world.destination_serves or not world.destination_lives, world


def test_a_source_that_waits_too_briefly_for_a_death_would_leave_nobody() -> None:
    # Why DEATH_TIMEOUT_S must be longer than a destination needs to end: the one assumption about time.
    rules = Rules(loses_what_it_took=True, kill_works=True, destination_ends_in_time=False)
    _, still = explore(rules)
    assert [world for world in still if world.source is S.COMPLETED and not world.served_there]
