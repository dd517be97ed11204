"""Guest memory and notifiers that change while frames pass, and the files that memory may be of."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from tests.kernel.silent_fuse import SilentFuse
from tests.kernel.test_many_nics import LOCAL, Nic
from tests.kernel.test_virtio_net import Guest, Site, beside, frame, run
from tests.kit.processes import DaemonProcess

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.testing.frontend import RX, TX
from localmig.testing.namespace import NetworkNamespace
from localmig.trace import MemoryMapped, RequestRefused, RingsStarted, RingsStopped
from localmig.vhost_user.memory import REGION_COUNT_MAX
from localmig.vhost_user.message import TABLE_REGION_COUNT_MAX, RegionDescription

pytestmark = pytest.mark.usefixtures("no_descriptor_is_lost")

PAGE: Final = 4096


def region(number: int, size: int = PAGE) -> RegionDescription:
    """One of many that do not touch, away from the guest's own."""
    address = 0x10_0000_0000 + number * 0x10_0000
    return RegionDescription(guest_address=address, size=size, user_address=address, mmap_offset=0)


def memory_file(ends: ExitStack, size: int = PAGE) -> OwnedFd:
    fd = ends.enter_context(OwnedFd(os.memfd_create("more", os.MFD_CLOEXEC)))
    os.ftruncate(fd.fileno(), size)
    return fd


def is_mapped(fd: OwnedFd) -> bool:
    """Whether this process, the device in it, maps the file."""
    inode = str(os.fstat(fd.fileno()).st_ino)
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return any("memfd:more" in line and line.split()[4] == inode for line in lines)


class Undisturbed:
    """No ring stops or starts from here to `check`."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._before = len(site.facts)

    def check(self) -> None:
        met = self._site.facts[self._before :]
        assert not [fact for fact in met if isinstance(fact, RingsStopped | RingsStarted)], met


async def talking(guest: Guest, stop: asyncio.Event) -> int:
    """Frames pass both ways until `stop`; gives how many."""
    number = 0
    while not stop.is_set():
        await guest.hears(number)
        await guest.says(number)
        number += 1
    return number


@pytest.mark.parametrize("packed", [False, True])
def test_regions_come_and_go_and_no_ring_stops(tmp_path: Path, *, packed: bool) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        frontend = guest.vmm.frontend
        rings, stop = Undisturbed(site), asyncio.Event()
        traffic = asyncio.create_task(talking(guest, stop))
        with ExitStack() as ends:
            for number in range(20):
                file = memory_file(ends)
                os.pwrite(file.fileno(), b"resident", 0)
                await beside(frontend.add_mem_region, region(number), file.fileno())
                fact = await site.fact(MemoryMapped)
                assert (fact.regions, fact.undisturbed_queue_pairs, fact.populated_bytes) == (2, (0,), PAGE)
                assert is_mapped(file)
                await beside(frontend.remove_mem_region, region(number))
                assert not is_mapped(file), "what was removed is mapped when the reply is there"
        stop.set()
        assert await traffic > 0
        rings.check()
        await guest.talks()

    run(tmp_path, scenario, packed=packed)


def test_a_table_that_says_a_region_again_keeps_its_mapping(tmp_path: Path) -> None:
    # QEMU 7.2 sends all of its table again for each region more, where it does not know slots.
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        memory = guest.vmm.memory
        rings = Undisturbed(site)
        with ExitStack() as ends:
            file = memory_file(ends)
            table = [(memory.region, memory.fd.fileno()), (region(0), file.fileno())]
            for regions in (table, table[:1], table):
                await beside(guest.vmm.frontend.set_mem_table, regions)
                await guest.talks()
                assert is_mapped(file) == (len(regions) > 1)
        rings.check()

    run(tmp_path, scenario)


def test_buffers_in_memory_that_is_taken_away_cost_their_ring_alone(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        with ExitStack() as ends:
            file = memory_file(ends)
            await beside(guest.vmm.frontend.add_mem_region, region(0), file.fileno())
            await beside(guest.vmm.frontend.remove_mem_region, region(0))
        guest.write_descriptor(TX, address=region(0).guest_address, length=64)
        assert await beside(guest.vmm.ring_error, TX, 10.0)
        await guest.hears(1)

    run(tmp_path, scenario)


def test_a_table_and_slots_have_as_many_regions_as_is_said(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        frontend, memory = guest.vmm.frontend, guest.vmm.memory
        assert await beside(frontend.get_max_mem_slots) == REGION_COUNT_MAX == 509
        rings = Undisturbed(site)
        with ExitStack() as ends:
            file = memory_file(ends)
            table = [(region(number), file.fileno()) for number in range(TABLE_REGION_COUNT_MAX - 1)]
            await beside(frontend.set_mem_table, [(memory.region, memory.fd.fileno()), *table])
            await guest.talks()
            for number in range(TABLE_REGION_COUNT_MAX - 1, REGION_COUNT_MAX - 1):
                await beside(frontend.add_mem_region, region(number), file.fileno())
            await guest.talks()
            with pytest.raises(PeerError, match="refused ADD_MEM_REG"):
                await beside(frontend.add_mem_region, region(REGION_COUNT_MAX), file.fileno())
            fact = await site.fact(RequestRefused)
            assert fact.reason == "ADD_MEM_REG: guest memory has 510 regions, limit is 509"
        await guest.talks()
        rings.check()

    run(tmp_path, scenario)


def test_a_session_with_every_slot_in_use_moves_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, namespace: NetworkNamespace
) -> None:
    # More descriptors than one message may carry.
    folder = tmp_path_factory.mktemp("m")  # a short path: a UNIX socket's has 107 bytes
    with ExitStack() as ends:
        options = ["--netdev", "tap,id=net0,ifname=tap0"]
        options += ["--device", f"virtio-net,id=nic0,netdev=net0,socket={folder}/0"]
        daemon = ends.enter_context(DaemonProcess([*LOCAL, *options], qmp=folder / "q0"))
        nic = Nic(0, folder, ends)
        file = memory_file(ends, PAGE * REGION_COUNT_MAX)
        regions = [replace(region(number), mmap_offset=number * PAGE) for number in range(REGION_COUNT_MAX - 1)]
        for each in regions:
            nic.guest.frontend.add_mem_region(each, file.fileno())
        address = f"unix:{folder}/m"
        successor = ends.enter_context(DaemonProcess([*LOCAL, "--incoming", address], qmp=folder / "q1"))
        nic.send()
        daemon.execute("migrate", uri=address)
        assert daemon.wait_migration()["status"] == "completed"
        assert daemon.quit() == 0
        nic.send()
        nic.receive_all()
        told = successor.execute("query-devices")[0]["session"]["memory-regions"]
        assert told == REGION_COUNT_MAX
        # What was adopted is kept when the table goes on changing.
        for each in regions[::2]:
            nic.guest.frontend.remove_mem_region(each)
        nic.send()
        nic.receive_all()
        assert not [fact for fact in successor.facts if fact["event"] == "RingsStopped"]
    del namespace


# -- notifiers --------------------------------------------------------------------------------------------------


def test_an_interrupt_is_masked_and_unmasked_and_no_ring_stops(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        frontend = guest.vmm.frontend
        rings, stop = Undisturbed(site), asyncio.Event()
        traffic = asyncio.create_task(talking(guest, stop))
        with OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) as masked:
            for number in range(60):
                ring = (RX, TX)[number % 2]
                # As QEMU does: what rings while the interrupt is masked is passed on when it is not any more.
                await beside(frontend.set_vring_call, ring, (masked.fileno(), None)[number % 3 == 0])
                await beside(frontend.set_vring_call, ring, guest.vmm._vrings[ring].call.fileno())
                await beside(frontend.set_vring_err, ring, guest.vmm._vrings[ring].error.fileno())
        stop.set()
        assert await traffic > 0
        await guest.talks()
        rings.check()

    run(tmp_path, scenario)


def test_a_call_descriptor_that_is_none_ends_the_session(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        with (tmp_path / "file").open("wb") as file, pytest.raises(PeerError):
            await beside(guest.vmm.frontend.set_vring_call, TX, file.fileno())

    run(tmp_path, scenario)


# -- files ------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    """A file system for a while; skips where this process may mount none."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(arguments[-1])], check=True)


async def accepts(site: Site, path: Path, size: int = PAGE) -> None:
    """The device maps the file beside what it has, and lets it go."""
    guest = site.guest()
    await beside(guest.vmm.attach)
    with OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)) as file:
        os.ftruncate(file.fileno(), size)
        await beside(guest.vmm.frontend.add_mem_region, region(0, size), file.fileno())
        await beside(guest.vmm.frontend.remove_mem_region, region(0, size))
    await guest.talks()


def test_a_file_on_an_overlay_is_memory(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    with mounted("-t", "tmpfs", "none", base):
        for name in ("lower", "upper", "work", "merged"):
            (base / name).mkdir()
        layers = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        with mounted("-t", "overlay", "none", "-o", layers, base / "merged"):
            run(tmp_path, lambda site: accepts(site, base / "merged" / "file"))


def test_a_file_on_a_disk_is_memory(tmp_path: Path) -> None:
    run(tmp_path, lambda site: accepts(site, tmp_path / "file"))


async def refuses(site: Site, fd: int, reason: str) -> None:
    """The device refuses the file by its reply, in no time, and frames pass on."""
    guest = site.guest()
    await beside(guest.vmm.attach)
    rings = Undisturbed(site)
    began_s = time.monotonic()
    with pytest.raises(PeerError, match="refused ADD_MEM_REG"):
        await beside(guest.vmm.frontend.add_mem_region, region(0), fd)
    assert time.monotonic() - began_s < 5.0, "it waited for somebody"
    fact = await site.fact(RequestRefused)
    assert reason in fact.reason
    assert "memory-backend-memfd" in fact.reason
    # It is as if it had never come.
    with ExitStack() as ends:
        file = memory_file(ends)
        await beside(guest.vmm.frontend.add_mem_region, region(0), file.fileno())
    assert (await site.fact(MemoryMapped)).regions == 2
    await guest.talks()
    rings.check()


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/proc/self/maps", "its file is on proc, whose pages"), ("/dev/zero", "is character device 1:5")],
)
def test_a_file_that_is_no_memory_is_refused_and_the_session_goes_on(tmp_path: Path, path: str, reason: str) -> None:
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        run(tmp_path, lambda site: refuses(site, fd.fileno(), reason))


def test_a_file_on_fuse_is_refused_by_name_and_its_server_is_not_waited_for(
    tmp_path: Path, silent_fuse: SilentFuse
) -> None:
    run(
        tmp_path,
        lambda site: refuses(site, silent_fuse.file, "its file is on fuse, whose pages may come from a server"),
    )
    assert set(silent_fuse.unanswered) <= {SilentFuse.FLUSH, SilentFuse.FORGET}, "the server was asked"


def test_a_notifier_on_fuse_ends_its_session_and_holds_up_nobody(tmp_path: Path, silent_fuse: SilentFuse) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        with pytest.raises(PeerError):
            await beside(guest.vmm.frontend.set_vring_call, TX, silent_fuse.file)
        await beside(guest.vmm.reconnect)
        site.machine.send(frame(1))
        assert (await beside(guest.near.recv, 4096))[guest.header :] == frame(1)

    run(tmp_path, scenario)
