"""What a soak found: what grew, and what it measured.

Owns:        how much may grow, with the reason; the report.
Never sees:  how anything is measured.
Read next:   test_soak.py and __main__.py, which soak and judge.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.soak.chain import Generation

from benchmarks.site import Footprint

SAMPLE: Final = 50
"""Generations, or rounds, of which a median is taken: their memory differs by some pages for no reason."""

DRIFT_BYTES_MAX: Final = 128 * 1024
"""What later generations may have more than early ones. Each is a new process, so only what travels, or what a frontend
does differently in time, can add up. Medians differ by a few pages; seven bytes kept from each of twenty
thousand predecessors would be as much as this."""

WARM_UP: Final = 3000
"""Failed handovers until one process has its size: Python's collector looks at old objects ever more rarely, and an
allocator keeps the most that it ever had."""

LEFT_BYTES_MAX: Final = 64
"""What a failed handover may leave in a daemon, on average. The objects of one have some kilobytes, an object alone has
more than this; what is left of it is an allocator's growth (some ten bytes, ever less)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What there is to report.

    Attributes:
        facts: lines for people.
        findings: what grew; empty is good.
    """

    facts: list[str]
    findings: list[str]


def judge_generations(generations: Sequence[Generation], *, drift_bytes_max: int = DRIFT_BYTES_MAX) -> Verdict:
    """Whether daemons grew from one to the next."""
    findings = []
    streams = [each.stream_bytes for each in generations if each.stream_bytes is not None]
    must_be_the_same: dict[str, set[int]] = {
        "threads": {each.footprint.threads for each in generations},
        "descriptors": {each.footprint.descriptors for each in generations},
        "descriptors that travel": {each.descriptors for each in generations},
        "bytes of a stream": set(streams),
    }
    for name, values in must_be_the_same.items():
        if len(values) != 1:
            findings.append(f"generations differ in {name}: {sorted(values)}")
    # A process that was forked and one that was started begin with different heaps.
    forked = [each.footprint.own_bytes for each in generations if not each.is_program]
    early, late = (statistics.median(forked[part]) for part in (slice(SAMPLE), slice(-SAMPLE, None)))
    if late - early > drift_bytes_max:
        findings.append(f"memory grew from {early / 1024:.0f} to {late / 1024:.0f} KiB from generation to generation")
    downtimes = sorted(each.downtime_us for each in generations)
    last = generations[-1]
    facts = [
        f"{len(generations)} handovers, {sum(each.is_program for each in generations)} to daemons started as programs",
        (
            f"own memory, median of {SAMPLE}: {early / 1024:.0f} KiB at first, {late / 1024:.0f} KiB in the end "
            f"(all of them: {min(forked) / 1024:.0f} to {max(forked) / 1024:.0f})"
        ),
        (
            f"{last.footprint.descriptors} descriptors, {last.footprint.threads} threads, "
            f"{last.descriptors} descriptors travel, streams of {streams[0]} bytes"
        ),
        (
            f"downtime: median {statistics.median(downtimes):.0f} µs, p99 {downtimes[len(downtimes) * 99 // 100]} µs, "
            f"longest {downtimes[-1]} µs"
        ),
    ]
    return Verdict(facts=facts, findings=findings)


def judge_failures(count: int, rounds: Sequence[Footprint]) -> Verdict:
    """Whether one daemon grew while it failed `count` times to hand over; `rounds` are of the time after `WARM_UP`."""
    findings = []
    for name, values in {
        "threads": {each.threads for each in rounds},
        "descriptors": {each.descriptors for each in rounds},
    }.items():
        if len(values) != 1:
            findings.append(f"a daemon that failed to hand over changed in {name}: {sorted(values)}")
    early, late = (
        statistics.median(each.own_bytes for each in rounds[part]) for part in (slice(SAMPLE), slice(-SAMPLE, None))
    )
    left = (late - early) / count
    if left > LEFT_BYTES_MAX:
        findings.append(f"each failed handover left {left:.0f} bytes in the daemon, limit is {LEFT_BYTES_MAX}")
    facts = [
        (
            f"{count} handovers that failed, of one daemon: {early / 1024:.0f} KiB at first, "
            f"{late / 1024:.0f} KiB in the end, {left:.1f} bytes each; "
            f"{rounds[-1].descriptors} descriptors, {rounds[-1].threads} threads"
        ),
    ]
    return Verdict(facts=facts, findings=findings)
