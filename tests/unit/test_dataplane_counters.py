"""The Rust core and its Python face list the same counters."""

from __future__ import annotations

import pytest

from localmig.dataplane import CallbackCounters, CallbackQueues, Counters, DriverCounters
from localmig.dataplane._dataplane import CALLBACK_COUNTER_NAMES, COUNTER_NAMES, DRIVER_COUNTER_NAMES, QueuePair


def test_names_stand_in_the_order_of_the_numbers() -> None:
    assert CallbackCounters._fields == CALLBACK_COUNTER_NAMES
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


def test_what_is_set_for_each_ring_is_what_is_read() -> None:
    queues = CallbackQueues(2, -1)
    counters = [CallbackCounters._make(range(first, first + len(CallbackCounters._fields))) for first in (1, 1 << 60)]
    queues.set_counters(counters)
    assert [CallbackCounters(*of_ring) for of_ring in queues.counters()] == counters
    with pytest.raises((ValueError, OverflowError)):
        queues.set_counters([(1, 2)])
    queues.close()
