"""A guest with real kernel TCP/IP on passt, which needs no privilege, while daemons change under it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest

from localmig.testing.namespace import ip

if TYPE_CHECKING:
    from tests.kit.site import Site

GATEWAY: Final = "10.9.0.1"
"""Where the guest reaches what listens at 127.0.0.1 of passt's namespace."""

PATIENCE_S: Final = 20.0
TCP_PORT, UDP_PORT = 5001, 5002
PIECE: Final = 1 << 14


@pytest.fixture
def passt(site: Site) -> Iterator[str]:
    """The socket of a passt that answers for `GATEWAY`, in the site's namespace."""
    program = shutil.which("passt")
    if program is None:
        pytest.skip("no passt: on Debian, apt-get install passt")
    path = str(site.folder / "passt.sock")
    with site.namespace.entered():
        ip("link", "set", "lo", "up")
        # passt takes the guest's routes and names from an interface with a default route.
        ip("tuntap", "add", "up0", "mode", "tap")
        ip("addr", "add", "10.77.0.2/24", "dev", "up0")
        ip("link", "set", "up0", "up")
        ip("route", "add", "default", "via", "10.77.0.1")
        options = [
            "-f",
            "-4",
            "-s",
            path,
            "-a",
            site.guest_address,
            "-n",
            "24",
            "-g",
            GATEWAY,
            "-t",
            "none",
            "-u",
            "none",
        ]
        process = subprocess.Popen(
            [program, *options, "--runas", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    try:
        yield path
        assert process.poll() is None, "passt ended"
    finally:
        process.kill()
        process.wait(PATIENCE_S)


class Echo:
    """What answers at 127.0.0.1, by TCP and UDP."""

    def __init__(self, ends: ExitStack) -> None:
        self._tcp = ends.enter_context(socket.create_server(("127.0.0.1", TCP_PORT)))
        self._tcp.settimeout(PATIENCE_S)
        self._udp = ends.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._udp.bind(("127.0.0.1", UDP_PORT))
        self._udp.settimeout(PATIENCE_S)
        self.connections = 0
        for serve in (self._serve_tcp, self._serve_udp):
            thread = threading.Thread(target=serve)
            thread.start()
            ends.callback(thread.join)

    def _serve_tcp(self) -> None:
        connection, _ = self._tcp.accept()
        with connection:
            while data := connection.recv(PIECE):
                connection.sendall(data)

    def _serve_udp(self) -> None:
        while True:
            data, sender = self._udp.recvfrom(2048)
            self._udp.sendto(data, sender)
            if data == b"end":
                return


class Caller:
    """In the guest: what is sent must come back, in its turn, until the end."""

    def __init__(self, ends: ExitStack) -> None:
        self._tcp = ends.enter_context(socket.create_connection((GATEWAY, TCP_PORT), PATIENCE_S))
        self._udp = ends.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._udp.connect((GATEWAY, UDP_PORT))
        self._udp.settimeout(PATIENCE_S)
        self._ends = threading.Event()
        self._moved = threading.Condition()
        self.bytes_back = self.datagrams_back = 0
        self.problems: list[Exception] = []
        self._threads = [threading.Thread(target=self._run, args=(call,)) for call in (self._call_tcp, self._call_udp)]
        for thread in self._threads:
            thread.start()

    def _run(self, call: object) -> None:
        try:
            assert callable(call)
            call()
        except (OSError, AssertionError) as problem:
            self.problems.append(problem)
        with self._moved:
            self._moved.notify_all()

    def _call_tcp(self) -> None:
        number = 0
        while not self._ends.is_set():
            number += 1
            piece = number.to_bytes(4, "big") * (PIECE // 4)
            self._tcp.sendall(piece)
            back = b""
            while len(back) < PIECE:
                more = self._tcp.recv(PIECE - len(back))
                assert more, "the connection ended"
                back += more
            assert back == piece
            with self._moved:
                self.bytes_back += PIECE
                self._moved.notify_all()
        self._tcp.shutdown(socket.SHUT_WR)

    def _call_udp(self) -> None:
        number = 0
        while not self._ends.is_set():
            number += 1
            datagram = number.to_bytes(4, "big") * 100
            self._udp.send(datagram)
            assert self._udp.recv(2048) == datagram, f"datagram {number} was lost or doubled"
            with self._moved:
                self.datagrams_back += 1
                self._moved.notify_all()
        self._udp.send(b"end")

    def await_more(self) -> None:
        """Until both came back often enough that they were on their way meanwhile."""
        pieces, datagrams = self.bytes_back + 20 * PIECE, self.datagrams_back + 50
        with self._moved:
            assert self._moved.wait_for(
                lambda: bool(self.problems) or (self.bytes_back >= pieces and self.datagrams_back >= datagrams),
                PATIENCE_S,
            )
        assert self.problems == []

    def end(self) -> None:
        """Ends both, in order."""
        self._ends.set()
        for thread in self._threads:
            thread.join()
        assert self.problems == []


def test_connections_and_datagrams_of_a_guest_on_passt_outlive_ten_handovers(site: Site, passt: str) -> None:
    netdev = f"stream,id=net0,addr.type=unix,addr.path={passt},reconnect-ms=100"
    device = f"virtio-net,id=nic0,netdev=net0,socket={site.socket}"
    daemon = site.daemon("--netdev", netdev, "--device", device, "--migration-parameter", "local=on")
    daemon.wait_event("InterfaceChanged", link_is_up=True)
    with ExitStack() as ends:
        with site.namespace.entered():
            Echo(ends)
        guest = site.attach_unseen()
        with guest.namespace.entered():
            caller = Caller(ends)
        for _ in range(10):
            caller.await_more()
            destination = site.destination()
            daemon.execute("migrate", uri=site.address)
            assert daemon.wait_migration()["status"] == "completed"
            assert daemon.quit() == 0
            destination.execute("migrate-set-parameters", local=True)
            daemon = destination
        caller.await_more()
        caller.end()
        assert guest.carrier_changes() == 0
    (info,) = daemon.execute("query-netdevs")
    assert (info["connected"], info["notes"]) == (True, [])
