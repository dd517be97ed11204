"""A NIC on a stream socket: daemons, peers and connections come and go, and every frame arrives once, in order."""

from __future__ import annotations

import array
import fcntl
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from tests.kit.daemons import Daemons
from tests.kit.processes import DaemonProcess

from localmig.testing.frontend import NetGuest

PATIENCE_S: Final = 20.0
HEADER: Final = 12
"""Bytes of the virtio-net header in front of each frame of the guest's own TAP."""

LOCAL: Final = ("--migration-parameter", "local=on")

WINDOW: Final = 32
"""Frames on their way at once: the socket that stands for the guest's own TAP takes no more."""


def frame(number: int, length: int = 60) -> bytes:
    """To everybody, of a type nobody knows."""
    head = b"\xff" * 6 + bytes.fromhex("525400123456") + b"\x88\xb5" + number.to_bytes(4, "big")
    return head.ljust(length, bytes([number % 256]))


def length_of(number: int) -> int:
    """Lengths of all kinds, up to an Ethernet's."""
    return 60 + number * 37 % 1455


def on_the_wire(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def bytes_in(sock: socket.socket, request: int) -> int:
    """TIOCOUTQ: what the other end has not read; FIONREAD: what waits here."""
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), request, count)
    return count[0]


def await_that(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end, "it did not come to that"


class Peer:
    """The other end of a stream."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE_S)

    def send(self, data: bytes) -> None:
        self.sock.sendall(on_the_wire(data))

    def receive(self) -> bytes:
        (length,) = struct.unpack(">I", self._read(4))
        return self._read(length)

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            assert more, f"the stream ended {len(data)} bytes into {count}"
            data += more
        return data

    def is_at_the_end(self) -> bool:
        """Whether the daemon ended the connection; waits for it."""
        try:
            return not self.sock.recv(1)
        except ConnectionResetError:
            return True

    def await_read(self) -> None:
        """Until the daemon has taken everything out of the socket."""
        await_that(lambda: bytes_in(self.sock, termios.TIOCOUTQ) == 0)


class Site(Daemons):
    """Where daemons, a peer and a guest meet.

    Attributes:
        near: the guest's own TAP.
        listener: the peer's, where the daemon connects.
    """

    def __init__(self, folder: Path, ends: ExitStack, *, server: bool) -> None:
        super().__init__(folder, ends)
        self.path = str(folder / "p")
        self.ends = ends
        self.server = server
        self.listener = ends.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self.listener.settimeout(PATIENCE_S)
        if not server:
            self.listener.bind(self.path)
            self.listener.listen()

    def netdev(self) -> str:
        return f"stream,id=net0,addr.type=unix,addr.path={self.path}," + (
            "server=on" if self.server else "server=off,reconnect-ms=1"
        )

    def source(self, *, fault: str | None = None, netdev: str = "") -> DaemonProcess:
        device = f"virtio-net,id=nic0,netdev=net0,socket={self.folder}/n"
        return self.daemon(*LOCAL, "--netdev", self.netdev() + netdev, "--device", device, fault=fault)

    def peer(self) -> Peer:
        """A peer that is there from now on."""
        if self.server:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(self.path)
        else:
            sock, _ = self.listener.accept()
        return Peer(self.ends.enter_context(sock))

    def guest(self, *, queue_size: int = 64) -> NetGuest:
        """A guest that receives and sends."""
        self.near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ends.enter_context(self.near)
        self.ends.enter_context(tap)
        self.near.settimeout(PATIENCE_S)
        tap.setblocking(False)
        guest = self.ends.enter_context(NetGuest(f"{self.folder}/n", tap_fds=[tap.fileno()], queue_size=queue_size))
        guest.attach()
        return guest

    def receive(self) -> bytes:
        """What the guest receives next."""
        got = self.near.recv(1 << 17)
        assert got[:10] == bytes(10)
        return got[HEADER:]

    def send(self, data: bytes) -> None:
        """The guest sends."""
        self.near.send(bytes(HEADER) + data)


def netdev_of(daemon: DaemonProcess) -> dict[str, Any]:
    (netdev,) = daemon.execute("query-netdevs")
    assert isinstance(netdev, dict)
    return netdev


def counter(daemon: DaemonProcess, name: str) -> int:
    (device,) = daemon.execute("query-devices")
    count: int = device["queue-pairs"][0]["counters"][name]
    return count


def await_count(daemon: DaemonProcess, name: str, count: int) -> None:
    await_that(lambda: counter(daemon, name) >= count)


def await_connected(daemon: DaemonProcess, *, is_connected: bool = True) -> None:
    await_that(lambda: netdev_of(daemon)["connected"] is is_connected)


@pytest.fixture(params=["server=off", "server=on"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as ends:
        yield Site(tmp_path_factory.mktemp("s"), ends, server=request.param == "server=on")


def check_both_ways(site: Site, peer: Peer, number: int) -> None:
    peer.send(frame(number))
    assert site.receive() == frame(number)
    site.send(frame(number))
    assert peer.receive() == frame(number)


def test_frames_go_both_ways(site: Site) -> None:
    site.source()
    peer = site.peer()
    site.guest()
    check_both_ways(site, peer, 1)


# -- handovers ----------------------------------------------------------------------------------------------------


class Traffic:
    """Numbered frames both ways while daemons change, at most `WINDOW` on their way; each must arrive in its turn."""

    def __init__(self, site: Site, peer: Peer) -> None:
        self._site = site
        self._peer = peer
        self._ends = threading.Event()
        self._problems: list[Exception] = []
        self.sent = {"in": 0, "out": 0}
        self.received = {"in": 0, "out": 0}
        self._turn = threading.Condition()
        work = (
            (self._send, "in", peer.send),
            (self._receive, "in", site.receive),
            (self._send, "out", site.send),
            (self._receive, "out", peer.receive),
        )
        self._threads = [threading.Thread(target=self._run, args=each) for each in work]
        for thread in self._threads:
            thread.start()

    def _run(self, step: Callable[[str, Any], None], way: str, act: Any) -> None:
        try:
            step(way, act)
        except (OSError, AssertionError) as problem:
            self._problems.append(problem)
            with self._turn:
                self._ends.set()
                self._turn.notify_all()

    def _send(self, way: str, act: Callable[[bytes], None]) -> None:
        while True:
            with self._turn:
                assert self._turn.wait_for(self._may_send(way), PATIENCE_S), f"{way}: nothing arrives any more"
                if self._ends.is_set():
                    return
                self.sent[way] += 1
                number = self.sent[way]
                self._turn.notify_all()
            act(frame(number, length_of(number)))

    def _may_send(self, way: str) -> Callable[[], bool]:
        return lambda: self._ends.is_set() or self.sent[way] - self.received[way] < WINDOW

    def _receive(self, way: str, act: Callable[[], bytes]) -> None:
        while True:
            with self._turn:
                arrived = self._turn.wait_for(lambda: self._ends.is_set() or self.sent[way] > self.received[way])
                if self.sent[way] == self.received[way] or self._problems or not arrived:
                    return
            number = self.received[way] + 1
            got = act()
            assert got == frame(number, length_of(number)), f"{way}: {number} is not {got[:24].hex()}"
            with self._turn:
                self.received[way] = number
                self._turn.notify_all()

    def await_more(self, count: int = 100) -> None:
        """Until as many frames more have arrived each way."""
        wanted = {way: number + count for way, number in self.received.items()}
        with self._turn:
            assert self._turn.wait_for(
                lambda: bool(self._problems) or all(self.received[way] >= wanted[way] for way in wanted), PATIENCE_S
            )
        assert not self._problems, self._problems

    def end(self) -> None:
        """All that was sent has arrived."""
        with self._turn:
            self._ends.set()
            self._turn.notify_all()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        assert not self._problems, self._problems
        assert self.received == self.sent


def test_ten_handovers_under_traffic_lose_double_and_reorder_nothing(site: Site) -> None:
    daemon = site.source()
    peer = site.peer()
    site.guest()
    traffic = Traffic(site, peer)
    for _ in range(10):
        traffic.await_more()
        daemon = site.hand_over(daemon)
    traffic.await_more()
    traffic.end()
    names = ("rx-dropped-length", "rx-dropped-error", "tx-dropped-interface", "tx-dropped-header")
    assert {name: counter(daemon, name) for name in names} == dict.fromkeys(names, 0)


def test_what_was_read_of_a_frame_travels_wherever_it_was_cut(site: Site) -> None:
    daemon = site.source()
    peer = site.peer()
    site.guest()
    check_both_ways(site, peer, 1)
    wire = on_the_wire(frame(2, 300)) + on_the_wire(frame(3))
    cuts = (0, 1, 3, 4, 5, 18, 200, 303, 304, 305, 310, len(wire))
    for begin, end in pairwise(cuts):
        peer.sock.sendall(wire[begin:end])
        peer.await_read()
        daemon = site.hand_over(daemon)
    assert site.receive() == frame(2, 300)
    assert site.receive() == frame(3)
    check_both_ways(site, peer, 4)


def test_what_was_sent_of_a_frame_is_finished_by_the_successor(site: Site) -> None:
    daemon = site.source(netdev=",mtu=65520")
    peer = site.peer()
    site.guest()
    length = 60_000
    sent = 0
    # The peer reads nothing: its socket fills up, and then the guest's ring.
    site.near.settimeout(2)
    while sent < 100:
        try:
            site.send(frame(sent, length))
        except TimeoutError:
            break
        sent += 1
    assert bytes_in(peer.sock, termios.FIONREAD) % (4 + length), "no frame was cut, so nothing is tested"
    for _ in range(3):
        daemon = site.hand_over(daemon)
    for number in range(sent):
        assert peer.receive() == frame(number, length)
    site.near.settimeout(PATIENCE_S)
    check_both_ways(site, peer, sent)


def test_frames_that_a_guest_has_no_buffers_for_wait_through_handovers(site: Site) -> None:
    daemon = site.source(netdev=",mtu=9000")
    peer = site.peer()
    guest = site.guest(queue_size=16)
    check_both_ways(site, peer, 0)
    guest._drivers[0].stop()
    for number in range(1, 25):
        peer.send(frame(number, 5000 if number % 3 == 0 else 60))
    for _ in range(3):
        daemon = site.hand_over(daemon)
    guest._drivers[0].start()
    for number in range(1, 25):
        assert site.receive() == frame(number, 5000 if number % 3 == 0 else 60)
    assert counter(daemon, "rx-dropped-length") == 0


# -- deaths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        "after-send:SETUP=kill",
        "before:net0.freeze=kill",
        "after:net0.freeze=kill",
        "before:net0.save_switchover=kill",
        "after:net0.save_switchover=kill",
        "before-send:SWITCHOVER=kill",
        "before-send:COMMIT=kill",
    ],
)
def test_after_the_death_of_the_source_the_connection_is_made_again(site: Site, fault: str) -> None:
    source = site.source(fault=fault)
    peer = site.peer()
    site.guest()
    check_both_ways(site, peer, 1)
    peer.sock.sendall(on_the_wire(frame(2))[:20])
    peer.await_read()
    destination = site.destination()
    source.execute("migrate", uri=site.address)
    assert source.wait() == -signal.SIGKILL
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert peer.is_at_the_end()
    check_both_ways(site, site.peer(), 3)
    assert "the process died that had frames of it in hand" in site.log()


@pytest.mark.parametrize(
    "fault", ["before:net0.adopt_setup=kill", "after:net0.adopt_setup=kill", "after:net0.adopt_switchover=kill"]
)
def test_after_the_death_of_the_destination_before_commit_nothing_has_happened(site: Site, fault: str) -> None:
    source = site.source()
    peer = site.peer()
    site.guest()
    wire = on_the_wire(frame(2))
    peer.sock.sendall(wire[:20])
    peer.await_read()
    destination = site.destination(fault=fault)
    source.execute("migrate", uri=site.address)
    assert source.wait_migration()["status"] == "failed"
    assert destination.wait() == -signal.SIGKILL
    peer.sock.sendall(wire[20:])
    assert site.receive() == frame(2)
    check_both_ways(site, peer, 3)


@pytest.mark.parametrize("fault", ["after-receive:COMMIT=kill", "before:net0.thaw=kill", "after:net0.thaw=kill"])
def test_a_source_that_comes_back_makes_the_connection_again(site: Site, fault: str) -> None:
    source = site.source()
    peer = site.peer()
    site.guest()
    check_both_ways(site, peer, 1)
    destination = site.destination(fault=fault)
    source.execute("migrate", uri=site.address)
    assert source.wait_migration()["status"] == "failed"
    assert destination.wait() == -signal.SIGKILL
    assert peer.is_at_the_end()
    check_both_ways(site, site.peer(), 3)


# -- peers --------------------------------------------------------------------------------------------------------


def test_a_peer_that_leaves_and_comes_back_is_told(site: Site) -> None:
    daemon = site.source()
    peer = site.peer()
    site.guest()
    check_both_ways(site, peer, 1)
    assert netdev_of(daemon) == {
        "id": "net0",
        "type": "stream",
        "open": True,
        "path": site.path,
        "server": site.server,
        "connected": True,
        "mtu": 1500,
        "notes": [],
    }
    for number in range(2, 5):
        if not site.server:
            site.listener.close()
        peer.sock.close()
        daemon.wait_event("InterfaceChanged", link_is_up=False)
        await_connected(daemon, is_connected=False)
        (note,) = netdev_of(daemon)["notes"]
        assert "it left" in note
        # Nothing the guest sends meanwhile holds it up.
        for _ in range(100):
            site.send(frame(0))
        await_count(daemon, "tx-dropped-interface", 100)
        daemon = site.hand_over(daemon)
        if not site.server:
            Path(site.path).unlink()
            site.listener = site.ends.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            site.listener.settimeout(PATIENCE_S)
            site.listener.bind(site.path)
            site.listener.listen()
        peer = site.peer()
        await_connected(daemon)
        check_both_ways(site, peer, number)


def test_a_peer_leaves_while_the_guest_is_off(site: Site) -> None:
    daemon = site.source()
    peer = site.peer()
    await_connected(daemon)
    peer.sock.sendall(b"\0\0")  # nobody takes it out
    peer.sock.close()
    peer = site.peer()
    await_connected(daemon)
    site.guest()
    check_both_ways(site, peer, 1)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (struct.pack(">I", 0), "it announces a frame of 0 bytes, possible are 1 to 65553"),
        (struct.pack(">I", 65554), "it announces a frame of 65554 bytes"),
        (b"\xff" * 4, "it announces a frame of 4294967295 bytes"),
        (on_the_wire(frame(5))[:30], "it left in the middle of a frame, 30 bytes of it came"),
    ],
)
def test_a_peer_that_breaks_the_stream_loses_its_connection_and_the_guest_nothing_else(
    site: Site, said: bytes, reason: str
) -> None:
    daemon = site.source()
    site.guest()
    for number in range(3):
        peer = site.peer()
        check_both_ways(site, peer, number)
        peer.send(frame(100 + number))
        peer.sock.sendall(said)
        peer.sock.shutdown(socket.SHUT_WR)
        assert site.receive() == frame(100 + number)
        assert peer.is_at_the_end()
        await_that(lambda: reason in site.log())
    peer = site.peer()
    check_both_ways(site, peer, 9)
    assert site.log().count(reason) == 1
    assert [vring["failed"] for vring in daemon.execute("query-devices")[0]["vrings"]] == [False, False]


def test_runts_are_dropped_and_the_longest_frame_arrives(site: Site) -> None:
    daemon = site.source(netdev=",mtu=65520")
    peer = site.peer()
    site.guest()
    check_both_ways(site, peer, 1)
    peer.send(b"x" * 13)
    longest = frame(7, 65535 + 18)
    peer.send(longest)
    assert site.receive() == longest
    assert counter(daemon, "rx-dropped-length") == 1
    site.send(b"x" * 13)
    site.send(frame(8, 65520 + 18))
    assert peer.receive() == frame(8, 65520 + 18)
    assert counter(daemon, "tx-dropped-header") == 1


def test_others_wait_until_the_peer_leaves(tmp_path_factory: pytest.TempPathFactory) -> None:
    with ExitStack() as ends:
        site = Site(tmp_path_factory.mktemp("s"), ends, server=True)
        site.source()
        first = site.peer()
        site.guest()
        check_both_ways(site, first, 1)
        second = site.peer()
        second.send(frame(2))
        check_both_ways(site, first, 3)
        first.sock.close()
        assert site.receive() == frame(2)
        check_both_ways(site, second, 4)
