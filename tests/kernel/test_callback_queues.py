"""Rings that Python answers: chains in any order, by any thread, parked, and served on by a successor after kill -9."""

from __future__ import annotations

import os
import select
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.kernel.chain_guest import ANSWER_SIZE_MAX, CHAINS, PATIENCE_MS, ChainGuest

from localmig import dataplane
from localmig.dataplane import CHAIN_DATA_SIZE_MAX, CallbackQueues, Chain, InFlight


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def served(guest: ChainGuest) -> CallbackQueues:
    rings = guest.rings()
    queues = CallbackQueues(len(rings), guest.event_fd)
    queues.configure(memory=guest.memory.mapping, rings=rings, event_index=False, indirect=True)
    queues.start()
    return queues


def take_all(queues: CallbackQueues) -> list[Chain]:
    chains = []
    while (chain := queues.take()) is not None:
        chains.append(chain)
    return chains


def echo(queues: CallbackQueues, stop_fd: int) -> None:
    """A device: it answers every chain with what it says."""
    polled = select.poll()
    polled.register(queues.fileno(), select.POLLIN)
    polled.register(stop_fd, select.POLLIN)
    while all(fd != stop_fd for fd, _ in polled.poll()):
        while (chain := queues.take()) is not None:
            queues.complete(chain, chain.readable)


def test_a_thread_of_the_device_answers_and_sleeps_meanwhile(undo: ExitStack) -> None:
    guest = ChainGuest(undo, ring_count=2)
    queues = served(guest)
    stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
    undo.callback(os.close, stop_fd)
    device = threading.Thread(target=echo, args=(queues, stop_fd))
    device.start()
    for number in range(100):
        ring, head, text = number % 2, number % CHAINS, b"%d" % number
        guest.offer(ring, head, text)
        assert guest.await_answer(ring) == (head, text)
    os.eventfd_write(stop_fd, 1)
    device.join()
    assert queues.stop() == [50, 50]
    queues.close()
    with pytest.raises(RuntimeError, match="closed"):
        queues.fileno()


def test_a_chain_says_what_it_is_and_is_completed_once(undo: ExitStack) -> None:
    guest = ChainGuest(undo)
    queues = served(guest)
    guest.offer(0, 3, b"question")
    (chain,) = take_all(queues)
    assert (chain.ring, chain.head, chain.readable, chain.writable) == (0, 3, b"question", ANSWER_SIZE_MAX)
    assert not chain.was_taken
    assert repr(chain) == "<chain at descriptor 3 of ring 0: 8 bytes to read, 64 to write>"
    with pytest.raises(ValueError, match="which has room for 64"):
        queues.complete(chain, bytes(ANSWER_SIZE_MAX + 1))
    assert guest.next_answer(0) is None
    assert queues.complete(chain, b"answer")
    with pytest.raises(ValueError, match="completed already"):
        queues.complete(chain, b"answer")
    assert guest.next_answer(0) == (3, b"answer")
    assert ANSWER_SIZE_MAX < CHAIN_DATA_SIZE_MAX


def test_threads_complete_parked_chains_in_any_order(undo: ExitStack) -> None:
    guest = ChainGuest(undo)
    queues = served(guest)
    for head in range(CHAINS):
        guest.offer(0, head, b"%d" % head)
    chains = take_all(queues)
    threads = [threading.Thread(target=queues.complete, args=(chain, chain.readable)) for chain in reversed(chains)]
    for thread in threads:
        thread.start()
    answers = dict(guest.await_answer(0) for _ in chains)
    for thread in threads:
        thread.join()
    assert answers == {head: b"%d" % head for head in range(CHAINS)}


def test_chains_are_given_back_before_a_frontend_is_told_the_position(undo: ExitStack) -> None:
    guest = ChainGuest(undo)
    queues = served(guest)
    guest.offer(0, 2, b"a")
    guest.offer(0, 1, b"b")
    parked = take_all(queues)
    with pytest.raises(RuntimeError, match="the rings run"):
        queues.give_back(0)
    queues.stop()
    assert queues.give_back(0) == 2
    assert [guest.next_answer(0), guest.next_answer(0)] == [(2, b""), (1, b"")]
    assert queues.positions() == [2]
    assert not queues.complete(parked[0], b"late")


@pytest.mark.parametrize("when", ["parked", "completing"])
def test_a_successor_of_a_killed_process_serves_each_chain_once(undo: ExitStack, when: str) -> None:
    guest = ChainGuest(undo)
    ready, ready_in = os.pipe()
    undo.callback(os.close, ready)
    for head in range(CHAINS):
        guest.offer(0, head, b"%d" % head)
    child = os.fork()
    if child == 0:
        queues = served(guest)
        chains = take_all(queues)
        os.write(ready_in, b"!")
        while when == "completing" and chains:
            queues.complete(chains.pop(), b"before")
        signal.pause()
    os.close(ready_in)
    polled = select.poll()
    polled.register(ready, select.POLLIN)
    assert polled.poll(PATIENCE_MS)
    # Wherever that is: in the middle of a completion, for one.
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    answers = []
    successor = served(guest)
    chains = take_all(successor)
    assert all(chain.was_taken for chain in chains)
    assert [chain.head for chain in chains] == list(range(len(chains))), "the last ones were completed first"
    for chain in chains:
        successor.complete(chain, b"after")
    while (answer := guest.next_answer(0)) is not None:
        answers.append(answer)
    assert sorted(head for head, _ in answers) == list(range(CHAINS))
    assert {head for head, text in answers if text == b"after"} == {chain.head for chain in chains}


def test_a_handover_carries_positions_failures_and_counters(undo: ExitStack) -> None:
    guest = ChainGuest(undo, ring_count=3)
    queues = served(guest)
    for number in range(2 * CHAINS):
        guest.offer(0, number % CHAINS, b"asked")
        (chain,) = take_all(queues)
        queues.complete(chain, b"answered")
    guest.offer(1, 1, b"kept")
    (kept,) = take_all(queues)
    queues.fail(2, "it is broken")
    assert dataplane.stop_all([queues]) == [True]
    positions, failed, counters = dataplane.save_all([queues])
    assert struct.unpack(">3H", positions) == (2 * CHAINS, 1, 0)
    assert failed == b"\0\0\1"

    rings = guest.rings()
    successor = CallbackQueues(len(rings), guest.event_fd)
    successor.configure(memory=guest.memory.mapping, rings=rings, event_index=False, indirect=True)
    assert dataplane.check_positions([successor], positions) is None
    dataplane.load_all([successor], positions, failed, counters)
    assert dataplane.save_all([successor]) == (positions, failed, counters)
    assert successor.counters() == queues.counters()
    (began_ns,) = dataplane.start_all([successor])
    assert began_ns is not None
    assert dataplane.start_all([successor]) == [None]
    assert (successor.take_corrections(), successor.take_ring_errors()) == ([], [])
    (again,) = take_all(successor)
    assert (again.ring, again.head, again.was_taken) == (1, kept.head, True)
    successor.complete(again, b"answered")
    assert guest.await_answer(1) == (1, b"answered")
    with pytest.raises(RuntimeError, match="the rings run"):
        dataplane.load_all([successor], positions, failed, counters)
    dataplane.stop_all([successor])
    dataplane.recover_all([successor])
    assert dataplane.save_all([successor])[0] == struct.pack(">3H", 2 * CHAINS, 1, 0)


def test_rings_that_are_not_laid_out_take_only_counters_and_a_wrong_number_of_any_is_refused(undo: ExitStack) -> None:
    guest = ChainGuest(undo)
    bare, queues = CallbackQueues(1, guest.event_fd), served(guest)
    queues.stop()
    engines = [bare, queues]
    assert dataplane.check_positions(engines, bytes(4)) is None
    queues.release()
    # Nothing is laid out: it can go on anywhere, and its counters are taken.
    dataplane.load_all(engines, b"\xff" * 4, b"\1\1", b"\0" * 79 + b"\1")
    assert dataplane.save_all(engines) == (bytes(4), bytes(2), b"\0" * 79 + b"\1")
    for positions, failed, counters, what in (
        (bytes(3), bytes(2), bytes(80), "positions have 3 bytes, expected 4"),
        (bytes(4), bytes(3), bytes(80), "failed rings have 3 bytes, expected 2"),
        (bytes(4), bytes(2), bytes(72), "counters have 72 bytes, expected 80"),
    ):
        with pytest.raises(ValueError, match=what):
            dataplane.load_all(engines, positions, failed, counters)


def test_a_guest_that_lies_fails_its_ring_and_everybody_hears(undo: ExitStack) -> None:
    guest = ChainGuest(undo, ring_count=2)
    queues = served(guest)
    guest.offer(0, 1, b"a")
    guest.offer(0, 1, b"a")
    guest.offer(1, 1, b"b")
    chains = take_all(queues)
    assert queues.failed() == [True, False]
    assert os.eventfd_read(guest.event_fd) == 1
    reason = "the chain at descriptor 1 is made available again while it is in flight"
    assert queues.take_ring_errors() == [(0, reason)]
    assert [queues.complete(chain, b"") for chain in chains] == [chain.ring == 1 for chain in chains]


def test_files_and_configurations_that_cannot_be_are_refused(undo: ExitStack) -> None:
    guest = ChainGuest(undo)
    with pytest.raises(ValueError, match="must be for 1 to 256"):
        InFlight.create(257)
    with pytest.raises(ValueError, match="in-flight file: has"):
        InFlight(guest.in_flight_fd, 2)
    with pytest.raises(ValueError, match="has no ring 1"):
        guest.in_flight().forget(1)
    queues = CallbackQueues(1, guest.event_fd)
    with pytest.raises(RuntimeError, match="not configured"):
        queues.start()
    with pytest.raises(ValueError, match="2 rings are configured, there are 1"):
        queues.configure(memory=guest.memory.mapping, rings=[None, None], event_index=False, indirect=True)


def test_nothing_is_left_open(undo: ExitStack) -> None:
    guest = ChainGuest(undo)
    before = len(list(Path("/proc/self/fd").iterdir()))
    queues = served(guest)
    guest.offer(0, 1, b"a")
    take_all(queues)
    queues.close()
    queues.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
