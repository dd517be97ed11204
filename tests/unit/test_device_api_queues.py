"""The rings of all devices travel as one: whatever serves them, and whatever another release counts."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from localmig.dataplane import CallbackCounters, CallbackQueues, Counters, QueuePair
from localmig.device_api.callback_group import CallbackGroup
from localmig.device_api.queues import Queues
from localmig.device_api.queues_state import QUEUES, QUEUES_SETUP, EngineState, QueuesSetup, QueuesState
from localmig.device_api.ring_group import RingGroup
from localmig.devices.virtio_net.queue_pairs import QueuePairRings
from localmig.errors import PeerError
from localmig.trace import Tracer
from localmig.vmstate import Blob, Description, Reader, load, save

RINGS_OF_THE_CONSOLE = 3


class Rings:
    """A device that has nothing but rings, which nobody laid out."""

    def __init__(self, device_id: str, *groups: RingGroup) -> None:
        self.id = device_id
        self.groups = groups


class Netdev:
    """What nobody asks while no ring is laid out."""


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def queues_of(undo: ExitStack, *devices: Rings) -> Queues:
    queues = Queues(Tracer())
    for device in devices:
        queues.join(device)
        for group in device.groups:
            undo.callback(group.close)
    return queues


def nic(count: int = 1) -> Rings:
    return Rings("nic0", *(QueuePairRings("nic0", index, Netdev(), -1) for index in range(count)))  # type: ignore[arg-type]


def console(ring_count: int = RINGS_OF_THE_CONSOLE) -> Rings:
    return Rings("con0", CallbackGroup({ring: f"ring {ring}" for ring in range(ring_count)}, -1))


def count_something(queues: Queues) -> list[tuple[int, ...]]:
    """Lets each engine have counted something else; gives what."""
    number = 1
    counted: list[tuple[int, ...]] = []
    for engine in queues._engines():
        if isinstance(engine, QueuePair):
            counters = Counters._make(range(number, number + len(Counters._fields)))
            engine.set_counters(counters)
            counted.append(counters)
        else:
            each = len(CallbackCounters._fields)
            rings = [tuple(range(number + each * ring, number + each * (ring + 1))) for ring in range(3)]
            engine.set_counters(rings)
            counted += rings
        number += 100
    return counted


def counted(queues: Queues) -> list[tuple[int, ...]]:
    counters: list[tuple[int, ...]] = []
    for engine in queues._engines():
        counters += engine.counters() if isinstance(engine, CallbackQueues) else [engine.counters()]
    return counters


def travelled(queues: Queues) -> tuple[QueuesSetup, QueuesState]:
    """What a destination gets of them."""
    sections: list[tuple[Description[Any], Any]] = [
        (QUEUES_SETUP, queues.save_setup(with_descriptors=False)),
        (QUEUES, queues.save_switchover()),
    ]
    states = []
    for description, state in sections:
        blob = Blob()
        save(description, state, blob)
        states.append(load(description, description.version, Reader(blob.data)))
    return states[0], states[1]


def take(queues: Queues, setup: QueuesSetup, state: QueuesState) -> None:
    """What a destination does with it, rehearsal and all."""
    queues.check_setup(setup)
    queues.adopt_setup(setup)
    for each in (queues.save_switchover(), state):
        queues.check_switchover(each)
        queues.adopt_switchover(each)
    queues.thaw()


@pytest.mark.parametrize(
    "made",
    [(), (nic,), (console,), (nic, console), (console, nic)],
    ids=["none", "nic", "console", "nic and console", "console and nic"],
)
def test_rings_of_any_devices_arrive_as_they_were(undo: ExitStack, made: tuple[Callable[[], Rings], ...]) -> None:
    source, destination = (queues_of(undo, *(make() for make in made)) for _ in range(2))
    told = count_something(source)
    setup, state = travelled(source)
    take(destination, setup, state)
    assert counted(destination) == told == counted(source)
    assert travelled(destination) == (setup, state)


def test_each_group_has_its_name_its_engine_and_its_rings(undo: ExitStack) -> None:
    setup, state = travelled(queues_of(undo, nic(2), console()))
    assert setup == QueuesSetup(
        engines=(
            EngineState(name="queue-pair", counters=Counters._fields),
            EngineState(name="callbacks", counters=CallbackCounters._fields),
        ),
        groups=("nic0/0", "nic0/1", "con0/0"),
        group_engines=(0, 0, 1),
        ring_counts=(2, 2, 3),
        waiting=None,
    )
    counters = 2 * len(Counters._fields) + 3 * len(CallbackCounters._fields)
    assert [len(array) for array in state] == [2 * 7, 7, 4 * 2, 8 * counters]


def test_counters_of_another_release_are_known_by_their_names(undo: ExitStack) -> None:
    source, destination = (queues_of(undo, nic(2), console()) for _ in range(2))
    count_something(source)
    setup, state = travelled(source)
    # A release that counts things in another order, one of them by another name, and things that nobody knows here.
    pair_names = ("teapots", *reversed(Counters._fields[1:]))
    ring_names = ("kicks", "teapots", "chains")
    pairs = [[7, *reversed(each[1:])] for each in counted(source)[:2]]
    rings = [[each[CallbackCounters._fields.index("kicks")], 7, each[0]] for each in counted(source)[2:]]
    numbers = [number for each in (*pairs, *rings) for number in each]
    setup = dataclasses.replace(
        setup,
        engines=(
            EngineState(name="queue-pair", counters=pair_names),
            EngineState(name="callbacks", counters=ring_names),
        ),
    )
    take(destination, setup, state._replace(counters=struct.pack(f">{len(numbers)}Q", *numbers)))
    for engine, (before, after) in enumerate(zip(counted(source), counted(destination), strict=True)):
        expected = [0, *before[1:]]
        if engine >= 2:
            known = CallbackCounters(*before)
            expected = list(CallbackCounters(chains=known.chains, kicks=known.kicks))
        assert list(after) == expected
    # As a source it counts as everybody here does.
    assert travelled(destination)[0].engines == travelled(source)[0].engines


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (lambda: (), "the source has 0 groups of rings, this daemon has 2: the rest is the same"),
        (lambda: (console(2),), "'con0/0' stands there for 'nic0/0' here"),
        (lambda: (nic(), console(2)), "'con0/0' has 2 rings there and 3 here"),
        (
            lambda: (Rings("nic0", *console(2).groups), console()),
            "rings 'nic0/0' are served by 'callbacks' there and by 'queue-pair' here",
        ),
    ],
    ids=["none", "another", "ring count", "engine"],
)
def test_other_groups_of_rings_are_refused(
    undo: ExitStack, theirs: Callable[[], tuple[Rings, ...]], reason: str
) -> None:
    setup, _ = travelled(queues_of(undo, *theirs()))
    destination = queues_of(undo, nic(), console())
    destination.check_setup(setup)
    with pytest.raises(PeerError, match=reason):
        destination.adopt_setup(setup)
    destination.discard()


def test_numbers_that_are_missing_or_too_many_are_refused(undo: ExitStack) -> None:
    source, destination = (queues_of(undo, nic(), console()) for _ in range(2))
    setup, state = travelled(source)
    destination.adopt_setup(setup)
    for name, size, reason in (
        ("positions", 2, "positions came, expected 5"),
        ("failed", 1, "failed rings came, expected 5"),
        ("waiting", 4, "waiting frames came, expected 1"),
        ("counters", 8, f"counters came, expected {len(Counters._fields) + 3 * len(CallbackCounters._fields)}"),
    ):
        array = getattr(state, name)
        for wrong in (array[:-size], array + bytes(size), b""):
            with pytest.raises(PeerError, match=f"{len(wrong) // size} {reason}"):
                destination.check_switchover(state._replace(**{name: wrong}))
    with pytest.raises(PeerError, match="a ring has failed 3, which is 0 or 1"):
        destination.check_switchover(state._replace(failed=b"\0\1\3\0\1"))
    with pytest.raises(PeerError, match="a frame of 60 bytes waits for its guest, and no file came that has it"):
        destination.check_switchover(state._replace(waiting=struct.pack(">I", 60)))
