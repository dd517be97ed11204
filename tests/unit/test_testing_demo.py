"""The demonstration's table."""

from __future__ import annotations

from dataclasses import replace

from localmig.testing.demo import Round, table
from localmig.testing.traffic import PingReport, StreamReport

PINGS = PingReport(
    sent=12000,
    received=12000,
    lost=0,
    duplicates=0,
    rtt_us_p50=200,
    rtt_us_p99=400,
    rtt_us_max=1500,
    silence_us_max=1600,
    send_gap_us_max=1100,
)
STREAM = StreamReport(
    bytes_sent=250_000_000, bytes_received=250_000_000, sha256_sent="aa", sha256_received="aa", seconds=10.0
)
GOOD = Round(downtimes_us=(210, 190, 1200), pings=PINGS, stream=STREAM, carrier_changes=0, guest_lost=False)


def rows(left: Round, right: Round) -> dict[str, tuple[str, str]]:
    lines = [line for line in table(left, right).splitlines()[1:] if line]
    cells = [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in lines]
    return {name: (first, second) for name, first, second in cells}


def test_the_table_shows_both_rounds_side_by_side() -> None:
    bad = replace(
        GOOD,
        downtimes_us=(500_000,),
        pings=replace(PINGS, lost=600, silence_us_max=601_000),
        carrier_changes=2,
        stream=replace(STREAM, sha256_received="bb"),
    )
    shown = rows(GOOD, bad)
    assert shown["pings lost"] == ("0", "600")
    assert shown["downtime p50"] == ("0.21 ms", "500.00 ms")
    assert shown["downtime max"] == ("1.20 ms", "500.00 ms")
    assert shown["longest silence"] == ("1.60 ms", "601.00 ms")
    assert shown["link changes in guest"] == ("0", "2")
    assert shown["SHA-256 at both ends"] == ("equal", "DIFFERENT")


def test_a_guest_that_is_lost_has_no_downtime_and_is_silent_for_good() -> None:
    lost = replace(GOOD, downtimes_us=(), stream=None, carrier_changes=None, guest_lost=True)
    shown = rows(GOOD, lost)
    assert shown["downtime p50"] == ("0.21 ms", "-")
    assert shown["longest silence"] == ("1.60 ms", "for good")
    assert shown["replacements"] == ("3", "0, then guest lost")
    assert shown["TCP stream"] == ("250 MB", "broken")
