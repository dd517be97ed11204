"""Every named point of a handover, and a side that is killed there, stopped and continued, or has a bug: who serves.

The points are all that a handover passes (`localmig.testing.faults`), in zones at which the same is to come of it.
Between the end of a step and the beginning of the next one nothing happens, so one of the two is enough day by day;
`make kill-matrix` goes through all of them and writes what came of each into docs/kill-matrix.md.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import pytest
from tests.faults.matrix import FLOW_SECONDS_MAX, Chain, Daemon, MixedChain, census, end_of, wait_stopped
from tests.kit.frames import Way

from localmig.device_api import CallbackDevice, Part, Queues
from localmig.devices.virtio_net import VirtioNet
from localmig.netdevs.stream import Stream
from localmig.netdevs.tap import Tap
from localmig.testing.faults import FRAME_PLACES, Action, Entry, Fault, Place, Point
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

PAGE: Final = Path(__file__).resolve().parents[2] / "docs/kill-matrix.md"
TABLES_BEGIN: Final = "## What came of each point"
MIXED_BEGIN: Final = "## What came of the points of a stream and of a device in Python"

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
    OTHER_FIRST = "the other side first"
    """It goes on only when the other side, stopped too, has gone on and serves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Zone:
    """Points at which the same comes of the same.

    Attributes:
        name: where in a handover they are.
        side: whose they are.
        points: in the order in which they are passed.
        kill: what comes of a death.
        stop: what the guest notices meanwhile, and what comes of a hang that ends.
        error: what comes of an error nobody expects; None where nobody is left to be served by.
        end: what may come of being told to end: one, or either of two, by which of two messages is quicker.
        before: what happened earlier in the same handover.
        is_met: whether the destination ever sees the source.
        otherwise: what may come of a death or an error instead: which of two messages is quicker decides.
        is_changed: whether the guest moves to another VMM between the setup and the switchover.
    """

    name: str
    side: Side
    points: str
    kill: Outcome
    stop: tuple[Meanwhile, Outcome]
    error: Outcome | None
    end: tuple[Outcome, ...] = (Outcome.MOVED,)
    before: tuple[tuple[Side, Fault], ...] = ()
    is_met: bool = True
    otherwise: Outcome | None = None
    is_changed: bool = False


Parts = dict[str, type[Any]]

ONE_NIC: Final[Parts] = {"net0": Tap, "nic0": VirtioNet, "*": Queues}
"""What the matrix is about: the parts of a daemon by their ids, in the order of a handover."""

MIXED: Final[Parts] = {
    "net0": Tap,
    "net1": Stream,
    "nic0": VirtioNet,
    "nic1": VirtioNet,
    "dev0": CallbackDevice,
    "*": Queues,
}
"""What is handed over besides in another chain: a stream, and a device in Python."""


def _reversed(parts: Parts) -> Parts:
    return dict(reversed(parts.items()))


def _steps(steps: str, parts: Parts) -> str:
    """The points at steps of those parts that do something there."""
    return " ".join(
        f"before:{part}.{step} after:{part}.{step}"
        for step in steps.split()
        for part, kind in parts.items()
        if getattr(kind, step) is not getattr(Part, step)
    )


def zones(parts: Parts) -> tuple[Zone, ...]:
    """The zones of a handover in which nothing else happens."""
    return (
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
                after-receive:HELLO leave:greeting enter:setting-up {_steps("watch_setup", parts)}
                {_steps("save_setup", parts)} before-send:DESCRIPTION after-send:DESCRIPTION before-send:SETUP""",
            kill=Outcome.NOBODY,
            stop=(Meanwhile.SILENT, Outcome.MOVED),
            error=Outcome.STAYED,
        ),
        Zone(
            name="setup is out",
            side=Side.SOURCE,
            points=f"""after-send:SETUP after-receive:SETUP_ACK leave:setting-up enter:prepared
                {_steps("quiesce freeze", parts)} leave:prepared enter:switching
                {_steps("stop save_switchover", parts)}
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
            points=f"""after-send:COMMIT leave:committing enter:committed after-receive:DONE leave:committed
                enter:completed {_steps("release", parts)} before:channel.close after:channel.close""",
            kill=Outcome.MOVED,
            stop=(Meanwhile.FLOWS, Outcome.MOVED),
            error=Outcome.MOVED,
        ),
        Zone(
            name="setup",
            side=Side.DESTINATION,
            points=f"""leave:waiting enter:greeting after-receive:HELLO before-send:HELLO after-send:HELLO
                leave:greeting enter:setting-up after-receive:DESCRIPTION after-receive:SETUP
                {_steps("check_setup adopt_setup", parts)} leave:setting-up enter:prepared before-send:SETUP_ACK""",
            kill=Outcome.STAYED,
            stop=(Meanwhile.FLOWS, Outcome.MOVED),
            error=Outcome.STAYED,
            end=(Outcome.STAYED,),
        ),
        Zone(
            name="prepared",
            side=Side.DESTINATION,
            points=f"""after-send:SETUP_ACK after-receive:SWITCHOVER
                {_steps("check_switchover adopt_switchover", parts)} before-send:READY""",
            kill=Outcome.STAYED,
            stop=(Meanwhile.SETTLES, Outcome.STAYED),
            error=Outcome.STAYED,
            end=(Outcome.STAYED, Outcome.FENCED),
        ),
        Zone(
            name="ready",
            side=Side.DESTINATION,
            points="after-send:READY leave:prepared enter:ready",
            kill=Outcome.TAKEN_BACK,
            stop=(Meanwhile.SETTLES, Outcome.FENCED),
            error=Outcome.FENCED,
            end=(Outcome.FENCED, Outcome.STAYED),
            # COMMIT may find it gone.
            otherwise=Outcome.STAYED,
        ),
        Zone(
            name="owner",
            side=Side.DESTINATION,
            points=f"""after-receive:COMMIT leave:ready enter:owner
                {_steps("resume thaw", parts)}""",
            kill=Outcome.TAKEN_BACK,
            stop=(Meanwhile.SETTLES, Outcome.FENCED),
            error=Outcome.FENCED,
            end=(Outcome.FENCED,),
        ),
        Zone(
            name="about to say done",
            side=Side.DESTINATION,
            points="before-send:DONE",
            kill=Outcome.TAKEN_BACK,
            stop=(Meanwhile.SETTLES, Outcome.FENCED),
            # It cannot know that nothing was sent, so it goes on and closes the channel.
            error=Outcome.MOVED,
            end=(Outcome.NOBODY,),
        ),
        Zone(
            name="done",
            side=Side.DESTINATION,
            points=f"""after-send:DONE before:daemon.on_serving after:daemon.on_serving
                before:channel.receive_end after:channel.receive_end {_steps("source_released", parts)}
                leave:owner enter:completed before:channel.close after:channel.close""",
            # As any backend that is killed while it serves.
            kill=Outcome.NOBODY,
            stop=(Meanwhile.SILENT, Outcome.MOVED),
            error=Outcome.MOVED,
            end=(Outcome.NOBODY,),
        ),
    )


def _again(steps: str) -> str:
    return " ".join(f"{point}#2" for point in _steps(steps, {"nic0": VirtioNet}).split())


def _after(side: Side, fault: str) -> tuple[tuple[Side, Fault], ...]:
    return ((side, Fault.parse(fault)),)


def second_zones(parts: Parts) -> tuple[Zone, ...]:
    """What may happen while one side deals with what happened to the other."""
    return (
        Zone(
            name="the destination died before READY",
            before=_after(Side.DESTINATION, "before-send:READY=kill"),
            side=Side.SOURCE,
            points=f"""leave:switching enter:failed {_steps("resume", _reversed(parts))}
                before-send:CANCEL after-send:CANCEL {_steps("thaw", _reversed(parts))}
                before:channel.close after:channel.close""",
            kill=Outcome.NOBODY,
            stop=(Meanwhile.SILENT, Outcome.STAYED),
            error=Outcome.STAYED,
        ),
        Zone(
            name="the destination died past COMMIT",
            before=_after(Side.DESTINATION, "after-receive:COMMIT=kill"),
            side=Side.SOURCE,
            points=f"""leave:committed enter:taken-back {_steps("recover resume thaw", parts)}
                before:channel.close after:channel.close""",
            kill=Outcome.NOBODY,
            stop=(Meanwhile.SILENT, Outcome.TAKEN_BACK),
            error=Outcome.TAKEN_BACK,
        ),
        Zone(
            name="the source died before COMMIT",
            before=_after(Side.SOURCE, "after-send:SWITCHOVER=kill"),
            side=Side.DESTINATION,
            points=f"""enter:recovering {_steps("recover resume thaw", parts)}
                before:daemon.on_serving after:daemon.on_serving {_steps("source_released", parts)}
                leave:recovering enter:completed before:channel.close after:channel.close""",
            kill=Outcome.NOBODY,
            stop=(Meanwhile.SILENT, Outcome.RECOVERED),
            error=Outcome.RECOVERED,
        ),
        Zone(
            name="the source died past COMMIT",
            before=_after(Side.SOURCE, "after-send:COMMIT=kill"),
            side=Side.DESTINATION,
            points=f"""after-receive:COMMIT leave:ready enter:owner {_steps("resume thaw", parts)}
                before-send:DONE after-send:DONE
                before:daemon.on_serving after:daemon.on_serving before:channel.receive_end""",
            kill=Outcome.NOBODY,
            stop=(Meanwhile.SILENT, Outcome.MOVED),
            error=None,
        ),
    )


ZONES: Final = zones(ONE_NIC)
SECOND_ZONES: Final = second_zones(ONE_NIC)

CHANGED_ZONES: Final = (
    Zone(
        name="the frontend changed something",
        is_changed=True,
        side=Side.SOURCE,
        points=f"""leave:prepared enter:setting-up#2 {_again("save_setup")}
            before-send:DESCRIPTION#2 after-send:DESCRIPTION#2 before-send:SETUP#2""",
        # The frontend has been answered, and the destination does not know it.
        kill=Outcome.NOBODY,
        stop=(Meanwhile.SILENT, Outcome.MOVED),
        error=Outcome.STAYED,
    ),
    Zone(
        name="the change is out",
        is_changed=True,
        side=Side.SOURCE,
        points="after-send:SETUP#2 after-receive:SETUP_ACK#2 leave:setting-up#2 enter:prepared#2",
        kill=Outcome.RECOVERED,
        stop=(Meanwhile.SILENT, Outcome.MOVED),
        error=Outcome.STAYED,
    ),
    Zone(
        name="a change arrives",
        is_changed=True,
        side=Side.DESTINATION,
        points=f"""after-receive:DESCRIPTION#2 after-receive:SETUP#2 leave:prepared enter:setting-up#2
            {_again("check_setup adopt_setup")} leave:setting-up#2 enter:prepared#2 before-send:SETUP_ACK#2""",
        kill=Outcome.STAYED,
        stop=(Meanwhile.FLOWS, Outcome.MOVED),
        error=Outcome.STAYED,
        end=(Outcome.STAYED,),
    ),
)
"""What more is passed where a frontend says something while the operator is awaited."""

ALL_ZONES: Final = (*ZONES, *SECOND_ZONES, *CHANGED_ZONES)

NOW_AND_THEN: Final = (
    *("enter:in-doubt", "before:peer.wait_dead", "after:peer.wait_dead", "leave:in-doubt"),
    *("before:channel.close", "after:channel.close"),
)
"""Passed, or passed earlier, where a channel's end is seen before its process counts as dead: the kernel decides."""

NOTHING_ELSE_CAN: Final = ("before:*.recover", "before:*.resume")
"""There an error is that of the very step by which the last process that has the guest would serve it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What happens at which side's point, and what is to come of it.

    Attributes:
        faults: in the order in which they are waited for.
        outcome: what is to come of it.
        meanwhile: what the guest notices while a side is stopped, for each one that is.
        is_met: as a zone's, and so are `otherwise` and `is_changed`.
        is_moment: whether no other point stands for the same moment.
    """

    faults: tuple[tuple[Side, Fault], ...]
    outcome: Outcome
    meanwhile: tuple[Meanwhile, ...] = ()
    is_met: bool = True
    otherwise: Outcome | None = None
    is_changed: bool = False
    is_moment: bool = True

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What may come of it."""
        return (self.outcome,) if self.otherwise is None else (self.outcome, self.otherwise)

    def __str__(self) -> str:
        return "+".join(f"{side}:{fault}" for side, fault in self.faults)


def moments(zone: Zone) -> list[str]:
    """One point for each moment: between the end of a step and the beginning of the next one nothing happens."""
    points = zone.points.split()
    following = [*points[1:], ""]
    return [
        point
        for point, later in zip(points, following, strict=True)
        if not (point.startswith("after:") and later.startswith("before:"))
        and not (point.startswith("leave:") and later.startswith("enter:"))
    ]


def cells_of(zone: Zone) -> Iterator[Cell]:
    for text in zone.points.split():
        point = Point.parse(text)
        for action, outcome, otherwise, meanwhile in (
            (Action.KILL, zone.kill, zone.otherwise, ()),
            (Action.STOP, zone.stop[1], None, (zone.stop[0],)),
            (Action.RAISE, zone.error, zone.otherwise, ()),
            (Action.END, zone.end[0], zone.end[-1], ()),
        ):
            if action is Action.RAISE and point.place in (Place.LEAVE, Place.ENTER):
                continue  # a state is looked up in a table, of which every pair is tested: nothing else happens there
            if action is Action.END and (zone.before or point.place not in FRAME_PLACES):
                continue  # it is heard of at the next frame: so a point at each is as good as all
            if outcome is None or (zone.before and action is Action.RAISE and text in NOTHING_ELSE_CAN):
                continue
            yield Cell(
                faults=(*zone.before, (zone.side, Fault(point=point, action=action))),
                outcome=outcome,
                meanwhile=meanwhile,
                is_met=zone.is_met,
                otherwise=otherwise,
                is_changed=zone.is_changed,
                is_moment=text in moments(zone),
            )


CELLS: Final = tuple(cell for zone in ALL_ZONES for cell in cells_of(zone))


def _about(zone: Zone, *parts: str) -> Zone:
    """The points of a zone that are steps of these parts."""
    points = [point for point in zone.points.split() if Point.parse(point).subject.partition(".")[0] in parts]
    return replace(zone, points=" ".join(points))


MIXED_ZONES: Final = tuple(
    about for zone in (*zones(MIXED), *second_zones(MIXED)) if (about := _about(zone, "net1", "dev0")).points
)
"""The points that a stream and a device in Python add."""

MIXED_CELLS: Final = tuple(cell for zone in MIXED_ZONES for cell in cells_of(zone))


# -- playing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What came of a cell."""

    outcome: Outcome
    silence_ms: float = 0.0
    lost: int = 0
    doubled: int = 0

    def __str__(self) -> str:
        if self.outcome is Outcome.NOBODY:
            return str(self.outcome)
        packets = "".join(
            f", {count} {what}" for count, what in ((self.lost, "lost"), (self.doubled, "twice")) if count
        )
        return f"{self.outcome}, {self.silence_ms:.0f} ms{packets}"


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
    hangs = Meanwhile.SETTLES in cell.meanwhile or any("peer.kill" in str(fault) for _, fault in cell.faults)
    hangs = hangs or cell.outcome is Outcome.FENCED
    source.process.execute(
        "migrate-set-parameters",
        downtime_limit=DOWNTIME_LIMIT_MS if hangs and cell.outcome is Outcome.STAYED else PATIENT_MS,
        commit_timeout=COMMIT_TIMEOUT_MS if hangs else PATIENT_MS,
    )
    pause = {"capability": "pause-before-switchover", "state": cell.is_changed}
    source.process.execute("migrate-set-capabilities", capabilities=[pause])
    seen = len(chain.journal())
    mark = chain.frames.mark()
    source.process.execute("migrate", uri=destination.address)
    if cell.is_changed:
        source.process.wait_migration_status("pre-switchover")
        chain.guest.frontend.set_mtu(1400)
        chain.move()
        source.process.execute("migrate-continue", state="pre-switchover")
    meanwhile = list(cell.meanwhile)
    sleepers: list[Daemon] = []
    for side, fault in cell.faults:
        if fault.action is Action.KILL:
            assert end_of(it.side(side)) == -signal.SIGKILL
        elif fault.action is Action.END:
            # One that has COMMIT, and refuses, is killed meanwhile.
            assert end_of(it.side(side)) in (0, -signal.SIGKILL)
        elif fault.action is Action.STOP:
            if meanwhile[0] is Meanwhile.OTHER_FIRST:
                meanwhile.pop(0)
                wait_stopped(it.side(side))
                sleepers.append(it.side(side))
            else:
                hold(it, it.side(side), meanwhile.pop(0))
    for sleeper in sleepers:
        hold(it, sleeper, Meanwhile.FLOWS)
    if hangs:
        it.allowed_ms += DOWNTIME_LIMIT_MS + COMMIT_TIMEOUT_MS
    settle(it)
    it.entries = chain.journal(seen)
    struck = [entry.about for entry in it.entries if entry.word == "fault"]
    assert sorted(struck) == sorted(str(fault) for _, fault in cell.faults)
    assert [entry for entry in it.entries if entry.word == "two-owners"] == []
    outcome = outcome_of(it)
    assert outcome in cell.outcomes, it.chain.log_of(source) + it.chain.log_of(destination)
    owners = [side for side in Side if it.side(side).owns]
    assert owners == ([OWNER[outcome]] if OWNER[outcome] else [])
    if not owners:
        assert chain.guest.frontend.is_lost(FLOW_SECONDS_MAX)
        assert not chain.has_tap()
        chain.renew()
        return Row(outcome=outcome)
    survivor = it.side(owners[0])
    assert chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX), "the guest is not served"
    assert not chain.guest.frontend.is_lost()
    # What could not go on is not served until the next handover, and nothing else is missing.
    left = {part for part in ("net1", "dev0") for _, fault in cell.faults if str(fault) == f"before:{part}.thaw=raise"}
    chain.check_others(but=left)
    reports = chain.frames.since(mark)
    loser = it.side(Side.SOURCE if owners[0] is Side.DESTINATION else Side.DESTINATION)
    if loser.process.is_alive and owners[0] is Side.DESTINATION:
        assert loser.process.quit() == 0
    end_of(loser)
    chain.serving = survivor
    assert sorted(chain.roles()) == (["owns"] if chain.waiting is None else ["held", "owns"])
    allowed = [expected]
    if outcome is Outcome.MOVED and any(fault.action is Action.RAISE for _, fault in cell.faults):
        # A source that was in doubt is remembered until the next handover, in which it could come back.
        allowed.append(expected + Counter({"anon_inode:[pidfd]": 1, "anon_inode:[eventfd]": 1}))
    if any(str(fault) == "before:*.thaw=raise" for _, fault in cell.faults):
        allowed.append(expected + Counter({"/memfd:waiting-frames": 1}))  # until the next handover
    assert left or census(survivor, *allowed) in allowed, chain.sockets_of(survivor)
    in_hand = IN_HAND_MAX if killed_while_it_ran(it) else 0
    lost, doubled = sum(each.lost for each in reports.values()), sum(each.doubled for each in reports.values())
    assert reports[Way.OUT].lost == 0, reports
    assert reports[Way.IN].doubled == 0, reports
    assert lost <= in_hand, reports
    assert doubled <= in_hand, reports
    silence_ms = max(each.silence_ms for each in reports.values())
    assert silence_ms <= it.allowed_ms, reports
    chain.guest.counters()  # raises what the driver found wrong with its rings
    return Row(outcome=outcome, silence_ms=silence_ms, lost=lost, doubled=doubled)


def play_or_begin_again(chain: Chain, cell: Cell, expected: Counter[str]) -> Row:
    """Plays a cell; one that fails spoils no other."""
    try:
        return play(chain, cell, expected)
    except BaseException:
        chain.begin_again()
        raise


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
        it.destination.process.execute("query-status")  # it passes its last points before it answers
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
    chain = Chain(tmp_path_factory.mktemp("k"), is_waited_for=True)
    yield chain
    chain.close()


@pytest.fixture(scope="module")
def mixed_chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(f"needs network namespaces: {reason}")
    chain = MixedChain(tmp_path_factory.mktemp("k"))
    yield chain
    chain.close()


@pytest.fixture(scope="module")
def mixed_expected(mixed_chain: Chain) -> Counter[str]:
    return census(mixed_chain.serving)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[dict[Cell, Row]]:
    """What came of each cell, which becomes tables of the page where that is asked for."""
    rows: dict[Cell, Row] = {}
    yield rows
    if (path := request.config.getoption("--kill-matrix")) is not None and len(rows) == len(CELLS):
        _, _, rest = PAGE.read_text().partition(f"\n{MIXED_BEGIN}\n")
        _write_page(Path(path), before=TABLES_BEGIN, text=tables(ALL_ZONES, rows) + f"\n{MIXED_BEGIN}\n{rest}")


@pytest.fixture(scope="module")
def mixed_rows(request: pytest.FixtureRequest) -> Iterator[dict[Cell, Row]]:
    """As `rows`, of the other chain, whose tables are the page's last."""
    rows: dict[Cell, Row] = {}
    yield rows
    if (path := request.config.getoption("--kill-matrix")) is not None and len(rows) == len(MIXED_CELLS):
        _write_page(Path(path), before=MIXED_BEGIN, text=tables(MIXED_ZONES, rows))


def _write_page(path: Path, *, before: str, text: str) -> None:
    head, *_ = PAGE.read_text().partition(f"\n{before}\n")
    path.write_text(f"{head}\n{before}\n{text}")


@pytest.fixture(scope="module")
def expected(chain: Chain) -> Counter[str]:
    """What a daemon holds that serves the NIC and nothing else."""
    return census(chain.serving)


def test_the_points_of_the_matrix_are_all_that_a_handover_passes(chain: Chain, expected: Counter[str]) -> None:
    passed = points_passed(chain, expected, Cell(faults=(), outcome=Outcome.MOVED))
    changed = points_passed(chain, expected, Cell(faults=(), outcome=Outcome.MOVED, is_changed=True))
    for side in Side:
        listed = [point for zone in CHANGED_ZONES if zone.side is side for point in zone.points.split()]
        begin = changed[side].index(listed[0])
        assert changed[side][begin : begin + len(listed)] == listed
        listed = [point for zone in ZONES if zone.side is side for point in zone.points.split()]
        assert [point for point in passed[side] if "#" not in point] == listed


@pytest.mark.parametrize("zone", SECOND_ZONES, ids=lambda zone: zone.name)
def test_the_points_of_the_matrix_are_all_that_the_other_side_passes_then(
    chain: Chain, expected: Counter[str], zone: Zone
) -> None:
    passed = points_passed(chain, expected, Cell(faults=zone.before, outcome=zone.stop[1]))[zone.side]
    passed = [point for point in passed if point not in NOW_AND_THEN and "#" not in point]
    listed = [point for point in zone.points.split() if point not in NOW_AND_THEN]
    begin = passed.index(listed[0])
    assert passed[begin : begin + len(listed)] == listed


def test_a_source_that_sleeps_before_it_fences_lets_the_destination_serve_until_that_is_dead(
    chain: Chain, expected: Counter[str]
) -> None:
    # Both are stopped past COMMIT. The destination wakes up first and serves; the source cannot know, and kills it.
    cell = Cell(
        faults=(
            (Side.SOURCE, Fault.parse("before:peer.kill=stop")),
            (Side.DESTINATION, Fault.parse("after-receive:COMMIT=stop")),
        ),
        outcome=Outcome.FENCED,
        meanwhile=(Meanwhile.OTHER_FIRST, Meanwhile.SILENT),
    )
    play_or_begin_again(chain, cell, expected)


@pytest.mark.parametrize(("point", "outcome"), [("before", Outcome.MOVED), ("after", Outcome.NOBODY)])
def test_a_source_that_dies_when_it_fences_leaves_the_guest_to_a_destination_that_lives(
    chain: Chain, expected: Counter[str], point: str, outcome: Outcome
) -> None:
    cell = Cell(
        faults=(
            (Side.SOURCE, Fault.parse(f"{point}:peer.kill=kill")),
            (Side.DESTINATION, Fault.parse("after-receive:COMMIT=stop")),
        ),
        outcome=outcome,
        meanwhile=(Meanwhile.SILENT,),
    )
    play_or_begin_again(chain, cell, expected)


def test_a_source_stopped_past_commit_finds_a_dead_destination_and_takes_back(
    chain: Chain, expected: Counter[str]
) -> None:
    cell = Cell(
        faults=(
            (Side.DESTINATION, Fault.parse("after:*.resume=kill")),
            (Side.SOURCE, Fault.parse("after-send:COMMIT=stop")),
        ),
        outcome=Outcome.TAKEN_BACK,
        meanwhile=(Meanwhile.SILENT,),
    )
    play_or_begin_again(chain, cell, expected)


def points_passed(chain: Chain, expected: Counter[str], cell: Cell) -> dict[Side, list[str]]:
    """Which points each side passes, in their order, the first time."""
    seen = len(chain.journal())
    source = chain.serving.process.pid
    play(chain, cell, expected)
    passed: dict[Side, dict[str, None]] = {side: {} for side in Side}
    for entry in chain.journal(seen):
        if entry.word == "point":
            passed[Side.SOURCE if entry.pid == source else Side.DESTINATION].setdefault(entry.about)
    return {side: list(points) for side, points in passed.items()}


def tables(zones: Sequence[Zone], rows: Mapping[Cell, Row]) -> str:
    """A table for each zone, a line for each point."""
    text = ""
    for zone in zones:
        first = f", {'when ' if zone.before or zone.is_changed else ''}{zone.name}"
        text += f"\n### The {zone.side}{first}\n\n"
        text += "| point | killed | stopped, then continued | error | told to end |\n|---|---|---|---|---|\n"
        found = {cell.faults[-1][1]: str(rows[cell]) for cell in cells_of(zone)}
        for point in zone.points.split():
            fates = (found.get(Fault(point=Point.parse(point), action=action), "") for action in Action)
            text += f"| `{point}` | {' | '.join(fates)} |\n"
    return text


def test_the_page_has_every_point_and_what_may_come_of_it() -> None:
    lines = PAGE.read_text().partition(TABLES_BEGIN)[2].splitlines()
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    cells = {(cell.is_changed, cell.faults): cell for cell in (*CELLS, *MIXED_CELLS)}
    points = [(zone, point) for zone in (*ALL_ZONES, *MIXED_ZONES) for point in zone.points.split()]
    assert [row[0] for row in told] == [f"`{point}`" for _, point in points]
    for (zone, point), (_, *fates) in zip(points, told, strict=True):
        for action, fate in zip(Action, fates, strict=True):
            faults = (*zone.before, (zone.side, Fault(point=Point.parse(point), action=action)))
            cell = cells.get((zone.is_changed, faults))
            allowed = [""] if cell is None else [str(outcome) for outcome in cell.outcomes]
            assert fate.partition(",")[0] in allowed, (zone.name, point, action)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_whole = metafunc.config.getoption("--kill-matrix") is not None
    if "mixed_cell" in metafunc.fixturenames:
        # Day by day they need not be stopped there: that is the same as at a NIC's step before or behind it.
        cells = [cell for cell in MIXED_CELLS if is_whole or (cell.is_moment and not cell.meanwhile)]
        group = pytest.mark.xdist_group("kill-matrix-mixed")
        metafunc.parametrize("mixed_cell", [pytest.param(cell, marks=group, id=str(cell)) for cell in cells])
    if "cell" in metafunc.fixturenames:
        cells = [cell for cell in CELLS if is_whole or cell.is_moment]
        # Each cell leaves the next one its survivor: three chains of neighbours, for three workers.
        chains = [pytest.mark.xdist_group(f"kill-matrix-{3 * index // len(cells)}") for index in range(len(cells))]
        metafunc.parametrize(
            "cell", [pytest.param(cell, marks=mark, id=str(cell)) for cell, mark in zip(cells, chains, strict=True)]
        )


def test_whatever_happens_there_is_one_owner(
    chain: Chain, expected: Counter[str], rows: dict[Cell, Row], cell: Cell
) -> None:
    rows[cell] = play_or_begin_again(chain, cell, expected)


@pytest.mark.xdist_group("kill-matrix-mixed")
def test_a_stream_and_a_device_in_python_pass_the_points_that_are_listed_for_them(
    mixed_chain: Chain, mixed_expected: Counter[str]
) -> None:
    passed = points_passed(mixed_chain, mixed_expected, Cell(faults=(), outcome=Outcome.MOVED))
    for side in Side:
        listed = [point for zone in zones(MIXED) if zone.side is side for point in zone.points.split()]
        assert [point for point in passed[side] if "#" not in point] == listed


def test_whatever_happens_to_a_stream_and_a_device_in_python_there_is_one_owner(
    mixed_chain: Chain, mixed_expected: Counter[str], mixed_rows: dict[Cell, Row], mixed_cell: Cell
) -> None:
    mixed_rows[mixed_cell] = play_or_begin_again(mixed_chain, mixed_cell, mixed_expected)
