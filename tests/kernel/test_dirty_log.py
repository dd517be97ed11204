"""The dirty log beside the pages that really changed: whatever a guest's rings look like, whatever happens meanwhile.

The guest's memory is watched: what is in it beside the guest's own writes was written by the device. Each such page
must be marked.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from tests.kernel.logged_guest import PAGE, RING_BYTES, Buffers, PackedRing, SplitRing, WatchedMemory, WatchedRing
from tests.kernel.test_virtio_net import MAC, PATIENCE_S, Guest, Site, beside, run

from localmig.errors import PeerError
from localmig.testing.frontend import DRIVER_FEATURES, PROTOCOL_FEATURES, RX, TX, DirtyBitmap, Frontend
from localmig.trace import DeviceNoted, RingFailed, RingsStarted, RingsStopped
from localmig.vhost_user.message import (
    LOG_ALL_BIT,
    PROTOCOL_FEATURES_BIT,
    LogFile,
    RegionDescription,
    VringAddress,
)
from localmig.virtio import Feature
from localmig.virtio.net import NetFeature

pytestmark = pytest.mark.usefixtures("no_descriptor_is_lost")

SIZE: Final = 64
ROUNDS: Final = 150
"""Frames each way: rings go round several times."""

HEADER: Final = 12
FRAME_MIN, FRAME_MAX = 60, 1514
SLOT: Final = 0x2000
"""For the buffers of one chain."""

MEMORY: Final = 0x20_0000
LOG_ALL: Final = 1 << LOG_ALL_BIT


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


def move_frames(site: Site, guest: LoggedGuest, rounds: int) -> None:
    """Frames both ways, in random order."""
    for _ in range(rounds):
        guest.fill()
        if guest.chance.random() < 0.5:
            site.machine.send(any_frame(guest.chance))
            guest.await_one()
        else:
            guest.say(any_frame(guest.chance))
            assert site.machine.recv(4096)
        guest.drain()


SHAPES: Final = {
    "split": 0,
    "packed": int(Feature.RING_PACKED),
    "event index": int(Feature.RING_EVENT_IDX),
    "indirect": int(Feature.RING_INDIRECT_DESC),
    "mergeable": int(NetFeature.MRG_RXBUF),
}


def shapes() -> Iterator[tuple[str, int]]:
    """Every kind of rings that a driver may ask for."""
    options = ("event index", "indirect", "mergeable")
    for form in ("split", "packed"):
        for count in range(len(options) + 1):
            for chosen in itertools.combinations(options, count):
                names = (form, *chosen)
                yield ", ".join(names), sum(SHAPES[name] for name in names) | int(Feature.VERSION_1)


def test_each_page_that_a_device_changes_is_marked_whatever_its_rings_are_like(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        failures = {}
        for seed, (name, features) in enumerate(shapes()):
            with ExitStack() as ends:
                guest = await beside(lambda f=features, e=ends, s=seed: LoggedGuest(site.path, f, e, seed=s))
                await beside(lambda g=guest, s=seed: g.attach(is_logged=bool(s % 2)))
                if not seed % 2:
                    # The other way: it begins while rings run that carried frames before.
                    await beside(move_frames, site, guest, 20)
                    guest.memory.changed()
                    guest.memory._changed.clear()
                    await beside(lambda g=guest: g.switch(is_logged=True))
                await beside(move_frames, site, guest, ROUNDS)
                await beside(guest.stop)
                assert guest.sent > 20, name
                assert guest.received > 20, name
                try:
                    guest.check()
                except AssertionError as error:
                    failures[name] = str(error)
        assert not failures

    run(tmp_path, scenario, packed=True)


def test_logging_is_switched_while_frames_move_and_no_ring_stops(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        for features in (DRIVER_FEATURES, DRIVER_FEATURES | Feature.RING_PACKED):
            with ExitStack() as ends:
                guest = await beside(lambda f=features, e=ends: LoggedGuest(site.path, f, e, seed=7))
                await beside(lambda g=guest: g.attach(is_logged=False))
                await beside(move_frames, site, guest, 20)
                before = len(site.facts)
                for number in range(10):
                    former, guest.log = guest.log, DirtyBitmap(guest.memory.start + MEMORY, mmap_offset=number * PAGE)
                    ends.callback(guest.log.close)
                    guest.memory.changed()
                    guest.memory._changed.clear()
                    await beside(lambda g=guest: g.switch(is_logged=True))
                    former.clear()
                    await beside(move_frames, site, guest, 20)
                    await beside(lambda g=guest: g.switch(is_logged=False))
                    assert not former.pages()
                    guest.check()
                    # What is not to be logged is not.
                    guest.log.clear()
                    await beside(move_frames, site, guest, 5)
                    assert not guest.log.pages()
                changes = [fact for fact in site.facts[before:] if isinstance(fact, RingsStarted | RingsStopped)]
                assert not changes
                await beside(guest.stop)

    run(tmp_path, scenario, packed=True)


def test_a_ring_that_must_log_waits_for_a_log_or_for_the_end_of_logging(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest: Guest = site.guest()
        await beside(guest.vmm.attach)
        await guest.talks()
        frontend = guest.vmm.frontend
        features = guest.vmm.features | 1 << PROTOCOL_FEATURES_BIT
        log = DirtyBitmap(guest.vmm.memory.region.guest_address + guest.vmm.memory.region.size)
        with contextlib.closing(log):
            for way in ("log", "no more"):
                await beside(frontend.set_features, features | LOG_ALL)
                assert [vring.running for vring in site.device.info().vrings] == [False, False]
                guest.near.send(bytes(guest.header) + b"\xff" * 60)
                site.machine.setblocking(False)
                with pytest.raises(BlockingIOError):
                    site.machine.recv(4096)
                site.machine.settimeout(PATIENCE_S)
                note = await site.note("SET_LOG_BASE")
                assert "VHOST_F_LOG_ALL" in note
                if way == "log":
                    await beside(frontend.set_log_base, log.file, log.fd.fileno())
                else:
                    await beside(frontend.set_features, features)
                # What waited goes on.
                assert (await beside(site.machine.recv, 4096))[:60] == b"\xff" * 60
                await guest.talks()
                if way == "log":
                    # All rings stop: QEMU's log is gone, and the next one comes after the kicks.
                    await beside(guest.vmm.detach)
                    await beside(guest.vmm.attach)
        site.facts[:] = [fact for fact in site.facts if not isinstance(fact, DeviceNoted)]

    run(tmp_path, scenario)


def test_a_log_that_cannot_have_all_marks_stops_its_rings_and_says_why(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        end = 0x4000_0000 + MEMORY
        small = DirtyBitmap(0x1000)
        short = DirtyBitmap(end)
        os.ftruncate(short.fd.fileno(), 8)
        with contextlib.closing(small), contextlib.closing(short):
            for log, text in (
                (small, f"the dirty log has 0x8 bytes, guest memory up to {end:#x} needs "),
                (short, "needs a file of"),
            ):
                with ExitStack() as ends:
                    guest = await beside(lambda e=ends: LoggedGuest(site.path, DRIVER_FEATURES, e, seed=1))
                    await beside(lambda g=guest: g.attach(is_logged=True))
                    await beside(move_frames, site, guest, 10)
                    site.facts.clear()
                    answer = pytest.raises(PeerError) if log is short else contextlib.nullcontext()
                    with answer:
                        await beside(guest.frontend.set_log_base, log.file, log.fd.fileno())
                    failed = await site.fact(RingFailed)
                    assert text in failed.reason
                    infos = site.device.info().vrings
                    assert [vring.failed for vring in infos if vring.index in (RX, TX)] == [True, True]
                    # The session lives, and set up again with a good log it carries frames.
                    await beside(guest.frontend.get_features)
                    await beside(guest.frontend.reset_device)

    run(tmp_path, scenario)


def test_a_log_that_is_cut_short_stops_its_rings_and_no_others(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        with ExitStack() as ends:
            guest = await beside(lambda: LoggedGuest(site.path, DRIVER_FEATURES, ends, seed=1))
            await beside(lambda: guest.attach(is_logged=True))
            await beside(move_frames, site, guest, 10)
            os.ftruncate(guest.log.fd.fileno(), 0)
            guest.fill()
            site.machine.send(any_frame(guest.chance))
            failed = await site.fact(RingFailed)
            assert "the dirty log" in failed.reason
            assert "is lost" in failed.reason
            assert await beside(guest.frontend.get_features)
        fine = site.guest()
        await beside(fine.vmm.attach)
        await fine.talks()

    run(tmp_path, scenario)


def test_memory_comes_and_goes_while_pages_are_logged(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        with ExitStack() as ends:
            guest = await beside(lambda: LoggedGuest(site.path, DRIVER_FEATURES, ends, seed=1))
            await beside(lambda: guest.attach(is_logged=True))
            await beside(move_frames, site, guest, 10)
            before = len(site.facts)
            far = 0x2_0000_0000
            more = RegionDescription(guest_address=far, size=0x10_0000, user_address=far, mmap_offset=0)
            for _ in range(3):
                former, guest.log = guest.log, DirtyBitmap(far + 0x10_0000)
                ends.callback(guest.log.close)
                # Growth: the log first. Shrinking: the other way round.
                await beside(guest.frontend.set_log_base, guest.log.file, guest.log.fd.fileno())
                marked = former.pages()
                await beside(guest.frontend.add_mem_region, more, guest.memory.shared.fd.fileno())
                await beside(move_frames, site, guest, 20)
                await beside(guest.frontend.remove_mem_region, more)
                assert former.pages() == marked
                now = guest.log
                guest.log = DirtyBitmap(guest.memory.start + MEMORY)
                ends.callback(guest.log.close)
                await beside(guest.frontend.set_log_base, guest.log.file, guest.log.fd.fileno())
                assert now.pages()
                await beside(move_frames, site, guest, 20)
            assert not [fact for fact in site.facts[before:] if isinstance(fact, RingsStopped | RingFailed)]
            await beside(guest.stop)

    run(tmp_path, scenario)


def test_a_descriptor_to_be_told_by_means_nothing(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        await beside(guest.vmm.frontend.set_log_fd, guest.vmm.memory.fd.fileno())
        await guest.talks()
        wrong = LogFile(size=0x1000, mmap_offset=0x10)
        with pytest.raises(PeerError, match="backend cannot use the dirty log"):
            await beside(guest.vmm.frontend.set_log_base, wrong, guest.vmm.memory.fd.fileno())
        # Nobody logs, so nobody minds.
        await guest.talks()

    run(tmp_path, scenario)
