"""What a guest that writes nonsense costs: its own ring, and nobody else anything.

A daemon in a process of its own serves two NICs on real TAPs. The first one's guest writes into its rings through its
own mapping what no driver would; the second one's guest is well-behaved all the time.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.kit.processes import DaemonProcess

from localmig.testing.daemon import Fact
from localmig.testing.frontend import DRIVER_FEATURES, RX, TX, NetGuest
from localmig.testing.namespace import NetworkNamespace, ip, unavailable_reason
from localmig.virtio import Feature

pytestmark = pytest.mark.xdist_group("hostile-guest")  # they share a house

PATIENCE_S: Final = 10.0
ETH_P_ALL: Final = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
QUEUE_SIZE: Final = 16
HEADER: Final = bytes(12)
NEXT, WRITE, INDIRECT = 1, 2, 4
START: Final = 0x4000_0000
"""Where the kit's guest memory begins."""

F_SEAL_FUTURE_WRITE: Final = 0x10
"""Linux: nobody may map the file writable from now on; who has goes on. Python does not name it."""

SIDES: Final = {RX: "rx", TX: "tx"}


def frame(number: int) -> bytes:
    """An Ethernet frame to everybody, of a type nobody knows."""
    return b"\xff" * 6 + bytes.fromhex("525400123456") + b"\x88\xb5" + number.to_bytes(4, "big") + bytes(42)


class Nic:
    """One TAP, its device's socket, the guest behind it."""

    def __init__(self, folder: Path, number: int, ends: ExitStack) -> None:
        self.id = f"nic{number}"
        self.machine = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        self.machine.bind((f"tap{number}", ETH_P_ALL))
        self.machine.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.machine.settimeout(PATIENCE_S)
        self.near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.enter_context(self.near)
        ends.enter_context(tap)
        self.near.settimeout(PATIENCE_S)
        tap.setblocking(False)
        self.guest = ends.enter_context(
            NetGuest(
                f"{folder}/nic{number}.sock",
                tap_fds=[tap.fileno()],
                queue_size=QUEUE_SIZE,
                features=DRIVER_FEATURES | Feature.RING_INDIRECT_DESC,
                answer_seconds_max=PATIENCE_S,
            )
        )
        self.guest.attach()
        self._number = 0

    def next_frame(self) -> bytes:
        """One that was not there before."""
        self._number += 1
        return frame(self._number)

    def fill(self) -> None:
        """Frames for every receive buffer there is, and one more."""
        for _ in range(QUEUE_SIZE + 1):
            self.machine.send(self.next_frame())

    def stop_driver(self) -> None:
        """Leaves the rings alone, which are to be written by hand."""
        self.guest._drivers[0].stop()

    def sends_by_hand(self) -> None:
        """A frame leaves the guest, whose driver stands still."""
        it, data = Nonsense(self.guest, TX), self.next_frame()
        it.write(it.spare, HEADER + data)
        it.descriptor(0, it.spare, len(HEADER + data), 0)
        it.offer(0)
        assert self.machine.recv(4096) == data

    def carries(self, *rings: int) -> None:
        """More frames pass than a ring has entries, behind those that waited in the TAP."""
        for _ in range(QUEUE_SIZE + 1):
            data = self.next_frame()
            if RX in rings:
                self.machine.send(data)
                while self.near.recv(4096)[len(HEADER) :] != data:
                    pass
            if TX in rings:
                self.near.send(HEADER + data)
                assert self.machine.recv(4096) == data


class Nonsense:
    """A ring as who writes it by hand sees it."""

    def __init__(self, guest: NetGuest, ring: int) -> None:
        self._kick = guest._vrings[ring].kick
        self._memory = guest.memory.mapping
        self.table, self.avail, self.used = guest._drivers[0].ring_addresses()[ring]
        self.flags = WRITE if ring == RX else 0
        # A page of the buffers, which lie behind the rings.
        self.spare = START + guest.memory.region.size - 0x8000

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.descriptor_at(self.table + 16 * index, address, length, flags, following)

    def descriptor_at(self, place: int, address: int, length: int, flags: int, following: int = 0) -> None:
        values = ((address, 8), (length, 4), (flags, 2), (following, 2))
        self.write(place, b"".join(value.to_bytes(size, "little") for value, size in values))

    def write(self, place: int, data: bytes) -> None:
        self._memory.write(place, data)

    def offer(self, head: int, *, ahead: int = 1) -> None:
        """Makes a chain available, or says that there are more than there can be."""
        index = int.from_bytes(self._memory.read(self.avail + 2, 2), "little")
        self._memory.write(self.avail + 4 + 2 * (index % QUEUE_SIZE), head.to_bytes(2, "little"))
        self._memory.write(self.avail + 2, ((index + ahead) % (1 << 16)).to_bytes(2, "little"))
        os.eventfd_write(self._kick.fileno(), 1)


def an_index_jumps(it: Nonsense) -> None:
    it.offer(0, ahead=1000)


def a_head_is_outside_the_table(it: Nonsense) -> None:
    it.offer(QUEUE_SIZE)


def a_chain_goes_on_outside_the_table(it: Nonsense) -> None:
    it.descriptor(0, it.spare, 64, it.flags | NEXT, QUEUE_SIZE)
    it.offer(0)


def a_chain_loops(it: Nonsense) -> None:
    it.descriptor(0, it.spare, 64, it.flags | NEXT, 1)
    it.descriptor(1, it.spare, 64, it.flags | NEXT, 0)
    it.offer(0)


def a_chain_is_too_long(it: Nonsense) -> None:
    for index in range(1100):
        it.descriptor_at(it.spare + 16 * index, it.spare, 1, it.flags | NEXT, index + 1)
    it.descriptor(0, it.spare, 1100 * 16, INDIRECT)
    it.offer(0)


def an_indirect_table_has_an_indirect_table(it: Nonsense) -> None:
    it.descriptor_at(it.spare, it.spare, 16, INDIRECT)
    it.descriptor(0, it.spare, 16, INDIRECT)
    it.offer(0)


def an_indirect_table_has_a_next_one(it: Nonsense) -> None:
    it.descriptor(0, it.spare, 16, INDIRECT | NEXT, 1)
    it.offer(0)


def an_indirect_table_ends_inside_a_descriptor(it: Nonsense) -> None:
    it.descriptor(0, it.spare, 17, INDIRECT)
    it.offer(0)


def an_indirect_table_is_outside_memory(it: Nonsense) -> None:
    it.descriptor(0, 0x10, 16, INDIRECT)
    it.offer(0)


def a_buffer_is_outside_memory(it: Nonsense) -> None:
    it.descriptor(0, 0x10, 64, it.flags)
    it.offer(0)


def a_buffer_ends_outside_memory(it: Nonsense) -> None:
    it.descriptor(0, START, 0x7FFF_FFFF, it.flags)
    it.offer(0)


def a_buffer_wraps_around(it: Nonsense) -> None:
    it.descriptor(0, (1 << 64) - 16, 64, it.flags)
    it.offer(0)


def a_buffer_goes_the_wrong_way(it: Nonsense) -> None:
    it.descriptor(0, it.spare, 64, it.flags ^ WRITE)
    it.offer(0)


def a_buffer_is_empty(it: Nonsense) -> None:
    it.descriptor(0, it.spare, 0, it.flags)
    it.offer(0)


def a_chain_has_no_room_for_a_header(it: Nonsense) -> None:
    it.descriptor(0, it.spare, 11, it.flags)
    it.offer(0)


def an_index_jumps_back(it: Nonsense) -> None:
    it.offer(0, ahead=-1000)


REASONS: Final[dict[Callable[[Nonsense], None], str]] = {
    an_index_jumps: r"available index \d+ is more than the ring's 16 entries ahead",
    a_head_is_outside_the_table: "descriptor index 16 is outside its table of 16",
    a_chain_goes_on_outside_the_table: "descriptor index 16 is outside its table of 16",
    a_chain_loops: "loops or is longer than 16 descriptors",
    a_chain_is_too_long: "loops or is longer than 1023 descriptors",
    an_indirect_table_has_an_indirect_table: "descriptor 0 of an indirect table is indirect itself",
    an_indirect_table_has_a_next_one: "indirect descriptor 0 has a next one",
    an_indirect_table_ends_inside_a_descriptor: "an indirect table of 17 bytes is not a whole number of descriptors",
    an_indirect_table_is_outside_memory: "0x10 bytes at 0x10 are not inside guest memory",
    a_buffer_is_outside_memory: "0x40 bytes at 0x10 are not inside guest memory",
    a_buffer_ends_outside_memory: "0x7fffffff bytes at 0x40000000 are not inside guest memory",
    a_buffer_wraps_around: "0x40 bytes at 0xfffffffffffffff0 are not inside guest memory",
    a_buffer_goes_the_wrong_way: "descriptor 0 is (read|write)-only in a (receive|transmit) queue",
    a_buffer_is_empty: "descriptor 0 has length 0",
    a_chain_has_no_room_for_a_header: "a descriptor chain of 11 bytes has no room for the 12 byte header",
}


@dataclass(kw_only=True)
class House:
    """A daemon with two NICs. It may be succeeded."""

    folder: Path
    namespace: NetworkNamespace
    ends: ExitStack
    daemon: DaemonProcess
    hostile: Nic
    good: Nic
    seen: int = 0
    upgrades: int = 0

    def await_failures(self, *rings: int, reason: str, told: bool = True) -> None:
        """The rings stop, once each, and all who are to know are told why."""
        for ring in rings:
            fact = self.daemon.wait_fact(
                lambda fact, ring=ring: fact["event"] == "RingFailed" and fact["vring"] == ring,  # type: ignore[misc]
                after=self.seen,
            )
            assert fact["device"] == self.hostile.id
            assert re.search(reason, fact["reason"]), fact["reason"]
            assert not told or self.hostile.guest.ring_error(ring, PATIENCE_S)
        self.seen = len(self.daemon.facts)

    def failures(self) -> list[Fact]:
        """Rings that failed since `await_failures`."""
        return [fact for fact in self.daemon.facts[self.seen :] if fact["event"] == "RingFailed"]

    def reset(self) -> None:
        """The hostile guest's driver begins anew, and behaves."""
        self.hostile.guest._drivers = []  # it need not bear what its rings were made
        self.hostile.guest.reset_driver()

    def upgrade(self) -> None:
        """Another daemon takes over."""
        self.upgrades += 1
        address = f"unix:{self.folder}/m{self.upgrades}"
        with self.namespace.entered():
            new = DaemonProcess(
                ["--incoming", address, "--migration-parameter", "local=on"],
                qmp=self.folder / f"q{self.upgrades}",
                log=self.folder / f"log{self.upgrades}",
            )
        self.ends.enter_context(new)
        self.daemon.execute("migrate-set-parameters", local=True)
        self.daemon.execute("migrate", uri=address)
        assert self.daemon.wait_migration()["status"] == "completed", (self.folder / "log0").read_text()
        self.daemon.quit()
        self.daemon, self.seen = new, 0
        new.wait_event("MigrationStatusChanged", status="completed")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One for all cases: after each of them it must be as good as new."""
    yield from make_house(tmp_path_factory)


@pytest.fixture
def new_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One of the test's own."""
    yield from make_house(tmp_path_factory)


def make_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    if reason := unavailable_reason():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("h")  # a short path: a UNIX socket's has 107 bytes
    with ExitStack() as ends:
        namespace = ends.enter_context(NetworkNamespace.create())
        options: list[str] = []
        for number in range(2):
            options += ["--netdev", f"tap,id=net{number},ifname=tap{number}"]
            options += ["--device", f"virtio-net,id=nic{number},netdev=net{number},socket={folder}/nic{number}.sock"]
        with namespace.entered():
            ipv6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
            if ipv6.exists():
                ipv6.write_text("1")
            daemon = ends.enter_context(DaemonProcess(options, qmp=folder / "q0", log=folder / "log0"))
            for number in range(2):
                ip("link", "set", f"tap{number}", "up")
            hostile, good = (Nic(folder, number, ends) for number in range(2))
        house = House(folder=folder, namespace=namespace, ends=ends, daemon=daemon, hostile=hostile, good=good)
        house.hostile.carries(RX, TX)
        house.good.carries(RX, TX)
        yield house
        assert house.daemon.is_alive


@pytest.mark.parametrize("ring", SIDES, ids=SIDES.values())
@pytest.mark.parametrize("nonsense", REASONS, ids=lambda it: it.__name__)
def test_nonsense_costs_its_ring_until_the_driver_resets(
    house: House, nonsense: Callable[[Nonsense], None], ring: int
) -> None:
    hostile = house.hostile
    if ring == RX:
        hostile.stop_driver()
    nonsense(Nonsense(hostile.guest, ring))
    if ring == RX:
        hostile.fill()  # what the driver offered before comes first
    house.await_failures(ring, reason=REASONS[nonsense])
    if ring == RX:
        hostile.sends_by_hand()
    else:
        hostile.carries(RX)
    assert not hostile.guest.ring_error(TX if ring == RX else RX)
    house.good.carries(RX, TX)
    assert hostile.guest.frontend.get_features()
    house.reset()
    hostile.carries(RX, TX)
    assert not house.failures()


# -- buffers that overlap ---------------------------------------------------------------------------------------


def test_a_receive_buffer_over_the_ring_itself_breaks_that_ring_alone(house: House) -> None:
    hostile = house.hostile
    hostile.stop_driver()
    it = Nonsense(hostile.guest, RX)
    for index in range(QUEUE_SIZE):
        it.descriptor(index, it.avail, 2048, WRITE)
    hostile.fill()  # addresses of all ones land on the available entries
    house.await_failures(RX, reason="descriptor index 65535 is outside its table of 16")
    hostile.sends_by_hand()
    house.good.carries(RX, TX)
    house.reset()
    hostile.carries(RX, TX)


def test_buffers_over_each_other_harm_nobody(house: House) -> None:
    hostile, data = house.hostile, frame(0)
    it = Nonsense(hostile.guest, TX)
    it.write(it.spare, HEADER + data)
    it.descriptor(0, it.spare, len(HEADER + data), NEXT, 1)
    it.descriptor(1, it.spare, len(HEADER + data), 0)
    for _ in range(3):
        it.offer(0)
        assert hostile.machine.recv(4096) == data + HEADER + data
    assert not house.failures()
    house.reset()
    hostile.carries(RX, TX)


# -- memory that goes away --------------------------------------------------------------------------------------

LOST: Final = "guest memory at 0x40000000, 0x[0-9a-f]+ bytes, is lost: its file became smaller than announced"


@pytest.mark.parametrize("kept", [0, 0x4000], ids=["all", "buffers"])
def test_memory_that_is_taken_away_costs_its_own_rings(new_house: House, kept: int) -> None:
    house, hostile = new_house, new_house.hostile
    os.ftruncate(hostile.guest.memory.fd.fileno(), kept)
    hostile.fill()
    os.eventfd_write(hostile.guest._vrings[TX].kick.fileno(), 1)
    house.await_failures(RX, TX, reason=LOST)
    house.good.carries(RX, TX)
    # The session goes on, and with it what a VMM asks before it resets the device.
    assert hostile.guest.frontend.get_features()
    house.upgrade()
    house.good.carries(RX, TX)
    assert hostile.guest.frontend.get_features()
    assert not house.failures()


def test_lost_memory_that_nobody_met_is_met_by_the_successor(new_house: House) -> None:
    house, hostile = new_house, new_house.hostile
    os.ftruncate(hostile.guest.memory.fd.fileno(), 0)
    house.upgrade()
    house.await_failures(RX, TX, reason=LOST)
    house.good.carries(RX, TX)
    house.upgrade()
    house.good.carries(RX, TX)
    assert not house.failures()


def test_memory_that_cannot_be_mapped_any_more_stops_no_handover(new_house: House) -> None:
    house, hostile = new_house, new_house.hostile
    fcntl.fcntl(hostile.guest.memory.fd.fileno(), fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    hostile.carries(RX, TX)
    house.upgrade()
    house.await_failures(RX, TX, reason=LOST)
    house.good.carries(RX, TX)


# -- handovers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", SIDES, ids=SIDES.values())
def test_a_failed_ring_is_a_failed_ring_in_the_successor(new_house: House, ring: int) -> None:
    house, hostile = new_house, new_house.hostile
    it = Nonsense(hostile.guest, ring)
    if ring == RX:
        hostile.stop_driver()
    an_index_jumps(it)
    if ring == RX:
        hostile.fill()
    house.await_failures(ring, reason=REASONS[an_index_jumps])
    for _ in range(2):
        house.upgrade()
        # What it stumbled over is gone, so a ring that was tried again would go on.
        an_index_jumps_back(it)
        if ring == RX:
            hostile.sends_by_hand()
        else:
            hostile.carries(RX)
        house.good.carries(RX, TX)
        assert not house.failures()
        assert not hostile.guest.ring_error(ring)
    house.reset()
    hostile.carries(RX, TX)
