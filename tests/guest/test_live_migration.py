"""A VMM moves its guest to another VMM while it runs: what localmig wrote into its memory arrives.

Two daemons with a TAP each stand for two machines; a bridge joins them. What a program in the guest does not read
stays in the guest's memory as localmig wrote it, and nobody else wrote there: it is looked for in the memory of both
VMMs before the guest runs on. (The rest is not compared: QEMU's emulation misses writes of its own processor.)
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import pytest
from qemu.qmp import ConnectError, QMPClient
from tests.guest.lab import HOST_ADDRESS, PREFIX, EchoTransfer, Guest, Lab
from tests.guest.service import Service

from localmig.testing.namespace import ip
from localmig.testing.qemu import vhost_user_netdev

MIGRATION_SECONDS_MAX: Final = 120.0
"""A guest of 256 MiB, most of it zeros, under emulation on a machine under load."""

CRAWL_BYTES: Final = 1 << 20
"""A second: a migration that goes on for as long as a test needs it to."""

FAST_BYTES: Final = 1 << 33
"""As fast as it can: each round of a migration is a chance for QEMU's emulation to miss a write of its own processor
(with QEMU's own TAP too), which the guest may not survive."""

MEMORY: Final = "memory-backend-memfd"

UNREAD_PORT: Final = 9999
UNREAD_MAX: Final = 4 << 20
"""Bytes that the guest's kernel keeps for a program that reads nothing."""

RECORD_BYTES: Final = 64
RECORDS_AT_ONCE: Final = 20
"""About a frame."""

RECORDS_MIN: Final = 100
"""Of a migration of some seconds."""


class Host:
    """A machine: a daemon with a NIC on a TAP of its own, all TAPs on one bridge."""

    def __init__(self, lab: Lab, number: int, device: str) -> None:
        self._lab = lab
        self._tap = f"tap{number}"
        self._number = number
        self.service = Service(lab)
        self.service.socket = lab.folder / f"nic{number}.sock"
        self.service.qmp = lab.folder / f"qmp{number}.sock"
        self.service.start(
            *("--netdev", f"tap,id=net0,ifname={self._tap}"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,socket={self.service.socket}{device}"),
        )
        with lab.namespace.entered():
            ip("link", "set", self._tap, "master", "br0")
            ip("link", "set", self._tap, "up")

    def boot(self, *options: str, **nic: Any) -> Vm:
        """A VMM with a guest whose NIC is this host's."""
        self._number += 10
        monitor = self._lab.folder / f"vmm{self._number}.sock"
        arguments = [*vhost_user_netdev(self.service.socket), "-qmp", f"unix:{monitor},server=on,wait=off", *options]
        return Vm(guest=self._lab.boot_qemu(arguments, **nic), monitor=monitor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vm:
    """A VMM: its guest, and where it is asked."""

    guest: Guest
    monitor: Path

    async def client(self) -> QMPClient:
        """A connection to its monitor, once it is there."""
        client = QMPClient(self.monitor.name)
        async with asyncio.timeout(MIGRATION_SECONDS_MAX):
            while True:
                try:
                    await client.connect(str(self.monitor))
                except ConnectError:  # it is starting: there is no event to wait for
                    await asyncio.sleep(0.05)
                else:
                    return client

    def memory(self) -> bytes:
        """All that is in the guest's memory."""
        folder = Path(f"/proc/{self.guest.process.pid}/fd")
        (path,) = (path for path in folder.iterdir() if MEMORY in os.readlink(path))  # noqa: PTH115
        return path.read_bytes()


class Unread:
    """A connection to a program that reads nothing, and records for it, until the block ends."""

    def __init__(self, guest: Guest) -> None:
        self._mark = os.urandom(16)
        # The kernel keeps what nobody reads.
        guest.run(f"echo '4096 {UNREAD_MAX} {UNREAD_MAX}' >/proc/sys/net/ipv4/tcp_rmem")
        guest.run(f"nc -l -p {UNREAD_PORT} -e sleep 1000 </dev/null >/dev/null 2>&1 &")
        self._socket = guest.connect(UNREAD_PORT)
        self._socket.settimeout(0.01)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def _record(self, number: int) -> bytes:
        digest = hashlib.blake2b(number.to_bytes(4, "big") + self._mark, digest_size=RECORD_BYTES - 20).digest()
        return self._mark + number.to_bytes(4, "big") + digest

    def _send(self) -> None:
        number, rest = 0, b""
        while not self._ended.wait(0.001):
            if not rest:
                rest = b"".join(map(self._record, range(number, number + RECORDS_AT_ONCE)))
                number += RECORDS_AT_ONCE
            # It waits for nothing: the guest stands still for a while, and what it has room for ends.
            with contextlib.suppress(TimeoutError):
                rest = rest[self._socket.send(rest) :]

    def check(self, source: bytes, destination: bytes) -> None:
        """Each record that lies in the source's memory lies in the destination's, at the same place."""
        found, missing, at = 0, [], source.find(self._mark)
        while at >= 0:
            record = source[at : at + RECORD_BYTES]
            # One that was cut in two by frames has other bytes behind its beginning.
            if record == self._record(int.from_bytes(record[16:20], "big")):
                found += 1
                if destination[at : at + RECORD_BYTES] != record:
                    missing.append(hex(at))
            at = source.find(self._mark, at + 1)
        assert not missing, f"{len(missing)} of {found} records did not arrive: {missing[:20]}"
        assert found >= RECORDS_MIN, found

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()


@pytest.fixture
def bridged(lab: Lab) -> Lab:
    """A lab whose host address is on a bridge."""
    with lab.namespace.entered():
        ip("link", "add", "br0", "type", "bridge")
        ip("address", "add", HOST_ADDRESS + PREFIX, "dev", "br0")
        ip("link", "set", "br0", "up")
    return lab


async def begin(source: QMPClient, uri: str, *, bytes_a_second: int) -> None:
    """Begins a migration, of which events tell."""
    for name in ("events", "return-path"):
        await source.execute("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": True}]})
    await source.execute("migrate-set-parameters", {"max-bandwidth": bytes_a_second, "downtime-limit": 1000})
    await source.execute("migrate", {"uri": uri})


async def reached(client: QMPClient, *statuses: str) -> str:
    """The first of these states that its migration comes to."""
    async with asyncio.timeout(MIGRATION_SECONDS_MAX):
        while True:
            info = await client.execute("query-migrate")
            assert isinstance(info, dict), info
            if info.get("status") in statuses:
                return str(info["status"])
            await asyncio.sleep(0.05)


def move(lab: Lab, source: Vm, there: Host, *, upgraded: Service | None = None, **nic: Any) -> Vm:
    """Moves a guest to a VMM on another host; the guest runs there, with what localmig wrote here.

    `upgraded`: this host's localmig is replaced meanwhile, while the VMM reads its log.
    """
    uri = f"unix:{lab.folder / 'vm-migration.sock'}"
    destination = there.boot("-S", "-incoming", uri, **nic)

    async def conversation() -> None:
        here, other = await source.client(), await destination.client()
        slow = upgraded is not None
        await begin(here, uri, bytes_a_second=CRAWL_BYTES if slow else FAST_BYTES)
        if upgraded is not None:
            await reached(here, "active")
            await asyncio.to_thread(upgraded.upgrade)
            await here.execute("migrate-set-parameters", {"max-bandwidth": FAST_BYTES})
        info = await reached(here, "completed", "failed")
        assert info == "completed", await here.execute("query-migrate")
        await reached(other, "completed")
        arrived = await asyncio.to_thread(destination.memory)
        await other.execute("cont")
        # The source's guest stands still for good.
        await asyncio.to_thread(unread.check, source.memory(), arrived)
        await here.execute("quit")
        with contextlib.suppress(EOFError):  # how it learns that the VMM is gone
            await here.disconnect()
        await other.disconnect()

    with Unread(source.guest) as unread:
        asyncio.run(conversation())
    source.guest.process.wait(seconds_max=30)
    return destination


@pytest.mark.parametrize(
    ("device", "nic"),
    [
        pytest.param("", {}, id="split"),
        pytest.param(",packed=on", {"packed": True}, id="packed"),
        pytest.param("", {"mergeable": False}, id="not-merged"),
    ],
)
def test_a_guest_moves_there_and_back_under_traffic_with_all_that_was_written(
    bridged: Lab, device: str, nic: dict[str, Any]
) -> None:
    hosts = [Host(bridged, number, device) for number in range(2)]
    vm = hosts[0].boot(**nic)
    vm.guest.wait_ready()
    with EchoTransfer(vm.guest) as transfer:
        transfer.wait_progress(1_000_000)
        for number in (1, 0):
            vm = move(bridged, vm, hosts[number], **nic)
            transfer.wait_progress(1_000_000)
            # Nothing is logged there: the guest runs where it is.
            assert "VHOST_F_LOG_ALL" not in hosts[number].service.nic()["session"]["features"]
        assert transfer.finish().intact


def test_localmig_is_replaced_while_its_log_is_read(bridged: Lab) -> None:
    hosts = [Host(bridged, number, "") for number in range(2)]
    vm = hosts[0].boot()
    vm.guest.wait_ready()
    with EchoTransfer(vm.guest) as transfer:
        transfer.wait_progress(1_000_000)
        move(bridged, vm, hosts[1], upgraded=hosts[0].service)
        transfer.wait_progress(1_000_000)
        assert transfer.finish().intact


def test_a_migration_that_is_cancelled_changes_nothing_for_the_guest(bridged: Lab) -> None:
    hosts = [Host(bridged, number, "") for number in range(2)]
    vm = hosts[0].boot()
    vm.guest.wait_ready()
    changes = vm.guest.carrier_changes()
    uri = f"unix:{bridged.folder / 'vm-migration.sock'}"
    destination = hosts[1].boot("-S", "-incoming", uri)

    def features() -> list[str]:
        names: list[str] = hosts[0].service.nic()["session"]["features"]
        return names

    async def conversation() -> None:
        here = await vm.client()
        await (await destination.client()).disconnect()  # it listens
        await begin(here, uri, bytes_a_second=CRAWL_BYTES)
        await reached(here, "active")
        assert "VHOST_F_LOG_ALL" in await asyncio.to_thread(features)
        await asyncio.to_thread(transfer.wait_progress, 200_000)
        await here.execute("migrate_cancel")
        await reached(here, "cancelled")
        assert "VHOST_F_LOG_ALL" not in await asyncio.to_thread(features)
        await here.disconnect()

    with EchoTransfer(vm.guest) as transfer:
        transfer.wait_progress(1_000_000)
        asyncio.run(conversation())
        transfer.wait_progress(1_000_000)
        assert transfer.finish().intact
    assert vm.guest.carrier_changes() == changes
