"""The thread in which a device's own Python code runs, apart from everything else the daemon does.

Owns:        CallbackThread: waiting, pausing between two callbacks, what becomes of code that raises or never returns.
Never sees:  a ring, a session.
Read next:   callback_device.py, whose chains it takes.

Code of a device may be slow, may raise, may loop for ever. It is given its own thread, so that sessions, QMP, handovers
and other devices go on meanwhile. Nobody can interrupt it: code that does not return in time is left behind, and the
device is told so.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from localmig.fds import OwnedFd

_logger = logging.getLogger(__name__)

CALLBACK_SECONDS_MAX: Final = 1.0
"""How long one callback may take. A handover waits for it, and drivers give a silent device up after some seconds."""

SWITCH_SECONDS: Final = 0.0005
"""How soon a thread of Python's lets another one run. The interpreter's five milliseconds would be added to a downtime
each time the event loop has waited for something while a callback computes."""


class CallbackThread:
    """Calls what is watched, one after the other. Paused until `resume`. `watch` and `unwatch` may be called in it too.

    Args:
        name: the thread's.
        failed: called in the thread with what was raised, and with nothing else. The thread goes on.

    Attributes:
        change_count: how many times a callback began or ended. The same number twice says that none ran meanwhile, and
            that none began before and ended after.
    """

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        self._name = name
        self._failed = failed
        self._wake = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._watched: dict[int, Callable[[], None]] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._condition = threading.Condition()
        self._is_paused = True
        self._is_closed = False
        self._busy_since: float | None = None
        self._thread: threading.Thread | None = None
        self.change_count = 0

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Calls `callback` whenever `fd` can be read or has ended, until `unwatch`."""
        self._watched[fd] = callback
        self._notify()

    def unwatch(self, fd: int) -> None:
        """To be called before `fd` is closed. Nothing if it is not watched."""
        self._watched.pop(fd, None)
        self._notify()

    def post(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once, before anything that is watched."""
        self._posted.append(callback)
        self._notify()

    def resume(self) -> None:
        """Lets callbacks be called. Idempotent. RuntimeError where the process may have no further thread."""
        with self._condition:
            self._is_paused = False
            self._condition.notify_all()
        if self._thread is None:
            sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread

    def pause(self) -> bool:
        """From now on no callback begins; whether none is under way either. Idempotent."""
        with self._condition:
            self._is_paused = True
            return self._busy_since is None

    def seconds_busy(self) -> float:
        """How long the present callback has been running, 0 where none is."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        """Ends the thread, or leaves it behind where a callback does not return. Idempotent."""
        with self._condition:
            was_closed, self._is_closed = self._is_closed, True
            is_busy = self._busy_since is not None
            self._condition.notify_all()
        if was_closed:
            return
        self._notify()
        if self._thread is not None and not is_busy:
            self._thread.join()
        if self._thread is None or not self._thread.is_alive():
            self._wake.close()

    def _notify(self) -> None:
        if self._wake.is_open:
            os.eventfd_write(self._wake.fileno(), 1)

    def _run(self) -> None:
        while self._await_turn():
            self._call_posted()
            poll = select.poll()
            poll.register(self._wake.fileno(), select.POLLIN)
            for fd in tuple(self._watched):
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll():
                if fd == self._wake.fileno():
                    os.eventfd_read(fd)
                    continue
                # What was posted meanwhile may be about what this callback finds.
                self._call_posted()
                if (callback := self._watched.get(fd)) is not None and self._begin():
                    self._call(callback)

    def _call_posted(self) -> None:
        while self._posted and self._begin():
            self._call(self._posted.popleft())

    def _await_turn(self) -> bool:
        """Waits while paused; whether to go on."""
        with self._condition:
            self._condition.wait_for(lambda: not self._is_paused or self._is_closed)
            return not self._is_closed

    def _begin(self) -> bool:
        """Whether a callback may begin: decided at once with that it has begun."""
        with self._condition:
            if self._is_paused or self._is_closed:
                return False
            self._busy_since = time.monotonic()
            self.change_count += 1
            return True

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            _logger.exception("'%s': error in a callback", self._name)
            self._failed(error)
        finally:
            self.change_count += 1  # before it counts as ended: whoever waits for its end saves what it did
            self._busy_since = None
