"""The two rounds: a daemon is replaced under traffic, by handovers, then by restarts.

Owns:        the traffic, when the next replacement may come, the namespace that all of it happens in.
Never sees:  how a daemon or a guest is started, what is told of the rounds.
Read next:   report.py for what a round is.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol, Self

from localmig.demo.guests import GUEST_ADDRESS, Boot, DemoGuest
from localmig.demo.report import Replacement, Round, milliseconds
from localmig.demo.service import STEP_SECONDS_MAX, Service
from localmig.errors import PeerError, PeerLostError
from localmig.testing.children import adopt_orphans, end_children
from localmig.testing.namespace import configure, create_tap, isolate
from localmig.testing.traffic import PingRecord, PingReport, StreamReport, StreamSender

HOST_ADDRESS: Final = "10.9.0.1/24"

STREAM_BYTES_PER_SECOND: Final = 25_000_000
"""200 Mbit/s: with both ends, the guest and the daemon on one small machine, more would measure its scheduler."""

STREAM_PROGRESS_BYTES: Final = 2_500_000
"""What the stream moves between two replacements, a tenth of a second at its full speed: only what has recovered from
one is a fair subject for the next."""

RECOVERY_SECONDS_MAX: Final = 10.0
"""How long that may take: TCP tries again after 0.2 s, 0.4 s, 0.8 s …"""


def progress(line: str) -> None:
    """Says to whoever watches how far it is."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Replaceable(Protocol):
    """What a round replaces."""

    def forget(self) -> None:
        """Lets `moved_ns` begin here."""

    def moved_ns(self) -> tuple[int, int | None]:
        """When, since `forget`, the guest's network stopped and ran again, by CLOCK_MONOTONIC; None if it did not."""


def hand_over(service: Service, guest: DemoGuest, *, times: int) -> Round:
    """Traffic, and `times` handovers in it."""
    return play("handover", guest, service, service.hand_over, times=times)


def restart(service: Service, guest: DemoGuest, *, times: int) -> Round:
    """The same with restarts."""

    def replace() -> None:
        service.restart()
        guest.wait_reconnected()

    return play("restart", guest, service, replace, times=times)


def play(name: str, guest: DemoGuest, subject: Replaceable, replace: Callable[[], None], *, times: int) -> Round:
    """Replaces `subject` under traffic until it was done `times` times or the guest did not recover."""
    replacements: list[Replacement] = []
    before = guest.counters()
    with Traffic(guest.port) as traffic:
        traffic.recover()
        for number in range(1, times + 1):
            subject.forget()
            replace()
            recovered = traffic.recover()
            recovered_ns = time.monotonic_ns()
            stopped_ns, started_ns = subject.moved_ns()
            if not recovered:
                # Rings may have run again: the guest has lost its network all the same.
                replacements.append(Replacement(stopped_ns=stopped_ns, started_ns=None, recovered_ns=None))
                progress(f"{name} {number}/{times}: the guest has lost its network")
                traffic.give_up()
                break
            replacement = Replacement(stopped_ns=stopped_ns, started_ns=started_ns, recovered_ns=recovered_ns)
            replacements.append(replacement)
            progress(f"{name} {number}/{times}: downtime {milliseconds(replacement.downtime_us)}")
        pings, record, stream = traffic.reports()
    counted = None if replacements[-1].started_ns is None else guest.counters() - before
    return Round(replacements=tuple(replacements), pings=pings, record=record, stream=stream, guest=counted)


class Traffic:
    """Pings every millisecond and a TCP stream, from the host to the guest."""

    def __init__(self, port: int) -> None:
        address = GUEST_ADDRESS.partition("/")[0]
        # In a process of its own: nothing that happens here may make it late.
        self._folder = tempfile.TemporaryDirectory(prefix="localmig-demo-")
        self._record = Path(self._folder.name, "pings.csv")
        argv = [sys.executable, "-m", "localmig.testing.traffic", "ping", address, "--record", str(self._record)]
        self._pinger = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._pinger.stdout is not None
        self._output = self._pinger.stdout
        try:
            self._wait_answer(address)
            self._sender = StreamSender(address, port, bytes_per_second=STREAM_BYTES_PER_SECOND)
        except (PeerError, OSError):
            self.close()
            raise

    def _wait_answer(self, address: str) -> None:
        """The pinger's first line tells of its first answer."""
        if not select.select([self._output], [], [], STEP_SECONDS_MAX)[0] or not self._output.readline():
            raise PeerError(f"guest does not answer at {address}")

    def recover(self) -> bool:
        """Waits until the stream flows; False if it does not any more."""
        return self._sender.wait_progress(STREAM_PROGRESS_BYTES, RECOVERY_SECONDS_MAX)

    def give_up(self) -> None:
        """Breaks the stream off, which would wait for a guest that is lost."""
        self._sender.abort()

    def reports(self) -> tuple[PingReport, PingRecord, StreamReport | None]:
        """Ends both; None for a stream that broke."""
        try:
            stream = self._sender.stop()
        except PeerLostError:
            stream = None
        self._pinger.send_signal(signal.SIGTERM)
        report, _ = self._pinger.communicate(timeout=STEP_SECONDS_MAX)
        return PingReport(**json.loads(report)), PingRecord.read(self._record), stream

    def close(self) -> None:
        """Kills the pinger, if it still runs. Idempotent."""
        if self._pinger.poll() is None:
            self._pinger.kill()
            self._pinger.wait()
        self._output.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run(boot: Boot, *, times: int) -> tuple[Round, Round, DemoGuest]:
    """Both rounds, each with a fresh guest; the last of them to tell what it was.

    Args:
        boot: of the kind of guest that plays.
        times: how often the daemon is replaced in each.

    Raises:
        LocalmigError: this machine cannot run it, or it went wrong; the text says what.
    """
    isolate()
    create_tap("tap0")  # persistent: a restart keeps the host's addresses, as a careful operator has it
    configure("tap0", address=HOST_ADDRESS)
    adopt_orphans()
    rounds = []
    for play in (hand_over, restart):
        with ExitStack() as resources:
            resources.callback(end_children)
            folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="localmig-demo-")))
            service = Service(folder)
            resources.callback(service.stop)
            service.start()
            guest = boot(service.nic, folder, resources)
            rounds.append(play(service, guest, times=times))
    return rounds[0], rounds[1], guest
