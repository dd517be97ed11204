"""What each signal does to a daemon.

    SIGTERM, SIGINT     end it in order; a handover that is under way comes first
    SIGHUP              opens log and trace again: logrotate sends it, and so does a terminal that is closed
    `UNRELATED`         nothing: by default they would end the process, and a guest would lose its NIC by a mistake
    all others          what the kernel does: crashes and SIGQUIT leave a core, SIGTSTP stops

Owns:        the handlers.
Never sees:  what ending or opening again is.
Read next:   run.py, its user.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Final

from localmig.daemon import Daemon

_log = logging.getLogger(__name__)

ENDING: Final = (signal.SIGTERM, signal.SIGINT)

UNRELATED: Final = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF),
    *(signal.SIGIO, signal.SIGPWR, signal.SIGSTKFLT, signal.SIGXCPU),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)
"""Those whose default action is to end the process and that say nothing to a daemon (signal(7)). SIGPIPE and SIGXFSZ
are ignored by Python already."""


def ignore_until_handled() -> None:
    """SIGHUP ends nothing from now on. `signals_handled` follows when there is somebody to act."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # A line for a terminal whose foreground is another program's must not stop the process (termios(3), TOSTOP).
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)


@contextlib.contextmanager
def signals_handled(daemon: Daemon, *, reopen: Callable[[], None]) -> Iterator[list[int]]:
    """Inside, signals do what stands above. Gives those that came to end `daemon`, a list that grows.

    Args:
        daemon: who is to end.
        reopen: opens log and trace again. Called in the event loop, never inside the downtime: a disk may be slow.
    """
    ends: list[int] = []
    loop = asyncio.get_running_loop()

    def end(number: int, frame: object) -> None:
        del frame
        ends.append(number)
        # Python calls this between any two instructions; a handler of the loop's would wait for the end of a takeover.
        daemon.foretell_quit()
        loop.call_soon_threadsafe(daemon.quit)

    pending: set[int] = set()

    def later(number: int, frame: object) -> None:
        # Those that come before the event loop turns are one: handlers interrupt each other and must not pile up.
        del frame
        if number not in pending:
            pending.add(number)
            loop.call_soon_threadsafe(act, number)

    def act(number: int) -> None:
        pending.discard(number)
        if number != signal.SIGHUP:
            _log.info("signal %s ignored: it means nothing to this program", _name(number))
        elif daemon.tracer.is_held:
            daemon.tracer.on_release(reopen)
        else:
            reopen()

    handlers = {**dict.fromkeys(ENDING, end), **dict.fromkeys((signal.SIGHUP, *UNRELATED), later)}
    for number, handler in handlers.items():
        signal.signal(number, handler)
        signal.siginterrupt(number, False)
    try:
        yield ends
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # it is ending, and its exit status says how


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)
