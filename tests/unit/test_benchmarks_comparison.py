"""Two trees are compared by the same rows, in turns, and by no more than what their rounds differ by themselves."""

from __future__ import annotations

import pytest
from tests.kit.cases import each_case

from benchmarks.compare import Turn, order, show
from benchmarks.comparison import (
    BITS,
    BITS_A_CORE,
    DOWNTIME,
    PACKETS,
    PACKETS_A_CORE,
    RUST,
    TOTAL,
    Reading,
    Row,
    Side,
    compare,
    only_in,
    read_handovers,
    read_rates,
    read_rust,
)
from benchmarks.report import NONE, Findings

LATENCY = Row(quantity=DOWNTIME, case="1 NIC, idle")
RATE = Row(quantity=PACKETS, case="64 bytes, up")


def compared(row: Row, base: list[list[float]], this: list[list[float]]) -> str:
    (comparison,) = compare([{row: values} for values in base], [{row: values} for values in this])
    return comparison.verdict


# -- the turns -----------------------------------------------------------------------------------------------------


def test_each_round_begins_with_the_tree_that_ended_the_one_before() -> None:
    assert "".join("A" if side is Side.BASE else "B" for _, side in order(3)) == "ABBAAB"
    assert [number for number, _ in order(2)] == [1, 1, 2, 2]


@each_case("rounds", range(1, 8))
def test_each_round_has_each_tree_once(rounds: int) -> None:
    turns = list(order(rounds))
    assert len(turns) == 2 * rounds
    assert set(turns) == {(number, side) for number in range(1, rounds + 1) for side in Side}


@pytest.mark.parametrize("rounds", [2, 4, 6])
def test_a_steady_drift_hits_both_trees_alike_in_an_even_number_of_rounds(rounds: int) -> None:
    times = {side: [at for at, (_, whose) in enumerate(order(rounds)) if whose is side] for side in Side}
    assert sum(times[Side.BASE]) == sum(times[Side.THIS])


# -- arithmetic ----------------------------------------------------------------------------------------------------


def test_median_and_p99_are_of_all_rounds_together() -> None:
    (comparison,) = compare(
        [{LATENCY: [100.0] * 100}, {LATENCY: [200.0] * 99 + [9000.0]}], [{LATENCY: [300.0] * 200}, {LATENCY: [300.0]}]
    )
    assert (comparison.base.median, comparison.base.p99) == (150.0, 200)
    assert (comparison.this.median, comparison.this.p99) == (300.0, 300)
    assert comparison.ratio == 2.0


def test_one_value_a_round_has_no_p99() -> None:
    (comparison,) = compare([{RATE: [1e6]}, {RATE: [2e6]}], [{RATE: [3e6]}])
    assert (comparison.base.p99, comparison.this.p99) == (None, None)


def test_the_spread_is_between_medians_of_rounds_and_the_wider_one_counts() -> None:
    (comparison,) = compare(
        [{LATENCY: [1.0, 100.0, 999.0]}, {LATENCY: [110.0]}], [{LATENCY: [50.0]}, {LATENCY: [80.0]}, {LATENCY: [60.0]}]
    )
    assert (comparison.base.spread, comparison.this.spread, comparison.spread) == (10.0, 30.0, 30.0)


def test_a_difference_as_wide_as_the_spread_is_within_it() -> None:
    assert compared(LATENCY, [[100], [110]], [[110], [120]]) == "within the spread"
    assert compared(LATENCY, [[100], [110]], [[90], [100]]) == "within the spread"


def test_a_wider_difference_has_the_sense_of_its_quantity() -> None:
    assert compared(LATENCY, [[100], [110]], [[111], [121]]) == "worse"
    assert compared(LATENCY, [[111], [121]], [[100], [110]]) == "better"
    assert compared(RATE, [[100], [110]], [[111], [121]]) == "better"
    assert compared(RATE, [[111], [121]], [[100], [110]]) == "worse"


def test_one_round_of_either_tree_proves_nothing() -> None:
    assert compared(LATENCY, [[100]], [[500], [510]]) == NONE
    assert compared(LATENCY, [[100], [110]], [[500]]) == NONE


def test_a_median_of_zero_has_no_ratio() -> None:
    (comparison,) = compare([{LATENCY: [0.0]}] * 2, [{LATENCY: [5.0]}] * 2)
    assert comparison.ratio is None
    assert comparison.verdict == "worse"


def test_only_rows_of_both_trees_are_compared_and_the_others_are_named() -> None:
    base, this = [{LATENCY: [1.0]}, {}], [{RATE: [2.0], LATENCY: [1.0]}]
    assert [each.row for each in compare(base, this)] == [LATENCY]
    assert only_in(this, base) == ["64 bytes, up"]
    assert only_in(base, this) == []


# -- samples -------------------------------------------------------------------------------------------------------


def rate(a_second: int, cores: float) -> dict[str, float]:
    return {"moved": a_second * 2, "seconds": 2.0, "cores": cores}


def test_handovers_are_read_in_nanoseconds_with_what_went_wrong() -> None:
    flood = {"up": {"sent": 10, "received": 10}, "down": {"sent": 10, "received": 8}}
    failed = {"handovers": [], "failures": ["b", "a", "a"], "gave_up": "no more", "flood": None}
    handovers = [{"downtime_us": 150, "total_ms": 6}, {"downtime_us": 160, "total_ms": 7}]
    reading = read_handovers(
        {
            "1 NIC, flooded": {"handovers": handovers, "failures": [], "gave_up": None, "flood": flood},
            "8 NICs, idle": failed,
        }
    )
    assert reading.ours == {
        Row(quantity=DOWNTIME, case="1 NIC, flooded"): [150e3, 160e3],
        Row(quantity=TOTAL, case="1 NIC, flooded"): [6e6, 7e6],
    }
    assert reading.notes == [
        "1 NIC, flooded: 2 of 10 frames lost down",
        "8 NICs, idle: given up: no more",
        "8 NICs, idle: 3 failed: a; b",
    ]


def test_rates_of_localmig_and_of_the_others_are_told_apart() -> None:
    rows: list[dict[str, object]] = [
        {"driver": "D", "backend": "localmig, packed rings", "load": "64 bytes", "up": rate(100, 0.5), "down": None},
        {"driver": "D", "backend": "DPDK", "load": "64 bytes", "up": rate(70, 0.0), "down": rate(60, 1.0)},
        {"driver": "D", "backend": "localmig", "load": "one TCP stream", "up": None, "down": rate(80, 0.8)},
    ]
    reading = read_rates({"rows": [{**row, "failure": None} for row in rows]})
    assert reading.ours == {
        Row(quantity=PACKETS, case="D, localmig, packed rings, 64 bytes, up"): [100.0],
        Row(quantity=PACKETS_A_CORE, case="D, localmig, packed rings, 64 bytes, up"): [200.0],
        Row(quantity=BITS, case="D, localmig, one TCP stream, down"): [80.0],
        Row(quantity=BITS_A_CORE, case="D, localmig, one TCP stream, down"): [100.0],
    }
    assert {row.case for row in reading.others} == {"D, DPDK, 64 bytes, up", "D, DPDK, 64 bytes, down"}


def test_paths_of_the_driver_are_read_where_they_were_told() -> None:
    row = {"backend": "localmig", "load": "64 bytes", "up": None, "down": None, "failure": None}
    paths = {"transmit": "inorder", "receive": "mergeable buffer", "features": ["VIRTIO_F_IN_ORDER"]}
    reading = read_rates({"rows": [{**row, "driver": "D", "paths": paths}, {**row, "driver": "an older tree's"}]})
    assert reading.paths == {"D, localmig": "inorder / mergeable buffer, IN_ORDER"}


def test_what_the_packet_path_prints_is_read_time_by_time() -> None:
    printed = [
        "split ring: 12.5 ns a packet of two buffers",
        "stop under load: median 1.5µs, p99 20µs, longest 3ms of 2000, 7 packets moved",
    ]
    assert read_rust({"printed": printed}).ours == {
        Row(quantity=RUST, case="split ring"): [12.5],
        Row(quantity=RUST, case="stop under load, median"): [1500.0],
        Row(quantity=RUST, case="stop under load, p99"): [20_000.0],
        Row(quantity=RUST, case="stop under load, longest"): [3_000_000.0],
    }


# -- what is shown -------------------------------------------------------------------------------------------------


def test_a_turn_that_failed_is_said_and_what_the_others_found_is_compared() -> None:
    control = Row(quantity=PACKETS, case="DPDK")
    found = {
        Side.BASE: [Reading(ours={LATENCY: [100e3]}, others={control: [100.0]}), Reading(notes=["no cargo"])],
        Side.THIS: [
            Reading(ours={LATENCY: [100e3], RATE: [1.0]}, others={control: [110.0]}, paths={"D": "standard / standard"})
        ]
        * 2,
    }
    turns = [
        Turn(section="rust", round=number, side=side, reading=found[side][number - 1]) for number, side in order(2)
    ]
    findings = Findings(name="compare")
    show(findings, turns)

    rows, paths = findings.tables
    assert rows.rows == [("downtime", "1 NIC, idle", "100 µs", "100 µs", "1.000x", NONE, NONE, NONE, NONE)]
    assert paths.rows == [("D", NONE, "standard / standard")]
    assert findings.samples == {"downtime: 1 NIC, idle": {"base": [[100e3]], "this": [[100e3], [100e3]]}}
    assert "**rust, round 2, base**: no cargo" in findings.notes
    assert "Not compared, because only this has them: 64 bytes, up." in findings.notes
    assert any("came to 1.100x of themselves at the median" in note for note in findings.notes)
