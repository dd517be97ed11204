"""A VMM and a driver for any virtio device, with plain split rings: for devices that move little data.

Owns:        the driver's side of rings, one chain at a time; the bring-up of a device.
Never sees:  what the device is for.
Read next:   frontend.py for the connection; a NIC has its own driver there, which is fast.

    with Driver("/run/rng0.sock", ring_count=1) as driver:
        driver.attach()
        assert len(driver.request(0, room=32)) == 32
"""

from __future__ import annotations

import os
import select
import struct
import time
from typing import Final, Self

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.testing.frontend import ANSWER_SECONDS_MAX, Frontend, SharedMemory
from localmig.vhost_user.message import PROTOCOL_FEATURES_BIT, ProtocolFeature, VringAddress
from localmig.virtio import Feature, split_ring

BUFFER_SIZE: Final = 4096
"""Bytes of each buffer: a page."""

PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.RESET_DEVICE | ProtocolFeature.CONFIG
)

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_USED: Final = struct.Struct("<II")
_NEXT: Final = 1
_WRITE: Final = 2


class _DriverRing:
    """A split ring and its buffers. A chain has at most two: the even descriptor is read, the odd one written."""

    def __init__(self, memory: SharedMemory, address: int, size: int) -> None:
        sizes = split_ring.part_sizes(size)
        self.size = size
        self.areas = (address, address + sizes[0], -(-(address + sizes[0] + sizes[1]) // 4) * 4)
        self._memory = memory
        self._buffers = -(-(self.areas[2] + sizes[2]) // BUFFER_SIZE) * BUFFER_SIZE
        self.end = self._buffers + size * BUFFER_SIZE
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.kick, self.call = (OwnedFd(os.eventfd(0, flags)) for _ in range(2))
        self.begin()

    def begin(self) -> None:
        """As a driver that was just loaded."""
        for address, size in zip(self.areas, split_ring.part_sizes(self.size), strict=True):
            self._memory.mapping.write(address, bytes(size))
        self.free = list(range(0, self.size, 2))
        self.seen = 0

    def add(self, data: bytes, room: int) -> int:
        head = self.free.pop(0)
        chain: list[tuple[int, int, int]] = []
        if data:
            self._memory.mapping.write(self._buffer(head), data)
            chain.append((head, len(data), 0))
        if room:
            chain.append((head + 1 if data else head, room, _WRITE))
        for number, (index, length, flags) in enumerate(chain):
            more = _NEXT if number + 1 < len(chain) else 0
            descriptor = _DESCRIPTOR.pack(self._buffer(index), length, flags | more, index + 1 if more else 0)
            self._memory.mapping.write(self.areas[0] + index * _DESCRIPTOR.size, descriptor)
        avail = self.avail_index
        self._memory.mapping.write(self.areas[1] + 4 + 2 * (avail % self.size), head.to_bytes(2, "little"))
        self._memory.mapping.write(self.areas[1] + 2, ((avail + 1) & 0xFFFF).to_bytes(2, "little"))
        os.eventfd_write(self.kick.fileno(), 1)
        return head

    def take_used(self) -> tuple[int, bytes] | None:
        if self.seen == self.used_index:
            return None
        entry = self._memory.mapping.read(self.areas[2] + 4 + _USED.size * (self.seen % self.size), _USED.size)
        head, length = _USED.unpack(entry)
        self.seen = (self.seen + 1) & 0xFFFF
        if head in self.free or head % 2 or head >= self.size:
            raise PeerError(f"the device used chain {head}, which it does not have")
        self.free.append(head)
        first = self._memory.mapping.read(self.areas[0] + head * _DESCRIPTOR.size, _DESCRIPTOR.size)
        _, _, flags, _ = _DESCRIPTOR.unpack(first)
        return head, self._memory.mapping.read(self._buffer(head if flags & _WRITE else head + 1), length)

    @property
    def avail_index(self) -> int:
        return int.from_bytes(self._memory.mapping.read(self.areas[1] + 2, 2), "little")

    @property
    def used_index(self) -> int:
        return int.from_bytes(self._memory.mapping.read(self.areas[2] + 2, 2), "little")

    def _buffer(self, index: int) -> int:
        return self._buffers + index * BUFFER_SIZE

    def close(self) -> None:
        self.kick.close()
        self.call.close()


class Driver:
    """A guest with one device. Not thread-safe; every wait is bounded.

    Args:
        path: the device's vhost-user socket.
        ring_count: how many rings it has.
        queue_size: entries of each, a power of two; half as many chains can be on their way.
        features: virtio features to acknowledge besides VERSION_1, where they are offered.
    """

    def __init__(self, path: str, *, ring_count: int, queue_size: int = 16, features: int = 0) -> None:
        self._path = path
        self._wanted = int(Feature.VERSION_1) | features
        self._frontend: Frontend | None = None
        per_ring = (queue_size + 2) * BUFFER_SIZE + sum(split_ring.part_sizes(queue_size))
        self.memory = SharedMemory(-(-per_ring * ring_count // BUFFER_SIZE) * BUFFER_SIZE)
        self._rings: list[_DriverRing] = []
        address = self.memory.region.guest_address
        for _ in range(ring_count):
            self._rings.append(_DriverRing(self.memory, address, queue_size))
            address = self._rings[-1].end

    @property
    def frontend(self) -> Frontend:
        """The connection."""
        assert self._frontend is not None, self._path
        return self._frontend

    def attach(self) -> None:
        """Connects, and sets the device up; rings go on where they stand in memory."""
        frontend = self._frontend = Frontend.connect(self._path)
        offered = frontend.get_features()
        if offered >> PROTOCOL_FEATURES_BIT & 1:
            frontend.set_protocol_features(frontend.get_protocol_features() & PROTOCOL_FEATURES)
        frontend.set_owner()
        frontend.set_features((self._wanted & offered) | (offered & 1 << PROTOCOL_FEATURES_BIT))
        frontend.set_mem_table([(self.memory.region, self.memory.fd.fileno())])
        self.start()

    def start(self) -> None:
        """Starts every ring, as a VMM does whose guest has a driver."""
        for index, ring in enumerate(self._rings):
            descriptor_area, driver_area, device_area = map(self.memory.user_address, ring.areas)
            self.frontend.set_vring_num(index, ring.size)
            self.frontend.set_vring_base(index, ring.used_index)
            self.frontend.set_vring_addr(
                VringAddress(
                    index=index, descriptor_area=descriptor_area, driver_area=driver_area, device_area=device_area
                )
            )
            self.frontend.set_vring_call(index, ring.call.fileno())
            self.frontend.set_vring_kick(index, ring.kick.fileno())
            if self.frontend.protocol_features:
                self.frontend.enable_vring(index)

    def stop(self) -> list[int]:
        """Stops every ring, as a VMM that pauses; gives where each stands."""
        return [self.frontend.get_vring_base(index) for index in range(len(self._rings))]

    def reset(self) -> None:
        """Stops the device; its driver begins anew. `start` follows."""
        self.stop()
        for ring in self._rings:
            ring.begin()

    def add(self, ring: int, data: bytes = b"", *, room: int = 0) -> int:
        """Makes a chain available: `data` for the device to read, `room` bytes for it to write. Gives its number."""
        return self._rings[ring].add(data, room)

    def take_used(self, ring: int, *, seconds: float = ANSWER_SECONDS_MAX) -> tuple[int, bytes]:
        """The next chain that the device gave back: its number, and what was written into it.

        Raises:
            TimeoutError: none came.
            PeerError: the device gave back what it did not have.
        """
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._rings[ring].call.fileno(), select.POLLIN)
        while (used := self._rings[ring].take_used()) is None:
            if time.monotonic() > deadline or not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(f"the device gave no chain of ring {ring} back within {seconds:g} s")
            os.eventfd_read(self._rings[ring].call.fileno())
        return used

    def request(self, ring: int, data: bytes = b"", *, room: int = 0, seconds: float = ANSWER_SECONDS_MAX) -> bytes:
        """What the device wrote into a chain. Raises as `take_used`."""
        head = self.add(ring, data, room=room)
        used, written = self.take_used(ring, seconds=seconds)
        assert used == head, (used, head)
        return written

    def disconnect(self) -> None:
        """Leaves without a word, as a VMM that was killed. Idempotent."""
        if self._frontend is not None:
            self._frontend.close()
            self._frontend = None

    def close(self) -> None:
        """Ends the guest. Idempotent."""
        self.disconnect()
        for ring in self._rings:
            ring.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
