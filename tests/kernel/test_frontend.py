"""The kit's driver against the packet path: both ends of the same rings, in one process and in two."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from localmig.dataplane import DriverPair, QueuePair, Ring
from localmig.testing.frontend import DRIVER_FEATURES, SharedMemory
from localmig.virtio import Feature
from localmig.virtio.net import NetFeature, header_length

PATIENCE_SECONDS = 10.0
HEADER = bytes(12)


class Wire:
    """A driver and a queue pair over the same memory, with a socket pair for each one's TAP."""

    def __init__(self, *, queue_size: int = 256, features: int = DRIVER_FEATURES) -> None:
        with ExitStack() as undo:
            self.guest, guest_tap = self._socket_pair(undo)
            self.host, host_tap = self._socket_pair(undo)
            eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(5)]
            for fd in eventfds:
                undo.callback(os.close, fd)
            rx_kick, rx_call, tx_kick, tx_call, errors = eventfds
            self.memory = SharedMemory(DriverPair.layout_size(queue_size))
            undo.callback(self.memory.close)
            self.driver = DriverPair(
                name="driver",
                memory=self.memory.mapping,
                guest_address=self.memory.region.guest_address,
                queue_size=queue_size,
                features=features,
                rx_kick_fd=rx_kick,
                rx_call_fd=rx_call,
                tx_kick_fd=tx_kick,
                tx_call_fd=tx_call,
                tap_fd=guest_tap.fileno(),
            )
            undo.callback(self.driver.stop)
            self.rings = tuple(
                Ring(
                    size=queue_size,
                    descriptor_table=table,
                    avail_ring=avail,
                    used_ring=used,
                    kick_fd=kick,
                    call_fd=call,
                    error_fd=None,
                    next_avail=0,
                )
                for (table, avail, used), kick, call in zip(
                    self.driver.ring_addresses(), (rx_kick, tx_kick), (rx_call, tx_call), strict=True
                )
            )
            self.features = features
            self.host_tap = host_tap
            self.errors = errors
            self.device = self.new_device()
            self._undo = undo.pop_all()

    @staticmethod
    def _socket_pair(undo: ExitStack) -> tuple[socket.socket, socket.socket]:
        near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(near.close)
        undo.callback(tap.close)
        near.settimeout(PATIENCE_SECONDS)
        tap.setblocking(False)
        return near, tap

    def new_device(self) -> QueuePair:
        device = QueuePair("device", self.errors)
        rx, tx = self.rings
        device.configure(
            memory=self.memory.mapping,
            tap_fd=self.host_tap.fileno(),
            header_length=header_length(self.features),
            frame_length_max=1518,
            event_index=bool(self.features & Feature.RING_EVENT_IDX),
            indirect=False,
            mergeable=bool(self.features & NetFeature.MRG_RXBUF),
            rx=rx,
            tx=tx,
        )
        return device

    def hand_over(self) -> None:
        """What a handover does to the rings: one device stops, another goes on where it stood."""
        rx, tx = self.device.stop()
        device = self.new_device()
        device.set_positions(rx, tx)
        device.start()
        self.device.close()
        self.device = device

    def close(self) -> None:
        self.device.close()
        self._undo.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def frame(number: int, size: int = 60) -> bytes:
    return HEADER + number.to_bytes(4, "big") + bytes(size - 4)


def payload(data: bytes) -> bytes:
    """A frame without its header, in which the device sets the number of buffers."""
    return data[len(HEADER) :]


def test_frames_pass_both_ways_unchanged(wire: Wire) -> None:
    wire.device.start()
    wire.driver.start()
    for number in range(1000):
        wire.guest.send(frame(number))
        assert wire.host.recv(2048) == frame(number)
        wire.host.send(frame(number, 1514))
        assert payload(wire.guest.recv(2048)) == payload(frame(number, 1514))
    counters = wire.driver.counters()
    assert (counters.rx_packets, counters.tx_packets) == (1000, 1000)
    assert counters.rx_dropped == counters.tx_dropped == 0


@pytest.mark.parametrize(
    "features",
    [
        DRIVER_FEATURES,
        DRIVER_FEATURES & ~int(Feature.RING_EVENT_IDX),
        DRIVER_FEATURES & ~int(NetFeature.MRG_RXBUF),
        int(Feature.VERSION_1),
    ],
)
@pytest.mark.parametrize("queue_size", [2, 16, 1024])
def test_a_burst_comes_complete_and_in_order_whatever_is_negotiated(queue_size: int, features: int) -> None:
    wire = Wire(queue_size=queue_size, features=features)
    try:
        wire.device.start()
        wire.driver.start()
        exchange(wire, count=5000, handovers=0)
    finally:
        wire.close()


def test_a_device_that_takes_over_in_a_burst_loses_and_repeats_nothing(wire: Wire) -> None:
    wire.device.start()
    wire.driver.start()
    exchange(wire, count=20_000, handovers=50)


def exchange(wire: Wire, *, count: int, handovers: int) -> None:
    """Pushes `count` frames each way as fast as they go and checks that each comes out, once and in order."""
    sent = {wire.guest: 0, wire.host: 0}
    received = {wire.guest: 0, wire.host: 0}
    handover_every = count * 2 // handovers if handovers else 0
    next_handover = handover_every
    while min(received.values()) < count:
        writers = [end for end in sent if sent[end] < count]
        readable, writable, _ = select.select(list(received), writers, [], PATIENCE_SECONDS)
        assert readable or writable, (sent, received, wire.driver.counters(), wire.device.counters())
        for end in writable:
            end.send(frame(sent[end]))
            sent[end] += 1
        for end in readable:
            assert payload(end.recv(2048)) == payload(frame(received[end])), (sent, received)
            received[end] += 1
        if handover_every and sum(received.values()) >= next_handover:
            next_handover += handover_every
            wire.hand_over()
    assert wire.driver.counters().rx_packets == count
    assert wire.driver.counters().tx_packets == count
