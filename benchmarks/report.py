"""What a run found: samples, tables of them, a JSON file and a Markdown file.

Owns:        quantiles, how numbers are written, the layout of both files.
Never sees:  how anything is measured.
Read next:   __main__.py.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from localmig.testing.traffic import percentile

RESULTS: Final = Path(__file__).parent / "results"
"""Where files end unless another folder is named."""

NONE: Final = "-"
"""What a cell says where there is nothing to say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A sample, summed up; in the samples' unit."""

    count: int
    median: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[int]) -> Summary | None:
        """None for no values."""
        p99 = percentile(values, 0.99)
        if p99 is None:
            return None
        return cls(count=len(values), median=statistics.median(values), p99=p99, max=max(values))


def time_text(nanoseconds: float | None) -> str:
    """A duration with three digits and the unit that fits."""
    if nanoseconds is None:
        return NONE
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= size:
            return (
                f"{nanoseconds / size:.3g} {unit}" if nanoseconds < 1000 * size else f"{nanoseconds / size:.0f} {unit}"
            )
    return f"{nanoseconds:.0f} ns"


def ratio_text(numerator: float | None, denominator: float | None) -> str:
    """How many times the one is the other."""
    if numerator is None or not denominator:
        return NONE
    ratio = numerator / denominator
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.2g}x"


def count_text(count: int, what: str) -> str:
    """`1 NIC`, `8 NICs`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def rate_text(a_second: float | None) -> str:
    """Packets a second, in thousands or millions."""
    if a_second is None:
        return NONE
    return f"{a_second / 1e6:.2f} M" if a_second >= 1e6 else f"{a_second / 1e3:.0f} k"


def time_cells(values: Sequence[int]) -> list[str]:
    """Median, p99 and maximum of durations in nanoseconds."""
    summary = Summary.of(values)
    if summary is None:
        return [NONE] * 3
    return [time_text(summary.median), time_text(summary.p99), time_text(summary.max)]


@dataclass(kw_only=True, slots=True)
class Table:
    """A table of text."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """One row."""
        assert len(cells) == len(self.columns), (cells, self.columns)
        self.rows.append(cells)

    def markdown(self) -> str:
        """The table with padded columns, readable as it is."""
        columns = [[self.columns[at], *(row[at] for row in self.rows)] for at in range(len(self.columns))]
        padded = [_column(cells) for cells in columns]
        lines = [f"| {' | '.join(cells)} |" for cells in zip(*padded, strict=True)]
        rules = [f"{'-' * len(cells[0])}{':' if _is_numeric(cells) else '-'}" for cells in padded]
        return "\n".join((f"**{self.title}**", "", lines[0], f"|-{'|-'.join(rules)}|", *lines[1:]))


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether a column has numbers below its head."""
    return all(cell.strip()[:1].isdigit() or cell.strip() == NONE for cell in cells[1:])


def _column(cells: Sequence[str]) -> list[str]:
    """The cells of a column at one width, numbers to the right."""
    width = max(map(len, cells))
    return [cell.rjust(width) if _is_numeric(cells) else cell.ljust(width) for cell in cells]


@dataclass(kw_only=True, slots=True)
class Findings:
    """What one section found.

    Attributes:
        name: the section's.
        tables: for people.
        notes: what must be known to read them.
        samples: everything measured, by a name with its unit at the end.
        seconds: how long it took.
        failure: why the section could not run, or not to its end; None where it did.
    """

    name: str
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str | None = None

    def note(self, text: str) -> None:
        """Adds what must be known to read the tables."""
        self.notes.append(text)

    def markdown(self, title: str) -> str:
        """The section as it is shown."""
        parts = [f"## {title}"]
        parts += [table.markdown() for table in self.tables if table.rows]
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        if self.failure is not None:
            parts.append(f"**Not measured**: {self.failure}")
        return "\n\n".join([*parts, f"This section took {self.seconds:.0f} s."])


def write(
    folder: Path, machine: Mapping[str, str], findings: Sequence[Findings], titles: Mapping[str, str]
) -> tuple[str, Path]:
    """Writes `report.md` and `samples.json` into `folder`; gives the text of the first and its path."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = Table(title="The machine", columns=("fact", "value"))
    for name, value in machine.items():
        facts.add(name, value)
    text = "\n\n".join(["# Benchmarks", facts.markdown(), *(each.markdown(titles[each.name]) for each in findings)])
    path = folder / "report.md"
    path.write_text(text + "\n")
    sections = {each.name: {"failure": each.failure, "notes": each.notes, "samples": each.samples} for each in findings}
    (folder / "samples.json").write_text(json.dumps({"machine": machine, "sections": sections}, indent=1) + "\n")
    return text, path
