"""Two trees side by side: the same rows measured several times in each, and whether they differ by more than chance.

Owns:        what is compared of each section's samples, medians, spreads, the tables.
Never sees:  how anything is measured, or when.
Read next:   report.py for a table; compare.py, which measures.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from benchmarks.cpu import Rate
from benchmarks.iperf import BULK
from benchmarks.packet_rates import IN_ORDER
from benchmarks.report import NONE, Table, rate_text, time_text
from localmig.testing.traffic import percentile


class Side(StrEnum):
    """Which tree."""

    BASE = "base"
    THIS = "this"


class Better(StrEnum):
    """Which values one would rather have."""

    LESS = "less"
    MORE = "more"


def _gigabits_text(bits_a_second: float | None) -> str:
    return NONE if bits_a_second is None else f"{bits_a_second / 1e9:.2f} Gbit/s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """What is measured.

    Attributes:
        name: with its unit, unless `text` has that.
        better: which values one would rather have.
        text: a value, for people.
    """

    name: str
    better: Better
    text: Callable[[float | None], str]


DOWNTIME: Final = Quantity(name="downtime", better=Better.LESS, text=time_text)
TOTAL: Final = Quantity(name="total time", better=Better.LESS, text=time_text)
PACKETS: Final = Quantity(name="packets a second", better=Better.MORE, text=rate_text)
PACKETS_A_CORE: Final = Quantity(name="packets a second a core", better=Better.MORE, text=rate_text)
BITS: Final = Quantity(name="TCP", better=Better.MORE, text=_gigabits_text)
BITS_A_CORE: Final = Quantity(name="TCP a core", better=Better.MORE, text=_gigabits_text)
RUST: Final = Quantity(name="packet path", better=Better.LESS, text=time_text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing that each tree measures in each round.

    Attributes:
        quantity: what is measured.
        case: under which circumstances.
    """

    quantity: Quantity
    case: str


@dataclass(kw_only=True, slots=True)
class Reading:
    """What one run of one section in one tree found.

    Attributes:
        ours: values of localmig, by row. Times are in nanoseconds, rates in a second.
        others: values of programs that are the same for both trees, by row.
        paths: what DPDK's driver chose, by frontend and backend.
        notes: what went wrong in it.
    """

    ours: dict[Row, list[float]] = field(default_factory=dict)
    others: dict[Row, list[float]] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# -- what a section's samples say ----------------------------------------------------------------------------------


def read_handovers(samples: Mapping[str, Any]) -> Reading:
    """Downtime and total time of each handover; those that failed and frames that were lost are notes."""
    reading = Reading()
    for case, found in samples.items():
        if handovers := found["handovers"]:
            reading.ours[Row(quantity=DOWNTIME, case=case)] = [each["downtime_us"] * 1e3 for each in handovers]
            reading.ours[Row(quantity=TOTAL, case=case)] = [each["total_ms"] * 1e6 for each in handovers]
        if found["gave_up"] is not None:
            reading.notes.append(f"{case}: given up: {found['gave_up']}")
        if failures := found["failures"]:
            reading.notes.append(f"{case}: {len(failures)} failed: {'; '.join(sorted(set(failures)))}")
        for way, counts in (found["flood"] or {}).items():
            if lost := counts["sent"] - counts["received"]:
                reading.notes.append(f"{case}: {lost} of {counts['sent']} frames lost {way}")
    return reading


def read_rates(samples: Mapping[str, Any]) -> Reading:
    """The rate of each row each way, and that for each core the backend kept busy."""
    reading = Reading()
    for found in samples["rows"]:
        who = f"{found['driver']}, {found['backend']}"
        is_ours = found["backend"].startswith("localmig")
        if found["failure"] is not None:
            reading.notes.append(f"{who}: {found['failure']}")
        if is_ours and (paths := found.get("paths")) is not None:  # a tree from before they were looked at has none
            order = ", IN_ORDER" if IN_ORDER in (paths["features"] or ()) else ""
            reading.paths[who] = f"{paths['transmit']} / {paths['receive']}{order}"
        is_tcp = found["load"] == BULK.name
        for way in ("up", "down"):
            if found[way] is not None:
                values = reading.ours if is_ours else reading.others
                rate, case = Rate(**found[way]), f"{who}, {found['load']}, {way}"
                values[Row(quantity=BITS if is_tcp else PACKETS, case=case)] = [rate.a_second]
                if (a_core := rate.a_core_second) is not None:
                    values[Row(quantity=BITS_A_CORE if is_tcp else PACKETS_A_CORE, case=case)] = [a_core]
    return reading


_NANOSECONDS: Final = {"ns": 1.0, "µs": 1e3, "ms": 1e6, "s": 1e9}
_TIME: Final = re.compile(r"(?:(median|p99|longest) )?(\d+(?:\.\d+)?) ?(ns|µs|ms|s)\b")


def read_rust(samples: Mapping[str, Any]) -> Reading:
    """Each time in what the packet path's own benchmarks print."""
    reading = Reading()
    for line in samples["printed"]:
        name, _, found = line.partition(": ")
        for what, number, unit in _TIME.findall(found):
            case = f"{name}, {what}" if what else name
            reading.ours[Row(quantity=RUST, case=case)] = [float(number) * _NANOSECONDS[unit]]
    return reading


READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Reading]]] = {
    "handovers": read_handovers,
    "rates": read_rates,
    "rust": read_rust,
}
"""The sections that can be compared."""


# -- arithmetic ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One row in one tree: the values of each round; each round has one at least."""

    rounds: Sequence[Sequence[float]]

    @property
    def median(self) -> float:
        """Of all rounds together."""
        return statistics.median(self._values())

    @property
    def p99(self) -> float | None:
        """Of all rounds together; None where a round has one value only."""
        if max(map(len, self.rounds)) == 1:
            return None
        return percentile([round(value) for value in self._values()], 0.99)

    @property
    def spread(self) -> float | None:
        """How far apart the medians of the rounds are; None for one round."""
        if len(self.rounds) == 1:
            return None
        medians = [statistics.median(each) for each in self.rounds]
        return max(medians) - min(medians)

    def _values(self) -> list[float]:
        return [value for each in self.rounds for value in each]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One row in both trees."""

    row: Row
    base: Measured
    this: Measured

    @property
    def ratio(self) -> float | None:
        """This median to the base's; None where the base's is 0."""
        return self.this.median / self.base.median if self.base.median else None

    @property
    def spread(self) -> float | None:
        """The wider one of both trees' spreads between rounds; None where one of them has one round only."""
        spreads = (self.base.spread, self.this.spread)
        return None if None in spreads else max(spread for spread in spreads if spread is not None)

    @property
    def verdict(self) -> str:
        """Whether the medians differ by more than the spread, and which way."""
        difference = self.this.median - self.base.median
        if self.spread is None:
            return NONE
        if abs(difference) <= self.spread:
            return "within the spread"
        is_more = difference > 0
        return "better" if is_more == (self.row.quantity.better is Better.MORE) else "worse"


def compare(base: Sequence[Mapping[Row, list[float]]], this: Sequence[Mapping[Row, list[float]]]) -> list[Comparison]:
    """The rows that both have, in the order of `this`; each argument has the rows of each round."""
    known, found = _measured(base), _measured(this)
    return [Comparison(row=row, base=known[row], this=found[row]) for row in found if row in known]


def only_in(rounds: Iterable[Mapping[Row, list[float]]], other: Iterable[Mapping[Row, list[float]]]) -> list[str]:
    """The cases that `rounds` have and `other` never has."""
    ours, theirs = ({row.case for each in side for row in each} for side in (rounds, other))
    return sorted(ours - theirs)


def _measured(rounds: Iterable[Mapping[Row, list[float]]]) -> dict[Row, Measured]:
    values: dict[Row, list[list[float]]] = {}
    for each in rounds:
        for row, found in each.items():
            values.setdefault(row, []).append(found)
    return {row: Measured(rounds=found) for row, found in values.items()}


# -- what is shown -------------------------------------------------------------------------------------------------


def rows_table(comparisons: Sequence[Comparison]) -> Table:
    """A row each."""
    columns = ("measured", "case", "base median", "this median", "this to base", "base p99", "this p99")
    table = Table(title="This tree beside the base", columns=(*columns, "spread", "difference"))
    for each in comparisons:
        text = each.row.quantity.text
        table.add(
            each.row.quantity.name,
            each.row.case,
            text(each.base.median),
            text(each.this.median),
            _ratio_text(each.ratio),
            text(each.base.p99),
            text(each.this.p99),
            NONE if each.spread is None or not each.base.median else f"{each.spread / each.base.median:.1%}",
            each.verdict,
        )
    return table


def paths_table(base: Mapping[str, str], this: Mapping[str, str]) -> Table:
    """What DPDK's driver chose under each tree, by frontend and backend."""
    table = Table(title="What DPDK's driver chose: transmit / receive", columns=("driven", "base", "this"))
    for who in this:
        table.add(who, base.get(who, NONE), this[who])
    return table


def control_note(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """How much programs differ from themselves, if there are any."""
    ratios = [each.ratio for each in comparisons if each.ratio is not None]
    if ratios:
        least, median, most = (_ratio_text(of(ratios)) for of in (min, statistics.median, max))
        yield (
            f"DPDK and passt, the same programs in both trees' runs, came to {median} of themselves at the median, "
            f"{least} to {most}: so much of a ratio is the machine's."
        )


def _ratio_text(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.3f}x"
