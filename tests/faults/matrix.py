"""The kill matrix's machine: one NIC, one guest, a chain of daemons: each cell leaves the next one its survivor. And
a chain of daemons that serve more than a NIC on a TAP.

Owns:        the daemons and their journal, the guest's frames, the account of what the survivor holds.
Never sees:  which outcome is right.
Read next:   test_kill_matrix.py, which has the points and judges.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from qemu.qmp import QMPClient
from tests.examples.conftest import write_package
from tests.kit.frames import FrameStream
from tests.kit.processes import DaemonProcess

from localmig.errors import PeerError
from localmig.testing.daemon import ANSWER_SECONDS_MAX
from localmig.testing.driver import Driver
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
        guest: the frontend of the session that owns.
        waiting: another guest's, whose rings are held; None where nobody waits for the NIC.
        frames: what flows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        options: str = "",
        interval_s: float = 0.001,
        habits: Habits = QEMU,
        is_waited_for: bool = False,
    ) -> None:
        self.folder = folder
        self._habits = habits
        self._options = options
        self._interval_s = interval_s
        self._is_waited_for = is_waited_for
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
        self.serving = self._start(*self._objects)
        near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._life.callback(near.close)
        self._life.callback(tap.close)
        tap.setblocking(False)
        self.guest = self._life.enter_context(NetGuest(f"{self.folder}/n", tap_fds=[tap.fileno()], habits=self._habits))
        self.guest.attach()
        self.waiting: NetGuest | None = None
        if self._is_waited_for:
            self.waiting = self._life.enter_context(NetGuest(f"{self.folder}/n", queue_size=16))
            self.waiting.attach()
        self._near = near
        self._attach_others()
        self._stream()
        assert self.frames.wait_flow(seconds=FLOW_SECONDS_MAX)
        self.prepare()

    def reset_driver(self) -> None:
        """The guest's driver begins again. What was in its rings is gone, so the frames begin again too."""
        self.frames.stop()
        self.guest.reset_driver()
        self._stream()

    def move(self) -> None:
        """The guest moves to another VMM: another session owns."""
        other = self._life.enter_context(NetGuest(f"{self.folder}/n", moved_from=self.guest))
        other.connect()
        self.guest.detach()
        other.arrive(self.guest.bases)
        self.guest.disconnect()
        self.guest = other

    def roles(self) -> list[str]:
        """What the sessions are to the device, the oldest first."""
        device = next(each for each in self.serving.process.execute("query-devices") if each["id"] == "nic0")
        return [session["role"] for session in device["sessions"]]

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

    @property
    def _objects(self) -> list[str]:
        return [
            *("--netdev", f"tap,id=net0,ifname=tap0{self._netdev}"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,socket={self.folder}/n{self._options}"),
        ]

    def _attach_others(self) -> None:
        """Frontends of what a fresh daemon serves besides the NIC."""

    def check_others(self, *, but: AbstractSet[str] = frozenset()) -> None:
        """All that is served as before, except these parts."""

    def _stream(self) -> None:
        with self.namespace.entered():
            self.frames = FrameStream("tap0", self._near, interval_s=self._interval_s).start()
        self._life.callback(self.frames.stop)

    def renew(self) -> None:
        """The guest was lost with its daemons: a fresh daemon, to which the same frontend reconnects."""
        self.serving.process.kill()
        self.frames.stop()
        self.serving = self._start(*self._objects)
        self.guest.reconnect()
        if self.waiting is not None:
            self.waiting.reconnect()
        self._attach_others()
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


KEEPER: Final = '''
from dataclasses import dataclass

from localmig.device_api import CallbackDevice, ObjectType, VhostUserSpec, callback_members


class Keeper(CallbackDevice):
    """Keeps the chains of one ring, and answers one of them for each chain of the other."""

    device_id = 42
    ring_names = ("kept", "asked")

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.kept = []

    def on_chain(self, chain):
        if chain.ring == "kept":
            self.kept.append(chain)
        else:
            self.kept.pop(0).complete(chain.readable)
            chain.complete(b"done")

    def on_returned(self, ring):
        self.kept.clear()


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperSpec(VhostUserSpec):
    type_name = "keeper"
    summary = "a device that keeps chains"


KEEPER = ObjectType(
    spec=KeeperSpec, build=lambda spec, context: Keeper(**spec.arguments(context)), info=callback_members()
)
'''
"""A package's device, in Python."""

KEPT, ASKED = 0, 1
KEPT_COUNT: Final = 4


class MixedChain(Chain):
    """Daemons that hand on a NIC on a stream socket and a device in Python as well, which keeps chains."""

    def __init__(self, folder: Path) -> None:
        packages = folder / "packages"
        packages.mkdir()
        write_package(packages, "localmig-keeper", KEEPER, "keeper")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(packages)
        self._others = ExitStack()
        self._number = 0
        super().__init__(folder, is_waited_for=True)
        self._ends.callback(self._others.close)
        self._ends.callback(_set_python_path, before)

    @property
    def _objects(self) -> list[str]:
        return [
            *super()._objects,
            *("--netdev", f"stream,id=net1,addr.type=unix,addr.path={self.folder}/p,server=on"),
            *("--device", f"virtio-net,id=nic1,netdev=net1,socket={self.folder}/n1"),
            *("--device", f"keeper,id=dev0,socket={self.folder}/d"),
        ]

    def _attach_others(self) -> None:
        self._others.close()
        self._connect_peer()
        self._outer, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._others.callback(self._outer.close)
        self._others.callback(tap.close)
        tap.setblocking(False)
        self._outer.settimeout(FLOW_SECONDS_MAX)
        self._others.enter_context(NetGuest(f"{self.folder}/n1", tap_fds=[tap.fileno()])).attach()
        self._driver = self._others.enter_context(Driver(f"{self.folder}/d", ring_count=2))
        self._driver.attach()
        for _ in range(KEPT_COUNT):
            self._driver.add(KEPT, room=64)
        self.check_others()

    def _connect_peer(self) -> None:
        self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._others.callback(self._peer.close)
        self._peer.connect(f"{self.folder}/p")

    def check_others(self, *, but: AbstractSet[str] = frozenset()) -> None:
        """No chain that was kept is lost or was answered before, and frames pass the stream."""
        if "dev0" not in but:
            self._check_device()
        if "net1" not in but:
            self._check_stream()

    def _check_stream(self) -> None:
        self._number += 1
        frame = self._number.to_bytes(8, "big").rjust(60, b"\xff")
        deadline = time.monotonic() + FLOW_SECONDS_MAX
        while not self._frame_arrives(frame):
            # After a death the survivor ends the connection, because nobody knows what was in hand of it.
            assert time.monotonic() < deadline, "no frame passes the stream"
            self._connect_peer()

    def _check_device(self) -> None:
        for number in range(2 * KEPT_COUNT):
            assert self._driver.request(ASKED, b"%d" % number, room=8) == b"done"
            _, answer = self._driver.take_used(KEPT)
            assert answer == b"%d" % number
            self._driver.add(KEPT, room=64)

    def _frame_arrives(self, frame: bytes) -> bool:
        """Whether a frame passes from the peer to the guest; False if the connection ends before."""
        try:
            self._peer.sendall(len(frame).to_bytes(4, "big") + frame)
        except OSError:
            return False
        poll = select.poll()
        poll.register(self._outer, select.POLLIN)
        poll.register(self._peer, select.POLLRDHUP)
        while True:
            ready = dict(poll.poll(FLOW_SECONDS_MAX * 1000))
            if self._outer.fileno() in ready:
                if self._outer.recv(2048).endswith(frame):
                    return True
            elif ready:
                return False
            else:
                raise AssertionError("the stream is open, and no frame passes it")


def _set_python_path(value: str | None) -> None:
    if value is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = value


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
