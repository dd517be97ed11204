"""The thread of a device's own code: what may be known of it from outside."""

from __future__ import annotations

import os
import threading

from localmig.device_api.callback_thread import CallbackThread
from localmig.fds import OwnedFd

SECONDS_MAX = 10.0


def test_a_callback_that_ends_after_a_look_is_seen_by_the_next_look() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def callback() -> None:
        os.eventfd_read(fd.fileno())
        begun.set()
        assert may_end.wait(SECONDS_MAX)

    thread = CallbackThread("device", failed=lambda error: None)
    with OwnedFd(os.eventfd(1, os.EFD_CLOEXEC)) as fd:
        thread.watch(fd.fileno(), callback)
        thread.resume()
        assert begun.wait(SECONDS_MAX)
        in_the_middle = thread.change_count
        assert not thread.pause()
        may_end.set()
        thread.post(ended.set)
        thread.resume()
        assert ended.wait(SECONDS_MAX)
        thread.unwatch(fd.fileno())
        thread.close()
    assert thread.change_count > in_the_middle + 1


def test_a_thread_that_ran_nothing_since_looks_as_before() -> None:
    thread = CallbackThread("device", failed=lambda error: None)
    before = thread.change_count
    thread.resume()
    assert thread.pause()
    thread.close()
    assert thread.change_count == before
