"""What a guest's peer notices: pings each millisecond, from a process that nothing here makes late.

Owns:        the pinger's process, waiting for a guest to be reachable.
Never sees:  what happens to the guest meanwhile.
Read next:   localmig/testing/traffic.py for how a silence is counted; replacements.py, its user.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from typing import Final, Self

from benchmarks.lines import next_line
from localmig.errors import PeerLostError
from localmig.testing.traffic import PING_GRACE_SECONDS, Pinger, PingReport

ANSWER_SECONDS_MAX: Final = 30.0
"""A restarted daemon is back within a second; a guest under emulation, on a loaded machine, may take many."""

END_SECONDS_MAX: Final = PING_GRACE_SECONDS + 10
"""From asking for the report to having it: its grace, and a loaded machine."""


def await_answer(address: str) -> None:
    """Waits until a guest answers pings. PeerLostError if it does not."""
    answered = threading.Event()
    pinger = Pinger(address, on_first_answer=answered.set).start()
    try:
        if not answered.wait(ANSWER_SECONDS_MAX):
            raise PeerLostError(f"the guest at {address} did not answer within {ANSWER_SECONDS_MAX:g} s")
    finally:
        pinger.stop()


class Pings:
    """Pings a guest each millisecond, in the network namespace of the thread that starts it, until `stop`.

    Raises:
        PeerLostError: the guest did not answer the first of them.
    """

    def __init__(self, address: str) -> None:
        argv = [sys.executable, "-m", "localmig.testing.traffic", "ping", address]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._output = self._process.stdout
        try:
            next_line(self._output, seconds=ANSWER_SECONDS_MAX, who="the pinger")
        except PeerLostError:
            self.close()
            raise

    def stop(self) -> PingReport:
        """Pings no more; what became of the pings."""
        self._process.send_signal(signal.SIGTERM)
        return PingReport(**json.loads(next_line(self._output, seconds=END_SECONDS_MAX, who="the pinger")))

    def close(self) -> None:
        """Kills it, if it lives. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
