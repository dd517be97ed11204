"""Section bare: what it costs to hand over as many descriptors and bytes with nothing else done, in C and in Python.

Owns:        how many descriptors and bytes, the comparison with our downtime.
Never sees:  the messages themselves.
Read next:   bare_handover.c and bare_handover.py, which this runs; handovers.py for what is compared.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.handovers import FLOODED, Round
from benchmarks.native import program
from benchmarks.report import Findings, Summary, Table, count_text, ratio_text, time_cells, time_text
from benchmarks.sizes import Sizes
from localmig.errors import LocalmigError

RUN_SECONDS_MAX: Final = 120.0
"""A round of the largest takes a hundredth of a second."""

ROUNDS_OF_MANY_MAX: Final = 100
"""Rounds where thousands of descriptors move."""

ROUNDS_OF_FRESH_MAX: Final = 100
"""Rounds that have processes of their own, which must be started."""

MANY_DESCRIPTORS: Final = 2000

DESCRIPTORS_A_NIC: Final = 10
"""Where no handover was measured in this run: a session, a listener, memory, a TAP, six eventfds."""

A_MESSAGE: Final = {"one a message": 1, "253 a message": 253}
"""Descriptors: one, as in localmig's stream, where each stands at its place; or as many as the kernel allows."""

_SAVED_STREAM: Final = Path(__file__).parents[1] / "tests" / "compat" / "vectors" / "nic-session.hex"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    name: str
    argv: tuple[str, ...]
    a_message: int
    waiting: str = "asleep"
    is_fresh: bool = False
    """Whether each round has new processes, as each handover of ours has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    whole_ns: list[int]
    downtime_ns: list[int]


def run(findings: Findings, sizes: Sizes, rounds: Sequence[Round]) -> None:
    """Measures, and fills in what it found. `rounds`: handovers of this same run to compare with, may be none."""
    bare_c = (str(program("bare_handover")),)
    bare_python = (sys.executable, "-m", "benchmarks.bare_handover")
    kinds = [
        *(_Kind(name=f"C, {name}", argv=bare_c, a_message=count) for name, count in A_MESSAGE.items()),
        _Kind(name="C, 253 a message, never asleep", argv=bare_c, a_message=253, waiting="awake"),
        *(
            _Kind(name=f"C, {name}, fresh processes", argv=bare_c, a_message=count, is_fresh=True)
            for name, count in A_MESSAGE.items()
        ),
        *(_Kind(name=f"Python, {name}", argv=bare_python, a_message=count) for name, count in A_MESSAGE.items()),
    ]
    table = Table(
        title="Bare handovers: everything, and the part of it inside the downtime",
        columns=("NICs", "descriptors", "kind", "whole median", "p99", "max", "downtime part median", "p99", "max"),
    )
    setup_bytes, switchover_bytes = _bytes_a_nic()
    whole: dict[int, dict[str, _Measured]] = {}
    for nics, descriptors in _descriptors(sizes, rounds).items():
        whole[nics] = {}
        count = sizes.bare_rounds if descriptors < MANY_DESCRIPTORS else min(sizes.bare_rounds, ROUNDS_OF_MANY_MAX)
        for kind in kinds:
            runs = min(count, ROUNDS_OF_FRESH_MAX) if kind.is_fresh else 1
            numbers = (
                1 if kind.is_fresh else count,
                descriptors,
                nics * setup_bytes,
                nics * switchover_bytes,
                kind.a_message,
            )
            measured = _measure([*kind.argv, *map(str, numbers), kind.waiting], runs)
            whole[nics][kind.name] = measured
            table.add(
                str(nics),
                str(descriptors),
                kind.name,
                *time_cells(measured.whole_ns),
                *time_cells(measured.downtime_ns),
            )
            findings.samples[f"{count_text(nics, 'NIC')}, {kind.name}"] = {
                "whole_ns": measured.whole_ns,
                "downtime_ns": measured.downtime_ns,
            }
    findings.tables += [_comparison(rounds, whole), table]
    findings.note(
        f"As many messages as a handover has, {setup_bytes} bytes of setup and {switchover_bytes} of switchover a NIC, "
        "and nothing is mapped, started or checked. Two processes do all rounds, so nothing is cold, but for *fresh "
        "processes*: two new ones for each round, as each handover has."
    )
    findings.note("Downtime part: from sending the switchover to receiving COMMIT: three crossings, no descriptors.")


def _comparison(rounds: Sequence[Round], bare: Mapping[int, Mapping[str, _Measured]]) -> Table:
    """Our downtime as a multiple of each kind's whole."""
    names = [name for kinds in bare.values() for name in kinds]
    kinds = list(dict.fromkeys(names))
    columns = ("NICs", "load", "our downtime, median", *(f"to bare {name}" for name in kinds))
    table = Table(title="Our downtime as a multiple of a whole bare handover of as many descriptors", columns=columns)
    for this in rounds:
        ours = Summary.of(this.downtimes_ns)
        if ours is None or this.nics not in bare:
            continue
        medians = [Summary.of(bare[this.nics][name].whole_ns) for name in kinds]
        ratios = [ratio_text(ours.median, median.median if median else None) for median in medians]
        table.add(str(this.nics), this.load, time_text(ours.median), *ratios)
    return table


def _descriptors(sizes: Sizes, rounds: Sequence[Round]) -> dict[int, int]:
    """Descriptors of a handover by the number of NICs: as they were counted, where they were."""
    counted = {this.nics: this.handovers[0].descriptors for this in rounds if this.handovers and this.load == FLOODED}
    return {nics: counted.get(nics, nics * DESCRIPTORS_A_NIC) for nics in sizes.handovers}


def _bytes_a_nic() -> tuple[int, int]:
    """Bytes of setup and of switchover, from a saved stream of one NIC with its session."""
    setup, switchover, description = (len(bytes.fromhex(piece)) for piece in _SAVED_STREAM.read_text().split("\n\n"))
    return setup + description, switchover


def _measure(argv: Sequence[str], runs: int) -> _Measured:
    pairs: list[tuple[int, ...]] = []
    for _ in range(runs):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False)
        if done.returncode != 0:
            raise LocalmigError(f"'{' '.join(argv)}' failed: {done.stderr.strip()}")
        pairs += [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    return _Measured(whole_ns=[whole for whole, _ in pairs], downtime_ns=[downtime for _, downtime in pairs])
