"""The demonstration: handovers under traffic, beside restarts as people do them today.

Owns:        the two rounds and the table that compares them.
Never sees:  the machine's network: all of it happens in namespaces that end with it. Nor the daemons' code: it runs
             `localmig run` and `localmig upgrade`, as an operator does.
Read next:   guest.py and traffic.py, which it puts together.

    host namespace                                       guest's namespace, or User-Mode Linux
    pinger, TCP sender ─ kernel ─ tap0 ─ localmig ═ vhost-user ═ virtio-net ─ kernel ─ TCP receiver

`python -m localmig.testing.demo --help`
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from localmig.errors import LocalmigError, PeerError, PeerLostError
from localmig.fds import OwnedFd
from localmig.testing import uml
from localmig.testing.guest import GuestProcess, GuestSettings
from localmig.testing.initramfs import STREAM_PORT
from localmig.testing.linux_guest import LinuxGuest
from localmig.testing.namespace import configure, create_tap, isolate
from localmig.testing.traffic import PingReport, StreamReceiver, StreamReport, StreamSender, percentile

HOST_ADDRESS: Final = "10.9.0.1/24"
GUEST_ADDRESS: Final = "10.9.0.2/24"

TIMES_MAX: Final = 1000
"""Handovers one run may be asked for: what the pinger's memory has room for."""

STEP_SECONDS_MAX: Final = 60
"""For one handover or restart whole: it takes a second, most of it Python starting; a busy machine more."""

RECONNECT_MS: Final = 100
"""How often the guest of the second round looks for its backend. QEMU's own choices are whole seconds up to 9.1."""

STREAM_BYTES_PER_SECOND: Final = 25_000_000
"""200 Mbit/s: with both ends, the guest and the daemon on one small machine, more would measure its scheduler."""

STREAM_PROGRESS_BYTES: Final = 2_500_000
"""What the stream moves between two replacements, a tenth of a second at its full speed: only what has recovered from
one is a fair subject for the next."""

RECOVERY_SECONDS_MAX: Final = 10.0
"""How long that may take: TCP tries again after 0.2 s, 0.4 s, 0.8 s …"""

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT."""

_PR_SET_CHILD_SUBREAPER: Final = 36


# -- the service ------------------------------------------------------------------------------------------------


class Service:
    """One NIC on `tap0`, served by one daemon after another."""

    def __init__(self, folder: Path) -> None:
        self.nic = str(folder / "nic0.sock")
        self._qmp = str(folder / "qmp.sock")
        self._trace = folder / "trace.jsonl"
        self._log = folder / "daemon.log"
        self._seen = 0
        self._pid: int | None = None

    def start(self) -> None:
        """Starts a daemon and waits until it is ready. PeerError if it is not."""
        with contextlib.ExitStack() as ends:
            ready, announce = (ends.enter_context(OwnedFd(fd)) for fd in os.pipe())
            argv = [sys.executable, "-m", "localmig.cli", "run", "--netdev", "tap,id=net0,ifname=tap0"]
            argv += ["--device", f"virtio-net,id=nic0,netdev=net0,socket={self.nic}", "--qmp", f"unix:{self._qmp}"]
            argv += ["--trace", str(self._trace), "--log", str(self._log), "--ready-fd", str(announce.fileno())]
            # In a session of its own: Ctrl-C is for us, who end it in order.
            daemon = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stderr=ends.enter_context(self._log.open("a")),
                pass_fds=[announce.fileno()],
                start_new_session=True,
            )
            self._pid = daemon.pid
            announce.close()
            if not select.select([ready], [], [], STEP_SECONDS_MAX)[0] or not os.read(ready.fileno(), 1):
                raise PeerError(f"the daemon did not start:\n{self._log_tail()}")

    def hand_over(self) -> None:
        """Replaces the daemon as localmig does it. PeerError if the new one does not serve."""
        argv = [sys.executable, "-m", "localmig.cli", "upgrade", "--json", "--log", str(self._log), self._qmp]
        argv += ["--", "--trace", str(self._trace)]
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=STEP_SECONDS_MAX, start_new_session=True, check=False
        )
        if done.returncode != 0:
            raise PeerError(f"the upgrade failed:\n{done.stderr}")
        self._pid = json.loads(done.stdout)["new-pid"]

    def restart(self) -> None:
        """Replaces the daemon as a service manager does: ends it, then starts another."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """Ends the daemon, if there is one, and waits until it is gone."""
        if self._pid is None:
            return
        pid, self._pid = self._pid, None
        with OwnedFd(os.pidfd_open(pid)) as daemon:
            signal.pidfd_send_signal(daemon.fileno(), signal.SIGTERM)
            if not select.select([daemon], [], [], STEP_SECONDS_MAX)[0]:
                signal.pidfd_send_signal(daemon.fileno(), signal.SIGKILL)

    def downtime_us(self) -> int:
        """Microseconds since `forget` from the first ring that stopped to the last that started, as traced."""
        with self._trace.open() as trace:
            trace.seek(self._seen)
            events = [json.loads(line) for line in trace]
        stopped = [event["at_ns"] for event in events if event["event"] == "RingsStopped"]
        started = [event["at_ns"] for event in events if event["event"] == "RingsStarted"]
        if not stopped or not started:
            raise PeerError(f"the daemons traced {len(stopped)} stops and {len(started)} starts of the rings")
        return int(max(started) - min(stopped)) // 1000

    def forget(self) -> None:
        """Lets `downtime_us` count from here."""
        self._seen = self._trace.stat().st_size

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])


# -- the guests -------------------------------------------------------------------------------------------------


class DemoGuest(ABC):
    """What the rounds want of a guest."""

    port: int
    """Where its TCP receiver listens."""

    @abstractmethod
    def carrier_changes(self) -> int | None:
        """How often its link went up or down; None where it cannot be asked any more."""

    @abstractmethod
    def wait_reconnected(self) -> None:
        """Waits until it has found its backend again, where it looks for it."""


class BuiltinGuest(DemoGuest):
    """The kit's own guest: a namespace behind a driver of ours."""

    def __init__(self, nic: str, resources: ExitStack) -> None:
        settings = GuestSettings(socket=nic, address=GUEST_ADDRESS, reconnect_ms=RECONNECT_MS)
        self._process = resources.enter_context(GuestProcess(settings))
        with self._process.namespace.entered():
            self.port = resources.enter_context(StreamReceiver()).port

    def carrier_changes(self) -> int | None:
        """As its kernel saw it."""
        return self._process.carrier_changes()

    def wait_reconnected(self) -> None:
        """As it tells."""
        self._process.wait_for("reconnected", STEP_SECONDS_MAX)


class RealGuest(DemoGuest):
    """User-Mode Linux."""

    port = STREAM_PORT

    def __init__(self, nic: str, resources: ExitStack, folder: Path) -> None:
        argv = uml.command(nic, address=GUEST_ADDRESS, folder=folder)
        guest = LinuxGuest(argv, address=GUEST_ADDRESS, boot_failure_reason=uml.boot_failure_reason)
        self._guest = resources.enter_context(guest)
        self._changes_before = self._guest.carrier_changes()

    def carrier_changes(self) -> int | None:
        """As its kernel saw it."""
        try:
            return self._guest.carrier_changes() - self._changes_before
        except PeerLostError:
            return None

    def wait_reconnected(self) -> None:
        """It does not look."""


# -- the rounds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one way of replacing the daemon did to the guest.

    Attributes:
        downtimes_us: of each replacement, from the old daemon's rings stopping to the new one's running.
        pings: one a millisecond.
        stream: TCP from host to guest; None if it did not survive.
        carrier_changes: what the guest saw of its link; None if nobody could ask it at the end.
        guest_lost: the guest has no network any more.
    """

    downtimes_us: tuple[int, ...]
    pings: PingReport
    stream: StreamReport | None
    carrier_changes: int | None
    guest_lost: bool


def hand_over(service: Service, guest: DemoGuest, *, times: int) -> Round:
    """Traffic, and `times` handovers in it."""
    return _round("handover", guest, service, service.hand_over, times=times)


def restart(service: Service, guest: DemoGuest, *, times: int) -> Round:
    """The same with restarts."""

    def replace() -> None:
        service.restart()
        guest.wait_reconnected()

    return _round("restart", guest, service, replace, times=times)


def _round(name: str, guest: DemoGuest, service: Service, replace: Callable[[], None], *, times: int) -> Round:
    """Replaces the daemon under traffic until it was done `times` times or the guest did not recover."""
    downtimes = []
    with Traffic(guest.port) as traffic:
        traffic.recover()
        for number in range(1, times + 1):
            service.forget()
            replace()
            if not traffic.recover():
                _progress(f"{name} {number}/{times}: the guest has lost its network")
                traffic.give_up()
                break
            downtimes.append(service.downtime_us())
            _progress(f"{name} {number}/{times}: downtime {_milliseconds(downtimes[-1])}")
        pings, stream = traffic.reports()
    guest_lost = len(downtimes) < times
    return Round(
        downtimes_us=tuple(downtimes),
        pings=pings,
        stream=stream,
        carrier_changes=None if guest_lost else guest.carrier_changes(),
        guest_lost=guest_lost,
    )


class Traffic:
    """Pings every millisecond and a TCP stream, from the host to the guest."""

    def __init__(self, port: int) -> None:
        address = GUEST_ADDRESS.partition("/")[0]
        # In a process of its own: nothing that happens here may make it late.
        argv = [sys.executable, "-m", "localmig.testing.traffic", "ping", address]
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

    def reports(self) -> tuple[PingReport, StreamReport | None]:
        """Ends both; None for a stream that broke."""
        try:
            stream = self._sender.stop()
        except PeerLostError:
            stream = None
        self._pinger.send_signal(signal.SIGTERM)
        report, _ = self._pinger.communicate(timeout=STEP_SECONDS_MAX)
        return PingReport(**json.loads(report)), stream

    def close(self) -> None:
        """Kills the pinger, if it still runs. Idempotent."""
        if self._pinger.poll() is None:
            self._pinger.kill()
            self._pinger.wait()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- what is shown ----------------------------------------------------------------------------------------------


_LEGEND: Final = f"""\
handover: 'localmig upgrade'. restart: the daemon ends, then another starts; the guest looks every {RECONNECT_MS} ms.
downtime: from the old daemon's rings stopping to the new one's running. silence: pings waiting, none answered."""


def table(handovers: Round, restarts: Round) -> str:
    """Both rounds side by side."""
    left, right = _facts(handovers), _facts(restarts)
    rows = [("", "handover", "restart"), *((name, left[name], right[name]) for name in left)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}   {first:>{widths[1]}}   {second:>{widths[2]}}".rstrip() for name, first, second in rows
    )


def _facts(result: Round) -> dict[str, str]:
    downtimes = result.downtimes_us
    pings = result.pings
    stream = result.stream
    return {
        "replacements": str(len(downtimes)) if not result.guest_lost else f"{len(downtimes)}, then guest lost",
        "pings sent, one a ms": str(pings.sent),
        "pings lost": str(pings.lost),
        "downtime p50": _milliseconds(percentile(downtimes, 0.5)),
        "downtime p99": _milliseconds(percentile(downtimes, 0.99)),
        "downtime max": _milliseconds(max(downtimes, default=None)),
        "longest silence": "for good" if result.guest_lost else _milliseconds(pings.silence_us_max),
        "pinger itself late": _milliseconds(pings.send_gap_us_max),
        "link changes in guest": "-" if result.carrier_changes is None else str(result.carrier_changes),
        "TCP stream": "broken" if stream is None else f"{stream.bytes_sent / 1e6:.0f} MB",
        "SHA-256 at both ends": "-" if stream is None else "equal" if stream.intact else "DIFFERENT",
    }


def _milliseconds(microseconds: int | None) -> str:
    return "-" if microseconds is None else f"{microseconds / 1000:.2f} ms"


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _adopt_orphans() -> None:
    """Daemons outlive the upgrade that starts them: lets them become our children then, so that none is lost."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_children() -> None:
    """Kills what is left where the demonstration was broken off in the middle."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := children.read_text().split():
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run(*, guest: str, times: int) -> tuple[Round, Round]:
    """Both rounds, each with a fresh guest.

    Args:
        guest: "builtin" or "uml".
        times: how often the daemon is replaced in each.

    Raises:
        LocalmigError: this machine cannot run it, or it went wrong; the text says what.
    """
    isolate()
    create_tap("tap0")  # persistent: a restart keeps the host's addresses, as a careful operator has it
    configure("tap0", address=HOST_ADDRESS)
    _adopt_orphans()
    rounds = []
    for play in (hand_over, restart):
        with ExitStack() as resources:
            resources.callback(_end_children)
            folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="localmig-demo-")))
            service = Service(folder)
            resources.callback(service.stop)
            service.start()
            played: DemoGuest
            if guest == "uml":
                played = RealGuest(service.nic, resources, folder)
            else:
                played = BuiltinGuest(service.nic, resources)
            rounds.append(play(service, played, times=times))
    return rounds[0], rounds[1]


def main(argv: Sequence[str]) -> int:
    """Runs the demonstration; 0 if the handovers lost nothing, 1 if they did or it could not run."""
    parser = argparse.ArgumentParser(
        prog="localmig demo",
        description="Replaces the daemon that serves a guest's NIC while the guest talks: by handovers, then by "
        "restarts. Touches nothing of this machine's network.",
    )
    parser.add_argument(
        "--guest", choices=("builtin", "uml"), default="builtin", help="uml: User-Mode Linux (default: %(default)s)"
    )
    parser.add_argument("--handovers", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON instead of the table")
    options = parser.parse_args(argv)
    if not 1 <= options.handovers <= TIMES_MAX:
        parser.error(f"--handovers {options.handovers} is not between 1 and {TIMES_MAX}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        handovers, restarts = run(guest=options.guest, times=options.handovers)
    except LocalmigError as error:
        sys.stderr.write(f"localmig: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    if options.json:
        both = {"handover": dataclasses.asdict(handovers), "restart": dataclasses.asdict(restarts)}
        sys.stdout.write(json.dumps(both) + "\n")
    else:
        sys.stdout.write(f"\n{table(handovers, restarts)}\n\n{_LEGEND}\n")
    unharmed = handovers.pings.lost == 0 and handovers.carrier_changes == 0
    return 0 if unharmed and handovers.stream is not None and handovers.stream.intact else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
