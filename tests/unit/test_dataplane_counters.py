"""The Rust core and its Python face list the same counters."""

from __future__ import annotations

import pytest

from localmig.dataplane import Counters, DriverCounters
from localmig.dataplane._dataplane import COUNTER_NAMES, DRIVER_COUNTER_NAMES, QueuePair


def test_names_stand_in_the_order_of_the_numbers() -> None:
    assert Counters._fields == COUNTER_NAMES
    assert DriverCounters._fields == DRIVER_COUNTER_NAMES


def test_what_is_set_is_what_is_read() -> None:
    pair = QueuePair("counters", -1)
    counters = Counters._make(range((1 << 64) - len(Counters._fields), 1 << 64))
    pair.set_counters(counters)
    assert Counters(*pair.counters()) == counters
    for wrong in (counters[1:], (*counters, 1), (-1, *counters[1:])):
        with pytest.raises((ValueError, OverflowError)):
            pair.set_counters(wrong)
    assert Counters(*pair.counters()) == counters
    pair.close()
