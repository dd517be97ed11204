"""Section logged: packets a second while each page that is written is logged for a VMM that moves its guest.

Owns:        the rates with and without, in turns on one daemon; their ratio.
Never sees:  what a log is made of.
Read next:   guests.py, whose guests switch it; packet_rates.py for the other rates.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from functools import partial
from typing import Final

from benchmarks.cpu import Rate, measure
from benchmarks.flood import Flood, WayCounts
from benchmarks.guests import Guests
from benchmarks.report import Findings, Table, rate_text, ratio_text
from benchmarks.site import NicSite, namespace
from benchmarks.sizes import Sizes

FRAME_SIZES: Final = (64, 1500)

TURNS: Final = 5
"""Of each: rates differ between two looks by more than logging costs, so the medians are compared."""


def run(findings: Findings, sizes: Sizes) -> None:
    """Measures, and fills in what it found."""
    columns = ("rings", "load", "way", "a second", "while logged", "logged to not", "a core, logged to not")
    table = Table(title="Packets a second of the kit's frontend, with and without a dirty log", columns=columns)
    for packed in (False, True):
        rings = "packed" if packed else "split"
        with namespace(), NicSite(1, packed=packed) as site:
            site.start()
            with Guests(site.nics, queue_size=256, packed=packed) as guests:
                for size in FRAME_SIZES:
                    found = _measured(guests, site, size=size, seconds=sizes.rate_seconds / TURNS)
                    for way, (off, on) in found.items():
                        load = f"{size} bytes"
                        findings.samples[f"{rings}, {load}, {way}"] = {
                            "off": [asdict(rate) for rate in off],
                            "on": [asdict(rate) for rate in on],
                        }
                        without, logged = (statistics.median(rate.a_second for rate in rates) for rates in (off, on))
                        ratios = ratio_text(logged, without), ratio_text(_a_core(on), _a_core(off))
                        table.add(rings, load, way, rate_text(without), rate_text(logged), *ratios)
    findings.tables.append(table)
    findings.note(
        f"One daemon, one guest: logging is switched off and on {TURNS} times while frames move, as QEMU does when a"
        " migration begins and fails; medians. A core: for each processor that the daemon kept busy."
    )


def _measured(guests: Guests, site: NicSite, *, size: int, seconds: float) -> dict[str, tuple[list[Rate], list[Rate]]]:
    """The rates of each way, without and with logging."""
    found: dict[str, tuple[list[Rate], list[Rate]]] = {"up": ([], []), "down": ([], [])}
    with Flood(guests.ends, rate=0, frame_size=size) as flood:
        for _ in range(TURNS):
            for place, logs in enumerate((False, True)):
                guests.switch_logging(on=logs)
                for way, rates in found.items():
                    rates[place].append(
                        measure(partial(_received, flood, way), pids=[site.daemon.pid], seconds=seconds)
                    )
    guests.switch_logging(on=False)
    return found


def _received(flood: Flood, way: str) -> int:
    counts: WayCounts = getattr(flood.only(way), way)
    return counts.received


def _a_core(rates: list[Rate]) -> float | None:
    known = [a_core for rate in rates if (a_core := rate.a_core_second) is not None]
    return statistics.median(known) if known else None
