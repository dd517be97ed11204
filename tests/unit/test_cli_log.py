"""The log: a flood of lines costs little, hides nothing else, and is told of."""

from __future__ import annotations

import logging

import pytest

from localmig.cli.log import KIND_COUNT_MAX, LINE_INTERVAL_S, LINES_BURST, FloodFilter


class Clock:
    now_s = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("localmig.cli.log.time.monotonic", lambda: clock.now_s)
    return clock


def line(subject: object = "nic0", *, number: int = 7, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("localmig.x", level, "x.py", number, "device '%s': %s", (subject, "odd"), None)


def test_a_flood_is_cut_to_one_line_in_an_interval_which_counts_the_rest(clock: Clock) -> None:
    flood = FloodFilter()
    written = sum(flood.filter(line()) for _ in range(LINES_BURST + 100))
    assert written == LINES_BURST
    clock.now_s += LINE_INTERVAL_S
    told = line()
    assert flood.filter(told)
    assert told.getMessage() == "device 'nic0': odd (100 lines like this one were left out)"
    assert not flood.filter(line())
    clock.now_s += LINES_BURST * LINE_INTERVAL_S
    assert [flood.filter(line()) for _ in range(LINES_BURST + 1)] == [True] * LINES_BURST + [False]


def test_other_devices_and_other_places_are_heard_meanwhile(clock: Clock) -> None:
    flood = FloodFilter()
    while flood.filter(line()):
        pass
    assert flood.filter(line("nic1"))
    assert flood.filter(line(number=8))
    assert not flood.filter(line())


def test_numbers_make_no_kinds_and_no_flood_of_kinds_takes_memory(clock: Clock) -> None:
    flood = FloodFilter()
    assert sum(flood.filter(line(number_)) for number_ in range(1000)) == LINES_BURST
    for name in range(2 * KIND_COUNT_MAX):
        flood.filter(line(f"nic{name}"))
    assert len(flood._kinds) == KIND_COUNT_MAX


def test_what_was_asked_for_is_all_there(clock: Clock) -> None:
    flood = FloodFilter()
    assert all(flood.filter(line(level=logging.DEBUG)) for _ in range(10 * LINES_BURST))
