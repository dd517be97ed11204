"""The dirty log beside the pages that really changed: whatever a guest's rings look like, whatever happens meanwhile.

The guest's memory is watched: what is in it beside the guest's own writes was written by the device. Each such page
must be marked.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from tests.kernel.logged_guest import LOG_ALL, MEMORY, PAGE, LoggedGuest, any_frame, move_frames
from tests.kernel.test_virtio_net import PATIENCE_S, Guest, Site, beside, run

from localmig.errors import PeerError
from localmig.testing.frontend import DRIVER_FEATURES, RX, TX, DirtyBitmap
from localmig.trace import DeviceNoted, RingFailed, RingsStarted, RingsStopped
from localmig.vhost_user.message import PROTOCOL_FEATURES_BIT, LogFile, RegionDescription
from localmig.virtio import Feature
from localmig.virtio.net import NetFeature

pytestmark = pytest.mark.usefixtures("no_descriptor_is_lost")

ROUNDS: Final = 150
"""Frames each way: rings go round several times."""


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
                    await beside(move_frames, site.machine, guest, 20)
                    guest.memory.forget()
                    await beside(lambda g=guest: g.switch(is_logged=True))
                await beside(move_frames, site.machine, guest, ROUNDS)
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
                await beside(move_frames, site.machine, guest, 20)
                before = len(site.facts)
                for number in range(10):
                    former, guest.log = guest.log, DirtyBitmap(guest.memory.start + MEMORY, mmap_offset=number * PAGE)
                    ends.callback(guest.log.close)
                    guest.memory.forget()
                    await beside(lambda g=guest: g.switch(is_logged=True))
                    former.clear()
                    await beside(move_frames, site.machine, guest, 20)
                    await beside(lambda g=guest: g.switch(is_logged=False))
                    assert not former.pages()
                    guest.check()
                    # What is not to be logged is not.
                    guest.log.clear()
                    await beside(move_frames, site.machine, guest, 5)
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
                    await beside(move_frames, site.machine, guest, 10)
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
            await beside(move_frames, site.machine, guest, 10)
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
            await beside(move_frames, site.machine, guest, 10)
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
                await beside(move_frames, site.machine, guest, 20)
                await beside(guest.frontend.remove_mem_region, more)
                assert former.pages() == marked
                now = guest.log
                guest.log = DirtyBitmap(guest.memory.start + MEMORY)
                ends.callback(guest.log.close)
                await beside(guest.frontend.set_log_base, guest.log.file, guest.log.fd.fileno())
                assert now.pages()
                await beside(move_frames, site.machine, guest, 20)
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
