"""The guest's side of split rings that a device answers chain by chain.

Owns:        guest memory, rings, buffers, eventfds, the in-flight file.
Never sees:  the device.
Read next:   test_callback_queues.py.
"""

from __future__ import annotations

import os
import select
import struct
from contextlib import ExitStack
from typing import Final

from localmig.dataplane import InFlight, Ring
from localmig.testing.frontend import SharedMemory
from localmig.virtio.split_ring import part_sizes

PATIENCE_MS: Final = 10_000
"""For an answer to come: it takes microseconds, a machine under load gets much more."""

SIZE: Final = 16
"""Entries of a ring: half of them begin chains, the others are where the device answers."""

CHAINS: Final = SIZE // 2
ANSWER_SIZE_MAX: Final = 64
_NEXT, _WRITE = 1, 2
_RING_BYTES: Final = 0x4000
_BUFFERS: Final = 0x2000
_BUFFER_BYTES: Final = 256


class ChainGuest:
    """A driver of `ring_count` split rings. `undo` ends it.

    Attributes:
        in_flight_fd: the file for chains in flight.
        event_fd: for the device to hear of ring errors.
    """

    def __init__(self, undo: ExitStack, *, ring_count: int = 1) -> None:
        self.memory = SharedMemory(_RING_BYTES * ring_count)
        undo.callback(self.memory.close)
        self._start = self.memory.region.guest_address
        self.kick_fds, self.call_fds = (
            [_eventfd(undo) for _ in range(ring_count)],
            [_eventfd(undo) for _ in range(ring_count)],
        )
        self.event_fd = _eventfd(undo)
        self.in_flight_fd = InFlight.create(ring_count)
        undo.callback(os.close, self.in_flight_fd)
        self._available, self._used = [0] * ring_count, [0] * ring_count
        self._ring_count = ring_count

    def in_flight(self) -> InFlight:
        """The file as one process maps it."""
        return InFlight(self.in_flight_fd, self._ring_count)

    def rings(self) -> list[Ring]:
        """The rings as one process gets to know them."""
        in_flight = self.in_flight()
        return [self._ring(index, in_flight) for index in range(self._ring_count)]

    def offer(self, ring: int, head: int, text: bytes) -> None:
        """Makes a chain available: `text`, and room for an answer. Kicks."""
        table, avail, _ = self._areas(ring)
        address = self._buffer(ring, head)
        write = self.memory.mapping.write
        write(address, text)
        write(table + 16 * head, struct.pack("<QIHH", address, len(text), _NEXT, head + CHAINS))
        answer = struct.pack("<QIHH", address + _BUFFER_BYTES // 2, ANSWER_SIZE_MAX, _WRITE, 0)
        write(table + 16 * (head + CHAINS), answer)
        write(avail + 4 + 2 * (self._available[ring] % SIZE), struct.pack("<H", head))
        self._available[ring] = (self._available[ring] + 1) % 0x10000
        write(avail + 2, struct.pack("<H", self._available[ring]))
        os.eventfd_write(self.kick_fds[ring], 1)

    def next_answer(self, ring: int) -> tuple[int, bytes] | None:
        """The next chain that the device completed: its head, and what the device wrote."""
        *_, used = self._areas(ring)
        read = self.memory.mapping.read
        (index,) = struct.unpack("<H", read(used + 2, 2))
        if index == self._used[ring]:
            return None
        head, length = struct.unpack("<II", read(used + 4 + 8 * (self._used[ring] % SIZE), 8))
        self._used[ring] = (self._used[ring] + 1) % 0x10000
        return head, read(self._buffer(ring, head) + _BUFFER_BYTES // 2, length) if length else b""

    def await_answer(self, ring: int) -> tuple[int, bytes]:
        """As `next_answer`, when one comes."""
        calls = select.poll()
        calls.register(self.call_fds[ring], select.POLLIN)
        while (answer := self.next_answer(ring)) is None:
            assert calls.poll(PATIENCE_MS), "no answer came"
            os.eventfd_read(self.call_fds[ring])
        return answer

    def _areas(self, ring: int) -> tuple[int, int, int]:
        start = self._start + _RING_BYTES * ring
        table, avail, _ = part_sizes(SIZE)
        return start, start + table, start + (table + avail + 3) // 4 * 4

    def _buffer(self, ring: int, head: int) -> int:
        return self._start + _RING_BYTES * ring + _BUFFERS + _BUFFER_BYTES * head

    def _ring(self, index: int, in_flight: InFlight) -> Ring:
        table, avail, used = self._areas(index)
        return Ring(
            size=SIZE,
            descriptor_area=table,
            driver_area=avail,
            device_area=used,
            kick_fd=self.kick_fds[index],
            call_fd=self.call_fds[index],
            error_fd=None,
            next_avail=None,
            in_flight=(in_flight, index),
        )


def _eventfd(undo: ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    undo.callback(os.close, fd)
    return fd
