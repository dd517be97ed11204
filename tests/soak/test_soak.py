"""Hundreds of handovers in a row, and thousands that fail: nothing is lost, nothing grows. `make soak` does 20000."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit.fork_server import fork_server
from tests.soak.chain import PROGRAM_EVERY, RECONNECT_EVERY, RESET_EVERY, Generation, Soak
from tests.soak.long_lived import FAILURES
from tests.soak.verdict import SAMPLE, WARM_UP, judge_failures, judge_generations

from benchmarks.site import Footprint, namespace
from localmig.testing.namespace import unavailable_reason

HANDOVERS = 250

DRIFT_BYTES_MAX = 24 * 1024
"""What later generations may have more than early ones: medians of forked ones differ by a page, and a hundred bytes
kept from each of so many predecessors would be more than this."""

FAILED = 2000

SERVER_DRIFT_BYTES_MAX = 512 * 1024
"""How much a fork server's heap may differ after hundreds of forks. It breathes by a quarter of a MiB."""

PACE_SECONDS_MAX = 600
"""Handovers take a minute or two; a machine that needs ten cannot be waited for."""


@pytest.fixture
def soak() -> Iterator[Soak]:
    if (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    fork_server()  # which has a descriptor of its own
    before = set(Path("/proc/self/fd").iterdir())
    with namespace(), Soak() as soak:
        yield soak
    # The frontends' side.
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.timeout(PACE_SECONDS_MAX)
def test_hundreds_of_handovers_lose_no_frame_and_nothing_grows(soak: Soak) -> None:
    soak.hand_over(1)
    server = Footprint.of(fork_server().pid)
    generations = soak.hand_over(HANDOVERS)
    soak.traffic.pause()
    assert judge_generations(generations, drift_bytes_max=DRIFT_BYTES_MAX).findings == []
    assert (soak.resets, soak.reconnects) == (HANDOVERS // RESET_EVERY, HANDOVERS // RECONNECT_EVERY)
    assert sum(each.is_program for each in generations) == HANDOVERS // PROGRAM_EVERY
    assert soak.traffic.received > HANDOVERS
    # Where they come from: what it kept, all of them would begin with.
    after = Footprint.of(fork_server().pid)
    assert (after.threads, after.descriptors) == (server.threads, server.descriptors)
    assert after.own_bytes - server.own_bytes <= SERVER_DRIFT_BYTES_MAX


@pytest.mark.timeout(PACE_SECONDS_MAX)
def test_thousands_of_handovers_that_fail_leave_nothing_in_a_daemon(soak: Soak) -> None:
    # Not the first one, so that what came from a source is under test too.
    soak.hand_over(1)
    soak.fail_to_hand_over(WARM_UP)
    rounds = soak.fail_to_hand_over(FAILED)
    assert len(rounds) == FAILED // len(FAILURES)
    assert judge_failures(FAILED, rounds).findings == []
    soak.traffic.pause()
    soak.traffic.go_on()
    soak.hand_over(1)


# -- what would be noticed ------------------------------------------------------------------------------------------


def generation(number: int, **changes: int) -> Generation:
    own = {name: changes.pop(name) for name in list(changes) if name in ("threads", "descriptors", "own_bytes")}
    footprint = dataclasses.replace(Footprint(threads=3, descriptors=35, own_bytes=20 << 20), **own)
    return Generation(
        number=number,
        is_program=False,
        footprint=footprint,
        downtime_us=300,
        descriptors=22,
        stream_bytes=changes.get("stream_bytes", 9000),
    )


def test_growth_would_be_noticed() -> None:
    steady = [generation(number) for number in range(500)]
    assert judge_generations(steady).findings == []
    for change in ("threads", "descriptors", "stream_bytes"):
        (finding,) = judge_generations([*steady, generation(500, **{change: 36})]).findings
        assert change.partition("_")[2] or change in finding
    growing = [generation(number, own_bytes=(20 << 20) + 300 * number) for number in range(1000)]
    (finding,) = judge_generations(growing).findings
    assert finding.startswith("memory grew from")


def test_what_a_failed_handover_left_would_be_noticed() -> None:
    steady = Footprint(threads=3, descriptors=35, own_bytes=20 << 20)
    rounds = [dataclasses.replace(steady, own_bytes=steady.own_bytes + 9 * 80 * number) for number in range(300)]
    (finding,) = judge_failures(9 * (300 - SAMPLE), rounds).findings
    assert finding.startswith("each failed handover left 80 bytes")
    (finding,) = judge_failures(900, [steady] * 99 + [dataclasses.replace(steady, descriptors=36)]).findings
    assert "descriptors" in finding
