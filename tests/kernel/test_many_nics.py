"""Many NICs of one daemon, handed over in one migration: each goes on, none loses a frame, all cost the same."""

from __future__ import annotations

import signal
import socket
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, Self

import pytest
from tests.kit.processes import DaemonProcess

from localmig.testing.frontend import NetGuest
from localmig.virtio.net import header_length

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("namespace")]

PATIENCE_S: Final = 20.0

END_SECONDS_MAX: Final = 60.0
"""A loaded machine takes many seconds to unmap the memory of five hundred guests."""
"""For a frame to come, or a migration to end: milliseconds each, a machine under load gets much more."""

QUEUE_SIZE: Final = 16
ETH_P_ALL: Final = 3
SOL_PACKET: Final = 263
PACKET_IGNORE_OUTGOING: Final = 23

LOCAL: Final = ("--migration-parameter", "local=on")


def frame(number: int) -> bytes:
    """An Ethernet frame to everybody, of a type nobody knows."""
    return b"\xff" * 6 + bytes.fromhex("525400123456 88b5") + number.to_bytes(4, "big") + bytes(42)


class Nic:
    """A NIC with its guest, whose own network is a socket, and the machine's side of its TAP."""

    def __init__(self, number: int, folder: Path, ends: ExitStack) -> None:
        self.near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.enter_context(self.near)
        ends.enter_context(tap)
        self.near.settimeout(PATIENCE_S)
        tap.setblocking(False)
        self.guest = ends.enter_context(
            NetGuest(str(folder / f"{number}"), tap_fds=[tap.fileno()], queue_size=QUEUE_SIZE)
        )
        self.guest.attach()
        self.header = header_length(self.guest.features)
        self.machine = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        self.machine.bind((f"tap{number}", ETH_P_ALL))
        self.machine.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.machine.settimeout(PATIENCE_S)
        self.sent = 0

    def send(self) -> None:
        """A frame leaves each way."""
        self.sent += 1
        self.machine.send(frame(self.sent))
        self.near.send(bytes(self.header) + frame(self.sent))

    def receive_all(self) -> None:
        """Every frame that was sent arrives, once, in order."""
        for number in range(1, self.sent + 1):
            assert self.near.recv(4096)[self.header :] == frame(number)
            assert self.machine.recv(4096) == frame(number)
        self.sent = 0


class Takes(NamedTuple):
    """What a daemon takes of the machine."""

    threads: int
    descriptors: int

    @classmethod
    def of(cls, daemon: DaemonProcess) -> Self:
        process = Path(f"/proc/{daemon.pid}")
        return cls(len(list((process / "task").iterdir())), len(list((process / "fd").iterdir())))


def serve(count: int, folder: Path, *, handovers: int) -> Takes:
    """Serves `count` NICs through some handovers, with frames on their way across each; what the last daemon takes."""
    with ExitStack() as ends:
        objects = []
        for number in range(count):
            objects += ["--netdev", f"tap,id=net{number},ifname=tap{number}"]
            objects += ["--device", f"virtio-net,id=nic{number},netdev=net{number},socket={folder / f'{number}'}"]
        daemon = ends.enter_context(DaemonProcess([*LOCAL, *objects], qmp=folder / "q0"))
        nics = [Nic(number, folder, ends) for number in range(count)]
        for handover in range(1, handovers + 1):
            address = f"unix:{folder / f'm{handover}'}"
            successor = ends.enter_context(DaemonProcess([*LOCAL, "--incoming", address], qmp=folder / f"q{handover}"))
            for nic in nics:
                nic.send()
            daemon.execute("migrate", uri=address)
            for nic in nics:
                nic.send()
            info = daemon.wait_migration(seconds=PATIENCE_S)
            assert info["status"] == "completed", info
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(seconds=END_SECONDS_MAX) == 0
            daemon = successor
            for nic in nics:
                nic.send()
            for nic in nics:
                nic.receive_all()
        return Takes.of(daemon)


@pytest.mark.parametrize("count", [8, 64])
def test_all_nics_move_in_one_migration_and_none_loses_a_frame(
    count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    serve(count, tmp_path_factory.mktemp("m"), handovers=3)


def test_five_hundred_nics_move_in_one_migration(tmp_path_factory: pytest.TempPathFactory) -> None:
    serve(512, tmp_path_factory.mktemp("m"), handovers=1)


def test_each_nic_takes_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    takes = [serve(count, tmp_path_factory.mktemp("m"), handovers=1) for count in (1, 2, 3)]
    more = [Takes(*(after - before for before, after in zip(*pair, strict=True))) for pair in pairwise(takes)]
    # Its queue pair's thread. Its TAP, listener and connection, the guest's memory, kick, call and error of two rings,
    # an eventfd each for ring errors and to wake the thread.
    assert set(more) == {Takes(threads=1, descriptors=12)}
