"""The virtio-net device on a real TAP, in this process, with a guest that is not always well-behaved."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from localmig.contact import ConnectTo, ListenAt
from localmig.device_api import Queues, notes
from localmig.device_api.device_state import DeviceState
from localmig.devices.virtio_net import VirtioNet
from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.netdevs import tun
from localmig.netdevs.tap import Tap
from localmig.testing.frontend import (
    CLOUD_HYPERVISOR,
    DRIVER_FEATURES,
    PROTOCOL_FEATURES,
    QEMU,
    RX,
    TX,
    USER_MODE_LINUX,
    Frontend,
    FrontendListener,
    NetGuest,
)
from localmig.testing.namespace import ip, link
from localmig.trace import DeviceNoted, Event, InterfaceChanged, RingCorrected, RingFailed, SessionClosed, Tracer
from localmig.vhost_user.message import ProtocolFeature, RegionDescription, Request, VringNumber, encode_request
from localmig.virtio import Feature
from localmig.virtio.net import LinkStatus, NetConfig, NetFeature, header_length

PATIENCE_S: Final = 10.0
ETH_P_ALL: Final = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
MAC: Final = bytes.fromhex("525400123456")
QUEUE_SIZE: Final = 16

EventT = TypeVar("EventT", bound=Event)
Result = TypeVar("Result")


pytestmark = pytest.mark.usefixtures("no_descriptor_is_lost")


def frame(number: int) -> bytes:
    """An Ethernet frame to everybody, of a type nobody knows."""
    return b"\xff" * 6 + MAC + b"\x88\xb5" + number.to_bytes(4, "big") + bytes(42)


class Site:
    """A device on a TAP, the machine's side of the TAP, and the facts that were traced."""

    def __init__(
        self,
        path: Path,
        ends: ExitStack,
        *,
        reconnect_ms: int | None = None,
        packed: bool = False,
        guest_carrier: bool = False,
        queues: int = 1,
    ) -> None:
        """The device listens at `path`, or connects there, where `reconnect_ms` is given."""
        self.path = str(path)
        self.facts: list[Event] = []
        self._new_fact = asyncio.Event()
        self._ends = ends
        tracer = Tracer()
        tracer.subscribe(self._note)
        self.tap = Tap(id="net0", ifname="tap0", queues=queues, guest_carrier=guest_carrier)
        self.tap.open()
        ends.callback(self.tap.close)
        self.listens = reconnect_ms is None
        plan = (
            ListenAt(path=self.path) if reconnect_ms is None else ConnectTo(path=self.path, reconnect_ms=reconnect_ms)
        )
        self.rings = Queues(tracer)
        self.device = VirtioNet(
            id="nic0",
            netdev=self.tap,
            socket=plan,
            local_migration=True,
            packed=packed,
            queues=self.rings,
            tracer=tracer,
        )
        self.device.open()
        ends.callback(self.device.close)
        self.rings.resume()
        self.tap.thaw()
        self.device.thaw()
        self.machine = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        self.machine.bind(("tap0", ETH_P_ALL))
        self.machine.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.machine.settimeout(PATIENCE_S)

    def _note(self, fact: Event) -> None:
        self.facts.append(fact)
        self._new_fact.set()

    async def fact(self, kind: type[EventT]) -> EventT:
        """The last fact of a kind, once there is one."""
        async with asyncio.timeout(PATIENCE_S):
            while not (found := [each for each in self.facts if isinstance(each, kind)]):
                self._new_fact.clear()
                await self._new_fact.wait()
        return found[-1]

    async def note(self, text: str) -> str:
        """The note with `text` in it, once there is one. On a slow machine there may be others before."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for fact in self.facts:
                    if isinstance(fact, DeviceNoted) and text in fact.note:
                        return fact.note
                self._new_fact.clear()
                await self._new_fact.wait()

    def guest(self, kind: type[NetGuest] = NetGuest, *, features: int = DRIVER_FEATURES, **more: Any) -> Guest:
        """A guest that is not attached yet; `more` is for its `NetGuest`."""
        return Guest(self, kind, features, self._ends, **more)

    async def changed(self, **expected: object) -> None:
        """Once the device heard of an interface that is so."""
        async with asyncio.timeout(PATIENCE_S):
            while not any(
                isinstance(fact, InterfaceChanged) and expected.items() <= dataclasses.asdict(fact).items()
                for fact in self.facts
            ):
                self._new_fact.clear()
                await self._new_fact.wait()


async def beside(work: Callable[..., Result], *arguments: Any) -> Result:
    """What blocks, beside the loop that serves the device."""
    return await asyncio.to_thread(work, *arguments)


class Guest:
    """A guest whose own TAP is a socket: frames go in and come out of `near`, behind their header."""

    def __init__(self, site: Site, kind: type[NetGuest], features: int, ends: ExitStack, **more: Any) -> None:
        self._site = site
        self.near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.enter_context(self.near)
        ends.enter_context(tap)
        self.near.settimeout(PATIENCE_S)
        tap.setblocking(False)
        where = site.path if site.listens else ends.enter_context(FrontendListener(site.path))
        self.vmm = ends.enter_context(
            kind(
                where,
                **{
                    "tap_fds": [tap.fileno()],
                    "queue_size": QUEUE_SIZE,
                    "features": features,
                    "answer_seconds_max": PATIENCE_S,
                    **more,
                },
            )
        )

    @property
    def header(self) -> int:
        return header_length(self.vmm.features)

    async def hears(self, number: int) -> None:
        """A frame from the machine reaches the guest."""
        self._site.machine.send(frame(number))
        assert (await beside(self.near.recv, 4096))[self.header :] == frame(number)

    async def says(self, number: int) -> None:
        """A frame from the guest reaches the machine."""
        self.near.send(bytes(self.header) + frame(number))
        assert await beside(self._site.machine.recv, 4096) == frame(number)

    async def talks(self) -> None:
        """More frames pass either way than a ring has entries."""
        for number in range(QUEUE_SIZE + 1):
            await self.hears(number)
            await self.says(number)

    def write_descriptor(self, ring: int, *, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Makes a descriptor available that no driver of ours would write, and kicks."""
        table, avail, _ = self.vmm._drivers[0].ring_addresses()[ring]
        memory = self.vmm.memory.mapping
        descriptor = b"".join(
            value.to_bytes(size, "little") for value, size in ((address, 8), (length, 4), (flags, 2), (following, 2))
        )
        memory.write(table, descriptor)
        index = int.from_bytes(memory.read(avail + 2, 2), "little")
        memory.write(avail + 4 + 2 * (index % QUEUE_SIZE), bytes(2))
        memory.write(avail + 2, ((index + 1) % (1 << 16)).to_bytes(2, "little"))
        os.eventfd_write(self.vmm._vrings[ring].kick.fileno(), 1)

    def write_packed_descriptor(self, ring: int, *, address: int, length: int) -> None:
        """Makes the first descriptor of a packed ring available, which nobody used yet, and kicks."""
        table, _, _ = self.vmm._drivers[0].ring_addresses()[ring]
        descriptor = address.to_bytes(8, "little") + length.to_bytes(4, "little") + bytes(2)
        self.vmm.memory.mapping.write(table, descriptor + DESCRIPTOR_AVAIL.to_bytes(2, "little"))
        os.eventfd_write(self.vmm._vrings[ring].kick.fileno(), 1)


def run(path: Path, scenario: Callable[[Site], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Serves the device while the scenario plays."""

    async def play() -> None:
        with ExitStack() as ends:
            await scenario(Site(path / "nic0.sock", ends, **options))

    asyncio.run(play())


# -- broken rings ---------------------------------------------------------------------------------------------

VRING_DESC_F_NEXT, VRING_DESC_F_WRITE = 1, 2


@pytest.mark.parametrize(
    ("address", "length", "flags"),
    [
        (0x10, 64, 0),  # nobody's memory
        (0x4000_0000, 0x7FFF_FFFF, 0),  # begins in memory and ends behind it
        (0xFFFF_FFFF_FFFF_FFF0, 64, 0),  # wraps around
        (0x4000_0000, 64, VRING_DESC_F_NEXT),  # follows itself
        (0x4000_0000, 64, VRING_DESC_F_WRITE),  # nothing to read for who sends
    ],
)
def test_a_chain_that_cannot_be_stops_its_ring_alone_until_the_driver_resets(
    tmp_path: Path, address: int, length: int, flags: int
) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        await guest.talks()
        guest.write_descriptor(TX, address=address, length=length, flags=flags)
        failed = await site.fact(RingFailed)
        assert (failed.device, failed.vring) == ("nic0", TX)
        assert failed.reason
        assert await beside(guest.vmm.ring_error, TX, PATIENCE_S)
        # The other ring goes on, and so does the session.
        for number in range(QUEUE_SIZE + 1):
            await guest.hears(number)
        assert not guest.vmm.ring_error(RX)
        assert await beside(guest.vmm.frontend.get_features)
        await beside(guest.vmm.reset_driver)
        await guest.talks()
        assert not guest.vmm.ring_error(TX)

    run(tmp_path, scenario)


def test_a_broken_ring_is_seen_with_its_reason_until_the_driver_resets(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        assert site.device.info().session is None
        assert site.device.info().vrings == ()
        guest = site.guest()
        await beside(guest.vmm.attach)
        await guest.talks()
        assert [vring.running for vring in site.device.info().vrings] == [True, True]
        guest.write_descriptor(TX, address=0x10, length=64)
        failed = await site.fact(RingFailed)
        rx, tx = site.device.info().vrings
        assert (rx.failed, rx.failure, rx.running) == (False, None, True)
        assert (tx.failed, tx.failure, tx.running, tx.started) == (True, failed.reason, False, True)
        await beside(guest.vmm.reset_driver)
        await guest.talks()
        assert [(vring.failed, vring.failure) for vring in site.device.info().vrings] == [(False, None)] * 2
        await beside(guest.vmm.close)
        await site.fact(SessionClosed)
        assert site.device.info().session is None

    run(tmp_path, scenario)


# -- packed rings ---------------------------------------------------------------------------------------------

PACKED_FEATURES: Final = DRIVER_FEATURES | Feature.RING_PACKED
DESCRIPTOR_AVAIL: Final = 1 << 7


def test_packed_rings_carry_frames_stop_go_on_and_begin_anew(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(features=PACKED_FEATURES)
        await beside(guest.vmm.attach)
        assert guest.vmm.features & Feature.RING_PACKED
        await guest.talks()
        # One lap and one entry: the wrap counters are 0 now.
        await beside(guest.vmm.detach)
        assert guest.vmm.bases == (0x0001_0001, 0x0001_0001)
        await beside(guest.vmm.attach)
        await guest.talks()
        memory = guest.vmm.memory
        await beside(guest.vmm.frontend.set_mem_table, [(memory.region, memory.fd.fileno())])
        await guest.talks()
        await beside(guest.vmm.frontend.remove_mem_region, memory.region)
        guest.near.send(bytes(guest.header) + frame(7))
        await beside(guest.vmm.frontend.add_mem_region, memory.region, memory.fd.fileno())
        assert await beside(site.machine.recv, 4096) == frame(7)
        await beside(guest.vmm.reset_driver)
        assert guest.vmm.bases == (0x8000_8000, 0x8000_8000)
        await guest.talks()
        await beside(guest.vmm.reconnect)
        await guest.talks()

    run(tmp_path, scenario, packed=True)


def test_a_guest_that_does_not_know_packed_rings_has_split_ones(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        for features in (DRIVER_FEATURES, PACKED_FEATURES, DRIVER_FEATURES):
            guest = site.guest(features=features)
            await beside(guest.vmm.attach)
            assert guest.vmm.features == features
            await guest.talks()
            await beside(guest.vmm.close)

    run(tmp_path, scenario, packed=True)


def test_packed_rings_are_offered_only_where_the_user_says_so(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(features=PACKED_FEATURES)
        await beside(guest.vmm.attach)
        assert guest.vmm.features == DRIVER_FEATURES
        await guest.talks()

    run(tmp_path, scenario)


def test_a_packed_chain_that_cannot_be_stops_its_ring_alone_until_the_driver_resets(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(features=PACKED_FEATURES)
        await beside(guest.vmm.attach)
        guest.write_packed_descriptor(TX, address=0x10, length=64)
        failed = await site.fact(RingFailed)
        assert (failed.vring, failed.reason) == (TX, "0x40 bytes at 0x10 are not inside guest memory")
        assert await beside(guest.vmm.ring_error, TX, PATIENCE_S)
        for number in range(QUEUE_SIZE + 1):
            await guest.hears(number)
        await beside(guest.vmm.reset_driver)
        guest.vmm.ring_error(TX)
        await guest.talks()

    run(tmp_path, scenario, packed=True)


# -- what frontends do ----------------------------------------------------------------------------------------

FRONTENDS: Final = {"qemu": QEMU, "user-mode-linux": USER_MODE_LINUX, "cloud-hypervisor": CLOUD_HYPERVISOR}


@pytest.mark.parametrize("features", [DRIVER_FEATURES, PACKED_FEATURES], ids=["split", "packed"])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_driver_reset_ends_a_failure_whatever_the_frontend_sends_for_it(
    tmp_path: Path, frontend: str, features: int
) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(features=features, habits=FRONTENDS[frontend])
        await beside(guest.vmm.attach)
        if features & Feature.RING_PACKED:
            guest.write_packed_descriptor(TX, address=0x10, length=64)
        else:
            guest.write_descriptor(TX, address=0x10, length=64)
        assert (await site.fact(RingFailed)).vring == TX
        await beside(guest.vmm.reset_driver)
        await guest.talks()
        assert not any(vring.failed for vring in site.device.info().vrings)
        await beside(guest.vmm.reset_driver)
        await guest.talks()

    run(tmp_path, scenario, packed=True)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_driver_that_fills_its_ring_first_receives_whatever_position_the_frontend_tells(
    tmp_path: Path, frontend: str
) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(habits=FRONTENDS[frontend], fills_first=True)
        await beside(guest.vmm.attach)
        await guest.talks()
        corrected = [(fact.vring, fact.told, fact.begun) for fact in site.facts if isinstance(fact, RingCorrected)]
        tells_another = FRONTENDS[frontend].base_is_avail_index
        assert corrected == ([(RX, QUEUE_SIZE, 0)] if tells_another else [])
        await beside(guest.vmm.detach)
        assert guest.vmm._bases == [QUEUE_SIZE + 1] * 2
        await beside(guest.vmm.attach)
        await guest.talks()
        await beside(guest.vmm.reconnect)
        await guest.talks()

    run(tmp_path, scenario)


def test_a_handover_that_tells_another_position_than_guest_memory_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        await guest.talks()
        site.rings.stop()
        state = site.rings.save_switchover()
        site.rings.adopt_setup(site.rings.save_setup(with_descriptors=False))
        site.rings.adopt_switchover(state._replace(positions=b"\0\3" + state.positions[2:]))
        site.rings.resume()
        told = "device 'nic0': vring 0 (rx) goes on at 17, where its used index stands, and was told 3"
        assert site.device.take_notes() == [told]
        assert site.device.take_notes() == []
        fact = await site.fact(RingCorrected)
        assert (fact.device, fact.vring, fact.told, fact.begun) == ("nic0", RX, 3, QUEUE_SIZE + 1)
        await guest.talks()

    run(tmp_path, scenario)
    assert "vring 0 (rx) goes on at 17, where its used index stands, and was told 3" in caplog.text


# -- what keeps it from working -------------------------------------------------------------------------------


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "LOOK_SECONDS", 0.05)


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("features", [DRIVER_FEATURES, PACKED_FEATURES], ids=["split", "packed"])
def test_memory_that_is_not_shared_is_told_of_until_it_is(tmp_path: Path, features: int) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(features=features)
        await beside(guest.vmm.attach)
        shared = guest.vmm.memory.region, guest.vmm.memory.fd.fileno()
        with OwnedFd(os.memfd_create("another")) as another:
            os.ftruncate(another.fileno(), guest.vmm.memory.region.size)
            await beside(guest.vmm.frontend.set_mem_table, [(guest.vmm.memory.region, another.fileno())])
        guest.near.send(bytes(guest.header) + frame(0))
        assert await site.note("the guest has other memory") == notes.NOT_SHARED
        assert notes.NOT_SHARED in site.device.info().notes
        await beside(guest.vmm.frontend.set_mem_table, [shared])
        assert await beside(site.machine.recv, 4096) == frame(0)
        assert site.device.info().notes == ()
        await guest.talks()

    run(tmp_path, scenario, packed=True)


@pytest.mark.usefixtures("quick_looks")
def test_a_program_that_says_nothing_is_told_of(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        with await beside(Frontend.connect, site.path) as program:
            note = await site.note("says nothing")
            assert site.device.info().notes == (note,)
            await beside(program.get_features)
            assert site.device.info().notes == ()

    run(tmp_path, scenario)


@pytest.mark.usefixtures("quick_looks")
def test_too_many_queue_pairs_are_told_of_once_however_often_the_frontend_comes(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        for _ in range(3):
            with await beside(Frontend.connect, site.path) as qemu, OwnedFd(os.eventfd(0)) as call:
                await beside(qemu.set_protocol_features, ProtocolFeature.MQ)
                assert await beside(qemu.get_queue_num) == 5
                for index in range(8):
                    await beside(qemu.set_vring_call, index, call.fileno())
                note = await site.note("QEMU asks for 4 pairs, nic0 has 2")
            await site.fact(SessionClosed)
            site.facts = [fact for fact in site.facts if not isinstance(fact, SessionClosed)]
            assert site.device.info().notes == (note,)
        assert [fact.note for fact in site.facts if isinstance(fact, DeviceNoted)].count(note) == 1
        guest = site.guest(queue_pairs=2, tap_fds=[])
        await beside(guest.vmm.attach)
        assert site.device.info().notes == ()

    run(tmp_path, scenario, queues=2)


def test_the_same_mistake_again_and_again_is_one_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(site: Site) -> None:
        for _ in range(3):
            with await beside(Frontend.connect, site.path) as frontend:
                await beside(frontend.send, b"\xff" * 12)
                assert await beside(frontend.is_lost, PATIENCE_S)

    with caplog.at_level(logging.INFO):
        run(tmp_path, scenario)
    assert caplog.text.count("closed: request 4294967295 is unknown") == 1


# -- memory ---------------------------------------------------------------------------------------------------


def test_memory_may_be_told_anew_while_rings_run(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        memory = guest.vmm.memory
        for _ in range(3):
            await guest.talks()
            await beside(guest.vmm.frontend.set_mem_table, [(memory.region, memory.fd.fileno())])
        await guest.talks()

    run(tmp_path, scenario)


def test_rings_stand_still_while_their_memory_is_away(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        frontend, memory = guest.vmm.frontend, guest.vmm.memory
        await guest.talks()
        with ExitStack() as ends:
            file = os.memfd_create("more")
            ends.callback(os.close, file)
            os.ftruncate(file, 4096)
            more = RegionDescription(guest_address=0x1000, size=4096, user_address=0x5000_0000, mmap_offset=0)
            await beside(frontend.add_mem_region, more, file)
        await guest.talks()
        await beside(frontend.remove_mem_region, memory.region)
        guest.near.send(bytes(guest.header) + frame(7))
        site.machine.send(frame(8))
        await beside(frontend.remove_mem_region, more)
        assert guest.vmm.used_index(TX) == guest.vmm.used_index(RX) == 2 * (QUEUE_SIZE + 1)
        # What waited meanwhile goes its way.
        await beside(frontend.add_mem_region, memory.region, memory.fd.fileno())
        assert await beside(site.machine.recv, 4096) == frame(7)
        assert (await beside(guest.near.recv, 4096))[guest.header :] == frame(8)
        await guest.talks()

    run(tmp_path, scenario)


# -- what a frontend asks for ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("mtu", "accepted"), [(68, True), (1500, True), (1501, False), (9000, False)])
def test_an_mtu_the_tap_does_not_have_is_refused_and_the_session_goes_on(
    tmp_path: Path, mtu: int, accepted: bool
) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        if accepted:
            await beside(guest.vmm.frontend.set_mtu, mtu)
        else:
            with pytest.raises(PeerError, match="backend refused NET_SET_MTU"):
                await beside(guest.vmm.frontend.set_mtu, mtu)
        await guest.talks()

    run(tmp_path, scenario)


def test_a_rarp_for_the_guest_goes_into_the_network(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        await beside(guest.vmm.frontend.send_rarp, MAC)
        packet = await beside(site.machine.recv, 4096)
        # RFC 903: to everybody, from the guest, type 8035, operation 3 "request reverse", the guest as both.
        assert packet[:14] == b"\xff" * 6 + MAC + b"\x80\x35"
        assert packet[14:42] == bytes.fromhex("0001 0800 06 04 0003") + 2 * (MAC + bytes(4))
        assert len(packet) == 60
        # Who serves the guest elsewhere knows it too.
        assert site.device.save(with_descriptors=False).mac == MAC
        await guest.talks()

    run(tmp_path, scenario)


class LegacyGuest(NetGuest):
    """A driver from before virtio 1.0, which acknowledges nothing: its header has no number of buffers."""

    def _negotiate(self, frontend: Frontend) -> None:
        frontend.get_features()
        frontend.set_protocol_features(frontend.get_protocol_features() & PROTOCOL_FEATURES)
        frontend.set_owner()
        for index, vring in enumerate(self._vrings):
            frontend.set_vring_call(index, vring.call.fileno())


def test_the_header_has_the_length_the_guest_knows(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        for kind, length in ((NetGuest, 12), (LegacyGuest, 10), (NetGuest, 12)):
            guest = site.guest(kind)
            await beside(guest.vmm.attach)
            assert bool(guest.vmm.features & Feature.VERSION_1) == (kind is NetGuest)
            assert site.tap.vnet_header_length == guest.header == length
            await guest.talks()
            await beside(guest.vmm.close)

    run(tmp_path, scenario)


# -- frontends that come and go -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"\xff" * 12, "unknown"),
        (encode_request(Request.SET_VRING_BASE, VringNumber(index=TX, number=8)), "which is running"),
        (encode_request(Request.GET_QUEUE_NUM)[:4] + b"\2\0\0\0\0\0\0\0", "version"),
    ],
)
def test_a_wrong_message_closes_its_session_and_the_next_frontend_is_served(
    tmp_path: Path, message: bytes, complaint: str
) -> None:
    async def scenario(site: Site) -> None:
        rude = site.guest()
        await beside(rude.vmm.attach)
        await rude.talks()
        rude.vmm.frontend.send(message)
        closed = await site.fact(SessionClosed)
        assert complaint in str(closed.reason)
        assert await beside(rude.vmm.frontend.is_lost, PATIENCE_S)
        polite = site.guest()
        await beside(polite.vmm.attach)
        await polite.talks()

    run(tmp_path, scenario)


def test_a_device_connects_to_one_vmm_after_the_other(tmp_path: Path) -> None:
    async def play() -> None:
        with ExitStack() as ends:
            site = Site(tmp_path / "nic0.sock", ends, reconnect_ms=1)
            for _ in range(2):
                guest = site.guest()
                await beside(guest.vmm.attach)
                await guest.talks()
                # A VMM that goes on listening when its backend left, as QEMU does.
                guest.vmm.disconnect()
                await beside(guest.vmm.reconnect)
                await guest.talks()
                await beside(guest.vmm.close)

    asyncio.run(play())


# -- the interface --------------------------------------------------------------------------------------------


async def told(guest: Guest) -> tuple[int, int]:
    """(link status, MTU) as the frontend reads them from the configuration space."""
    config = await beside(guest.vmm.frontend.get_config, 0, 12)
    assert config is not None
    return int.from_bytes(config[6:8], "little"), int.from_bytes(config[10:12], "little")


def test_the_guests_link_and_mtu_follow_the_interface(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        wanted = guest.vmm.frontend.protocol_features | ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ
        await beside(guest.vmm.frontend.set_protocol_features, wanted)
        near, far = socket.socketpair()
        with near, far:
            near.settimeout(PATIENCE_S)
            await beside(guest.vmm.frontend.set_backend_request_fd, far.fileno())
            assert await told(guest) == (LinkStatus.LINK_UP, 1500)
            ip("link", "set", "tap0", "down")
            # VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
            assert int.from_bytes((await beside(near.recv, 12))[:4], "little") == 2
            await site.changed(link_is_up=False)
            assert await told(guest) == (0, 1500)
        ip("link", "set", "tap0", "mtu", "9000", "up")
        await site.changed(link_is_up=True, mtu=9000)
        assert await told(guest) == (LinkStatus.LINK_UP, 9000)
        site.machine.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # that it was down, which it tells once
        await guest.talks()

    run(tmp_path, scenario)


def test_an_mtu_that_was_raised_just_now_can_be_set_and_its_frames_find_room(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        await guest.talks()
        with pytest.raises(PeerError):
            await beside(guest.vmm.frontend.set_mtu, 9000)
        ip("link", "set", "tap0", "mtu", "9000")
        await beside(guest.vmm.frontend.set_mtu, 9000)
        long = frame(1) + bytes(8900)
        site.machine.send(long)
        assert (await beside(guest.near.recv, 10000))[guest.header :] == long
        ip("link", "set", "tap0", "mtu", "1500")
        await site.changed(mtu=1500)
        (note,) = site.tap.info().notes
        assert note == "'tap0' has MTU 1500, and the guest uses 9000: ip link set tap0 mtu 9000"
        await beside(guest.vmm.close)
        await site.fact(SessionClosed)
        assert site.tap.info().notes == ()

    run(tmp_path, scenario)


@pytest.mark.parametrize("packed", [False, True])
def test_a_guest_goes_on_with_an_interface_that_was_deleted_and_made_again(tmp_path: Path, packed: bool) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(features=PACKED_FEATURES if packed else DRIVER_FEATURES)
        await beside(guest.vmm.attach)
        await guest.talks()

        def lost() -> int:
            (pair,) = site.device.info().queue_pairs
            return pair.counters.tx_dropped_interface

        for _ in range(2):
            site.facts.clear()
            before = lost()
            ip("link", "del", "tap0")
            await site.changed(link_is_up=False)
            info = site.device.info()
            assert [vring.running for vring in info.vrings] == [False, False]
            assert not any(vring.failed for vring in info.vrings)
            # What it sends meanwhile is lost, and its ring goes on.
            for number in range(2 * QUEUE_SIZE):
                guest.near.send(bytes(guest.header) + frame(number))
            async with asyncio.timeout(PATIENCE_S):
                while lost() < before + 2 * QUEUE_SIZE:
                    assert await beside(guest.vmm.frontend.get_features)
            ip("tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr")
            await site.changed(link_is_up=True)
            assert [vring.running for vring in site.device.info().vrings] == [True, True]
            site.machine.bind(("tap0", ETH_P_ALL))
            site.machine.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            await guest.talks()
        assert not [fact for fact in site.facts if isinstance(fact, RingFailed)]

    run(tmp_path, scenario, packed=packed)


def test_the_interface_has_a_carrier_while_a_driver_serves_the_nic(tmp_path: Path) -> None:
    def has_carrier() -> bool:
        return "LOWER_UP" in link("tap0")["flags"]

    async def scenario(site: Site) -> None:
        assert not has_carrier()
        guest = site.guest()
        assert not has_carrier()
        await beside(guest.vmm.attach)
        await beside(guest.vmm.frontend.get_features)  # all before it is done
        assert has_carrier()
        await beside(guest.vmm.detach)
        await beside(guest.vmm.frontend.get_features)
        assert not has_carrier()
        await beside(guest.vmm.attach)
        await beside(guest.vmm.frontend.get_features)  # all before it is done
        assert has_carrier()
        await beside(guest.vmm.close)
        await site.fact(SessionClosed)
        assert not has_carrier()

    run(tmp_path, scenario, guest_carrier=True)


def test_a_kernel_that_turns_no_carrier_ends_neither_a_session_nor_a_takeover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        await beside(guest.vmm.frontend.get_features)  # all before it is done
        await guest.talks()
        monkeypatch.setattr(tun, "turn_carrier_off", refuse)
        await beside(guest.vmm.detach)
        site.device.freeze()
        site.device.thaw()
        await beside(guest.vmm.attach)
        await guest.talks()

    run(tmp_path, scenario, guest_carrier=True)
    assert "device 'nic0': netdev 'net0': cannot turn the carrier of TAP 'tap0' off: Invalid argument" in caplog.text
    caplog.clear()  # its records lead to the frames of those errors, and to queue pairs


# -- arriving -------------------------------------------------------------------------------------------------


def test_the_mtu_is_known_while_the_tap_is_awaited(tmp_path: Path) -> None:
    config = NetConfig(mtu=1400)

    async def scenario(site: Site) -> None:
        with ExitStack() as ends:
            tracer = Tracer()
            tap = Tap(id="net1", ifname="tap1")
            path = str(tmp_path / "nic1.sock")
            rings = Queues(tracer)
            device = VirtioNet(
                id="nic1", netdev=tap, socket=ListenAt(path=path), local_migration=True, queues=rings, tracer=tracer
            )
            device.adopt_setup(DeviceState(features_acked=0, config=config.encode(), socket=None))
            ends.callback(device.close)
            device.thaw()
            frontend = ends.enter_context(await beside(Frontend.connect, path))
            await beside(frontend.set_protocol_features, ProtocolFeature.CONFIG)
            assert NetConfig.decode(await beside(frontend.get_config, 0, 24)) == config
            tap.open()
            ends.callback(tap.close)
            device.source_released()
            assert NetConfig.decode(await beside(frontend.get_config, 0, 24)).mtu == 1500

    run(tmp_path, scenario)


def test_a_tap_without_udp_segmentation_refuses_a_guest_that_uses_it(tmp_path: Path) -> None:
    acked = int(Feature.VERSION_1 | NetFeature.CSUM | NetFeature.HOST_USO)
    state = DeviceState(features_acked=acked, config=NetConfig().encode(), socket=None)

    async def scenario(site: Site) -> None:
        tracer = Tracer()
        for has_uso in (True, False):
            assert site.tap._open is not None
            site.tap._open.has_uso = has_uso
            device = VirtioNet(
                id="nic1",
                netdev=site.tap,
                socket=ListenAt(path=str(tmp_path / "nic1.sock")),
                local_migration=True,
                queues=Queues(tracer),
                tracer=tracer,
            )
            # What the TAP knows is not known before it is there.
            device.check_setup(state)
            if has_uso:
                device.adopt_setup(state)
            else:
                text = f"device 'nic1': the guest uses features {acked:#x}, of which {NetFeature.HOST_USO:#x} are not"
                with pytest.raises(PeerError, match=text):
                    device.adopt_setup(state)
            device.discard()

    run(tmp_path, scenario)
