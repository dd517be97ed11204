"""What holds while a guest waits, and no longer."""

from __future__ import annotations

import errno
import gc
import os
from typing import NoReturn

import pytest

from localmig.migration.downtime import undisturbed, urgent
from localmig.trace import Event, RunStateChanged, Tracer


@pytest.fixture
def may_go_first() -> None:
    try:
        with urgent():
            if os.sched_getscheduler(0) != os.SCHED_FIFO:
                pytest.skip("needs CAP_SYS_NICE")
    finally:
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.usefixtures("may_go_first")
def test_a_thread_that_is_urgent_is_ordinary_again_afterwards_whatever_happened() -> None:
    with pytest.raises(InterruptedError), urgent():
        raise InterruptedError
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.usefixtures("may_go_first")
def test_a_policy_that_somebody_chose_is_kept() -> None:
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
    try:
        with urgent():
            assert os.sched_getscheduler(0) == os.SCHED_RR
        assert os.sched_getscheduler(0) == os.SCHED_RR
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_without_the_right_nothing_changes(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with urgent():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_events_wait_and_garbage_stays_until_the_end() -> None:
    seen: list[Event] = []
    tracer = Tracer()
    tracer.subscribe(seen.append)
    with undisturbed(tracer):
        tracer.emit(RunStateChanged(state="running"))
        assert seen == []
        assert not gc.isenabled()
    assert [type(event) for event in seen] == [RunStateChanged]
    assert gc.isenabled()
