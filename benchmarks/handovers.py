"""Section handovers: downtime, setup and total time for one NIC and for many, idle and flooded, and what a NIC takes.

Owns:        the rounds, their tables.
Never sees:  how a daemon is started or a frame counted.
Read next:   site.py and flood.py; bare.py, which compares with these downtimes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from benchmarks.flood import Flood, FloodCounts
from benchmarks.guests import Guests
from benchmarks.report import NONE, Findings, Summary, Table, count_text, ratio_text, time_cells, time_text
from benchmarks.site import Footprint, Handover, NicSite, namespace
from benchmarks.sizes import Sizes
from localmig.errors import LocalmigError, PeerError

FEW_NICS: Final = 8
"""Up to here each ring has QEMU's 256 entries; with more NICs 64, so that all guests' buffers fit a small machine."""

FAILURES_MAX: Final = 3
"""Handovers of one round that may fail, and are told, before the round is given up."""

IDLE: Final = "idle"
FLOODED: Final = "flooded"


@dataclass(kw_only=True, slots=True)
class Round:
    """Handovers of one number of NICs, idle or flooded."""

    nics: int
    load: str
    handovers: list[Handover] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    footprint: Footprint | None = None
    silences_ns: list[int] = field(default_factory=list)
    """The longest time without a frame, each way, around each handover."""
    refused: int = 0
    """Frames that met a full queue in the host while a handover was on its way."""
    flood: FloodCounts | None = None
    gave_up: str | None = None
    """Why it ended early."""

    @property
    def downtimes_ns(self) -> list[int]:
        """Of each handover."""
        return [each.downtime_us * 1000 for each in self.handovers]

    @property
    def setups_ns(self) -> list[int]:
        """Of each handover."""
        return [each.setup_us * 1000 for each in self.handovers]


def run(findings: Findings, sizes: Sizes) -> list[Round]:
    """Measures, and fills in what it found. Gives the rounds for whoever compares with them."""
    rounds: list[Round] = []
    try:
        for nics, times in sizes.handovers.items():
            for load in (IDLE, FLOODED):
                this = Round(nics=nics, load=load)
                rounds.append(this)
                try:
                    _play(this, times=times, rate=sizes.flood_rate)
                except (LocalmigError, OSError) as error:
                    this.gave_up = str(error)
    finally:
        findings.samples |= {f"{count_text(this.nics, 'NIC')}, {this.load}": asdict(this) for this in rounds}
        findings.tables += [_times(rounds), _phases(rounds), _losses(rounds), _footprints(rounds)]
        _note(findings, rounds, sizes)
    return rounds


def _play(this: Round, *, times: int, rate: int) -> None:
    queue_size = 256 if this.nics <= FEW_NICS else 64
    with namespace(), NicSite(this.nics) as site:
        site.start()
        with Guests(site.nics, queue_size=queue_size) as guests:
            this.footprint = Footprint.of(site.daemon.pid)
            if this.load == IDLE:
                _hand_over(this, site, None, times)
            else:
                with Flood(guests.ends, rate=rate) as flood:
                    _hand_over(this, site, flood, times)
                    this.flood = flood.stop()
            guests.stop()


def _hand_over(this: Round, site: NicSite, flood: Flood | None, times: int) -> None:
    for number in range(1, times + 1):
        site.start_destination()
        before = flood.counts() if flood is not None else None
        try:
            this.handovers.append(site.hand_over())
        except PeerError as error:
            this.failures.append(str(error))
            if len(this.failures) >= FAILURES_MAX:
                raise
        if flood is not None and before is not None:
            counts = flood.counts()
            this.refused += counts.down.refused - before.down.refused
            this.silences_ns.append(max(counts.up.silence_ns, counts.down.silence_ns))
        site.end_other()
        if number % 50 == 0 or number == times:
            sys.stderr.write(f"  {count_text(this.nics, 'NIC')}, {this.load}: {number}/{times}\n")


# -- what is shown ----------------------------------------------------------------------------------------------


def _times(rounds: Sequence[Round]) -> Table:
    quantiles = ("median", "p99", "max")
    columns = ["NICs", "load", "handovers", *(f"downtime {each}" for each in quantiles)]
    columns += ["to 1 NIC", *(f"setup {each}" for each in quantiles), "setup a NIC", "total median"]
    table = Table(title="Handovers", columns=columns)
    for this in rounds:
        one = next((each for each in rounds if each.load == this.load and each.handovers), this)
        setup = Summary.of(this.setups_ns)
        table.add(
            str(this.nics),
            this.load,
            str(len(this.handovers)),
            *time_cells(this.downtimes_ns),
            ratio_text(_median(this.downtimes_ns), _median(one.downtimes_ns)),
            *time_cells(this.setups_ns),
            time_text(setup.median / this.nics if setup else None),
            time_text(_median([each.total_ms * 1_000_000 for each in this.handovers])),
        )
    return table


def _phases(rounds: Sequence[Round]) -> Table:
    """Where the time goes, in medians."""
    source = ("hello", "setup", "setup-ack", "stop", "switchover", "ready")
    destination = ("adopt", "await-commit", "start")
    columns = ["NICs", "load", *(f"source {each}" for each in source), *(f"destination {each}" for each in destination)]
    table = Table(title="Medians of their phases", columns=columns)
    for this in rounds:
        cells = [_phase([each.source_phases_us for each in this.handovers], name) for name in source]
        cells += [_phase([each.destination_phases_us for each in this.handovers], name) for name in destination]
        table.add(str(this.nics), this.load, *cells)
    return table


def _phase(phases: Sequence[dict[str, int]], name: str) -> str:
    return time_text(_median([each[name] * 1000 for each in phases if name in each]))


def _losses(rounds: Sequence[Round]) -> Table:
    columns = ("NICs", "handovers", "frames up", "lost", "late or twice", "frames down", "lost", "late or twice")
    table = Table(
        title="Numbered frames through the handovers",
        columns=(*columns, "silence median", "silence p99", "silence max"),
    )
    for this in rounds:
        if this.flood is not None:
            up, down = this.flood.up, this.flood.down
            counts = [f"{up.sent}", f"{up.lost}", f"{up.late}", f"{down.sent}", f"{down.lost}", f"{down.late}"]
            # With many NICs it is another one's frame that ends the silence.
            silences = time_cells(this.silences_ns if this.nics == 1 else [])
            table.add(str(this.nics), str(len(this.handovers)), *counts, *silences)
    return table


def _footprints(rounds: Sequence[Round]) -> Table:
    table = Table(
        title="The daemon with its guests attached",
        columns=("NICs", "threads", "descriptors", "own memory", "a NIC more: threads", "descriptors", "own memory"),
    )
    known = {this.nics: this.footprint for this in rounds if this.footprint is not None}
    for nics, footprint in known.items():
        fewest, base = next(iter(known.items()))
        more = nics - fewest
        table.add(
            str(nics),
            str(footprint.threads),
            str(footprint.descriptors),
            f"{footprint.own_bytes / 2**20:.1f} MiB",
            f"{(footprint.threads - base.threads) / more:.2f}" if more else NONE,
            f"{(footprint.descriptors - base.descriptors) / more:.2f}" if more else NONE,
            f"{(footprint.own_bytes - base.own_bytes) / more / 1024:.0f} KiB" if more else NONE,
        )
    return table


def _note(findings: Findings, rounds: Sequence[Round], sizes: Sizes) -> None:
    findings.note(
        "All NICs of a daemon are handed over in one migration. Downtime: from the first ring asked to stop to the "
        "last one that runs again, by the daemons' own stamps."
    )
    findings.note(
        f"Flooded: {sizes.flood_rate} frames of 64 bytes a second each way, all NICs together, in bursts every 0.2 ms "
        "(up: guest to TAP, down: TAP to guest). Each frame is numbered. Silence: the longest time without a frame "
        "from asking for the handover to hearing of its end, with one NIC; setup's load shows in it, too."
    )
    findings.note(
        f"Queues have 256 entries up to {FEW_NICS} NICs, 64 beyond. Fewer handovers where one takes seconds. "
        "To 1 NIC: median downtime as a multiple of the first row's with the same load."
    )
    for this in rounds:
        name = f"{count_text(this.nics, 'NIC')}, {this.load}"
        if this.failures:
            findings.note(f"**{name}: {len(this.failures)} failed**: {'; '.join(sorted(set(this.failures)))}")
        if this.gave_up is not None:
            findings.note(f"**{name}: given up**: {this.gave_up}")
        if this.flood is not None and (refused := this.flood.down.refused):
            findings.note(
                f"{name}: {refused} of the frames lost down met a full queue at once, {this.refused} of them while a "
                "handover was on its way; a machine that starves a daemon for 50 ms does that without one."
            )


def _median(values: Sequence[int]) -> float | None:
    summary = Summary.of(values)
    return None if summary is None else summary.median
