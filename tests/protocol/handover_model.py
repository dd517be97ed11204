"""Source and destination as they step through both tables, with what each hears, and all that can go wrong there.

    python -m tests.protocol.handover_model

Owns:        the worlds two processes can be in, the steps out of each, what must hold in all of them.
Never sees:  sockets, parts, time: a wait that ends is a step like any other.
Read next:   test_handover_tables.py, which walks all of it; test_handover_pair.py, where the real Outgoing and Incoming
             must take no step that this model has not.

Each step is one that outgoing.py or incoming.py takes: the event it fires, in the state it is in, on the input it has.
Where one of their steps is more than one thing that a death can come between, it is more than one step here.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Any, Final, NamedTuple, Protocol

from localmig.migration.exchange import CATCH_UP_ROUNDS_MAX
from localmig.migration.handover import (
    DESTINATION,
    DESTINATION_ENDED,
    DESTINATION_SERVES,
    SOURCE,
    SOURCE_ENDED,
    SOURCE_SERVES,
    DestinationEvent,
    DestinationState,
    SourceEvent,
    SourceState,
)

S, E = SourceState, SourceEvent
D, F = DestinationState, DestinationEvent

SourceTable = Mapping[tuple[SourceState, SourceEvent], SourceState]
DestinationTable = Mapping[tuple[DestinationState, DestinationEvent], DestinationState]


class World(NamedTuple):
    """Two processes and a channel between them.

    Attributes:
        source, destination: where each stands, or stood when it died.
        source_lives, destination_lives: whether the process is there.
        to_destination, to_source: what is on its way, oldest first.
        unsaid: what the source, in the state it is in, has still to send before it listens.
        whole: the channel connects the two; what one side ended counts as not whole.
        shot: SIGKILL is on its way to the destination.
        revoked: the source said, in a way that outlives it, that it took its offer back.
        went_on: the source's control planes go on after they were frozen: what the destination holds of them is old.
        changes: how often a frontend changed something in the source since that began to count: what it says, which
            sessions there are, which of them owns.
        saved: how many of them are in the setup that was sent last.
        adopted: how many are in the setup that the destination has.
        rounds: how often the setup was sent again.
        frozen: the source's control planes are frozen, so nothing changes any more.
        let_go: the source said, in a way that outlives it, that it will never serve again.
        done_said: the destination serves, and has said so.
        gave_up: the destination discarded everything in a state that has no step for that; its process ends.
        served_there: the destination has served at some time.
        quiesced: code of devices' own has stopped in the source, so it changes nothing any more.
        code_ran: it ran since the setup was saved that was sent last.
        has_setup: the destination has received a setup that it has not adopted.
        heir: the source died when the destination had everything, and nothing has happened to that one since.
    """

    source: SourceState = S.IDLE
    destination: DestinationState = D.WAITING
    source_lives: bool = True
    destination_lives: bool = True
    to_destination: tuple[str, ...] = ()
    to_source: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()
    whole: bool = True
    shot: bool = False
    revoked: bool = False
    went_on: bool = False
    changes: int = 0
    saved: int = 0
    adopted: int = 0
    rounds: int = 0
    frozen: bool = False
    let_go: bool = False
    done_said: bool = False
    gave_up: bool = False
    served_there: bool = False
    heir: bool = False
    quiesced: bool = False
    code_ran: bool = False
    has_setup: bool = False

    @property
    def source_serves(self) -> bool:
        """Whether rings run there."""
        return self.source_lives and self.source in SOURCE_SERVES

    @property
    def destination_serves(self) -> bool:
        """Whether rings may run there."""
        return self.destination_lives and self.destination in DESTINATION_SERVES and not self.gave_up


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What may happen besides.

    Attributes:
        loses_what_it_took: a channel that breaks forgets what is on its way (a proxy), or delivers it (a socket).
        kill_works: SIGKILL reaches the destination.
        ends_in_time: a process that is dead, or cannot become the owner and ends, is seen to be dead before the other
            side believes otherwise. It is what DEATH_TIMEOUT_S and DEATH_GRACE_S are for.
        looks_at_revocation: a destination looks for it before it takes over. It does; this is how to see why.
        looks_at_changes: a destination looks whether its setup is as new as the source, before it takes over. Likewise.
        changes_max: how often a frontend changes something.
        quiesces: a source stops devices' code before it saves what that has done for the last time. Likewise.
        code_runs: whether there are devices with such code.
        waits_for_source: a destination hands over in its turn only once its source said that it let go. Likewise.
        source_table, destination_table: the steps; the handover's own, but where a test sees what a wrong one would do.
    """

    loses_what_it_took: bool
    kill_works: bool
    ends_in_time: bool = True
    looks_at_revocation: bool = True
    looks_at_changes: bool = True
    changes_max: int = 2
    quiesces: bool = True
    code_runs: bool = True
    waits_for_source: bool = True
    source_table: SourceTable = field(default_factory=lambda: SOURCE, hash=False)
    destination_table: DestinationTable = field(default_factory=lambda: DESTINATION, hash=False)

    def __str__(self) -> str:
        chosen = {
            "proxy": self.loses_what_it_took,
            "unkillable": not self.kill_works,
            "late": not self.ends_in_time,
        }
        return "-".join(name for name, is_so in chosen.items() if is_so) or "plain"


ALL_RULES: Final = tuple(
    Rules(loses_what_it_took=loses, kill_works=kills, ends_in_time=in_time)
    for loses in (False, True)
    for kills in (True, False)
    for in_time in (True, False)
)


class Input(StrEnum):
    """What makes a side step, where it is no frame of the other side."""

    HERE = "here"
    """It does what comes next, or cannot, or finds fault with what the other side sent."""
    OPERATOR = "operator"
    TIME = "time"
    """It has waited long enough."""
    END = "end"
    """The channel was read to its end."""
    DEATH = "death"
    """The other process is seen to be dead, by who waits for just that."""


class Step(NamedTuple):
    """One thing that happens.

    Attributes:
        side: who steps, "world" for what no side does.
        state: where that side stood.
        input: why: an `Input`, or the kind of the frame that it read.
        event: what it fires; None where it steps without.
        world: what is then.
        must: whether it will happen if nothing else does; else it is a mishap, or the operator's.
    """

    side: str
    state: StrEnum | None
    input: str
    event: StrEnum | None
    world: World
    must: bool = True


class _Fire(Protocol):
    """Fires an event where the table has it; `before` where the world is not the one it was."""

    def __call__(self, what: str, event: Any, before: World = ..., *, must: bool = ...) -> Iterator[Step]: ...


BEFORE_COMMIT: Final = (S.CONNECTING, S.GREETING, S.SETTING_UP, S.PREPARED, S.SWITCHING)

# What a side sends when it comes into a state, and the word that takes it on.
SOURCE_SAYS: Final[Mapping[SourceState, tuple[str, ...]]] = {
    S.GREETING: ("HELLO",),
    S.SETTING_UP: ("DESCRIPTION", "SETUP"),
    S.SWITCHING: ("SWITCHOVER",),
}
SOURCE_HEARS: Final = {
    (S.GREETING, "HELLO"): E.HELLO_ACCEPTED,
    (S.SETTING_UP, "SETUP_ACK"): E.SETUP_ACKED,
    (S.SWITCHING, "READY"): E.READY_RECEIVED,
    (S.COMMITTED, "DONE"): E.DONE_RECEIVED,
}
DESTINATION_SAYS: Final = {D.SETTING_UP: "HELLO", D.PREPARED: "SETUP_ACK", D.READY: "READY"}
DESTINATION_HEARS: Final = {
    (D.GREETING, "HELLO"): F.HELLO_ACCEPTED,
    (D.PREPARED, "SETUP"): F.SETUP_OUTDATED,
    (D.PREPARED, "SWITCHOVER"): F.SWITCHOVER_ADOPTED,
    (D.READY, "COMMIT"): F.COMMIT_RECEIVED,
}


def steps(world: World, rules: Rules) -> Iterator[Step]:
    """All that the two sides, and a SIGKILL on its way, can do next."""
    yield from source_steps(world, rules)
    yield from destination_steps(world, rules)
    if world.shot and rules.kill_works and world.destination_lives:
        yield Step("world", None, "SIGKILL", None, without_destination(world))


def fates(world: World, rules: Rules) -> Iterator[Step]:
    """What may happen besides, or never: frontends or devices' code change something, processes die, channels break."""
    is_read = world.source in (S.SETTING_UP, S.PREPARED) and not world.frozen
    if world.source_lives and is_read and world.changes < rules.changes_max:
        yield Step("world", None, "a frontend changes something", None, world._replace(changes=world.changes + 1))
    is_asked = world.source in (S.SETTING_UP, S.PREPARED) and not world.quiesced
    if world.source_lives and is_asked and rules.code_runs and not world.code_ran:
        yield Step("world", None, "a device's code runs", None, world._replace(code_ran=True))
    if world.source_lives:
        yield Step("world", None, "source dies", None, without_source(world))
    if world.destination_lives:
        yield Step("world", None, "destination dies", None, without_destination(world))
    if world.whole:
        kept = world._replace(whole=False)
        lost = kept._replace(to_source=(), to_destination=())
        yield Step("world", None, "channel breaks", None, lost if rules.loses_what_it_took else kept)


def without_destination(world: World) -> World:
    return world._replace(destination_lives=False, to_destination=(), whole=False, heir=False)


def source_steps(world: World, rules: Rules) -> Iterator[Step]:
    """What the source does next, and all that can go wrong with it."""
    state, table = world.source, rules.source_table
    if not world.source_lives:
        return
    if state is S.COMPLETED and not world.let_go:
        yield Step("source", state, Input.HERE, None, world._replace(let_go=True, whole=False))
    if state in (S.FAILED, S.CANCELLED):
        # Outgoing._abandon: rings first, then the word, then control planes.
        if not world.revoked:
            told = ("CANCEL",) if world.whole else ()
            after = world._replace(revoked=True, to_destination=(*world.to_destination, *told))
            yield Step("source", state, Input.HERE, None, after)
        elif not world.went_on:
            yield Step("source", state, Input.HERE, None, world._replace(went_on=True, whole=False))
        return

    def fire(what: str, event: SourceEvent, before: World = world, *, must: bool = True) -> Iterator[Step]:
        if (state, event) in table:
            yield Step("source", state, what, event, _source_fired(before, table[state, event]), must)

    if state is S.IDLE:
        yield from fire(Input.HERE, E.START)
    elif state is S.CONNECTING:
        if not world.destination_lives:
            yield from fire(Input.END, E.CHANNEL_LOST)
        elif world.destination is D.WAITING:
            connected = world._replace(destination=rules.destination_table[D.WAITING, F.CONNECTED])
            yield from fire(Input.HERE, E.CONNECTED, connected)
    elif state is S.COMMITTING:
        yield from _commit_steps(world, fire)
    elif world.unsaid and world.whole:
        first, *others = world.unsaid
        after = world._replace(unsaid=tuple(others), to_destination=(*world.to_destination, first))
        yield Step("source", state, Input.HERE, None, after)
    elif world.to_source and state in (*BEFORE_COMMIT, S.COMMITTED):
        # Also where it had more to say and cannot: why not may be there.
        said, rest = world.to_source[0], world._replace(to_source=world.to_source[1:])
        # REFUSE, or a word that cannot be.
        yield from fire(said, SOURCE_HEARS.get((state, said), E.REFUSED), rest)
    elif not world.whole and state in (*BEFORE_COMMIT, S.COMMITTED):
        if state is S.COMMITTED and not world.destination_lives:
            yield from fire(Input.END, E.PEER_DIED)
        # A process's sockets end a little before it is seen as dead.
        yield from fire(Input.END, E.CHANNEL_LOST)
    if state is S.PREPARED:
        yield from _catch_up_steps(world, rules, fire)
    if state in BEFORE_COMMIT:
        yield from fire(Input.HERE, E.FAILED_HERE, must=False)
        yield from fire(Input.HERE, E.REFUSED, must=False)
        yield from fire(Input.TIME, E.TIMED_OUT)
        yield from fire(Input.OPERATOR, E.CANCEL, must=False)
    if state is S.COMMITTED:
        yield from fire(Input.TIME, E.TIMED_OUT)
        # What is no DONE, and a bug of its own where the answer is awaited.
        yield from fire(Input.HERE, E.REFUSED, must=False)
        yield from fire(Input.HERE, E.CHANNEL_LOST, must=False)
    if state in (S.FENCING, S.IN_DOUBT):
        yield from _waiting_steps(world, rules, fire)


def _catch_up_steps(world: World, rules: Rules, fire: _Fire) -> Iterator[Step]:
    """Outgoing._catch_up: what changed is sent again, also when devices' code has stopped, and when all is frozen."""
    state, is_behind = world.source, world.changes != world.saved
    again = world._replace(rounds=world.rounds + 1)
    if world.frozen:
        yield from fire(Input.HERE, E.SETUP_OUTDATED if is_behind else E.CONTINUED, again if is_behind else world)
        return
    before_quiesced = 0 if world.quiesced else 1
    if (is_behind or (world.quiesced and world.code_ran)) and world.rounds < CATCH_UP_ROUNDS_MAX - 1 - before_quiesced:
        yield from fire(Input.HERE, E.SETUP_OUTDATED, again)
    if not world.quiesced:
        yield Step("source", state, Input.HERE, None, world._replace(quiesced=True))
    if (world.quiesced and not world.code_ran) or not rules.quiesces:
        yield Step("source", state, Input.HERE, None, world._replace(frozen=True))


def _commit_steps(world: World, fire: _Fire) -> Iterator[Step]:
    """COMMIT is so short that the socket takes it whole or not at all."""
    if world.whole:
        yield from fire(Input.HERE, E.COMMIT_SENT, world._replace(to_destination=(*world.to_destination, "COMMIT")))
    else:
        yield from fire(Input.END, E.CHANNEL_LOST)
    yield from fire(Input.TIME, E.CHANNEL_LOST)
    yield from fire(Input.HERE, E.FAILED_HERE, must=False)
    # An error nobody expects: it may have been sent.
    yield from fire(Input.HERE, E.COMMIT_SENT, must=False)


def _waiting_steps(world: World, rules: Rules, fire: _Fire) -> Iterator[Step]:
    """Nothing is read any more: only a death tells, or none in time."""
    if not world.destination_lives:
        yield from fire(Input.DEATH, E.PEER_DIED)
        if rules.ends_in_time:
            return
    late = not rules.ends_in_time
    if world.source is S.FENCING and (late or not rules.kill_works):
        yield from fire(Input.TIME, E.TIMED_OUT)
    if world.source is S.IN_DOUBT and (late or world.destination_serves):
        yield from fire(Input.TIME, E.TIMED_OUT)


def _source_fired(world: World, state: SourceState) -> World:
    world = world._replace(source=state, unsaid=SOURCE_SAYS.get(state, ()))
    if state is S.SETTING_UP:
        world = world._replace(saved=world.changes, code_ran=False)
    if state is S.FENCING:
        world = world._replace(shot=True)
    if state in (S.TAKEN_BACK, S.IN_DOUBT):
        world = world._replace(whole=False)
    return world


def destination_steps(world: World, rules: Rules) -> Iterator[Step]:
    """What the destination does next, and all that can go wrong with it."""
    state, table = world.destination, rules.destination_table
    if not world.destination_lives or state in (D.WAITING, D.COMPLETED):
        return
    if state is D.FAILED or world.gave_up:
        # A destination that failed ends its process.
        ended = world._replace(destination_lives=False, to_destination=(), whole=False)
        yield Step("destination", state, Input.HERE, None, ended)
        return

    def fire(what: str, event: DestinationEvent, before: World = world, *, must: bool = True) -> Iterator[Step]:
        if (state, event) in table:
            after = _destination_fired(before, event, table[state, event])
            yield Step("destination", state, what, event, after, must)

    if state is D.RECOVERING:
        yield from fire(Input.HERE, F.SETTLED)
        return
    if state is D.OWNER:
        yield from _owner_steps(world, fire)
        return
    if world.has_setup:
        # One is on its way at a time, so it is the one that was saved last.
        heard = Input.HERE if world.rounds else "SETUP"  # one that comes again has outdated the other first
        yield from fire(heard, F.SETUP_ADOPTED, world._replace(has_setup=False, adopted=world.saved))
        yield from fire(Input.HERE, F.FAILED_HERE, must=False)
        return
    if world.to_destination:
        said, rest = world.to_destination[0], world._replace(to_destination=world.to_destination[1:])
        if (state, said) in ((D.SETTING_UP, "DESCRIPTION"), (D.PREPARED, "DESCRIPTION")):
            yield Step("destination", state, said, None, rest)
        elif said == "CANCEL":
            yield from fire(said, F.CANCELLED, rest)
        elif (state, said) == (D.SETTING_UP, "SETUP"):
            yield Step("destination", state, said, None, rest._replace(has_setup=True))
        elif (state, said) == (D.PREPARED, "SETUP"):
            yield from fire(said, F.SETUP_OUTDATED, rest._replace(has_setup=True))
        else:
            yield from fire(said, DESTINATION_HEARS.get((state, said), F.FAILED_HERE), rest)
    elif not world.whole:
        # Only now it is believed; then the pidfd tells which it was. In GREETING there is none yet.
        if world.source_lives or state is D.GREETING or not rules.ends_in_time:
            yield from fire(Input.END, F.CHANNEL_LOST)
        if not world.source_lives and state is not D.GREETING:
            revoked = world.revoked and rules.looks_at_revocation
            outdated = world.changes != world.adopted and rules.looks_at_changes
            yield from fire(Input.END, F.CANCELLED if revoked else F.CHANNEL_LOST if outdated else F.SOURCE_DIED)
    if state is not D.READY:
        # Past READY the source alone decides how long.
        yield from fire(Input.TIME, F.TIMED_OUT)
    yield from fire(Input.HERE, F.FAILED_HERE, must=False)


def _owner_steps(world: World, fire: _Fire) -> Iterator[Step]:
    state = world.destination
    if not world.done_said:
        said = ("DONE",) if world.whole else ()
        yield Step(
            "destination", state, Input.HERE, None, world._replace(done_said=True, to_source=(*world.to_source, *said))
        )
        # Its rings do not start: it ends, and the source takes back.
        refusal = ("REFUSE",) if world.whole else ()
        after = world._replace(gave_up=True, whole=False, to_source=(*world.to_source, *refusal), heir=False)
        yield Step("destination", state, Input.HERE, None, after, must=False)
        return
    if world.to_destination:
        yield from fire(world.to_destination[0], F.SETTLED)
    elif not world.whole:
        yield from fire(Input.END, F.SETTLED)
    yield from fire(Input.TIME, F.SETTLED)
    # An error nobody expects ends nothing: it alone can serve.
    yield from fire(Input.HERE, F.SETTLED, must=False)


def _destination_fired(world: World, event: DestinationEvent, state: DestinationState) -> World:
    said = (DESTINATION_SAYS[state],) if world.whole and state in DESTINATION_SAYS else ()
    world = world._replace(
        destination=state,
        to_source=(*world.to_source, *said),
        served_there=world.served_there or state in DESTINATION_SERVES,
    )
    if state is D.FAILED:
        refusal = ("REFUSE",) if world.whole and event is F.FAILED_HERE else ()
        # What it cannot do, or will not wait for, is no fault of a source that is dead.
        excused = event in (F.FAILED_HERE, F.TIMED_OUT)
        world = world._replace(to_source=(*world.to_source, *refusal), whole=False, heir=world.heir and not excused)
    if state is D.COMPLETED:
        world = world._replace(whole=False)
    return world


# -- what must hold -----------------------------------------------------------------------------------------------


class Broken(StrEnum):
    """A promise that a world breaks."""

    TWO_OWNERS = "two owners"
    OLD_STATE = "taken over from a source that had gone on"
    OLD_DEVICE = "handed over without what a device's code did last"
    NOBODY = "nobody serves, although somebody lives who could"
    WAITS_FOREVER = "a side waits for what never comes"


def broken_always(world: World) -> Iterator[Broken]:
    """What no world may break."""
    if world.source_serves and world.destination_serves:
        yield Broken.TWO_OWNERS
    if world.destination_serves and (world.went_on or world.changes != world.adopted):
        yield Broken.OLD_STATE
    if world.destination is D.OWNER and world.code_ran:
        yield Broken.OLD_DEVICE


def broken_in_the_end(world: World) -> Iterator[Broken]:
    """What a world may not break in which nothing more must happen: all was delivered, all waits have ended."""
    if world.source_lives and world.source not in SOURCE_ENDED:
        yield Broken.WAITS_FOREVER
    if world.destination_lives and world.destination not in (D.WAITING, *DESTINATION_ENDED):
        yield Broken.WAITS_FOREVER
    if world.source_lives and not world.source_serves and not world.served_there:
        # Whatever became of the destination later: nobody lets go before somebody else had the guest.
        yield Broken.NOBODY
    if world.heir and not world.destination_serves:
        yield Broken.NOBODY


class Again(StrEnum):
    """What a second handover is, beside the first."""

    FROM_SOURCE = "the source tries another destination"
    """The first one did not become one, but its process may be there still."""
    FROM_DESTINATION = "the destination hands over in its turn"
    """It owns the guest; the process that had it before may be there still."""


class Two(NamedTuple):
    """Three processes: a handover, and one after it.

    Attributes:
        first: the one that began before.
        second: the other; None before it begins.
        again: who hands over in it.
    """

    first: World
    second: World | None
    again: Again

    def owners(self) -> int:
        """How many processes run the guest's rings."""
        first, second = self.first, self.second
        if second is None:
            return first.source_serves + first.destination_serves
        if self.again is Again.FROM_SOURCE:
            return first.destination_serves + second.source_serves + second.destination_serves
        handed = second.source_serves and first.destination_serves
        return first.source_serves + handed + second.destination_serves


def steps_of_two(two: Two, rules: Rules, moves: Moves) -> Iterator[Two]:
    """All that can happen next, by itself or not: each of the three steps, dies, or loses its channel."""
    # Made by their places: there are millions of them.
    for each in moves(two.first):
        changed = Two(each, two.second, two.again)
        if two.second is not None and each.source_lives != two.first.source_lives and two.again is Again.FROM_SOURCE:
            changed = changed._replace(second=without_source(two.second))
        ended = each.destination_lives != two.first.destination_lives
        if two.second is not None and ended and two.again is Again.FROM_DESTINATION:
            changed = changed._replace(second=without_source(two.second))
        yield changed
    if two.second is not None:
        for each in moves(two.second):
            changed = Two(two.first, each, two.again)
            if each.source_lives != two.second.source_lives:
                if two.again is Again.FROM_SOURCE:
                    changed = changed._replace(first=without_source(two.first))
                else:
                    changed = changed._replace(first=without_destination(two.first))
            yield changed
    elif _may_begin(two, rules):
        yield two._replace(second=World())


Moves = Callable[[World], "tuple[World, ...]"]


def _may_begin(two: Two, rules: Rules) -> bool:
    return may_try_again(two.first) if two.again is Again.FROM_SOURCE else may_go_further(two.first, rules)


def may_try_again(world: World) -> bool:
    """Whether the source may hand over to another destination: it went all the way back."""
    return world.source_lives and world.source in (S.FAILED, S.CANCELLED) and world.went_on


def may_go_further(world: World, rules: Rules) -> bool:
    """Whether the destination may hand over in its turn: it has the guest, and nobody can come back for it."""
    settled = world.destination_lives and world.destination is D.COMPLETED
    return settled and (not rules.waits_for_source or world.let_go or not world.source_lives)


def without_source(world: World) -> World:
    inherits = world.destination in (D.PREPARED, D.READY, D.OWNER) and world.destination_lives
    inherits = inherits and world.adopted == world.changes
    return world._replace(
        source_lives=False,
        to_source=(),
        whole=False,
        heir=inherits and not world.gave_up and not world.revoked and world.source is not S.COMPLETED,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Explored:
    """Everything that can come of two processes at rest.

    Attributes:
        worlds: every one, with the length of the shortest way there.
        step_count: out of all of them together.
        fired: each (side, state, input, event) that a step had.
        broken: promises, each with a world that breaks it.
    """

    worlds: Mapping[World, int]
    step_count: int
    fired: frozenset[tuple[str, StrEnum | None, str, StrEnum]]
    broken: Mapping[Broken, World]


@cache
def explore(rules: Rules) -> Explored:
    """Walks breadth-first until there is nothing new."""
    start = World()
    worlds, ahead = {start: 0}, deque([start])
    step_count = 0
    fired = set()
    broken: dict[Broken, World] = {}
    while ahead:
        world = ahead.popleft()
        own = list(steps(world, rules))
        is_still = not any(step.must for step in own)
        found = [*broken_always(world), *(broken_in_the_end(world) if is_still else ())]
        for each in found:
            broken.setdefault(each, world)
        for step in itertools.chain(own, fates(world, rules)):
            step_count += 1
            if step.event is not None:
                fired.add((step.side, step.state, step.input, step.event))
            if step.world not in worlds:
                worlds[step.world] = worlds[world] + 1
                ahead.append(step.world)
    return Explored(worlds=worlds, step_count=step_count, fired=frozenset(fired), broken=broken)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExploredTwo:
    """Everything that can come of two handovers.

    Attributes:
        world_count, step_count: how many there are.
        two_owners: one in which two processes run rings, None where there is none.
    """

    world_count: int
    step_count: int
    two_owners: Two | None


@cache
def explore_two(rules: Rules, again: Again) -> ExploredTwo:
    """Walks two handovers until there is nothing new, or two owners are found."""

    @cache
    def moves(world: World) -> tuple[World, ...]:
        return tuple(step.world for step in (*steps(world, rules), *fates(world, rules)))

    start = Two(first=World(), second=None, again=again)
    found, ahead = {start}, deque([start])
    step_count = 0
    while ahead:
        two = ahead.popleft()
        if two.owners() > 1:
            return ExploredTwo(world_count=len(found), step_count=step_count, two_owners=two)
        for after in steps_of_two(two, rules, moves):
            step_count += 1
            if after not in found:
                found.add(after)
                ahead.append(after)
    return ExploredTwo(world_count=len(found), step_count=step_count, two_owners=None)


def sizes() -> str:
    """How much is walked, as docs/handover.md tells it."""
    one = explore(ALL_RULES[0])
    two = [explore_two(replace(ALL_RULES[0], changes_max=0, code_runs=False), again) for again in Again]
    return (
        f"{len(one.worlds)} worlds with {one.step_count} steps between them, none more than {max(one.worlds.values())} "
        f"steps away; {two[0].world_count} with {two[0].step_count} steps where the source tries a second destination, "
        f"{two[1].world_count} with {two[1].step_count} where the destination hands over in its turn"
    )


def main() -> None:
    """Says how large it is under each of the rules."""
    for rules in ALL_RULES:
        explored = explore(rules)
        sys.stdout.write(
            f"{rules}: {len(explored.worlds)} worlds, {explored.step_count} steps, broken: {list(explored.broken)}\n"
        )
        for again in Again:
            found = explore_two(replace(rules, changes_max=0, code_runs=False), again)
            sys.stdout.write(f"  {again}: {found.world_count} worlds, {found.step_count} steps, {found.two_owners}\n")
    sys.stdout.write(sizes() + "\n")


if __name__ == "__main__":
    main()
