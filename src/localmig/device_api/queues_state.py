"""How the rings of all devices travel: a few arrays of numbers, and what tells whose they are.

Owns:        the names of engines, both sections' descriptions, how long each array is, counters of another release.
Never sees:  a device, a ring that runs.
Read next:   queues.py, which saves and loads them.

The numbers of all rings stand one after the other, device by device, as `dataplane.save_all` gives them and `load_all`
takes them: nobody makes objects of them while guests wait. What stands where follows from the setup section. It has the
names of the counters too, because a release may count what another one does not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Final, NamedTuple, Self

from localmig.dataplane import CallbackCounters, CallbackQueues, Counters, QueuePair
from localmig.errors import PeerError
from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd
from localmig.vmstate import Description, array, fd, numbers, optional, text, u8, u16, u32, u64

GROUP_COUNT_MAX: Final = 65536
"""Groups of rings of one daemon: a queue pair has a thread, and the kernel's default gives a process 32768 of them or
fewer."""

RING_COUNT_MAX: Final = 4 * GROUP_COUNT_MAX
"""Twice as many as if all were queue pairs: devices with Python's code have more rings a group, and are fewer."""

COUNTER_COUNT_MAX: Final = 32 * GROUP_COUNT_MAX
"""A queue pair counts 14 things, two rings that Python serves 10: twice that and more."""

_ENGINE_COUNT_MAX: Final = 16
"""Kinds of engine. There are two, and a release adds one at most."""

_COUNTER_NAME_COUNT_MAX: Final = 256
"""What one engine counts, with much to spare."""

_NAME_SIZE_MAX: Final = 80
"""A device's id has at most 63 letters, a slash and a group's number follow. No counter has a longer name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKind:
    """A way to serve rings.

    Attributes:
        name: in the stream.
        counters: names of what it counts, in order.
        counts_each_ring: whether it counts each ring for itself, and not the group as a whole.
    """

    name: str
    counters: tuple[str, ...]
    counts_each_ring: bool

    def counter_sets(self, ring_count: int) -> int:
        """How often a group of so many rings has all its counters."""
        return ring_count if self.counts_each_ring else 1


ENGINE_KINDS: Final[dict[type[QueuePair | CallbackQueues], EngineKind]] = {
    QueuePair: EngineKind(name="queue-pair", counters=Counters._fields, counts_each_ring=False),
    CallbackQueues: EngineKind(name="callbacks", counters=CallbackCounters._fields, counts_each_ring=True),
}

_KINDS_BY_NAME: Final = {kind.name: kind for kind in ENGINE_KINDS.values()}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineState:
    """A kind of engine as the source has it.

    Attributes:
        name: which one.
        counters: names of what it counts, in the order in which the numbers come.
    """

    name: str
    counters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuesSetup:
    """Whose the numbers are.

    Attributes:
        engines: those that serve a group.
        groups: names of the groups of rings: the device's id, a slash, the group's number there.
        group_engines: for each group its engine's place in `engines`.
        ring_counts: for each group how many rings it has.
        waiting: a memory file, into which the source writes the frames that wait, at the switchover. None where
            descriptors stay home, and the frames in the TAPs as well.
    """

    engines: tuple[EngineState, ...]
    groups: tuple[str, ...]
    group_engines: tuple[int, ...]
    ring_counts: tuple[int, ...]
    waiting: OwnedFd | None

    @classmethod
    def of(cls, groups: Iterable[tuple[str, EngineKind, int]], waiting: OwnedFd | None) -> Self:
        """What is told of `groups`: name, engine and number of rings of each."""
        places: dict[str, int] = {}
        names, engines, counts = [], [], []
        for name, kind, ring_count in groups:
            names.append(name)
            engines.append(places.setdefault(kind.name, len(places)))
            counts.append(ring_count)
        return cls(
            engines=tuple(EngineState(name=name, counters=_KINDS_BY_NAME[name].counters) for name in places),
            groups=tuple(names),
            group_engines=tuple(engines),
            ring_counts=tuple(counts),
            waiting=waiting,
        )


class QueuesState(NamedTuple):
    """What travels inside the downtime. Numbers are big endian, and stand in the order of the groups.

    Attributes:
        positions: where each ring goes on, 2 bytes each; 0 where it does not run.
        failed: whether each ring was given up, 0 or 1.
        waiting: of each queue pair, 4 bytes: how long the frame is that was read and that the guest has no buffers for
            yet, 0 where none waits. The frame itself is in a file, because what is described before the switchover
            cannot become longer in it.
        counters: what each engine counted, 8 bytes each.
    """

    positions: bytes
    failed: bytes
    waiting: bytes
    counters: bytes


ENGINE: Final = Description(
    name="engine",
    version=1,
    oldest_version=1,
    state=EngineState,
    fields=(
        text("name", size_max=_NAME_SIZE_MAX),
        array("counters", lambda name: text(name, size_max=_NAME_SIZE_MAX), count_max=_COUNTER_NAME_COUNT_MAX),
    ),
)

QUEUES_SETUP: Final = Description(
    name="queues-setup",
    version=1,
    oldest_version=1,
    state=QueuesSetup,
    fields=(
        array("engines", ENGINE, count_max=_ENGINE_COUNT_MAX),
        array("groups", lambda name: text(name, size_max=_NAME_SIZE_MAX), count_max=GROUP_COUNT_MAX),
        array("group_engines", u8, count_max=GROUP_COUNT_MAX),
        array("ring_counts", u16, count_max=GROUP_COUNT_MAX),
        optional(fd("waiting", kind=FdKind.MEMORY)),
    ),
)

QUEUES: Final = Description(
    name="queues",
    version=1,
    oldest_version=1,
    state=QueuesState,
    fields=(
        numbers("positions", u16, count_max=RING_COUNT_MAX),
        numbers("failed", u8, count_max=RING_COUNT_MAX),
        numbers("waiting", u32, count_max=GROUP_COUNT_MAX),
        numbers("counters", u64, count_max=COUNTER_COUNT_MAX),
    ),
)


def check_setup(setup: QueuesSetup) -> None:
    """Raises PeerError where the columns of `setup` do not belong together."""
    count = len(setup.groups)
    if not count == len(setup.group_engines) == len(setup.ring_counts):
        raise PeerError(
            f"the source has {count} groups of rings, the engines of {len(setup.group_engines)} and the ring counts of "
            f"{len(setup.ring_counts)}"
        )
    for each in setup.engines:
        if each.name not in _KINDS_BY_NAME:
            known = ", ".join(_KINDS_BY_NAME)
            raise PeerError(f"the source has an engine '{each.name}', this release has {known}")
    if (engine := max(setup.group_engines, default=-1)) >= len(setup.engines):
        raise PeerError(f"a group of rings has engine {engine}, the source has {len(setup.engines)} of them")


def check_same_groups(theirs: QueuesSetup, ours: QueuesSetup) -> None:
    """Raises PeerError where both sides do not count the same groups of rings in the same order."""
    if theirs.groups != ours.groups:
        pairs = zip(theirs.groups, ours.groups, strict=False)
        odd = next((pair for pair in pairs if pair[0] != pair[1]), None)
        difference = f"'{odd[0]}' stands there for '{odd[1]}' here" if odd else "the rest is the same"
        raise PeerError(
            f"the source has {len(theirs.groups)} groups of rings, this daemon has {len(ours.groups)}: {difference}"
        )
    for place, name in enumerate(theirs.groups):
        engines = theirs.engines[theirs.group_engines[place]].name, ours.engines[ours.group_engines[place]].name
        if engines[0] != engines[1]:
            raise PeerError(f"rings '{name}' are served by '{engines[0]}' there and by '{engines[1]}' here")
        counts = theirs.ring_counts[place], ours.ring_counts[place]
        if counts[0] != counts[1]:
            raise PeerError(f"'{name}' has {counts[0]} rings there and {counts[1]} here")


class Arriving:
    """How long the arrays are that come, and where each counter stands in them.

    Args:
        setup: as the source told it, checked.

    Attributes:
        groups: their names.
        counter_count: how many counters come.
    """

    def __init__(self, setup: QueuesSetup) -> None:
        self.groups = setup.groups
        self.counter_count, self._pick = _counters(setup)
        self._ring_count = sum(setup.ring_counts)
        is_pair = [engine.name == ENGINE_KINDS[QueuePair].name for engine in setup.engines]
        self._pair_count = sum(is_pair[engine] for engine in setup.group_engines)

    def check(self, state: QueuesState) -> None:
        """Raises PeerError where an array has another length than it must have, or a ring has failed by more than 1."""
        for name, array_, size, count in (
            ("positions", state.positions, 2, self._ring_count),
            ("failed rings", state.failed, 1, self._ring_count),
            ("waiting frames", state.waiting, 4, self._pair_count),
            ("counters", state.counters, 8, self.counter_count),
        ):
            if len(array_) != size * count:
                raise PeerError(f"{len(array_) // size} {name} came, expected {count}")
        if state.failed.strip(b"\0\1"):
            raise PeerError(f"a ring has failed {max(state.failed)}, which is 0 or 1")

    def counters(self, arrived: bytes) -> bytes:
        """The counters of this release, 0 for those that the source does not know."""
        if self._pick is None:
            return arrived
        values = (*struct.unpack(f">{self.counter_count}Q", arrived), 0)
        picked = self._pick(values)
        return struct.pack(f">{len(picked)}Q", *picked)


def _counters(setup: QueuesSetup) -> tuple[int, Callable[[tuple[int, ...]], tuple[int, ...]] | None]:
    """How many counters come, and what picks ours from them and a 0 behind them; None where they are the same."""
    kinds = [_KINDS_BY_NAME[engine.name] for engine in setup.engines]
    names = [engine.counters for engine in setup.engines]
    sets = [
        (engine, kinds[engine].counter_sets(ring_count))
        for engine, ring_count in zip(setup.group_engines, setup.ring_counts, strict=True)
    ]
    count = sum(len(names[engine]) * set_count for engine, set_count in sets)
    if all(kind.counters == told for kind, told in zip(kinds, names, strict=True)):
        return count, None
    places: list[int] = []
    first = 0
    for engine, set_count in sets:
        told = {name: place for place, name in enumerate(names[engine])}
        for _ in range(set_count):
            places += [first + told[name] if name in told else count for name in kinds[engine].counters]
            first += len(names[engine])
    return count, _picking(places)


def _picking(places: Sequence[int]) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple(values[place] for place in places)
