"""`python -m benchmarks compare`: this tree and another commit, measured in turns on one machine in one run.

Owns:        the command, the turns, what becomes of one that fails.
Never sees:  how anything is measured: each tree does that with its own `python -m benchmarks`.
Read next:   trees.py for the other commit's files; comparison.py for what is made of the samples.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import machine, report
from benchmarks.comparison import READERS, Reading, Side, compare, control_note, only_in, paths_table, rows_table
from benchmarks.options import new_parser
from benchmarks.report import RESULTS, Findings
from benchmarks.trees import Tree
from localmig.errors import LocalmigError
from localmig.testing.children import adopt_orphans

SECTION_SECONDS_MAX: Final = 1800.0
"""One section once in one tree. All sections of a full run together take that long."""

ROUNDS: Final = 4
"""Rounds unless the command line says otherwise. An even number gives both trees the same share of a steady drift."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One section once in one tree, and what it found."""

    section: str
    round: int
    side: Side
    reading: Reading


def order(rounds: int) -> Iterator[tuple[int, Side]]:
    """The round and the side of each turn: A B B A A B …, so that what drifts with time hits both alike."""
    for number in range(rounds):
        first, second = (Side.BASE, Side.THIS) if number % 2 == 0 else (Side.THIS, Side.BASE)
        yield number + 1, first
        yield number + 1, second


def main(argv: Sequence[str]) -> int:
    """Measures and reports; 0 unless it cannot begin. KeyboardInterrupt after the report of what was measured."""
    options = _parse(argv)
    adopt_orphans()
    begun = time.monotonic()
    options.results.mkdir(parents=True, exist_ok=True)
    try:
        trees = {Side.BASE: Tree.unpack(options.base), Side.THIS: Tree.here()}
        for side, tree in trees.items():
            sys.stderr.write(f"{side}: {tree.description}\n")
            tree.set_up(options.results / f"setup-{side}.log")
    except (LocalmigError, OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"cannot compare: {error}\n")
        return 1
    facts = {**{str(side): tree.description for side, tree in trees.items()}, **machine.facts()}
    turns: list[Turn] = []
    findings = Findings(name="compare")
    try:
        for section in options.only:
            for number, side in order(options.rounds):
                sys.stderr.write(f"{section}, round {number} of {options.rounds}: {side} …\n")
                folder = options.results / section / f"{number}-{side}"
                reading = _measure(trees[side], section, folder, options.size)
                turns.append(Turn(section=section, round=number, side=side, reading=reading))
    except KeyboardInterrupt:
        findings.failure = "interrupted"
        raise
    finally:
        findings.seconds = time.monotonic() - begun
        show(findings, turns)
        text, path = report.write(options.results, facts, [findings], {"compare": "Comparison"})
        sys.stdout.write(f"{text}\n\nWritten to {path}\n")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser(
        prog="make bench-compare BASE=… BENCH_ARGS=…",
        description="Measures this tree, with its uncommitted changes, and another commit in turns. Judges no time.",
        sections=list(READERS),
        results=RESULTS / "compare",
    )
    parser.add_argument(
        "--base", metavar="REV", help="the other commit; default: HEAD if files were changed since, else HEAD~1"
    )
    parser.add_argument("--rounds", type=_count, default=ROUNDS, metavar="N", help="of each tree; default: %(default)s")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


def _measure(tree: Tree, section: str, folder: Path, size: str) -> Reading:
    """What a tree's own benchmarks find; a section that cannot run is a note."""
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier run left must not be read as this one's
    folder.mkdir(parents=True)
    arguments = [] if size == "full" else [f"--{size}"]
    arguments += ["--only", section, "--results", str(folder.absolute())]
    failure = None
    try:
        tree.python("benchmarks", *arguments, seconds=SECTION_SECONDS_MAX, log=folder / "log.txt")
        found = json.loads((folder / "samples.json").read_text())["sections"][section]
        failure = found["failure"]
        reading = READERS[section](found["samples"])
    except (LocalmigError, OSError) as error:
        return Reading(notes=[str(error)])
    except (KeyError, TypeError, ValueError) as error:  # of another version; or a section that failed at once
        return Reading(notes=[failure or f"its samples cannot be read: {error!r}"])
    if failure is not None:
        reading.notes.append(failure)
    return reading


def show(findings: Findings, turns: Sequence[Turn]) -> None:
    """Fills in what the turns found."""
    sides = {side: [turn.reading for turn in turns if turn.side is side] for side in Side}
    base, this = sides[Side.BASE], sides[Side.THIS]
    ours = [[reading.ours for reading in side] for side in (base, this)]
    comparisons = compare(*ours)
    controls = compare([reading.others for reading in base], [reading.others for reading in this])
    paths = [{who: path for reading in side for who, path in reading.paths.items()} for side in (base, this)]
    findings.tables += [rows_table(comparisons), paths_table(*paths)]
    findings.samples |= {
        f"{each.row.quantity.name}: {each.row.case}": {"base": each.base.rounds, "this": each.this.rounds}
        for each in comparisons
    }
    findings.note(
        "Medians and p99: of all rounds together. Spread: how far apart the medians of one tree's rounds are, the "
        "wider of both trees', to the base's median. Difference: whether the two medians are further apart than that."
    )
    findings.notes += control_note(controls)
    for side, cases in ((Side.BASE, only_in(*ours)), (Side.THIS, only_in(*reversed(ours)))):
        if cases:
            findings.note(f"Not compared, because only {side} has them: {'; '.join(cases)}.")
    findings.notes += [
        f"**{turn.section}, round {turn.round}, {turn.side}**: {note}" for turn in turns for note in turn.reading.notes
    ]
