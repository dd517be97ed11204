"""`python -m benchmarks`: the sections in order, each in namespaces of its own, and one report of all.

Owns:        the command line, the order, what becomes of a section that cannot run, the end after Ctrl-C.
Never sees:  how anything is measured.
Read next:   sizes.py and report.py; the sections' modules; compare.py for `python -m benchmarks compare`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

from benchmarks import (
    bare,
    compare,
    handovers,
    logged_rates,
    machine,
    microbenchmarks,
    packet_rates,
    replacements,
    report,
)
from benchmarks.options import new_parser
from benchmarks.report import RESULTS, Findings
from benchmarks.sizes import SIZES, Sizes
from localmig.errors import LocalmigError
from localmig.testing.children import end_children
from localmig.testing.namespace import isolate

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT."""

TITLES: Final = {
    "handovers": "Handovers",
    "bare": "The bare cost of handing descriptors over",
    "replacements": "What a guest's peer notices",
    "rates": "Packet rates",
    "logged": "Packet rates while pages are logged",
    "rust": "The packet path's own benchmarks",
}


class Run:
    """One run: its sizes, and what a section needs of an earlier one."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._rounds: list[handovers.Round] = []

    def sections(self) -> dict[str, Callable[[Findings], None]]:
        """Each section by its name, in order."""
        return {
            "handovers": self._handovers,
            "bare": self._bare,
            "replacements": lambda findings: replacements.run(findings, self.sizes),
            "rates": lambda findings: packet_rates.run(findings, self.sizes),
            "logged": lambda findings: logged_rates.run(findings, self.sizes),
            "rust": microbenchmarks.run,
        }

    def _handovers(self, findings: Findings) -> None:
        self._rounds = handovers.run(findings, self.sizes)

    def _bare(self, findings: Findings) -> None:
        bare.run(findings, self.sizes, self._rounds)


def measure(sizes: Sizes, names: Sequence[str]) -> tuple[list[Findings], bool]:
    """Runs sections; what they found, and whether all of it was measured: Ctrl-C ends them early."""
    found: list[Findings] = []
    for name, section in Run(sizes).sections().items():
        if name not in names:
            continue
        findings = Findings(name=name)
        found.append(findings)
        begun = time.monotonic()
        sys.stderr.write(f"{name} …\n")
        try:
            section(findings)
        except KeyboardInterrupt:
            findings.failure = "interrupted"
        except (LocalmigError, OSError, subprocess.SubprocessError) as error:
            findings.failure = str(error) or repr(error)
        except Exception as error:  # noqa: BLE001 - a bug in one section must not cost what the others measured
            traceback.print_exc()
            findings.failure = f"internal error: {error!r}"
        finally:
            findings.seconds = time.monotonic() - begun
            end_children()  # of a process that was just starting nobody may know yet
        if _interrupts:  # what it was in the middle of may have made another error of it
            return found, False
        sys.stderr.write(f"{name}: {findings.failure or 'done'}, {findings.seconds:.0f} s\n")
    return found, True


_interrupts: list[int] = []
"""Signals that told us to end."""


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """Measures and reports; 0 unless it was interrupted, or cannot run at all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if argv[:1] == ["compare"]:
        try:
            return compare.main(argv[1:])
        except KeyboardInterrupt:
            return INTERRUPTED
    parser = new_parser(
        prog="make bench BENCH_ARGS=…",
        description="Measures localmig beside what others do, in namespaces of its own. Compares no time with a limit.",
        sections=list(TITLES),
        results=RESULTS,
    )
    options = parser.parse_args(argv)
    try:
        isolate()
    except LocalmigError as error:
        sys.stderr.write(f"benchmarks cannot run here: {error}\n")
        return 1
    facts = machine.facts()
    found, complete = measure(SIZES[options.size], options.only)
    text, path = report.write(options.results, facts, found, TITLES)
    sys.stdout.write(f"{text}\n\nWritten to {path}\n")
    return 0 if complete else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
