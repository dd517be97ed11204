"""The guest lab: real Linux guests in real VMMs, in a network namespace of their own.

Owns:        the namespace, every process started in it, their logs, the folder with their sockets.
Never sees:  what is being tested: a test gives the network backend's arguments or socket.
Read next:   localmig/testing/qemu.py for what a guest boots, conftest.py for the fixtures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

from localmig.errors import ConfigError
from localmig.testing import qemu, uml
from localmig.testing.initramfs import ECHO_PORT, READY_LINE
from localmig.testing.linux_guest import GuestShell
from localmig.testing.namespace import NetworkNamespace, configure, create_tap, ip
from localmig.testing.traffic import STALL_SECONDS_MAX, STREAM_WINDOW_BYTES, PingReport, StreamReport

UNPACKED_KERNEL: Final = Path(__file__).resolve().parents[2] / ".lab/kernel"
"""Debian's cloud kernel, as `make guest-kernel` unpacked it."""

HOST_ADDRESS: Final = "10.9.0.1"
GUEST_ADDRESS: Final = "10.9.0.2"
PREFIX: Final = "/24"

BOOT_SECONDS_MAX: Final = 60
"""A guest boots in 3 s here; a busy machine without KVM may take ten times that."""

CONNECT_SECONDS_MAX: Final = 30
"""For a guest to become reachable again: VMMs try a lost backend once a second, TCP at most every few."""

STOP_SECONDS_MAX: Final = 10
"""From SIGTERM to the end of a process that behaves; then SIGKILL."""

BULK_NICENESS: Final = 10
"""A tenth of the weight of a process with niceness 0."""


class LabError(Exception):
    """This machine cannot provide a guest; the text says what is missing."""


class ProcessorError(Exception):
    """Nothing is missing, and yet such a guest runs on no machine of this kind."""


class Process:
    """A process whose output is read into a log as it comes, so that a test can wait for a line."""

    def __init__(self, argv: Sequence[str], *, log: Path, pass_fds: Sequence[int] = ()) -> None:
        self.log = log
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
        )
        self.pid = self._popen.pid
        self._reader = threading.Thread(target=self._read, name=f"log of {log.name}")
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self.log.open("a", buffering=1) as log:
            for line in self._popen.stdout:
                log.write(line)
                with self._changed:
                    self._lines.append(line.strip())
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, text: str, *, seconds_max: float) -> str:
        """The first line that contains `text`, once there is one.

        Raises:
            AssertionError: The process ended or the time passed without such a line.
        """
        self.wait_count(text, 1, seconds_max=seconds_max)
        return next(line for line in self._lines if text in line)

    def count(self, text: str) -> int:
        """How many lines so far contain `text`."""
        with self._changed:
            return sum(text in line for line in self._lines)

    def wait_count(self, text: str, count: int, *, seconds_max: float) -> None:
        """Wait until so many lines contain `text`. AssertionError as `wait_for`."""
        with self._changed:
            self._changed.wait_for(lambda: self.count(text) >= count or self._ended, timeout=seconds_max)
            said = self.count(text)
            state = "ended" if self._ended else f"ran {seconds_max} s"
            assert said >= count, (
                f"{self.log.name}: {state} and said {text!r} {said} of {count} times: {self._lines[-5:]}"
            )

    def wait(self, *, seconds_max: float) -> int:
        """The exit status, once the process has ended."""
        return self._popen.wait(timeout=seconds_max)

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._popen.poll() is None

    def kill(self) -> None:
        """End it at once, as a crash would, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait()

    def stop(self) -> None:
        """End it, if it still runs, and wait until it is gone."""
        if self.is_running():
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.wait(timeout=STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._reader.join()
        assert self._popen.stdout is not None
        self._popen.stdout.close()


class Guest(GuestShell):
    """A booted guest, and what a test may ask of it over its network."""

    def __init__(self, lab: Lab, process: Process) -> None:
        self._lab = lab
        self.process = process

    def wait_ready(self) -> None:
        """Wait until its network is up and its services listen."""
        try:
            self.process.wait_for(READY_LINE, seconds_max=BOOT_SECONDS_MAX)
        except AssertionError:
            reason = uml.boot_failure_reason(self.process.log.read_text())
            if reason is not None:
                raise ProcessorError(reason) from None
            raise

    def connect(self, port: int) -> socket.socket:
        """A TCP connection to one of its services, which is tried again for as long as the guest is unreachable."""
        deadline = time.monotonic() + CONNECT_SECONDS_MAX
        with self._lab.namespace.entered():
            while True:
                try:
                    return _connect(GUEST_ADDRESS, port, seconds_max=deadline - time.monotonic())
                except OSError:
                    if time.monotonic() > deadline - 1:
                        raise


def _connect(address: str, port: int, *, seconds_max: float) -> socket.socket:
    connection = socket.socket()
    try:
        # Before connecting: the window is agreed on when a connection opens.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STREAM_WINDOW_BYTES)
        connection.settimeout(seconds_max)
        connection.connect((address, port))
        connection.settimeout(STALL_SECONDS_MAX)
    except OSError:
        connection.close()
        raise
    return connection


class EchoTransfer:
    """Pseudo-random bytes through a guest's TCP and back, hashed as they leave and as they return, until `finish`.

    As a context manager it ends with the block, also where nobody asked for the report.
    """

    def __init__(self, guest: Guest) -> None:
        self._started = time.monotonic()
        self._connection = guest.connect(ECHO_PORT)
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()
        self._sent_bytes = self._received_bytes = 0
        self._ended = False
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        # Bulk traffic takes what the guest and its daemon leave of the processors.
        self._threads = [threading.Thread(target=_yielding, args=(work,)) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        source = random.Random(0)
        with contextlib.suppress(OSError):  # a broken connection shows as bytes that never returned
            while not self._stopping.is_set():
                data = source.randbytes(16384)
                self._connection.sendall(data)
                self._sent.update(data)
                self._sent_bytes += len(data)
            self._connection.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._connection.recv(65536):
                self._received.update(data)
                with self._changed:
                    self._received_bytes += len(data)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_progress(self, size: int) -> None:
        """Wait until `size` more bytes have returned.

        Raises:
            AssertionError: The connection ended or stood still instead.
        """
        with self._changed:
            goal = self._received_bytes + size
            self._changed.wait_for(lambda: self._ended or self._received_bytes >= goal, timeout=STALL_SECONDS_MAX)
            assert self._received_bytes >= goal, f"transfer stopped {goal - self._received_bytes} bytes too early"

    def finish(self) -> StreamReport:
        """Send no more, wait for what is on its way, and report."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        return StreamReport(
            bytes_sent=self._sent_bytes,
            bytes_received=self._received_bytes,
            sha256_sent=self._sent.hexdigest(),
            sha256_received=self._received.hexdigest(),
            seconds=time.monotonic() - self._started,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):  # it may be closed from the other side
            self._connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._connection.close()


def _yielding(work: Callable[[], None]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BULK_NICENESS)
    work()


class Lab:
    """A network namespace with the processes of one test, all of them ended by `close`."""

    def __init__(self) -> None:
        self.namespace = NetworkNamespace.create()
        # A short path: a UNIX socket's may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self._processes: list[Process] = []
        self._guest_count = 0

    def start(self, argv: Sequence[str], *, name: str, pass_fds: Sequence[int] = ()) -> Process:
        """Start a process in the namespace; its output goes to `name`.log in the lab's folder."""
        # With the tests gone, however they ended, nobody needs it any more.
        argv = ["setpriv", "--pdeathsig", "TERM", *argv]
        with self.namespace.entered():
            process = Process(argv, log=self.folder / f"{name}.log", pass_fds=pass_fds)
        self._processes.append(process)
        return process

    def add_tap(self, ifname: str = "tap0") -> None:
        """Make a persistent TAP with a vnet header, as an operator would beforehand."""
        with self.namespace.entered():
            create_tap(ifname)

    def set_up(self, ifname: str = "tap0") -> None:
        """Give a TAP the host's address and bring it up."""
        with self.namespace.entered():
            configure(ifname, address=HOST_ADDRESS + PREFIX)

    def set_down(self, ifname: str = "tap0") -> None:
        """Bring an interface down and take its addresses, as before `set_up`."""
        with self.namespace.entered():
            ip("address", "flush", "dev", ifname)
            ip("link", "set", ifname, "down")

    def delete(self, ifname: str = "tap0") -> None:
        """Delete an interface."""
        with self.namespace.entered():
            ip("link", "del", ifname)

    def start_pinger(self) -> Process:
        """Ping the guest every millisecond, in a process of its own so that nothing here delays it."""
        argv = [sys.executable, "-m", "localmig.testing.traffic", "ping", GUEST_ADDRESS]
        return self.start(argv, name="pinger")

    def boot_qemu(self, netdev: Sequence[str], **nic: Any) -> Guest:
        """Boot a guest under QEMU with one virtio-net on netdev "n0", which the arguments `netdev` define.

        `nic` is what `qemu.command` knows of it.
        """
        with _lab_errors():
            argv = qemu.command(
                netdev,
                address=GUEST_ADDRESS + PREFIX,
                folder=self.folder,
                kernel_package=UNPACKED_KERNEL,
                **nic,
            )
        return self._booting(argv)

    def boot_uml(self, device: Path, **more: Any) -> Guest:
        """Boot a guest under User-Mode Linux, its NIC served at the vhost-user socket `device`.

        `more` is what `uml.command` knows besides.
        """
        with _lab_errors():
            argv = uml.command(str(device), address=GUEST_ADDRESS + PREFIX, folder=self.folder, **more)
        return self._booting(argv)

    def _booting(self, argv: Sequence[str]) -> Guest:
        self._guest_count += 1
        return Guest(self, self.start(argv, name=f"guest{self._guest_count}"))

    def logs(self) -> list[tuple[str, str]]:
        """Name and text of every log in the folder so far."""
        return [(path.name, path.read_text()) for path in sorted(self.folder.glob("*.log"))]

    def close(self) -> None:
        """End every process, newest first, and remove the folder."""
        for process in reversed(self._processes):
            process.stop()
        self._kill_strays()
        self.namespace.close()
        shutil.rmtree(self.folder)

    def _kill_strays(self) -> None:
        """Kill what processes of the lab left behind: daemons they started, helpers of a crashed guest."""
        with self.namespace.entered():
            namespace = Path("/proc/thread-self/ns/net").readlink()
        for link in Path("/proc").glob("[0-9]*/ns/net"):
            # It may end meanwhile, or be another user's.
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
                if link.readlink() == namespace:
                    os.kill(int(link.parts[2]), signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def finish_pings(pinger: Process) -> PingReport:
    """End a pinger and read what it counted."""
    pinger.stop()
    facts: dict[str, Any] = json.loads(pinger.wait_for("{", seconds_max=0))
    return PingReport(**facts)


def tap_netdev(ifname: str = "tap0") -> list[str]:
    """QEMU's own TAP backend: a guest without localmig."""
    return ["-netdev", f"tap,id=n0,ifname={ifname},script=no,downscript=no"]


@contextlib.contextmanager
def _lab_errors() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise LabError(str(error)) from error
