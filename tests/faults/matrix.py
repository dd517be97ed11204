"""The kill matrix's machine: one NIC, one guest, a chain of daemons: each cell leaves the next one its survivor.

Owns:        the daemons and their journal, the guest's frames, the account of what the survivor holds.
Never sees:  which outcome is right.
Read next:   test_kill_matrix.py, which has the points and judges.
"""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from qemu.qmp import QMPClient
from tests.kit.frames import FrameStream
from tests.kit.processes import DaemonProcess

from localmig.errors import PeerError
from localmig.testing.daemon import ANSWER_SECONDS_MAX
from localmig.testing.faults import Entry, Fault, read_journal
from localmig.testing.frontend import QEMU, Habits, NetGuest
from localmig.testing.namespace import NetworkNamespace, ip

FLOW_SECONDS_MAX: Final = 20.0
"""For traffic to go on: milliseconds, and a machine under load gets much more."""

CENSUS_TRIES_MAX: Final = 50
"""Answers for which a daemon gets to let go: it closes what a client or a handover leaves within a turn or two."""


class Daemon:
    """A daemon of the chain, and the file that names its fault."""

    def __init__(self, process: DaemonProcess, fault: Path, address: str) -> None:
        self.process = process
        self.fault = fault
        self.address = address

    def arm(self, fault: Fault | None) -> None:
        """What shall happen to it in the next handover."""
        self.fault.write_text(str(fault or ""))

    @property
    def owns(self) -> bool:
        """Whether it says that it serves the guest."""
        if not self.process.is_alive:
            return False
        try:
            return bool(self.process.execute("query-status")["running"])
        except (PeerError, OSError, EOFError):
            return False


class Chain:
    """Daemons that hand one NIC on, in a namespace of their own.

    Attributes:
        serving: who serves.
        guest: the frontend.
        frames: what flows.
    """

    def __init__(self, folder: Path, *, options: str = "", interval_s: float = 0.001, habits: Habits = QEMU) -> None:
        self.folder = folder
        self._habits = habits
        self._options = options
        self._interval_s = interval_s
        self._ends = ExitStack()
        self._count = 0
        self._processes: list[DaemonProcess] = []
        self._workers = ThreadPoolExecutor(1)
        self._ends.callback(self._workers.shutdown)
        self.namespace = self._ends.enter_context(NetworkNamespace.create())
        with self.namespace.entered():
            ipv6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
            if ipv6.exists():
                ipv6.write_text("1")  # a new interface speaks IPv6 by itself; here every frame is ours
        self._life = ExitStack()
        self._ends.callback(self._end_life)
        self._next: Future[Daemon] | None = None
        self._begin_life()

    # -- a life: from a fresh daemon until nobody has the guest any more --

    def _begin_life(self) -> None:
        self.serving = self._start(
            *("--netdev", f"tap,id=net0,ifname=tap0{self._netdev}"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,socket={self.folder}/n{self._options}"),
        )
        near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._life.callback(near.close)
        self._life.callback(tap.close)
        tap.setblocking(False)
        self.guest = self._life.enter_context(NetGuest(f"{self.folder}/n", tap_fds=[tap.fileno()], habits=self._habits))
        self.guest.attach()
        self._near = near
        self._stream()
        assert self.frames.wait_flow(seconds=FLOW_SECONDS_MAX)
        self.prepare()

    def reset_driver(self) -> None:
        """The guest's driver begins again. What was in its rings is gone, so the frames begin again too."""
        self.frames.stop()
        self.guest.reset_driver()
        self._stream()

    def make_tap_again(self) -> None:
        """Somebody deletes the TAP and makes another one of its name; whoever serves attaches that."""
        self.frames.stop()
        with self.namespace.entered():
            ip("link", "del", "tap0")
            ip("tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
            ip("link", "set", "tap0", "up")
        deadline = time.monotonic() + FLOW_SECONDS_MAX
        while not self._has_attached():
            assert time.monotonic() < deadline, "the TAP that was made again is not attached"
        self._stream()

    def _has_attached(self) -> bool:
        (netdev,) = self.serving.process.execute("query-netdevs")
        with self.namespace.entered():
            return bool(netdev.get("ifindex") == socket.if_nametoindex("tap0") and netdev["attached-queues"])

    @property
    def _netdev(self) -> str:
        return ""

    def _stream(self) -> None:
        with self.namespace.entered():
            self.frames = FrameStream("tap0", self._near, interval_s=self._interval_s).start()
        self._life.callback(self.frames.stop)

    def renew(self) -> None:
        """The guest was lost with its daemons: a fresh daemon, to which the same frontend reconnects."""
        self.serving.process.kill()
        self.frames.stop()
        self.serving = self._start(
            *("--netdev", f"tap,id=net0,ifname=tap0{self._netdev}"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,socket={self.folder}/n{self._options}"),
        )
        self.guest.reconnect()
        self._stream()
        assert self.frames.wait_flow(seconds=FLOW_SECONDS_MAX), "the frontend reconnected and is not served"

    def begin_again(self) -> None:
        """Something went wrong: nothing of it may reach the next cell."""
        self._end_life()
        self._life = ExitStack()
        self._begin_life()

    def _end_life(self) -> None:
        if self._next is not None:
            self._next.result()
            self._next = None
        for process in self._processes:
            process.kill()
        self._processes.clear()
        self._life.close()

    def prepare(self) -> None:
        """Begins to start the next destination, in the background."""
        if self._next is None:
            self._next = self._workers.submit(self._start_destination)

    def destination(self) -> Daemon:
        """A daemon that waits for a source at its `address`."""
        self.prepare()
        assert self._next is not None
        daemon, self._next = self._next.result(), None
        return daemon

    def _start_destination(self) -> Daemon:
        address = f"unix:{self.folder}/m{self._count}"
        return self._start("--incoming", address, address=address)

    def _start(self, *arguments: str, address: str = "") -> Daemon:
        self._count += 1
        fault = self.folder / f"f{self._count}"
        with self.namespace.entered():
            process = DaemonProcess(
                [*arguments, "--migration-parameter", "local=on"],
                qmp=self.folder / f"q{self._count}",
                fault=fault,
                journal=self.folder,
                log=self.folder / f"log{self._count}",
            )
        self._processes = [each for each in self._processes if each.is_alive]
        self._processes.append(process)
        return Daemon(process, fault, address)

    # -- what there is to see --

    def journal(self, since: int = 0) -> list[Entry]:
        """What the daemons wrote, without the first `since` lines."""
        return read_journal(self.folder)[since:]

    def has_tap(self) -> bool:
        """Whether the TAP is there."""
        with self.namespace.entered():
            return "tap0" in [name for _, name in socket.if_nameindex()]

    def log_of(self, daemon: Daemon) -> str:
        """What a daemon logged."""
        number = daemon.fault.name.removeprefix("f")
        return (self.folder / f"log{number}").read_text()

    def sockets_of(self, daemon: Daemon) -> str:
        """Its sockets and their peers, as ss(8) has them."""
        with self.namespace.entered():
            said = subprocess.run(["ss", "-xap"], capture_output=True, text=True, check=False).stdout
        return "\n".join(line for line in said.splitlines() if f"pid={daemon.process.pid}," in line)

    def close(self) -> None:
        """Ends everything."""
        self._ends.close()


def census(daemon: Daemon, *expected: Counter[str]) -> Counter[str]:
    """What a daemon holds, once that is `expected`: its descriptors by kind, its threads by name.

    It is looked at in the middle of a conversation, whose socket counts: after an answer or two the daemon has seen
    the ends of all earlier ones.
    """
    return asyncio.run(_census(daemon, expected))


async def _census(daemon: Daemon, expected: Sequence[Counter[str]]) -> Counter[str]:
    client = QMPClient()
    assert daemon.process.qmp is not None
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        await client.connect(str(daemon.process.qmp))
        try:
            for _ in range(CENSUS_TRIES_MAX):
                await client.execute("query-status")
                held = _held(daemon.process.pid)
                if held in expected:
                    break
            return held
        finally:
            await client.disconnect()


def _held(pid: int) -> Counter[str]:
    process = Path(f"/proc/{pid}")
    held: Counter[str] = Counter()
    for link in (process / "fd").iterdir():
        if link.name in ("0", "1", "2"):
            continue  # ours, whatever they are today
        try:
            held[re.sub(r":?\[?\d+\]?$", "", str(link.readlink()).removesuffix(" (deleted)"))] += 1
        except FileNotFoundError:
            continue
    for task in (process / "task").iterdir():
        held[f"thread {(task / 'comm').read_text().strip()}"] += 1
    return held


def end_of(daemon: Daemon, seconds: float = 20.0) -> int:
    """Waits for its end."""
    return daemon.process.wait(seconds=seconds)


def wait_stopped(daemon: Daemon) -> None:
    """Waits until SIGSTOP has stopped it, or it is dead."""
    daemon.process.wait_stopped()
