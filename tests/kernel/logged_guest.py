"""A guest whose memory is watched: each page that somebody else changed is known, and so is which may be.

Owns:        WatchedMemory; drivers of split and packed rings with chains of any shape; LoggedGuest, a NIC's driver and
             its VMM, which compares the pages that changed with those that are marked.
Never sees:  the device.
Read next:   test_dirty_log.py; tests/faults/test_dirty_log.py, where the device moves and dies meanwhile.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from localmig.testing.frontend import PROTOCOL_FEATURES, RX, TX, DirtyBitmap, Frontend, SharedMemory
from localmig.vhost_user.message import LOG_ALL_BIT, PROTOCOL_FEATURES_BIT, VringAddress
from localmig.virtio import Feature, packed_ring
from localmig.virtio.net import NetFeature

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

SIZE: Final = 64
"""Entries of each ring of a NIC."""

HEADER: Final = 12
FRAME_MIN, FRAME_MAX = 60, 1514
SLOT: Final = 0x2000
"""For the buffers of one chain."""

MEMORY: Final = 0x20_0000
LOG_ALL: Final = 1 << LOG_ALL_BIT
MAC: Final = bytes.fromhex("525400123456")

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

    def forget(self) -> None:
        """What was changed until now does not count."""
        self.changed()
        self._changed.clear()

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


class LoggedGuest:
    """A VMM and a driver whose memory is watched, on one NIC that is not set up yet."""

    def __init__(self, path: str, features: int, ends: ExitStack, *, seed: int) -> None:
        self.chance = random.Random(seed)
        self.memory = WatchedMemory(MEMORY)
        ends.callback(self.memory.close)
        self.log = DirtyBitmap(self.memory.start + MEMORY)
        ends.callback(self.log.close)
        self.frontend = ends.enter_context(Frontend.connect(path))
        self.features = features | 1 << PROTOCOL_FEATURES_BIT
        kind = PackedRing if features & Feature.RING_PACKED else SplitRing
        self.rings: list[WatchedRing] = [
            kind(
                self.memory,
                self.memory.start + RING_BYTES * index,
                size=SIZE,
                writable=index == RX,
                indirect=bool(features & Feature.RING_INDIRECT_DESC),
                event_index=bool(features & Feature.RING_EVENT_IDX),
            )
            for index in (RX, TX)
        ]
        for ring in self.rings:
            ends.callback(ring.close)
        slots = range(self.memory.start + 2 * RING_BYTES, self.memory.start + MEMORY, SLOT)
        self._slots = list(slots)
        self.chance.shuffle(self._slots)
        self._lent: dict[int, int] = {}
        self.sent = self.received = 0

    def attach(self, *, is_logged: bool) -> None:
        """Sets all up, as QEMU does: where pages are logged it says last."""
        frontend = self.frontend
        assert not self.features & ~frontend.get_features()
        frontend.set_protocol_features(frontend.get_protocol_features() & PROTOCOL_FEATURES)
        frontend.set_owner()
        self.say_features(is_logged=is_logged)
        frontend.set_mem_table([(self.memory.shared.region, self.memory.shared.fd.fileno())])
        for index, ring in enumerate(self.rings):
            frontend.set_vring_num(index, ring.size)
            frontend.set_vring_base(index, ring.base)
            self.say_address(index, is_logged=is_logged)
            frontend.set_vring_err(index, ring.error)
            frontend.set_vring_kick(index, ring.kick)
            frontend.set_vring_call(index, ring.call)
            frontend.enable_vring(index)
        if is_logged:
            frontend.set_log_base(self.log.file, self.log.fd.fileno())

    def say_features(self, *, is_logged: bool) -> None:
        """As they are, with or without the bit for logging."""
        self.frontend.set_features(self.features | (LOG_ALL if is_logged else 0))

    def say_address(self, index: int, *, is_logged: bool) -> None:
        """Where a ring is, and whether it is logged."""
        descriptors, driver, device = self.rings[index].areas
        user = self.memory.shared.user_address
        address = VringAddress(
            index=index,
            flags=VringAddress.LOGGED if is_logged else 0,
            descriptor_area=user(descriptors),
            driver_area=user(driver),
            device_area=user(device),
            log=device if is_logged else 0,
        )
        self.frontend.set_vring_addr(address)

    def switch(self, *, is_logged: bool) -> None:
        """Begins or ends logging while rings run."""
        if is_logged:
            self.frontend.set_log_base(self.log.file, self.log.fd.fileno())
        self.say_features(is_logged=is_logged)
        for index in range(len(self.rings)):
            self.say_address(index, is_logged=is_logged)

    def stop(self) -> None:
        """Stops both rings: nothing is written afterwards."""
        for index in range(len(self.rings)):
            self.frontend.get_vring_base(index)

    def fill(self) -> None:
        """Posts receive buffers of any shape while there is room."""
        while self.rings[RX].room() >= 6 and len(self._slots) > SIZE:
            mergeable = self.features & NetFeature.MRG_RXBUF
            least = 100 if mergeable else HEADER + FRAME_MAX
            self.rings[RX].post(self._buffers(self.chance.randint(least, 3000)), self.chance)

    def drain(self) -> None:
        """Takes what was received so far."""
        while (used := self.rings[RX].take_used()) is not None:
            self._take(used)

    def await_one(self) -> None:
        """Takes one chain that was received into."""
        self._take(self.rings[RX].await_used())

    def say(self, frame: bytes) -> None:
        """Sends a frame in buffers of any shape, and waits until they are back."""
        packet = bytes(HEADER) + frame
        buffers, at = self._buffers(len(packet)), 0
        for address, length in buffers:
            self.memory.write(address, packet[at : at + length])
            at += length
        self.rings[TX].post(buffers, self.chance)
        used, written = self.rings[TX].await_used()
        assert written == 0
        self._give(used)
        self.sent += 1

    def check(self) -> None:
        """Each page that the device changed is marked, and none where it had nothing to write."""
        changed, marked = self.memory.changed(), self.log.pages()
        assert changed <= marked, f"pages {sorted(map(hex, changed - marked))} changed and are not marked"
        buffers = range(self.memory.start + 2 * RING_BYTES, self.memory.start + MEMORY, PAGE)
        rings = {area // PAGE for ring in self.rings for area in (ring.areas[0], ring.areas[2])}
        assert marked <= {address // PAGE for address in buffers} | rings, sorted(map(hex, marked))

    def _buffers(self, length: int) -> Buffers:
        """Some bytes in pieces, anywhere in a slot that is free."""
        slot = self._slots.pop(0)
        address = slot + self.chance.randrange(SLOT - length)
        self._lent[address] = slot
        count = self.chance.randint(1, 5)
        cuts = sorted(self.chance.sample(range(1, length), count - 1))
        ends = zip([0, *cuts], [*cuts, length], strict=True)
        return [(address + start, end - start) for start, end in ends]

    def _take(self, used: tuple[Buffers, int]) -> None:
        buffers, written = used
        assert written
        self._give(buffers)
        self.received += 1

    def _give(self, buffers: Buffers) -> None:
        self._slots.append(self._lent.pop(buffers[0][0]))


def any_frame(chance: random.Random) -> bytes:
    """To everybody, of a type nobody knows, of any length and content."""
    length = chance.randint(FRAME_MIN, FRAME_MAX)
    return b"\xff" * 6 + MAC + b"\x88\xb5" + chance.randbytes(length - 14)


def move_frames(machine: socket.socket, guest: LoggedGuest, rounds: int) -> None:
    """Frames both ways, in random order."""
    for _ in range(rounds):
        guest.fill()
        if guest.chance.random() < 0.5:
            machine.send(any_frame(guest.chance))
            guest.await_one()
        else:
            guest.say(any_frame(guest.chance))
            assert machine.recv(4096)
        guest.drain()


def churn(machine: socket.socket, guest: LoggedGuest, ended: threading.Event) -> None:
    """Frames both ways until that is set, whichever of them arrive: who moves them may die at any instant."""
    while not ended.is_set():
        guest.fill()
        machine.send(any_frame(guest.chance))
        guest.say(any_frame(guest.chance))
        guest.drain()
