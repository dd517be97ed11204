"""A real guest moves from one machine to another by its VMM's own migration, each machine with a daemon and a TAP."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from tests.guest.lab import PREFIX, STOP_SECONDS_MAX, EchoTransfer, Guest, Lab
from tests.guest.service import Service, converse
from tests.guest.vmm import begin_migration, migration_ended, monitor

from localmig.testing import qemu
from localmig.testing.namespace import COMMAND_SECONDS_MAX, configure, ip
from localmig.testing.traffic import STALL_SECONDS_MAX

MOVES: Final = 2 * int(os.environ.get("LOCALMIG_VMM_MOVES", "1"))
"""There and back. `make vmm` wants twenty."""

ADDRESSES: Final = ("10.9.0.1", "10.9.0.3")
GUEST_MAC: Final = "52:54:00:12:34:56"
MIGRATION_PORT: Final = 4444
FILE_PORT: Final = 5002
FILE_BYTES: Final = 16 << 20


class Host:
    """A machine: a bridge with the daemon's TAP and the cable to the other machine."""

    def __init__(self, lab: Lab, address: str) -> None:
        self.lab = lab
        self.address = address
        self.service = Service(lab)
        self._guest_count = 0
        with lab.namespace.entered():
            ip("link", "add", "br0", "type", "bridge")
            configure("br0", address=address + PREFIX)
        self.service.start(*self.service.objects())
        self.attach("tap0")

    def attach(self, ifname: str) -> None:
        """Bring an interface up as a port of the bridge."""
        with self.lab.namespace.entered():
            configure(ifname)
            ip("link", "set", ifname, "master", "br0")

    def boot(self, *more: str) -> tuple[Guest, Path]:
        """A QEMU with its NIC at the daemon; the path of its QMP."""
        self._guest_count += 1
        qmp = self.lab.folder / f"qemu{self._guest_count}.sock"
        netdev = qemu.vhost_user_netdev(self.service.socket)
        return self.lab.boot_qemu(netdev, more=["-qmp", f"unix:{qmp},server=on,wait=off", *more]), qmp

    def port_of(self, mac: str) -> str:
        """The port behind which the bridge believes an Ethernet address."""
        with self.lab.namespace.entered():
            (line,) = (line for line in bridge_table().splitlines() if line.startswith(mac) and "permanent" not in line)
        return line.split()[2]


def bridge_table() -> str:
    done = subprocess.run(
        ["bridge", "fdb", "show", "br", "br0"], capture_output=True, text=True, check=True, timeout=COMMAND_SECONDS_MAX
    )
    return done.stdout


@pytest.fixture
def hosts(lab: Lab) -> Iterator[tuple[Host, Host]]:
    with ExitStack() as resources:
        other = resources.enter_context(Lab())
        pair = Host(lab, ADDRESSES[0]), Host(other, ADDRESSES[1])
        with lab.namespace.entered():
            there = f"/proc/{os.getpid()}/fd/{other.namespace.fileno()}"
            ip("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", there)
        for host in pair:
            host.attach("cable")
        yield pair


async def move(source: Path, destination: Path, uri: str) -> None:
    async with monitor(source) as client, monitor(destination) as waiting:
        await waiting.execute("migrate-incoming", {"uri": uri})
        with client.listener("MIGRATION") as events:
            await begin_migration(client, uri)
            assert await migration_ended(events) == "completed", await client.execute("query-migrate")
        await client.execute("quit")


@pytest.mark.alone
@pytest.mark.timeout(180 + 60 * MOVES)
def test_a_guest_under_load_moves_there_and_back_with_its_memory_intact(hosts: tuple[Host, Host]) -> None:
    here, there = hosts
    guest, qmp = here.boot()
    guest.wait_ready()
    process = guest.process
    carrier_changes = guest.carrier_changes()
    content = random.Random(0).randbytes(FILE_BYTES)
    for _ in range(MOVES):
        following, following_qmp = there.boot("-incoming", "defer")
        guest.run(f"nc -l -p {FILE_PORT} >/tmp/file 2>/dev/null </dev/null &")
        # The NIC writes into the guest's memory while that is copied.
        with EchoTransfer(guest) as transfer, ThreadPoolExecutor() as pool:
            transfer.wait_progress(500_000)
            sending = pool.submit(send, guest, content)
            converse(move(qmp, following_qmp, f"tcp:{there.address}:{MIGRATION_PORT}"))
            transfer.wait_progress(500_000)
            sending.result(timeout=STALL_SECONDS_MAX)
            assert transfer.finish().intact
        assert guest.run("sha256sum </tmp/file").split()[0] == hashlib.sha256(content).hexdigest()
        # The bridges were told where the guest is.
        assert (here.port_of(GUEST_MAC), there.port_of(GUEST_MAC)) == ("cable", "tap0")
        assert process.wait(seconds_max=STOP_SECONDS_MAX) == 0
        here, there, qmp, process = there, here, following_qmp, following.process
    assert guest.carrier_changes() == carrier_changes


def send(guest: Guest, content: bytes) -> None:
    """Let the guest's file server have a file."""
    with guest.connect(FILE_PORT) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # it has all of it
