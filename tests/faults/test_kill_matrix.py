"""Every named point of a handover, and a side that is killed there, stopped and continued, or has a bug: who serves.

The points are all that a handover passes (`localmig.testing.faults`), in zones at which the same is to come of it.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import pytest
from tests.faults.matrix import FLOW_SECONDS_MAX, Chain, Daemon, census, census_like, end_of, wait_stopped

from localmig.testing.faults import Action, Entry, Fault, Place, Point
from localmig.testing.frames import Way
from localmig.testing.namespace import unavailable_reason

DOWNTIME_LIMIT_MS: Final = 200
COMMIT_TIMEOUT_MS: Final = 200
"""In cells where a side hangs, for them to be quick."""

PATIENT_MS: Final = 10_000
"""In all others: a machine under load must not look like a hang."""

NOISE_MS: Final = 3000
"""How much longer than it must a silence may be: a machine under load lets a process wait for hundreds of milliseconds,
and a cell has several processes that wait for each other. A hang lasts for good."""

QUIET_SECONDS: Final = 0.1
"""How long nothing may come while who serves is stopped: a hundred frames' time."""

IN_HAND_MAX: Final = 64
"""Packets of one way that a queue pair has in hand at once (BATCH_PACKETS of the packet path): so many may be lost on
the way in, and sent again on the way out, where it is killed while it runs."""


class Side(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class Outcome(StrEnum):
    """What came of a handover."""

    MOVED = "moved"
    """In order: the destination serves."""
    STAYED = "stayed"
    """Before COMMIT it came to nothing: the source served on."""
    RECOVERED = "recovered"
    """The source died, the destination took over from guest memory."""
    TAKEN_BACK = "taken back"
    """The destination died past COMMIT, the source serves again."""
    FENCED = "fenced"
    """The destination hung, or talked nonsense, past COMMIT and was killed; the source serves again."""
    NOBODY = "nobody"
    """Nobody has the guest any more: its connection is closed, its TAP gone."""


OWNER: Final = {
    Outcome.MOVED: Side.DESTINATION,
    Outcome.STAYED: Side.SOURCE,
    Outcome.RECOVERED: Side.DESTINATION,
    Outcome.TAKEN_BACK: Side.SOURCE,
    Outcome.FENCED: Side.SOURCE,
    Outcome.NOBODY: None,
}


class Meanwhile(StrEnum):
    """What the guest notices while a side is stopped."""

    FLOWS = "flows"
    """The other side serves."""
    SILENT = "silent"
    """Who serves is stopped, or alone may say who does."""
    SETTLES = "settles"
    """The other side waits, no longer than a limit says, and serves then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Zone:
    """Points at which the same comes of the same."""

    name: str
    side: Side
    points: str
    kill: Outcome
    stop: tuple[Meanwhile, Outcome]
    error: Outcome
    is_met: bool = True


def _steps(steps: str, *, parts: str = "net0 nic0 *") -> str:
    return " ".join(f"before:{part}.{step} after:{part}.{step}" for step in steps.split() for part in parts.split())


ZONES: Final = (
    Zone(
        name="not yet connected",
        side=Side.SOURCE,
        points="leave:idle enter:connecting",
        kill=Outcome.NOBODY,
        stop=(Meanwhile.SILENT, Outcome.MOVED),
        error=Outcome.STAYED,
        is_met=False,
    ),
    Zone(
        name="setup",
        side=Side.SOURCE,
        points=f"""leave:connecting enter:greeting before-send:HELLO after-send:HELLO
            after-receive:HELLO leave:greeting enter:setting-up {_steps("freeze save_setup")}
            before-send:DESCRIPTION after-send:DESCRIPTION before-send:SETUP""",
        kill=Outcome.NOBODY,
        stop=(Meanwhile.SILENT, Outcome.MOVED),
        error=Outcome.STAYED,
    ),
    Zone(
        name="setup is out",
        side=Side.SOURCE,
        points=f"""after-send:SETUP after-receive:SETUP_ACK leave:setting-up enter:prepared leave:prepared
            enter:switching {_steps("stop")} {_steps("save_switchover", parts="*")}
            before-send:SWITCHOVER after-send:SWITCHOVER after-receive:READY leave:switching enter:committing""",
        kill=Outcome.RECOVERED,
        stop=(Meanwhile.SILENT, Outcome.MOVED),
        error=Outcome.STAYED,
    ),
    Zone(
        name="about to commit",
        side=Side.SOURCE,
        points="before-send:COMMIT",
        kill=Outcome.RECOVERED,
        stop=(Meanwhile.SILENT, Outcome.MOVED),
        # It cannot know that nothing was sent.
        error=Outcome.FENCED,
    ),
    Zone(
        name="committed",
        side=Side.SOURCE,
        points=f"""after-send:COMMIT leave:committing enter:committed after-receive:DONE leave:committed enter:completed
            {_steps("release")} before:channel.close after:channel.close""",
        kill=Outcome.MOVED,
        stop=(Meanwhile.FLOWS, Outcome.MOVED),
        error=Outcome.MOVED,
    ),
    Zone(
        name="setup",
        side=Side.DESTINATION,
        points=f"""leave:waiting enter:greeting after-receive:HELLO before-send:HELLO after-send:HELLO leave:greeting
            enter:setting-up after-receive:DESCRIPTION after-receive:SETUP {_steps("check_setup adopt_setup")}
            leave:setting-up enter:prepared before-send:SETUP_ACK""",
        kill=Outcome.STAYED,
        stop=(Meanwhile.FLOWS, Outcome.MOVED),
        error=Outcome.STAYED,
    ),
    Zone(
        name="prepared",
        side=Side.DESTINATION,
        points=f"""after-send:SETUP_ACK after-receive:SWITCHOVER
            {_steps("check_switchover adopt_switchover", parts="*")} before-send:READY""",
        kill=Outcome.STAYED,
        stop=(Meanwhile.SETTLES, Outcome.STAYED),
        error=Outcome.STAYED,
    ),
    Zone(
        name="ready",
        side=Side.DESTINATION,
        points=f"""after-send:READY leave:prepared enter:ready after-receive:COMMIT leave:ready enter:owner
            {_steps("resume thaw")}""",
        kill=Outcome.TAKEN_BACK,
        stop=(Meanwhile.SETTLES, Outcome.FENCED),
        error=Outcome.FENCED,
    ),
    Zone(
        name="about to say done",
        side=Side.DESTINATION,
        points="before-send:DONE",
        kill=Outcome.TAKEN_BACK,
        stop=(Meanwhile.SETTLES, Outcome.FENCED),
        # It cannot know that nothing was sent, so it goes on and closes the channel.
        error=Outcome.MOVED,
    ),
    Zone(
        name="done",
        side=Side.DESTINATION,
        points=f"""after-send:DONE before:daemon.on_serving after:daemon.on_serving
            before:channel.receive_end after:channel.receive_end {_steps("source_released", parts="net0 nic0")}
            leave:owner enter:completed before:channel.close after:channel.close""",
        # As any backend that is killed while it serves.
        kill=Outcome.NOBODY,
        stop=(Meanwhile.SILENT, Outcome.MOVED),
        error=Outcome.MOVED,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What happens at which side's point, and what is to come of it."""

    faults: tuple[tuple[Side, Fault], ...]
    outcome: Outcome
    meanwhile: tuple[Meanwhile, ...] = ()
    is_met: bool = True

    def __str__(self) -> str:
        return "+".join(f"{side}:{fault}" for side, fault in self.faults)


def cells_of(zone: Zone) -> Iterator[Cell]:
    for text in zone.points.split():
        point = Point.parse(text)
        for action, outcome, meanwhile in (
            (Action.KILL, zone.kill, ()),
            (Action.STOP, zone.stop[1], (zone.stop[0],)),
            (Action.RAISE, zone.error, ()),
        ):
            if action is Action.RAISE and point.place in (Place.LEAVE, Place.ENTER):
                continue  # a state is looked up in a table, of which every pair is tested: nothing else happens there
            yield Cell(
                faults=((zone.side, Fault(point=point, action=action)),),
                outcome=outcome,
                meanwhile=meanwhile,
                is_met=zone.is_met,
            )


CELLS: Final = tuple(cell for zone in ZONES for cell in cells_of(zone))


# -- playing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What came of a cell."""

    cell: str
    outcome: Outcome
    owner: str
    silence_ms: float
    lost: int
    doubled: int


@dataclass
class Play:
    """A cell while it is played."""

    chain: Chain
    cell: Cell
    source: Daemon
    destination: Daemon
    allowed_ms: float = NOISE_MS
    entries: list[Entry] = field(default_factory=list)

    def side(self, side: Side) -> Daemon:
        return self.source if side is Side.SOURCE else self.destination


def play(chain: Chain, cell: Cell, expected: Counter[str]) -> Row:
    source, destination = chain.serving, chain.destination()
    chain.prepare()
    it = Play(chain, cell, source, destination)
    source.arm(None)
    for side, fault in cell.faults:
        it.side(side).arm(fault)
    hangs = Meanwhile.SETTLES in cell.meanwhile or cell.outcome is Outcome.FENCED
    source.process.execute(
        "migrate-set-parameters",
        downtime_limit=DOWNTIME_LIMIT_MS if hangs and cell.outcome is Outcome.STAYED else PATIENT_MS,
        commit_timeout=COMMIT_TIMEOUT_MS if hangs else PATIENT_MS,
    )
    seen = len(chain.journal())
    mark = chain.frames.mark()
    source.process.execute("migrate", uri=destination.address)
    meanwhile = list(cell.meanwhile)
    for side, fault in cell.faults:
        if fault.action is Action.KILL:
            assert end_of(it.side(side)) == -signal.SIGKILL
        elif fault.action is Action.STOP:
            hold(it, it.side(side), meanwhile.pop(0))
    if hangs:
        it.allowed_ms += DOWNTIME_LIMIT_MS + COMMIT_TIMEOUT_MS
    settle(it)
    it.entries = chain.journal(seen)
    struck = [entry.about for entry in it.entries if entry.word == "fault"]
    assert sorted(struck) == sorted(str(fault) for _, fault in cell.faults)
    assert [entry for entry in it.entries if entry.word == "two-owners"] == []
    outcome = outcome_of(it)
    assert outcome is cell.outcome, it.chain.log_of(source) + it.chain.log_of(destination)
    owners = [side for side in Side if it.side(side).owns]
    assert owners == ([OWNER[outcome]] if OWNER[outcome] else [])
    if not owners:
        assert chain.guest.frontend.is_lost(FLOW_SECONDS_MAX)
        assert not chain.has_tap()
        reports = chain.frames.since(mark)
        chain.renew()
        return Row(cell=str(cell), outcome=outcome, owner="nobody", silence_ms=0.0, lost=0, doubled=0)
    survivor = it.side(owners[0])
    assert chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX), "the guest is not served"
    assert not chain.guest.frontend.is_lost()
    reports = chain.frames.since(mark)
    loser = it.side(Side.SOURCE if owners[0] is Side.DESTINATION else Side.DESTINATION)
    if loser.process.is_alive and owners[0] is Side.DESTINATION:
        assert loser.process.quit() == 0
    end_of(loser)
    chain.serving = survivor
    assert census_like(survivor, expected) == expected
    in_hand = IN_HAND_MAX if killed_while_it_ran(it) else 0
    lost, doubled = sum(each.lost for each in reports.values()), sum(each.doubled for each in reports.values())
    assert reports[Way.OUT].lost == 0, reports
    assert reports[Way.IN].doubled == 0, reports
    assert lost <= in_hand, reports
    assert doubled <= in_hand, reports
    silence_ms = max(each.silence_ms for each in reports.values())
    assert silence_ms <= it.allowed_ms, reports
    chain.guest.counters()  # raises what the driver found wrong with its rings
    return Row(cell=str(cell), outcome=outcome, owner=owners[0], silence_ms=silence_ms, lost=lost, doubled=doubled)


def hold(it: Play, daemon: Daemon, meanwhile: Meanwhile) -> None:
    """A side is stopped, what the guest notices is seen, and it is continued."""
    wait_stopped(daemon)
    began = time.monotonic()
    match meanwhile:
        case Meanwhile.FLOWS:
            assert it.chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX)
        case Meanwhile.SILENT:
            deadline = time.monotonic() + FLOW_SECONDS_MAX
            # What was on its way when it stopped still comes.
            while it.chain.frames.wait_any(seconds=QUIET_SECONDS):
                assert time.monotonic() < deadline, "somebody serves although who serves is stopped"
        case Meanwhile.SETTLES:
            it.source.process.wait_migration()
            assert it.chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX)
    it.allowed_ms += 1000 * (time.monotonic() - began)
    if daemon.process.is_alive:
        daemon.process.send_signal(signal.SIGCONT)


def settle(it: Play) -> None:
    """Waits until both sides know what came of it."""
    owner = OWNER[it.cell.outcome]
    if it.source.process.is_alive:
        it.source.process.wait_migration()
    if owner is Side.DESTINATION:
        it.destination.process.wait_event("MigrationStatusChanged", status="completed")
    else:
        if not it.cell.is_met:
            it.destination.process.quit()  # it would wait for a source
        end_of(it.destination)


def outcome_of(it: Play) -> Outcome:
    """By what the daemons wrote into the journal, and who lives."""
    entered = {entry.about for entry in it.entries if entry.pid == it.source.process.pid and entry.word == "point"}
    there = {entry.about for entry in it.entries if entry.pid == it.destination.process.pid and entry.word == "point"}
    if it.source.process.is_alive and "enter:taken-back" in entered:
        return Outcome.FENCED if "enter:fencing" in entered else Outcome.TAKEN_BACK
    if it.source.process.is_alive and "enter:completed" not in entered and not it.destination.process.is_alive:
        return Outcome.STAYED
    if not it.destination.process.is_alive:
        return Outcome.NOBODY
    return Outcome.RECOVERED if "enter:recovering" in there else Outcome.MOVED


def killed_while_it_ran(it: Play) -> bool:
    """Whether a side died whose rings might have run."""
    running: set[int] = {it.source.process.pid}
    for entry in it.entries:
        if entry.word == "start":
            running.add(entry.pid)
        elif entry.word == "stopped":
            running.discard(entry.pid)
    return any(it.side(side).process.pid in running and not it.side(side).process.is_alive for side in Side)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(f"needs network namespaces: {reason}")
    chain = Chain(tmp_path_factory.mktemp("k"))
    yield chain
    chain.close()


@pytest.fixture(scope="module")
def expected(chain: Chain) -> Counter[str]:
    """What a daemon holds that serves the NIC and nothing else."""
    return census(chain.serving)


def test_the_points_of_the_matrix_are_all_that_a_handover_passes(chain: Chain, expected: Counter[str]) -> None:
    seen = len(chain.journal())
    cell = Cell(faults=(), outcome=Outcome.MOVED)
    source = chain.serving.process.pid
    play(chain, cell, expected)
    passed: dict[Side, list[str]] = {side: [] for side in Side}
    for entry in chain.journal(seen):
        if entry.word == "point":
            passed[Side.SOURCE if entry.pid == source else Side.DESTINATION].append(entry.about)
    for side in Side:
        listed = [point for zone in ZONES if zone.side is side for point in zone.points.split()]
        assert list(dict.fromkeys(passed[side])) == listed


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_whatever_happens_there_is_one_owner(chain: Chain, expected: Counter[str], cell: Cell) -> None:
    try:
        play(chain, cell, expected)
    except BaseException:
        chain.begin_again()
        raise
