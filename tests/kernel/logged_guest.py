"""A guest whose memory is watched: each page that somebody else changed is known, and so is which may be.

Owns:        WatchedMemory; drivers of split and packed rings with chains of any shape.
Never sees:  the dirty log.
Read next:   test_dirty_log.py, which compares the two.
"""

from __future__ import annotations

import os
import random
import select
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from localmig.testing.frontend import SharedMemory
from localmig.virtio import packed_ring

PAGE: Final = 4096
PATIENCE_MS: Final = 10_000
"""For a chain to come back: it takes microseconds, a machine under load gets much more."""

RING_BYTES: Final = 0x20000
"""What a ring takes: its three parts and the indirect tables, on pages of their own."""

_DRIVER_AREA: Final = 0x2000
_DEVICE_AREA: Final = 0x4000
_TABLES: Final = 0x8000
_TABLE_BYTES: Final = 0x100
_TABLE_LENGTH: Final = _TABLE_BYTES // 16

_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_AVAIL, _USED = 1 << 7, 1 << 15

Buffers = Sequence[tuple[int, int]]
"""(guest address, length) of each."""


class WatchedMemory:
    """Guest memory, and what would be in it if only the guest wrote."""

    def __init__(self, size: int) -> None:
        self.shared = SharedMemory(size)
        self.start = self.shared.region.guest_address
        self._expected = bytearray(size)
        self._changed: set[int] = set()

    def read(self, address: int, size: int) -> bytes:
        """What is there."""
        return self.shared.mapping.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        """The guest writes. What somebody else wrote there before is known."""
        self._look(address, len(data))
        self.shared.mapping.write(address, data)
        offset = address - self.start
        self._expected[offset : offset + len(data)] = data

    def changed(self) -> set[int]:
        """The numbers of the pages that somebody else changed so far."""
        self._look(self.start, len(self._expected))
        return set(self._changed)

    def _look(self, address: int, size: int) -> None:
        offset = address - self.start
        for at in range(offset - offset % PAGE, offset + size, PAGE):
            there = self.read(self.start + at, PAGE)
            if there != self._expected[at : at + PAGE]:
                self._changed.add((self.start + at) // PAGE)
                self._expected[at : at + PAGE] = there

    def close(self) -> None:
        """Drops it. Idempotent."""
        self.shared.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chain:
    buffers: Buffers
    slots: int


class WatchedRing:
    """A driver's end of a ring in watched memory. Calls are wanted for every chain.

    Args:
        memory: where it is laid, at `address`.
        size: entries, a power of two up to 256.
        writable: whether the device writes into its chains.
        indirect: whether some chains have a table of their own.
        event_index: whether the driver says where it wants a call.
    """

    def __init__(
        self, memory: WatchedMemory, address: int, *, size: int, writable: bool, indirect: bool, event_index: bool
    ) -> None:
        self.memory = memory
        self.size = size
        self.areas = (address, address + _DRIVER_AREA, address + _DEVICE_AREA)
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._ends = ExitStack()
        self.kick, self.call, self.error = (os.eventfd(0, flags) for _ in range(3))
        for fd in (self.kick, self.call, self.error):
            self._ends.callback(os.close, fd)
        self._tables = address + _TABLES
        self._flags = _WRITE if writable else 0
        self._indirect = indirect
        self._event_index = event_index
        self._chains: dict[int, _Chain] = {}

    @property
    def base(self) -> int:
        """Where it begins, as SET_VRING_BASE has it."""
        raise NotImplementedError

    def room(self) -> int:
        """How many descriptors one more chain may have."""
        raise NotImplementedError

    def post(self, buffers: Buffers, chance: random.Random) -> None:
        """Makes a chain available and kicks."""
        raise NotImplementedError

    def take_used(self) -> tuple[Buffers, int] | None:
        """The buffers of the next chain that came back, and how many bytes were written into them."""
        raise NotImplementedError

    def await_used(self) -> tuple[Buffers, int]:
        """As `take_used`, once there is one."""
        calls = select.poll()
        calls.register(self.call, select.POLLIN)
        while (used := self.take_used()) is None:
            assert calls.poll(PATIENCE_MS), "no chain came back"
            os.eventfd_read(self.call)
        return used

    def close(self) -> None:
        """Closes its notifiers."""
        self._ends.close()

    def _uses_table(self, buffers: Buffers, chance: random.Random) -> bool:
        return self._indirect and len(buffers) <= _TABLE_LENGTH and chance.random() < 0.5

    def _kick(self) -> None:
        os.eventfd_write(self.kick, 1)


class SplitRing(WatchedRing):
    """Of a split virtqueue."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._free = list(range(self.size))
        self._slots: dict[int, list[int]] = {}
        self._avail = self._seen = 0

    @property
    def base(self) -> int:
        return 0

    def room(self) -> int:
        return len(self._free)

    def post(self, buffers: Buffers, chance: random.Random) -> None:
        table, avail, _ = self.areas
        if self._uses_table(buffers, chance):
            head = self._free.pop(0)
            place = self._tables + _TABLE_BYTES * head
            self._write_chain(place, range(len(buffers)), buffers)
            self._write(table + 16 * head, place, 16 * len(buffers), _INDIRECT, 0)
            slots = [head]
        else:
            slots = [self._free.pop(0) for _ in buffers]
            self._write_chain(table, slots, buffers)
        self._chains[slots[0]] = _Chain(buffers=buffers, slots=len(slots))
        self._slots[slots[0]] = slots
        self.memory.write(avail + 4 + 2 * (self._avail % self.size), struct.pack("<H", slots[0]))
        self._avail = (self._avail + 1) & 0xFFFF
        self.memory.write(avail + 2, struct.pack("<H", self._avail))
        self._kick()

    def take_used(self) -> tuple[Buffers, int] | None:
        _, avail, used = self.areas
        if self._event_index:
            self.memory.write(avail + 4 + 2 * self.size, struct.pack("<H", self._seen))
        (index,) = struct.unpack("<H", self.memory.read(used + 2, 2))
        if index == self._seen:
            return None
        head, length = struct.unpack("<II", self.memory.read(used + 4 + 8 * (self._seen % self.size), 8))
        self._seen = (self._seen + 1) & 0xFFFF
        self._free += self._slots.pop(head)
        return self._chains.pop(head).buffers, length

    def _write_chain(self, table: int, slots: Sequence[int], buffers: Buffers) -> None:
        for number, (slot, (address, length)) in enumerate(zip(slots, buffers, strict=True)):
            more = number + 1 < len(buffers)
            following = slots[number + 1] if more else 0
            self._write(table + 16 * slot, address, length, self._flags | (_NEXT if more else 0), following)

    def _write(self, place: int, address: int, length: int, flags: int, following: int) -> None:
        self.memory.write(place, struct.pack("<QIHH", address, length, flags, following))


class PackedRing(WatchedRing):
    """Of a packed virtqueue."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._next = self._seen = (0, True)
        self._ids = list(range(self.size))
        self._left = self.size

    @property
    def base(self) -> int:
        return packed_ring.base_of(packed_ring.START)

    def room(self) -> int:
        return self._left

    def post(self, buffers: Buffers, chance: random.Random) -> None:
        identity = self._ids.pop(0)
        if self._uses_table(buffers, chance):
            place = self._tables + _TABLE_BYTES * identity
            for number, (address, length) in enumerate(buffers):
                self.memory.write(place + 16 * number, struct.pack("<QIHH", address, length, 0, self._flags))
            entries = [(place, 16 * len(buffers), _INDIRECT)]
        else:
            last = len(buffers) - 1
            entries = [
                (address, length, self._flags | (_NEXT if number < last else 0))
                for number, (address, length) in enumerate(buffers)
            ]
        first = self._next
        places = [self._advanced(first, number) for number in range(len(entries))]
        # The first one last: then the device sees all of the chain.
        for (index, wrap), (address, length, flags) in reversed([*zip(places, entries, strict=True)]):
            turn = _AVAIL if wrap else _USED
            self.memory.write(self.areas[0] + 16 * index, struct.pack("<QIH", address, length, identity))
            self.memory.write(self.areas[0] + 16 * index + 14, struct.pack("<H", flags | turn))
        self._next = self._advanced(first, len(entries))
        self._left -= len(entries)
        self._chains[identity] = _Chain(buffers=buffers, slots=len(entries))
        self._kick()

    def take_used(self) -> tuple[Buffers, int] | None:
        index, wrap = self._seen
        length, identity, flags = struct.unpack("<IHH", self.memory.read(self.areas[0] + 16 * index + 8, 8))
        if (bool(flags & _AVAIL), bool(flags & _USED)) != (wrap, wrap):
            return None
        chain = self._chains.pop(identity)
        self._seen = self._advanced(self._seen, chain.slots)
        self._left += chain.slots
        self._ids.append(identity)
        return chain.buffers, length

    def _advanced(self, position: tuple[int, bool], slots: int) -> tuple[int, bool]:
        laps, index = divmod(position[0] + slots, self.size)
        return index, position[1] ^ (laps % 2 == 1)
