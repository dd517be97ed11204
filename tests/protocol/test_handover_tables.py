"""Both tables of the handover: walked pair by pair, then every run of the two together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.kit.cases import each_case
from tests.protocol.handover_model import (
    ALL_RULES,
    Again,
    Broken,
    Rules,
    Step,
    World,
    broken_always,
    explore,
    explore_two,
    fates,
    may_go_further,
    may_try_again,
    sizes,
    steps,
    without_destination,
    without_source,
)

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
    S.PREPARED: {S.SWITCHING: "continued", S.SETTING_UP: "setup-outdated", **UNDONE},
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
    D.PREPARED: {
        D.READY: "switchover-adopted",
        D.SETTING_UP: "setup-outdated",
        D.RECOVERING: "source-died",
        **GIVEN_UP,
    },
    D.READY: {D.OWNER: "commit-received", D.RECOVERING: "source-died", **GIVEN_UP},
    D.OWNER: {D.COMPLETED: "settled", D.OWNER: "channel-lost source-died"},
    D.RECOVERING: {D.COMPLETED: "settled", D.RECOVERING: "channel-lost"},
    D.COMPLETED: {},
    D.FAILED: {},
}


def drawn_steps(drawing: Mapping[StateT, Mapping[StateT, str]]) -> dict[tuple[str, str], StateT]:
    return {
        (state, event): target
        for state, targets in drawing.items()
        for target, events in targets.items()
        for event in events.split()
    }


@each_case("event", SourceEvent)
@each_case("state", SourceState)
def test_the_source_takes_the_steps_that_are_drawn_and_no_other(state: SourceState, event: SourceEvent) -> None:
    check_step(Machine(state, SOURCE), event, drawn_steps(SOURCE_DRAWING).get((state, event)))


@each_case("event", DestinationEvent)
@each_case("state", DestinationState)
def test_the_destination_takes_the_steps_that_are_drawn_and_no_other(
    state: DestinationState, event: DestinationEvent
) -> None:
    check_step(Machine(state, DESTINATION), event, drawn_steps(DESTINATION_DRAWING).get((state, event)))


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


@each_case("event", [E.REFUSED, E.CHANNEL_LOST, E.PEER_DIED, E.TIMED_OUT, E.FAILED_HERE, E.CANCEL], ids=str)
@each_case("state", [S.CONNECTING, S.GREETING, S.SETTING_UP, S.PREPARED, S.SWITCHING], ids=str)
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

IN_TIME = [rules for rules in ALL_RULES if rules.ends_in_time]

every_rule = pytest.mark.parametrize("rules", ALL_RULES, ids=str)


@every_rule
def test_never_two_owners_whatever_dies_breaks_or_hangs(rules: Rules) -> None:
    explored = explore(rules)
    assert {world.source for world in explored.worlds} == set(SourceState)
    assert {world.destination for world in explored.worlds} == set(DestinationState)
    assert not explored.broken.keys() - {Broken.NOBODY}


@pytest.mark.parametrize("rules", IN_TIME, ids=str)
def test_in_the_end_one_side_serves_as_long_as_one_lives(rules: Rules) -> None:
    assert explore(rules).broken == {}


def test_who_waits_too_briefly_for_a_death_would_leave_nobody() -> None:
    # Why DEATH_TIMEOUT_S and DEATH_GRACE_S are longer than a process needs to end: the one assumption about time.
    for rules in ALL_RULES:
        if not rules.ends_in_time:
            assert explore(rules).broken.keys() == {Broken.NOBODY}


@every_rule
def test_a_destination_that_hands_over_in_its_turn_makes_no_two_owners(rules: Rules) -> None:
    explored = explore_two(replace(rules, changes_max=0, code_runs=False), Again.FROM_DESTINATION)
    assert explored.two_owners is None
    assert explored.world_count > 10_000


# A hundred thousand worlds each: the tamest and the wildest. What frontends change would make a million of them, and
# has nothing to do with a second destination: `test_never_two_owners` walks that.
@pytest.mark.parametrize("rules", [ALL_RULES[0], ALL_RULES[-1]], ids=str)
def test_a_source_that_tries_another_destination_makes_no_two_owners(rules: Rules) -> None:
    explored = explore_two(replace(rules, changes_max=0, code_runs=False), Again.FROM_SOURCE)
    assert explored.two_owners is None
    assert explored.world_count > 10_000


def test_the_page_says_how_much_was_walked() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs/handover.md").read_text().split())
    assert sizes() in text


# -- what would be noticed --


def with_step(rules: Rules, state: str, event: str, target: SourceState | DestinationState | None) -> Rules:
    """The rules with one step that leads elsewhere, or nowhere."""
    if isinstance(state, SourceState):
        assert not isinstance(target, DestinationState)
        source = {**rules.source_table, (state, SourceEvent(event)): target}
        return replace(rules, source_table={key: to for key, to in source.items() if to is not None})
    assert not isinstance(target, SourceState)
    destination = {**rules.destination_table, (DestinationState(state), DestinationEvent(event)): target}
    return replace(rules, destination_table={key: to for key, to in destination.items() if to is not None})


@each_case(
    ("state", "event", "target", "broken"),
    [
        (S.COMMITTED, E.CHANNEL_LOST, S.FAILED, Broken.TWO_OWNERS),
        (S.COMMITTED, E.TIMED_OUT, S.FAILED, Broken.TWO_OWNERS),
        (S.COMMITTED, E.REFUSED, S.TAKEN_BACK, Broken.TWO_OWNERS),
        (S.FENCING, E.TIMED_OUT, S.TAKEN_BACK, Broken.TWO_OWNERS),
        (S.IN_DOUBT, E.TIMED_OUT, S.TAKEN_BACK, Broken.TWO_OWNERS),
        (D.READY, F.CHANNEL_LOST, D.RECOVERING, Broken.TWO_OWNERS),
        (D.PREPARED, F.CHANNEL_LOST, D.RECOVERING, Broken.TWO_OWNERS),
        (D.PREPARED, F.CANCELLED, D.RECOVERING, Broken.TWO_OWNERS),
        (D.READY, F.CANCELLED, D.RECOVERING, Broken.OLD_STATE),
        (D.PREPARED, F.SWITCHOVER_ADOPTED, D.OWNER, Broken.TWO_OWNERS),
        (D.PREPARED, F.SOURCE_DIED, D.FAILED, Broken.NOBODY),
        (D.READY, F.SOURCE_DIED, D.FAILED, Broken.NOBODY),
        (S.COMMITTED, E.PEER_DIED, S.COMPLETED, Broken.NOBODY),
        (S.IN_DOUBT, E.PEER_DIED, S.COMPLETED, Broken.NOBODY),
        (S.SWITCHING, E.CHANNEL_LOST, S.COMPLETED, Broken.NOBODY),
        (S.IN_DOUBT, E.PEER_DIED, None, Broken.WAITS_FOREVER),
        (S.FENCING, E.PEER_DIED, None, Broken.WAITS_FOREVER),
        (D.READY, F.SOURCE_DIED, None, Broken.WAITS_FOREVER),
        (S.COMMITTING, E.CHANNEL_LOST, None, Broken.WAITS_FOREVER),
        (D.READY, F.CHANNEL_LOST, None, Broken.WAITS_FOREVER),
        (D.OWNER, F.SETTLED, None, Broken.WAITS_FOREVER),
    ],
)
def test_a_wrong_step_would_be_noticed(
    state: str, event: str, target: SourceState | DestinationState | None, broken: Broken
) -> None:
    assert any(broken in explore(with_step(rules, state, event, target)).broken for rules in IN_TIME)


def test_a_source_that_did_not_quiesce_would_be_noticed() -> None:
    for rules in IN_TIME:
        assert Broken.OLD_DEVICE in explore(replace(rules, quiesces=False)).broken


def test_a_destination_that_did_not_look_for_a_revocation_would_be_noticed() -> None:
    for rules in IN_TIME:
        blind = replace(rules, looks_at_revocation=False)
        assert Broken.OLD_STATE in explore(blind).broken
    two = explore_two(replace(ALL_RULES[0], looks_at_revocation=False, changes_max=0), Again.FROM_SOURCE).two_owners
    assert two is not None
    assert two.first.destination_serves


def test_a_destination_that_did_not_look_for_changes_would_be_noticed() -> None:
    for rules in IN_TIME:
        assert Broken.OLD_STATE in explore(replace(rules, looks_at_changes=False)).broken


def test_a_destination_that_did_not_wait_for_its_source_would_be_noticed() -> None:
    for rules in IN_TIME:
        two = explore_two(replace(rules, waits_for_source=False, changes_max=0), Again.FROM_DESTINATION).two_owners
        assert two is not None
        assert two.first.source is S.TAKEN_BACK


# -- at random, beyond what can be walked --


class Handovers(RuleBasedStateMachine):
    """Handover after handover among any number of processes, of which all earlier ones may be there still.

    Every step is one of the model's, and the machines that Outgoing and Incoming use fire it.
    """

    @initialize(rules=st.sampled_from(ALL_RULES))
    def begin(self, rules: Rules) -> None:
        self.world_rules = rules
        self.handovers: list[tuple[int, int, World]] = []
        """(source's process, destination's process, world) of each."""
        self.process_count = 1
        self.machines: list[tuple[Machine[Any, Any], Machine[Any, Any]]] = []
        self.dead: set[int] = set()
        self.hand_over(0)

    def hand_over(self, source: int) -> None:
        self.handovers.append((source, self.process_count, World()))
        self.machines.append((source_machine(), destination_machine()))
        self.process_count += 1

    @precondition(lambda self: bool(self.taken_by_themselves()))
    @rule(data=st.data())
    def somebody_steps(self, data: st.DataObject) -> None:
        number, step = data.draw(st.sampled_from(self.taken_by_themselves()))
        self.take(number, step)

    @precondition(lambda self: bool(self.steps_of(fates)))
    @rule(data=st.data())
    def something_happens(self, data: st.DataObject) -> None:
        number, step = data.draw(st.sampled_from(self.steps_of(fates)))
        self.take(number, step)

    @precondition(lambda self: self.process_count < PROCESSES_MAX and bool(self.may_hand_over()))
    @rule(data=st.data())
    def another_handover_begins(self, data: st.DataObject) -> None:
        self.hand_over(data.draw(st.sampled_from(self.may_hand_over())))

    @rule()
    def nothing_happens(self) -> None:
        """For when nothing is left that could."""

    def steps_of(self, kind: Callable[[World, Rules], Iterator[Step]]) -> list[tuple[int, Step]]:
        return [
            (number, step)
            for number, (_, _, world) in enumerate(self.handovers)
            for step in kind(world, self.world_rules)
        ]

    def taken_by_themselves(self) -> list[tuple[int, Step]]:
        return self.steps_of(steps)

    def may_hand_over(self) -> list[int]:
        """Processes that have the guest for good, and hand over to nobody now."""
        found = []
        for number, (source, destination, world) in enumerate(self.handovers):
            later = self.handovers[number + 1 :]
            if may_try_again(world) and not any(source in each[:2] for each in later):
                found.append(source)
            if may_go_further(world, self.world_rules) and not any(destination in each[:2] for each in later):
                found.append(destination)
        return found

    def take(self, number: int, step: Step) -> None:
        source, destination, before = self.handovers[number]
        self.handovers[number] = (source, destination, step.world)
        machine_of_source, machine_of_destination = self.machines[number]
        if step.event is not None:
            (machine_of_source if step.side == "source" else machine_of_destination).fire(step.event)
        if step.event is E.CONNECTED:
            machine_of_destination.fire(F.CONNECTED)
        for process, lived, lives in (
            (source, before.source_lives, step.world.source_lives),
            (destination, before.destination_lives, step.world.destination_lives),
        ):
            if lived and not lives:
                self.dies(process)

    def dies(self, process: int) -> None:
        """In every handover that it takes part in."""
        for number, (source, destination, world) in enumerate(self.handovers):
            if source == process and world.source_lives:
                self.handovers[number] = (source, destination, without_source(world))
            if destination == process and world.destination_lives:
                self.handovers[number] = (source, destination, without_destination(world))

    @invariant()
    def one_process_at_most_has_the_guest(self) -> None:
        owners = set()
        for process in range(self.process_count):
            roles = [
                world.source_serves if source == process else world.destination_serves
                for source, destination, world in self.handovers
                if process in (source, destination)
            ]
            # Who takes part in several has the guest as the last one says.
            if roles and roles[-1]:
                owners.add(process)
        assert len(owners) <= 1, owners

    @invariant()
    def the_machines_stand_where_the_model_does(self) -> None:
        for (source, destination), (_, _, world) in zip(self.machines, self.handovers, strict=True):
            assert (source.state, destination.state) == (world.source, world.destination)

    @invariant()
    def no_world_breaks_a_promise(self) -> None:
        for _, _, world in self.handovers:
            assert not list(broken_always(world))


PROCESSES_MAX = 6

TestHandovers = Handovers.TestCase
TestHandovers.settings = settings(
    max_examples=150, stateful_step_count=80, derandomize=True, suppress_health_check=list(HealthCheck)
)
