"""The demonstration: handovers under traffic, beside restarts as people do them today.

Owns:        the two rounds, the guests that can play in them, the traffic.
Never sees:  the machine's network: all of it happens in namespaces that end with it. Nor the daemons' code: it runs
             `localmig run` and `localmig upgrade`, as an operator does.
Read next:   demo_report.py for what is told of them; guest.py, linux_guest.py and traffic.py, which it puts together.

    host namespace                                       guest's namespace, or Linux under QEMU or User-Mode Linux
    pinger, TCP sender ─ kernel ─ tap0 ─ localmig ═ vhost-user ═ virtio-net ─ kernel ─ TCP receiver

`python -m localmig.testing.demo --help`
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, Self

from localmig.errors import ConfigError, LocalmigError, PeerError, PeerLostError
from localmig.fds import OwnedFd
from localmig.testing import picture, qemu, uml
from localmig.testing.children import adopt_orphans, end_children
from localmig.testing.demo_report import (
    GuestCounters,
    Replacement,
    Round,
    counted,
    legend,
    milliseconds,
    table,
    verdict,
)
from localmig.testing.guest import GuestProcess, GuestSettings
from localmig.testing.initramfs import STREAM_PORT
from localmig.testing.linux_guest import LinuxGuest, discarded_replies
from localmig.testing.namespace import configure, create_tap, isolate
from localmig.testing.traffic import PingRecord, PingReport, StreamReceiver, StreamReport, StreamSender

HOST_ADDRESS: Final = "10.9.0.1/24"
GUEST_ADDRESS: Final = "10.9.0.2/24"

GUESTS: Final = ("builtin", "qemu", "uml")

KERNEL_PACKAGE: Final = Path(".lab/kernel")
"""Where `make guest-kernel` unpacks it, in a source tree."""

PICTURE: Final = Path("localmig-demo.png")
"""Where people find it: in the folder they are in."""

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

    def rings_moved_ns(self) -> tuple[int, int | None]:
        """When, since `forget`, the first ring stopped and the last one started, as traced; None if none did."""
        with self._trace.open() as trace:
            trace.seek(self._seen)
            events = [json.loads(line) for line in trace]
        stopped = [event["at_ns"] for event in events if event["event"] == "RingsStopped"]
        started = [event["at_ns"] for event in events if event["event"] == "RingsStarted"]
        if not stopped:
            raise PeerError(f"the daemons traced no stop of the rings, and {len(started)} starts")
        return min(stopped), max(started, default=None)

    def forget(self) -> None:
        """Lets `rings_moved_ns` begin here."""
        self._seen = self._trace.stat().st_size

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])


# -- the guests -------------------------------------------------------------------------------------------------


class DemoGuest(ABC):
    """What the rounds want of a guest."""

    port: int
    """Where its TCP receiver listens."""

    name: str
    """What it is."""

    reconnects: str
    """How it looks for a backend that is gone."""

    @abstractmethod
    def carrier_changes(self) -> int:
        """How often its link went up or down. PeerLostError if it cannot be asked any more, as below."""

    @abstractmethod
    def discarded_replies(self) -> int:
        """How many ping replies its own network stack has discarded so far."""

    def counters(self) -> GuestCounters:
        """Both."""
        return GuestCounters(carrier_changes=self.carrier_changes(), discarded_replies=self.discarded_replies())

    @abstractmethod
    def wait_reconnected(self) -> None:
        """Waits until it has found its backend again, where it tells."""


class BuiltinGuest(DemoGuest):
    """The kit's own guest: a namespace behind a driver of ours."""

    name = "the built-in guest"
    reconnects = f"the guest looks for it every {RECONNECT_MS} ms"

    def __init__(self, nic: str, resources: ExitStack) -> None:
        settings = GuestSettings(socket=nic, address=GUEST_ADDRESS, reconnect_ms=RECONNECT_MS)
        self._process = resources.enter_context(GuestProcess(settings))
        with self._process.namespace.entered():
            self.port = resources.enter_context(StreamReceiver()).port

    def carrier_changes(self) -> int:
        """As its kernel saw it."""
        return self._process.carrier_changes()

    def discarded_replies(self) -> int:
        """As its kernel counts them."""
        with self._process.namespace.entered():
            return discarded_replies(Path("/proc/thread-self/net/snmp").read_text())

    def wait_reconnected(self) -> None:
        """As it tells."""
        self._process.wait_for("reconnected", STEP_SECONDS_MAX)


class RealGuest(DemoGuest):
    """Linux in a VMM."""

    port = STREAM_PORT

    def __init__(self, guest: LinuxGuest, *, name: str, reconnects: str) -> None:
        self._guest = guest
        self.name = name
        self.reconnects = reconnects

    def carrier_changes(self) -> int:
        """As its kernel saw it."""
        return self._guest.carrier_changes()

    def discarded_replies(self) -> int:
        """As its kernel counts them."""
        return self._guest.discarded_replies()

    def wait_reconnected(self) -> None:
        """It does not tell."""


Boot = Callable[[str, Path, ExitStack], DemoGuest]
"""Boots a guest with its NIC at a socket and its files in a folder; the stack ends it."""


def choose_guest(kind: str, kernel_package: Path) -> Boot:
    """How to boot the kind of guest that was asked for.

    Args:
        kind: one of `GUESTS`.
        kernel_package: what "qemu" boots: see `qemu.command`.

    Raises:
        ConfigError: this machine has not what it takes; the text says what is missing.
    """
    match kind:
        case "qemu":
            if (reason := qemu.unavailable_reason(kernel_package)) is not None:
                raise ConfigError(reason)
            return partial(_boot_qemu, kernel_package, qemu.best_accelerator(kernel_package))
        case "uml":
            if (reason := uml.unavailable_reason()) is not None:
                raise ConfigError(reason)
            return _boot_uml
        case _:
            return _boot_builtin


def _boot_builtin(nic: str, _folder: Path, resources: ExitStack) -> DemoGuest:
    return BuiltinGuest(nic, resources)


def _boot_qemu(kernel_package: Path, accelerator: str, nic: str, folder: Path, resources: ExitStack) -> DemoGuest:
    argv = qemu.command(
        qemu.vhost_user_netdev(nic),
        address=GUEST_ADDRESS,
        folder=folder,
        kernel_package=kernel_package,
        accelerator=accelerator,
    )
    guest = resources.enter_context(LinuxGuest(argv, address=GUEST_ADDRESS))
    name = f"Linux under QEMU ({accelerator.upper()})"
    return RealGuest(guest, name=name, reconnects="QEMU looks for it every second")


def _boot_uml(nic: str, folder: Path, resources: ExitStack) -> DemoGuest:
    argv = uml.command(nic, address=GUEST_ADDRESS, folder=folder)
    guest = LinuxGuest(argv, address=GUEST_ADDRESS, boot_failure_reason=uml.boot_failure_reason)
    resources.enter_context(guest)
    return RealGuest(guest, name="User-Mode Linux", reconnects="User-Mode Linux cannot reconnect")


# -- the rounds -------------------------------------------------------------------------------------------------


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
    replacements: list[Replacement] = []
    before = guest.counters()
    with Traffic(guest.port) as traffic:
        traffic.recover()
        for number in range(1, times + 1):
            service.forget()
            replace()
            recovered = traffic.recover()
            recovered_ns = time.monotonic_ns()
            stopped_ns, started_ns = service.rings_moved_ns()
            if not recovered:
                # Rings may have run again: the guest has lost its network all the same.
                replacements.append(Replacement(stopped_ns=stopped_ns, started_ns=None, recovered_ns=None))
                _progress(f"{name} {number}/{times}: the guest has lost its network")
                traffic.give_up()
                break
            replacement = Replacement(stopped_ns=stopped_ns, started_ns=started_ns, recovered_ns=recovered_ns)
            replacements.append(replacement)
            _progress(f"{name} {number}/{times}: downtime {milliseconds(replacement.downtime_us)}")
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


# -- the whole --------------------------------------------------------------------------------------------------


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="localmig demo",
        description="Replaces the daemon that serves a guest's NIC while the guest talks: by handovers, then by "
        "restarts. Touches nothing of this machine's network.",
    )
    parser.add_argument(
        "--guest",
        choices=GUESTS,
        default="builtin",
        help="builtin: a network namespace behind a virtio-net driver; qemu: Linux under QEMU; uml: User-Mode Linux "
        "(default: %(default)s)",
    )
    parser.add_argument("--handovers", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--guest-kernel",
        type=Path,
        default=KERNEL_PACKAGE,
        metavar="FOLDER",
        help="what QEMU boots: an unpacked package of Debian's cloud kernel (default: %(default)s, where 'make "
        "guest-kernel' puts one)",
    )
    drawing = parser.add_mutually_exclusive_group()
    drawing.add_argument(
        "--picture",
        type=Path,
        default=PICTURE,
        metavar="FILE",
        help=f"draw each ping's round trip into this file: {', '.join(picture.SUFFIXES)} (default: %(default)s)",
    )
    drawing.add_argument("--no-picture", dest="picture", action="store_const", const=None, help="draw none")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON instead of the table")
    return parser


def _demonstrate(options: argparse.Namespace) -> Round:
    """Plays, prints and draws; gives the handovers. LocalmigError as `run`."""
    drawn: Path | None = options.picture
    if drawn is not None:
        picture.check_path(drawn)
        if (reason := picture.unavailable_reason()) is not None:
            _progress(f"No picture will be drawn: {reason}")
            drawn = None
    boot = choose_guest(options.guest, options.guest_kernel)
    _progress(
        f"A guest is pinged every millisecond while the daemon that serves its NIC is replaced: "
        f"{counted(options.handovers, 'time')} by a handover, then as often by a restart."
    )
    handovers, restarts, guest = run(boot, times=options.handovers)
    if options.json:
        sys.stdout.write(json.dumps({"handover": handovers.facts(), "restart": restarts.facts()}) + "\n")
    else:
        told = (table(handovers, restarts), legend(reconnects=guest.reconnects), verdict(handovers))
        sys.stdout.write("\n" + "\n\n".join(told) + "\n")
    sys.stdout.flush()
    if drawn is not None:
        picture.draw(drawn, handovers, restarts, guest=guest.name)
        _progress(f"\nThe picture of it: {drawn.absolute()}")
    return handovers


def main(argv: Sequence[str]) -> int:
    """Runs the demonstration; 0 if the handovers did no harm, 1 if they did or it could not run."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not 1 <= options.handovers <= TIMES_MAX:
        parser.error(f"--handovers {options.handovers} is not between 1 and {TIMES_MAX}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        handovers = _demonstrate(options)
    except LocalmigError as error:
        sys.stderr.write(f"localmig: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0 if handovers.is_unharmed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
