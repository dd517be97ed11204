"""A guest without a VMM: a network namespace whose kernel talks through a virtio-net driver of ours.

Owns:        the guest's process: its namespace, its TAP, what it does when the backend goes away; a handle on it.
Never sees:  the host's side of anything but the device's socket.
Read next:   frontend.py for what it says to the backend, demo.py for who starts it.

    host namespace                                    guest's namespace
    kernel TCP/IP ─ tap0 ─ daemon ═ vhost-user ═ driver ─ gtap0 ─ kernel TCP/IP

`python -m localmig.testing.guest --socket nic0.sock --address 10.9.0.2/24` prints an event a line, as JSON: `ready`,
`reset`, `paused`, `lost`, `reconnected`, at last `ended` with a reason (None: it was told to) and what it counted.
SIGUSR1 resets the driver, SIGUSR2 stops the rings at the backend and starts them again, as a VMM does that pauses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, Self

from localmig.errors import ConfigError, LocalmigError, PeerError, PeerLostError
from localmig.fds import OwnedFd
from localmig.netdevs.tap import Tap
from localmig.testing.frontend import DRIVER_FEATURES, OFFLOAD_FEATURES, NetGuest, sending_offloads
from localmig.testing.namespace import NetworkNamespace, carrier_changes, configure, isolate, link
from localmig.testing.process import Start, start_program
from localmig.virtio import Feature

MAC: Final = "52:54:00:12:34:56"
"""The guest's address unless another is given: locally administered, in QEMU's range."""

RECONNECT_SECONDS_MAX: Final = 60.0
"""How long a guest looks for a new backend: longer than any restart that a test means to see the end of."""

START_SECONDS_MAX: Final = 20.0
"""How long a guest's process may take to be ready: it starts Python and asks the backend a dozen questions."""

_LOOK_SECONDS: Final = 0.1
"""How often the guest looks whether its driver still runs."""

_READ_BYTES: Final = 65536
"""More than a guest tells at once."""

_TUNSETCARRIER: Final = 0x400454E2


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestSettings:
    """What a guest is started with.

    Attributes:
        socket: path of the device's vhost-user socket.
        address: its IPv4 address with prefix length.
        ifname: the interface in its namespace.
        mac: the interface's Ethernet address.
        mtu: of the interface, in bytes.
        queue_size: entries of each ring.
        packed: whether its driver takes packed rings where they are offered.
        queue_pairs: how many the NIC has.
        offloads: whether checksums and segmentation are left to the other side, where that is offered.
        reconnect_ms: time between attempts to reconnect when the backend is gone, as QEMU's option of that name;
            None: the guest ends then.
        neighbors: Ethernet addresses of peers by IPv4 address.
    """

    socket: str
    address: str
    ifname: str = "gtap0"
    mac: str = MAC
    mtu: int = 1500
    queue_size: int = 256
    packed: bool = False
    queue_pairs: int = 1
    offloads: bool = False
    reconnect_ms: float | None = None
    neighbors: Mapping[str, str] = dataclasses.field(default_factory=dict)


# -- the process ------------------------------------------------------------------------------------------------


class _Guest:
    """The guest while it runs, in its namespace."""

    def __init__(self, settings: GuestSettings, tap: Tap, driver: NetGuest) -> None:
        self._settings = settings
        self._tap = tap
        self._driver = driver
        self._reconnects = 0
        self._resets = 0
        self._pauses = 0
        self._carrier_changes_before = carrier_changes(settings.ifname)
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):  # full: thousands are waiting already
            os.write(self._waker, bytes([number]))

    def run(self) -> str | None:
        """Serves signals and losses until the end; gives its reason, None for being told to end."""
        self._tell("ready", pid=os.getpid(), mac=link(self._settings.ifname)["address"])
        try:
            while self._serve():
                pass
        except PeerError as error:
            return str(error)
        return None

    def _serve(self) -> bool:
        """Deals with a signal or a loss, if there is one; False for being told to end."""
        try:
            number = self._next_signal()
            if number in (signal.SIGTERM, signal.SIGINT):
                return False
            if number is not None:
                self._obey(number)
        except PeerLostError:
            if self._settings.reconnect_ms is None:
                raise
            return self._reconnect(self._settings.reconnect_ms)
        return True

    def _next_signal(self) -> signal.Signals | None:
        """A signal that came, None for none so far. Raises what is wrong with the backend or the driver."""
        watched = [self._wake, self._driver.frontend.fileno()]
        readable, _, _ = select.select(watched, [], [], _LOOK_SECONDS)
        self._driver.counters()
        if self._wake in readable:
            return signal.Signals(os.read(self._wake, 1)[0])
        if readable and self._driver.frontend.is_lost():
            raise PeerLostError("backend closed the connection")
        return None

    def report(self) -> dict[str, object]:
        """What it counted. `carrier_changes`: what the guest's kernel saw of its link since the start."""
        changes = carrier_changes(self._settings.ifname) - self._carrier_changes_before
        try:
            counters = self._driver.counters()
        except PeerError:
            moved = {}
        else:
            moved = {name: getattr(counters, name) for name in ("rx_packets", "rx_dropped", "tx_packets", "tx_dropped")}
        return {
            "reconnects": self._reconnects,
            "resets": self._resets,
            "pauses": self._pauses,
            "carrier_changes": changes,
            **moved,
        }

    def _obey(self, number: signal.Signals) -> None:
        if number == signal.SIGUSR1:
            self._driver.reset_driver()
            self._resets += 1
            self._tell("reset")
        else:
            self._driver.detach()
            self._driver.attach()
            self._pauses += 1
            self._tell("paused")

    def _reconnect(self, every_ms: float) -> bool:
        """Looks for a backend as QEMU does, its link down until there is one; False for being told to end.

        Raises:
            PeerError: there was none for `RECONNECT_SECONDS_MAX`, or it refused.
        """
        began = time.monotonic()
        self._set_carrier(0)
        self._tell("lost")
        while True:
            try:
                self._driver.reconnect()
                break
            except PeerLostError as error:
                seconds = time.monotonic() - began
                if seconds > RECONNECT_SECONDS_MAX:
                    raise PeerError(f"no backend for {seconds:.0f} s: {error}") from error
            told = select.select([self._wake], [], [], every_ms / 1e3)[0]
            # A driver reset, or a pause, is nobody's business while nobody is there.
            if told and os.read(self._wake, 1)[0] in (signal.SIGTERM, signal.SIGINT):
                return False
        self._set_carrier(1)
        self._reconnects += 1
        self._tell("reconnected", seconds=time.monotonic() - began)
        return True

    def _set_carrier(self, carrier: int) -> None:
        fcntl.ioctl(self._tap.fileno(), _TUNSETCARRIER, struct.pack("i", carrier))

    def _tell(self, event: str, **facts: object) -> None:
        _print(event, facts)


def _print(event: str, facts: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def run(settings: GuestSettings) -> int:
    """Becomes a guest, in a fresh namespace, until a signal ends it or it loses its backend.

    Returns:
        0 if it was told to end, 1 for every other end.
    """
    try:
        isolate()
        tap = Tap(id="guest", ifname=settings.ifname, mtu=settings.mtu, queues=settings.queue_pairs)
        tap.open()
        with contextlib.closing(tap):
            configure(settings.ifname, address=settings.address, mac=settings.mac, neighbors=settings.neighbors)
            driver = NetGuest(
                settings.socket,
                tap_fds=[tap.fileno(queue) for queue in range(settings.queue_pairs)],
                queue_pairs=settings.queue_pairs,
                queue_size=settings.queue_size,
                features=(OFFLOAD_FEATURES if settings.offloads else DRIVER_FEATURES)
                | (Feature.RING_PACKED if settings.packed else 0),
            )
            with driver:
                driver.attach()
                tap.set_offloads(sending_offloads(driver.features))
                for queue in range(1, settings.queue_pairs):
                    tap.attach(queue)
                guest = _Guest(settings, tap, driver)
                reason = guest.run()
                _print("ended", {"reason": reason, **guest.report()})
                return 0 if reason is None else 1
    except LocalmigError as error:
        _print("ended", {"reason": str(error)})
        return 1


# -- a handle on it ---------------------------------------------------------------------------------------------


class GuestProcess:
    """A guest in a process of its own, in a namespace below that of the thread that starts it.

    Raises:
        PeerError: it could not start; the text is its own. Nothing is left of it.
    """

    def __init__(self, settings: GuestSettings, *, start: Start = start_program) -> None:
        words = ["--settings", json.dumps(dataclasses.asdict(settings))]
        self._output, theirs = (OwnedFd(fd) for fd in os.pipe())
        with theirs:
            self._process = start("localmig.testing.guest", words, stdout=theirs.fileno())
        self._unread = b""
        self._ifname = settings.ifname
        self._namespace: NetworkNamespace | None = None
        try:
            self.ready = self.wait_for("ready", START_SECONDS_MAX)
            self._namespace = NetworkNamespace.of_process(self.pid)
            self._carrier_changes_before = self._carrier_changes()
        except (PeerError, OSError):
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def namespace(self) -> NetworkNamespace:
        """Where its kernel's end of the NIC is, lent until `close`."""
        assert self._namespace is not None
        return self._namespace

    def wait_for(self, event: str, timeout: float) -> dict[str, Any]:
        """The next event of that name; others are skipped.

        Raises:
            PeerLostError: the guest ended instead.
            PeerError: it did not come within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                facts: dict[str, Any] = json.loads(line)
                if facts["event"] == event:
                    return facts
                if facts["event"] == "ended":
                    raise PeerLostError(f"guest ended: {facts['reason']}")
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._output], [], [], left)[0]:
                raise PeerError(f"guest did not tell '{event}' within {timeout} s")
            piece = os.read(self._output.fileno(), _READ_BYTES)
            if not piece:
                raise PeerLostError("guest ended without a word")
            self._unread += piece

    def carrier_changes(self) -> int:
        """How often its kernel saw its link go up or down since it was ready."""
        return self._carrier_changes() - self._carrier_changes_before

    def reset_driver(self) -> None:
        """Lets its driver reset the device. Returns when that is done; raises as `wait_for`."""
        self._process.send_signal(signal.SIGUSR1)
        self.wait_for("reset", START_SECONDS_MAX)

    def pause(self) -> None:
        """Lets it stop and start its rings at the backend. Returns when that is done; raises as `wait_for`."""
        self._process.send_signal(signal.SIGUSR2)
        self.wait_for("paused", START_SECONDS_MAX)

    def stop(self) -> dict[str, Any]:
        """Ends it and gives its report. Raises as `wait_for`; it is gone in any case."""
        try:
            self._process.send_signal(signal.SIGTERM)
            return self.wait_for("ended", START_SECONDS_MAX)
        finally:
            self.close()

    def _carrier_changes(self) -> int:
        with self.namespace.entered():
            return carrier_changes(self._ifname)

    def close(self) -> None:
        """Kills what is left of it. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._output.close()
        if self._namespace is not None:
            self._namespace.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- command line -----------------------------------------------------------------------------------------------


def _settings(argv: Sequence[str]) -> GuestSettings:
    parser = argparse.ArgumentParser(
        prog="python -m localmig.testing.guest", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--settings", help=argparse.SUPPRESS)  # all of them as JSON: how GuestProcess tells
    parser.add_argument("--socket", help="the device's vhost-user socket")
    parser.add_argument("--address", default="10.9.0.2/24", help="default: %(default)s")
    parser.add_argument("--ifname", default="gtap0", help="default: %(default)s")
    parser.add_argument("--mac", default=MAC, help="default: %(default)s")
    parser.add_argument("--mtu", type=int, default=1500, help="default: %(default)s")
    parser.add_argument("--queue-size", type=int, default=256, help="entries of each ring (default: %(default)s)")
    parser.add_argument("--packed", action="store_true", help="take packed rings where they are offered")
    parser.add_argument("--queue-pairs", type=int, default=1, help="of the NIC (default: %(default)s)")
    parser.add_argument(
        "--offloads",
        action="store_true",
        help="leave checksums and segmentation to the other side, where it offers that",
    )
    parser.add_argument(
        "--reconnect-ms", type=float, help="reconnect at this interval when the backend goes away (default: end)"
    )
    parser.add_argument(
        "--neighbor", action="append", default=[], metavar="ADDRESS=MAC", help="a peer that needs no ARP; repeatable"
    )
    options = parser.parse_args(argv)
    if options.settings is not None:
        return GuestSettings(**json.loads(options.settings))
    if options.socket is None:
        parser.error("--socket is missing")
    return GuestSettings(
        socket=options.socket,
        address=options.address,
        ifname=options.ifname,
        mac=options.mac,
        mtu=options.mtu,
        queue_size=options.queue_size,
        packed=options.packed,
        queue_pairs=options.queue_pairs,
        offloads=options.offloads,
        reconnect_ms=options.reconnect_ms,
        neighbors=dict(_neighbor(text) for text in options.neighbor),
    )


def _neighbor(text: str) -> tuple[str, str]:
    address, equals, mac = text.partition("=")
    if not equals:
        raise ConfigError(f"--neighbor '{text}' is not ADDRESS=MAC")
    return address, mac


def main(argv: Sequence[str]) -> int:
    """Runs one guest."""
    try:
        return run(_settings(argv))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
