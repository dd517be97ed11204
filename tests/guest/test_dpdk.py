"""DPDK's driver with few receive buffers: every frame that fits into them arrives, and no frame blocks its ring."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

import pytest
from tests.guest.lab import Lab, LabError
from tests.guest.service import Service

from benchmarks import testpmd
from localmig.errors import ConfigError, LocalmigError

PATIENCE_S: Final = 60.0
"""For a few hundred frames, on a machine with more to do."""

BATCH: Final = 128
"""Frames sent at once. Two batches may be under way: a TAP keeps 1000 frames, and none may be dropped here."""

OVERSIZED_EVERY: Final = 16
"""One frame in so many does not fit, where such frames are sent; a batch never ends with one."""

FRAMES: Final = 2000
"""Before a handover and after it: each ring goes round a hundred times."""

RX_OFFLOADS: Final = {"checksums": 0x0C, "lro": 0x10, "scatter": 0x2000}
"""DPDK's RTE_ETH_RX_OFFLOAD_… of UDP and TCP checksums, large receive, frames in several buffers (rte_ethdev.h)."""

LRO: Final = RX_OFFLOADS["checksums"] | RX_OFFLOADS["lro"]
"""Its driver then takes GUEST_CSUM, GUEST_TSO4 and GUEST_TSO6."""

RXD_MIN: Final = 32
"""Its API takes no smaller number; a ring of fewer entries has as many buffers as entries all the same."""

BUFFER_LENGTH: Final = 2048 + 12
"""Of testpmd's buffers, with a packet's header."""

SOL_PACKET: Final = 263
PACKET_VNET_HDR: Final = 15
NEEDS_CSUM: Final = 1
GSO_TCPV4: Final = 1
SEGMENT: Final = 1448
"""Bytes of TCP payload that go into a packet of Ethernet's MTU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """How the driver is set up, and what goes into its ring.

    Attributes:
        entries: of each ring.
        vdev: options of its virtual device.
        options: testpmd's own.
        device: options of our device.
        mtu: of the TAP.
        features: some that the driver acknowledges.
        fitting: the longest frame to be sent that the ring can take.
        oversized: the shortest to be sent that it cannot, and the longest; None for none.
    """

    entries: int
    vdev: str = ""
    options: tuple[str, ...] = ()
    device: str = ""
    mtu: int = 1500
    features: frozenset[str] = frozenset()
    fitting: int
    oversized: tuple[int, int] | None = None


TSO: Final = frozenset({"VIRTIO_NET_F_GUEST_CSUM", "VIRTIO_NET_F_GUEST_TSO4", "VIRTIO_NET_F_GUEST_TSO6"})
MERGED: Final = frozenset({"VIRTIO_NET_F_MRG_RXBUF"})
TSO_MAX: Final = 65_000
"""Of a frame that the kernel leaves to others to segment: a little less than it would."""

CASES: Final = {
    "16 merged buffers": Case(
        entries=16,
        options=(f"--rx-offloads={LRO | RX_OFFLOADS['scatter']:#x}",),
        features=TSO | MERGED | {"VIRTIO_F_IN_ORDER"},
        fitting=16 * BUFFER_LENGTH - 12,
        oversized=(16 * BUFFER_LENGTH - 11, TSO_MAX),
    ),
    "16 merged buffers, packed, in any order": Case(
        entries=16,
        vdev=",packed_vq=1,in_order=0",
        options=(f"--rx-offloads={LRO | RX_OFFLOADS['scatter']:#x}",),
        device=",packed=on",
        features=TSO | MERGED | {"VIRTIO_F_RING_PACKED"},
        fitting=16 * BUFFER_LENGTH - 12,
        oversized=(16 * BUFFER_LENGTH - 11, TSO_MAX),
    ),
    "16 large buffers": Case(
        entries=16,
        vdev=",mrg_rxbuf=0",
        # The last one wins: 16384 of them would be a gigabyte, and no fewer are taken.
        options=(f"--rx-offloads={LRO:#x}", "--mbuf-size=65535", "--total-num-mbufs=1025"),
        features=TSO,
        fitting=TSO_MAX,
    ),
    "64 merged buffers": Case(
        entries=64,
        options=(f"--rx-offloads={LRO | RX_OFFLOADS['scatter']:#x}",),
        features=TSO | MERGED,
        fitting=TSO_MAX,
    ),
    "64 merged buffers, jumbo frames": Case(
        entries=64,
        options=(f"--rx-offloads={RX_OFFLOADS['scatter']:#x}", "--max-pkt-len=9018"),
        mtu=9000,
        features=MERGED,
        fitting=9014,
    ),
}


class Sender:
    """Sends TCP packets of all lengths into the TAP, as many as get through, from a thread of its own.

    Attributes:
        packets: sent so far that the ring can take.
        octets: their length together.
        oversized: sent so far that it cannot.
    """

    def __init__(self, lab: Lab, driver: testpmd.Testpmd, case: Case) -> None:
        self.packets = self.octets = self.oversized = 0
        self._case = case
        self._driver = driver
        self._random = random.Random(0)
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        with lab.namespace.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            self._socket.bind(("tap0", 0))
        self._before = driver.counters()
        self._came = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sender")
        self._thread.start()

    def wait_progress(self, packets: int) -> None:
        """Waits until so many more have come out at the driver."""
        with self._changed:
            goal = self._came + packets
            self._changed.wait_for(lambda: self._came >= goal or self._failure is not None, timeout=PATIENCE_S)
            assert self._came >= goal, f"{goal - self._came} packets did not come: {self._failure}"

    def finish(self) -> tuple[int, int]:
        """Sends no more and waits for what is under way; how many packets came out, and their length together."""
        self._stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        counters = self._driver.counters()
        assert (counters["RX-errors"], counters["RX-nombuf"]) == (0, 0)
        came = {name: counters[name] - self._before[name] for name in ("RX-packets", "RX-bytes")}
        return came["RX-packets"], came["RX-bytes"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._send_some()
                self._wait_until_under_way(BATCH)
            self._wait_until_under_way(0)
        except (AssertionError, LocalmigError, OSError) as error:
            self._failure = error
        with self._changed:
            self._changed.notify_all()

    def _wait_until_under_way(self, packets: int) -> None:
        """Waits until no more than so many have yet to come."""
        end = time.monotonic() + PATIENCE_S
        while True:
            came = self._driver.received() - self._before["RX-packets"]
            with self._changed:
                self._came = came
                self._changed.notify_all()
            if self.packets - came <= packets:
                return
            assert time.monotonic() < end, f"{self.packets - came} of {self.packets} packets do not come"

    def _send_some(self) -> None:
        case = self._case
        for _ in range(BATCH):
            number = self.packets + self.oversized
            if case.oversized is not None and number % OVERSIZED_EVERY == 0:
                self._socket.send(packet(number, self._random.randint(*case.oversized)))
                self.oversized += 1
                continue
            # The longest among them, and as many short ones as long ones.
            length = self._random.choice((case.fitting, self._random.randint(60, case.fitting), 60, 1514))
            self._socket.send(packet(number, length, tso=case.mtu == 1500))
            self.packets += 1
            self.octets += length


def packet(number: int, length: int, *, tso: bool = True) -> bytes:
    """A TCP packet in a frame of that length, after the header by which a packet socket learns how to segment it."""
    ethernet = bytes.fromhex("525400123456") + b"\x02host!" + b"\x08\x00"
    address = struct.pack(
        "!HHBBH4s4s", number & 0xFFFF, 0, 64, socket.IPPROTO_TCP, 0, b"\x0a\x09\0\x01", b"\x0a\x09\0\x02"
    )
    ip = struct.pack("!BBH", 0x45, 0, length - 14) + address
    tcp = struct.pack("!HHIIBBHHH", 1, 2, number, 0, 0x50, 0x10, 1000, 0, 0)
    to_segment = tso and length > 1514
    header = struct.pack("<BBHHHH", NEEDS_CSUM, GSO_TCPV4, 54, SEGMENT, 34, 16) if to_segment else bytes(10)
    return header + (ethernet + ip + tcp).ljust(length, bytes([number & 0xFF]))


@contextmanager
def driver_of(lab: Lab, service: Service, case: Case) -> Iterator[testpmd.Testpmd]:
    """DPDK's driver at the NIC. It receives and counts."""
    vdev = f"net_virtio_user0,path={service.socket},queues=1,queue_size={case.entries},mac=52:54:00:12:34:56{case.vdev}"
    usable = sorted(os.sched_getaffinity(0))
    sizes = (f"--rxd={max(RXD_MIN, case.entries)}", f"--txd={max(RXD_MIN, case.entries)}")
    try:
        with lab.namespace.entered():
            driver = testpmd.Testpmd([vdev], cpus=(usable[0], usable[-1]), options=(*sizes, *case.options))
    except ConfigError as error:
        raise LabError(str(error)) from error
    with driver:
        driver.command("set fwd rxonly", "start")
        yield driver


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_frame_that_fits_arrives_through_a_handover(lab: Lab, case: Case) -> None:
    service = Service(lab)
    service.start(*service.objects(device=case.device, netdev=f",mtu={case.mtu}"))
    lab.set_up("tap0")
    with driver_of(lab, service, case) as driver:
        nic = service.nic()
        assert [ring["size"] for ring in nic["vrings"]] == [case.entries] * 2
        assert case.features <= set(nic["session"]["features"])
        assert ("VIRTIO_NET_F_MRG_RXBUF" in nic["session"]["features"]) == ("VIRTIO_NET_F_MRG_RXBUF" in case.features)
        with Sender(lab, driver, case) as sender:
            sender.wait_progress(FRAMES)
            service.upgrade()
            sender.wait_progress(FRAMES)
            assert sender.finish() == (sender.packets, sender.octets)
            counters = service.nic()["queue-pairs"][0]["counters"]
            assert counters["rx-dropped-length"] == sender.oversized
