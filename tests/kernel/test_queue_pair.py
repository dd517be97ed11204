"""A queue pair between a real TAP and a driver: what only the kernel's TAP can show."""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.kernel.guest_side import PATIENCE_SECONDS, GuestSide

from localmig import dataplane
from localmig.dataplane import Counters, GuestMemory, QueuePair, Ring
from localmig.netdevs.tap import Tap
from localmig.testing.frontend import DRIVER_FEATURES
from localmig.testing.namespace import NetworkNamespace, configure, ip
from localmig.virtio import Feature
from localmig.virtio.net import header_length

ETHERTYPE = 0x88B5
"""Local experimental: nothing but these tests speaks it."""
MAC = b"\x02\x00\x00\x00\x00\x01"
BURST = 100
"""Frames in flight at most: a TAP keeps 1000 and a packet socket some 250 until they drop."""


def frame(number: int, *, length: int = 60) -> bytes:
    header = b"\xff" * 6 + MAC + ETHERTYPE.to_bytes(2, "big")
    return header + number.to_bytes(4, "big") + bytes(length - len(header) - 4)


def number_of(data: bytes) -> int:
    return int.from_bytes(data[14:18], "big")


class Nic(GuestSide):
    """A TAP with its network on one side; a queue pair, a driver and the guest's frames on the other."""

    def __init__(self, undo: ExitStack, features: int) -> None:
        super().__init__(undo, features=features)
        self.tap = Tap(id="net0", ifname="tap0")
        self.tap.open()
        undo.callback(self.tap.close)
        configure("tap0")
        self.tap.set_vnet_header_length(header_length(DRIVER_FEATURES))
        self.network = undo.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        self.network.bind(("tap0", ETHERTYPE))
        self.network.settimeout(PATIENCE_SECONDS)
        self.pair = self.new_pair()
        undo.callback(self.close_pair)
        self.driver.start()

    def new_pair(self) -> QueuePair:
        pair = QueuePair("nic0", self.event_fd)
        self.configure(pair)
        return pair

    def close_pair(self) -> None:
        self.pair.close()  # whichever it is by then

    def configure(self, pair: QueuePair, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "memory": self.memory.mapping,
            "host": self.tap.fileno(),
            "header_length": header_length(DRIVER_FEATURES),
            "frame_length_max": self.tap.frame_length_max,
            "offloads": 0,
            "event_index": True,
            "indirect": True,
            "mergeable": True,
            "rx": self.rx,
            "tx": self.tx,
            "packed": self.is_packed,
        }
        pair.configure(**settings | changes)

    def send_from_guest(self, data: bytes, *, header: bytes = bytes(12)) -> None:
        self.guest.send(header + data)

    def receive_in_guest(self) -> bytes:
        return self.guest.recv(4096)[12:]

    def await_ring_errors(self) -> list[tuple[str, str]]:
        readable, _, _ = select.select([self.event_fd], [], [], PATIENCE_SECONDS)
        assert readable, "no ring error came"
        os.eventfd_read(self.event_fd)
        return self.pair.take_ring_errors()

    def counters(self) -> Counters:
        return Counters(*self.pair.counters())

    def await_counters(self, reached: Callable[[Counters], bool]) -> Counters:
        """Counters tell nobody when they change: this is a poll with an end."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not reached(counters := self.counters()):
            assert time.monotonic() < end, counters
            os.sched_yield()
        return counters


def dropped(counters: Counters) -> dict[str, int]:
    """Every drop, by its reason."""
    return {name: count for name, count in counters._asdict().items() if "dropped" in name}


@pytest.fixture(params=[DRIVER_FEATURES, DRIVER_FEATURES | Feature.RING_PACKED], ids=["split", "packed"])
def nic(request: pytest.FixtureRequest, namespace: NetworkNamespace) -> Iterator[Nic]:
    with ExitStack() as undo:
        yield Nic(undo, request.param)


def test_frames_pass_the_tap_both_ways_unchanged(nic: Nic) -> None:
    nic.pair.start()
    for number in range(200):
        data = frame(number, length=60 + number * 7)
        nic.send_from_guest(data)
        assert nic.network.recv(4096) == data
        nic.network.send(data)
        assert nic.receive_in_guest() == data
    counters = nic.counters()
    assert (counters.rx_packets, counters.tx_packets) == (200, 200)
    assert counters.rx_bytes == counters.tx_bytes == sum(60 + number * 7 for number in range(200))
    assert not any(dropped(counters).values())


def test_the_longest_frame_with_a_vlan_tag_fits(nic: Nic) -> None:
    nic.pair.start()
    data = frame(1, length=nic.tap.frame_length_max)
    data = data[:12] + b"\x81\x00\x00\x05" + data[12:-4]
    nic.network.send(data)
    received = nic.receive_in_guest()
    assert received == data
    assert not any(dropped(nic.counters()).values())


def exchange(nic: Nic, *, count: int, every_turn: Callable[[], None]) -> None:
    """Sends `count` frames each way in bursts and checks that each arrives, once and in order."""
    sent, in_guest, in_network = 0, 0, 0
    while in_guest < count or in_network < count:
        while sent < count and sent - min(in_guest, in_network) < BURST:
            nic.network.send(frame(sent))
            nic.send_from_guest(frame(sent))
            sent += 1
        every_turn()
        for _ in range(min(BURST // 8, sent - in_guest)):
            assert number_of(nic.receive_in_guest()) == in_guest
            in_guest += 1
        for _ in range(min(BURST // 8, sent - in_network)):
            assert number_of(nic.network.recv(4096)) == in_network
            in_network += 1


def test_stopping_and_starting_loses_repeats_and_reorders_nothing(nic: Nic) -> None:
    def stop_and_start() -> None:
        positions = nic.pair.stop()
        assert nic.pair.stop() == nic.pair.positions() == positions
        nic.pair.start()

    nic.pair.start()
    exchange(nic, count=10_000, every_turn=stop_and_start)
    counters = nic.counters()
    assert (counters.rx_packets, counters.tx_packets) == (10_000, 10_000)


def test_another_pair_goes_on_where_the_first_stopped(nic: Nic) -> None:
    def hand_over() -> None:
        successor = nic.new_pair()
        successor.set_counters(nic.pair.counters())
        successor.set_positions(*nic.pair.stop())
        successor.start()
        nic.pair.close()
        nic.pair = successor

    nic.pair.start()
    exchange(nic, count=10_000, every_turn=hand_over)
    nic.pair.stop()


def test_a_pair_that_was_never_told_positions_finds_them(nic: Nic) -> None:
    nic.pair.start()
    for number in range(10):
        nic.network.send(frame(number))
        assert number_of(nic.receive_in_guest()) == number
    nic.pair.stop()
    successor = nic.new_pair()
    try:
        assert successor.positions() == nic.pair.positions() == ((0x800A, 0x8000) if nic.is_packed else (10, 0))
    finally:
        successor.close()


def test_an_interface_that_is_down_drops_packets_and_works_again_when_up(nic: Nic) -> None:
    nic.pair.start()
    ip("link", "set", "tap0", "down")
    for number in range(5):
        nic.send_from_guest(frame(number))
    nic.await_counters(lambda counters: counters.tx_dropped_interface == 5)
    ip("link", "set", "tap0", "up")
    nic.network.close()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as network:
        network.bind(("tap0", ETHERTYPE))
        network.settimeout(PATIENCE_SECONDS)
        nic.send_from_guest(frame(5))
        assert number_of(network.recv(4096)) == 5
        network.send(frame(6))
        assert number_of(nic.receive_in_guest()) == 6
    assert nic.pair.take_ring_errors() == []


def test_a_header_the_kernel_refuses_costs_that_packet_only(nic: Nic) -> None:
    nic.pair.start()
    gso_type_unknown = b"\x00\x7f" + bytes(10)
    nic.send_from_guest(frame(0), header=gso_type_unknown)
    nic.send_from_guest(frame(1))
    assert number_of(nic.network.recv(4096)) == 1
    # A frame is counted once it is through, which may be a moment later.
    counters = nic.await_counters(lambda counters: counters.tx_packets == 1)
    assert counters.tx_dropped_header == 1
    assert sum(dropped(counters).values()) == 1
    assert nic.pair.take_ring_errors() == []


def test_a_frame_longer_than_was_agreed_is_dropped(nic: Nic) -> None:
    nic.configure(nic.pair, frame_length_max=1000, mergeable=False)
    nic.pair.start()
    ip("link", "set", "tap0", "mtu", "9000")
    nic.network.send(frame(0, length=5000))
    nic.network.send(frame(1))
    assert number_of(nic.receive_in_guest()) == 1
    counters = nic.await_counters(lambda counters: counters.rx_packets == 1)
    assert counters.rx_dropped_length == 1
    assert sum(dropped(counters).values()) == 1


def test_a_tap_that_is_deleted_is_told_once_without_spinning_and_fails_no_ring(nic: Nic) -> None:
    nic.pair.start()
    ip("link", "delete", "tap0")
    assert nic.await_ring_errors() == []
    assert nic.pair.interface_gone()
    for number in range(3):
        nic.send_from_guest(frame(number))
    nic.await_counters(lambda counters: counters.tx_dropped_interface == 3)
    before = time.process_time()
    told_again, _, _ = select.select([nic.event_fd], [], [], 0.2)
    assert not told_again
    assert time.process_time() - before < 0.1
    assert (nic.pair.take_ring_errors(), nic.pair.failed()) == ([], (False, False))
    nic.pair.stop()
    nic.pair.start()
    assert nic.pair.interface_gone()


def test_an_interface_that_goes_down_renamed_and_up_is_not_gone(nic: Nic) -> None:
    nic.pair.start()
    ip("link", "set", "tap0", "down")
    nic.send_from_guest(frame(0))
    nic.await_counters(lambda counters: counters.tx_dropped_interface == 1)
    ip("link", "set", "tap0", "name", "tap1")
    ip("link", "set", "tap1", "up")
    nic.send_from_guest(frame(1))
    nic.await_counters(lambda counters: counters.tx_packets == 1)
    # It was told that its interface went down.
    assert nic.network.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ENETDOWN
    nic.network.send(frame(2))
    assert number_of(nic.receive_in_guest()) == 2
    assert not nic.pair.interface_gone()


def test_a_released_pair_lets_the_tap_go(nic: Nic) -> None:
    nic.pair.start()
    nic.network.send(frame(0))
    assert number_of(nic.receive_in_guest()) == 0
    nic.pair.release()
    nic.tap.close()
    # It was not persistent: the last descriptor, and the last sleeper on it, took the interface with them.
    assert "tap0" not in [name for _, name in socket.if_nameindex()]


def test_what_is_refused_changes_nothing(nic: Nic) -> None:
    bare = QueuePair("bare", nic.event_fd)
    with pytest.raises(RuntimeError, match="not configured"):
        bare.start()
    with pytest.raises(RuntimeError, match="not configured"):
        bare.set_positions(None, None)
    assert bare.stop() == bare.positions() == (None, None)
    bare.close()
    with pytest.raises(RuntimeError, match="closed"):
        bare.start()

    with pytest.raises(ValueError, match="10 or 12 bytes, not 11"):
        nic.configure(nic.pair, header_length=11)
    with pytest.raises(ValueError, match=r"rx ring: descriptor (table|ring) at 0x1000, 0x1000 bytes, is not inside"):
        nic.configure(nic.pair, rx=ring_at(0x1000))
    before = time.monotonic_ns()
    assert before <= nic.pair.start() <= time.monotonic_ns()
    assert nic.pair.is_running()
    for call in (nic.pair.start, lambda: nic.configure(nic.pair), lambda: nic.pair.set_counters(Counters())):
        with pytest.raises(RuntimeError, match="runs"):
            call()
    nic.network.send(frame(0))
    assert number_of(nic.receive_in_guest()) == 0


def test_a_position_outside_a_packed_ring_is_found_before_it_is_set(nic: Nic) -> None:
    bare = QueuePair("bare", nic.event_fd)
    pairs = [bare, nic.pair]

    def check(rx: int, tx: int) -> tuple[int, str] | None:
        return dataplane.check_positions(pairs, struct.pack(">4H", 0xFFFF, 0xFFFF, rx, tx))

    assert check(0x80FF, 0x00FF) is None
    if nic.is_packed:
        for rx, tx, side in ((0x8100, 0x8000, "rx"), (0x8000, 0x7FFF, "tx")):
            place, reason = check(rx, tx) or (None, "")
            assert place == 1
            assert re.search(f"{side} ring: position .* is outside the ring's 256", reason), reason
    else:
        assert check(0xFFFF, 0x1234) is None
    with pytest.raises(ValueError, match="positions have 6 bytes, expected 8"):
        dataplane.check_positions(pairs, bytes(6))
    nic.pair.start()
    with pytest.raises(RuntimeError, match="runs"):
        check(0x8000, 0x8000)
    bare.close()


def ring_at(address: int) -> Ring:
    return Ring(
        size=256,
        descriptor_area=address,
        driver_area=address,
        device_area=address,
        kick_fd=0,
        call_fd=None,
        error_fd=None,
        next_avail=None,
    )


def test_guest_memory_refuses_what_is_outside(nic: Nic) -> None:
    memory, region = nic.memory.mapping, nic.memory.region
    end = region.guest_address + region.size
    memory.write(end - 4, b"last")
    assert memory.read(end - 4, 4) == b"last"
    assert 0 < memory.populate(10.0) <= region.size
    with pytest.raises(ValueError, match=r"0x5 bytes at 0x[0-9a-f]+ are not inside guest memory"):
        memory.write(end - 4, b"wrong")
    with pytest.raises(ValueError, match="not inside guest memory"):
        memory.read(end, 1)
    with pytest.raises(ValueError, match="is empty"):
        GuestMemory([(0, 0, 0, 0, nic.memory.fd.fileno())])
    with pytest.raises(OSError, match="Bad file descriptor"):
        GuestMemory([(0, 4096, 0, 0, -1)])


def test_a_thread_carries_the_pairs_name_and_ends_with_it(nic: Nic) -> None:
    def is_there() -> bool:
        for task in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it may end meanwhile
                if task.joinpath("comm").read_text() == "a-name-of-more-\n":
                    return True
        return False

    def await_thread(*, there: bool) -> None:
        """A thread takes its name a moment after it began, and is gone from /proc a moment after it was joined."""
        end = time.monotonic() + PATIENCE_SECONDS
        while is_there() is not there:
            assert time.monotonic() < end
            os.sched_yield()

    pair = QueuePair("a-name-of-more-than-15", nic.event_fd)
    await_thread(there=True)
    pair.close()
    await_thread(there=False)
