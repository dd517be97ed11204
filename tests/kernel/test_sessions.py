"""Several frontends of one NIC on a real TAP: whose rings run, and that no frame is lost or comes twice meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from tests.kernel.test_virtio_net import MAC, Guest, Site, beside, frame, run

from localmig.contact import ListenAt
from localmig.device_api import CallbackDevice, Chain, Queues
from localmig.errors import NotFoundError
from localmig.fds import OwnedFd
from localmig.testing.driver import Driver
from localmig.testing.frontend import DRIVER_FEATURES, RX, TX, Frontend, NetGuest
from localmig.trace import GuestAnnounced, OwnerChanged, SessionClosed, Tracer
from localmig.vhost_user.message import PROTOCOL_FEATURES_BIT, VringAddress
from localmig.vhost_user.ownership import SESSION_COUNT_MAX
from localmig.virtio import Feature
from localmig.virtio.net import NetFeature

PACKED_FEATURES: Final = DRIVER_FEATURES | Feature.RING_PACKED

pytestmark = pytest.mark.usefixtures("no_descriptor_is_lost")


def second_vmm(site: Site, guest: Guest) -> NetGuest:
    """The VMM that the guest moves to, connected as one that waits for it."""
    vmm = NetGuest(site.path, moved_from=guest.vmm)
    site._ends.callback(vmm.close)
    return vmm


def roles(site: Site) -> list[tuple[int, str]]:
    return [(session.number, str(session.role)) for session in site.device.info().sessions]


async def hears(guest: Guest, numbers: Sequence[int]) -> None:
    """These frames reach the guest, in this order, and no other one before them."""
    for number in numbers:
        assert (await beside(guest.near.recv, 4096))[guest.header :] == frame(number)


async def owner_is(site: Site, number: int) -> OwnerChanged:
    fact = await site.fact(OwnerChanged)
    assert fact.session == number
    return fact


@pytest.mark.parametrize("packed", [False, True])
def test_a_guest_moves_to_another_vmm_and_loses_nothing(
    tmp_path: Path, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(features=PACKED_FEATURES if packed else DRIVER_FEATURES)
        await beside(guest.vmm.attach)
        await guest.talks()
        other = second_vmm(site, guest)
        await beside(other.connect)
        assert roles(site) == [(1, "owns"), (2, "idle")]
        await guest.talks()
        await beside(guest.vmm.detach)
        # Until the other one starts, what comes waits in the TAP, and what the guest sends in its ring.
        for number in range(3):
            site.machine.send(frame(number))
            guest.near.send(bytes(guest.header) + frame(100 + number))
        site.facts.clear()
        await beside(other.arrive, guest.vmm.bases)
        await hears(guest, range(3))
        for number in range(3):
            assert await beside(site.machine.recv, 4096) == frame(100 + number)
        await guest.talks()
        assert roles(site) == [(1, "idle"), (2, "owns")]
        fact = await owner_is(site, 2)
        assert (fact.former_session, fact.pid, fact.former_pid) == (1, fact.pid, fact.pid)
        # The former VMM leaves, and nobody notices.
        guest.vmm.disconnect()
        await site.fact(SessionClosed)
        await guest.talks()
        await beside(other.detach)

    with caplog.at_level(logging.INFO):
        run(tmp_path, scenario, packed=packed)
    assert "session 2 (process" in caplog.text
    assert "owns the device now, because session 1 (process" in caplog.text


@pytest.mark.parametrize("packed", [False, True])
def test_an_idle_guests_first_frame_waits_until_its_new_vmm_has_the_rings(tmp_path: Path, packed: bool) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(features=PACKED_FEATURES if packed else DRIVER_FEATURES)
        await beside(guest.vmm.attach)
        other = second_vmm(site, guest)
        await beside(other.connect)
        await beside(guest.vmm.detach)
        site.machine.send(frame(1))
        # No ring has moved, so that it continues is not to be seen: it waits for the former VMM's end.
        await beside(other.arrive, guest.vmm.bases)
        assert roles(site) == [(1, "owns"), (2, "held")]
        guest.vmm.disconnect()
        await hears(guest, [1])
        await guest.talks()
        await beside(other.detach)

    run(tmp_path, scenario, packed=packed)


def test_who_stopped_goes_on_if_nobody_has_run_since(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        await guest.talks()
        other = second_vmm(site, guest)
        await beside(other.connect)
        await beside(guest.vmm.detach)
        site.machine.send(frame(1))
        await beside(guest.vmm.attach)
        await hears(guest, [1])
        await guest.talks()
        assert roles(site) == [(1, "owns"), (2, "idle")]

    run(tmp_path, scenario)


def test_a_former_owner_is_held_until_its_successor_left(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        await guest.talks()
        other = second_vmm(site, guest)
        await beside(guest.vmm.detach)
        former_bases = guest.vmm.bases
        await beside(other.arrive, former_bases)
        await guest.talks()
        # It is answered as ever, and its rings wait.
        await beside(guest.vmm.attach)
        assert roles(site) == [(1, "held"), (2, "owns")]
        await guest.talks()
        assert [await beside(guest.vmm.frontend.get_vring_base, index) for index in (RX, TX)] == list(former_bases)
        await beside(guest.vmm.attach)
        # Nor does it get them while its successor pauses where it stood.
        await beside(other.detach)
        assert roles(site) == [(1, "held"), (2, "owns")]
        await beside(other.attach)
        await guest.talks()
        note = await site.note("session 1 (process")
        assert "waits for the rings that session 2" in note
        other.disconnect()
        await site.fact(SessionClosed)
        fact = await site.fact(OwnerChanged)
        assert (fact.session, fact.former_session) == (1, 2)
        await guest.talks()

    run(tmp_path, scenario)


def test_another_guest_is_held_while_the_first_one_is_connected(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        first, second = site.guest(), site.guest()
        await beside(first.vmm.attach)
        await first.talks()
        await beside(second.vmm.attach)
        assert roles(site) == [(1, "owns"), (2, "held")]
        await first.talks()
        # The first one reboots, pauses, and begins anew: the second gets nothing.
        await beside(first.vmm.reset_driver)
        await first.talks()
        await beside(first.vmm.detach)
        assert roles(site) == [(1, "owns"), (2, "held")]
        site.machine.send(frame(77))
        await beside(first.vmm.attach)
        await hears(first, [77])
        site.facts.clear()
        first.vmm.disconnect()
        await owner_is(site, 2)
        await second.talks()
        assert roles(site) == [(2, "owns")]

    run(tmp_path, scenario)


def test_what_a_session_says_reaches_the_netdev_once_it_owns(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        first = site.guest()
        await beside(first.vmm.attach)
        await beside(first.vmm.frontend.set_mtu, 1400)
        await first.talks()
        offloads = site.tap.offloads
        offloading = DRIVER_FEATURES | NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4
        second = site.guest(features=offloading)
        await beside(second.vmm.attach)
        await beside(second.vmm.frontend.set_mtu, 1300)
        await beside(second.vmm.frontend.send_rarp, MAC)
        assert (site.tap.mtu_told, site.tap.offloads) == (1400, offloads)
        assert not [fact for fact in site.facts if isinstance(fact, GuestAnnounced)]
        await first.talks()
        first.vmm.disconnect()
        assert (await site.fact(GuestAnnounced)).mac == MAC.hex(":")
        assert site.tap.mtu_told == 1300
        assert site.tap.offloads != offloads
        assert (await beside(site.machine.recv, 4096))[12:14] == b"\x80\x35"
        await second.talks()

    run(tmp_path, scenario)


def test_an_mtu_that_cannot_be_is_refused_to_whoever_asks(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        first, second = site.guest(), site.guest()
        await beside(first.vmm.attach)
        await beside(second.vmm.connect)
        with pytest.raises(Exception, match="backend refused NET_SET_MTU"):
            await beside(second.vmm.frontend.set_mtu, 9000)
        await first.talks()

    run(tmp_path, scenario)


def test_the_second_pair_stays_attached_while_a_guest_moves(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest(tap_fds=[], queue_pairs=2)
        await beside(guest.vmm.attach)
        other = second_vmm(site, guest)
        await beside(other.connect)
        # As QEMU does, which disables nothing.
        bases = [await beside(guest.vmm.frontend.get_vring_base, index) for index in range(4)]
        assert site.tap.info().attached_count == 2
        await beside(other.arrive, bases)
        assert site.tap.info().attached_count == 2

    run(tmp_path, scenario, queues=2)


def test_eight_silent_programs_keep_no_guest_out(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        with ExitStack() as programs:
            for _ in range(SESSION_COUNT_MAX):
                await beside(lambda: programs.enter_context(Frontend.connect(site.path)).get_features())
            guest = site.guest()
            await beside(guest.vmm.attach)
            await guest.talks()
            # Nor do those that come later cost the guest anything.
            for _ in range(SESSION_COUNT_MAX):
                await beside(lambda: programs.enter_context(Frontend.connect(site.path)).get_features())
            await guest.talks()
            assert roles(site)[0] == (SESSION_COUNT_MAX + 1, "owns")
            assert len(roles(site)) == SESSION_COUNT_MAX

    run(tmp_path, scenario)


def test_a_set_up_without_memory_or_without_enabled_rings_keeps_nobody_out(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        half = site.guest()
        await beside(half.vmm.connect)
        frontend = half.vmm.frontend
        await beside(frontend.set_features, half.vmm.features | 1 << PROTOCOL_FEATURES_BIT)
        with OwnedFd(os.eventfd(0)) as kick:
            await beside(frontend.set_vring_num, RX, 16)
            await beside(
                frontend.set_vring_addr,
                VringAddress(index=RX, descriptor_area=4096, device_area=8192, driver_area=12288),
            )
            await beside(frontend.set_vring_kick, RX, kick.fileno())
            await beside(frontend.enable_vring, RX)
        assert roles(site) == [(1, "idle")]
        guest = site.guest()
        await beside(guest.vmm.attach)
        await guest.talks()
        assert roles(site) == [(1, "idle"), (2, "owns")]

    run(tmp_path, scenario)


# -- a device of Python's -------------------------------------------------------------------------------------


class Echo(CallbackDevice):
    """Returns what was written, and remembers which rings it was told to forget."""

    device_id = 42
    ring_names = ("echo",)

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.returned = 0

    def on_chain(self, chain: Chain) -> None:
        chain.complete(chain.readable[: chain.writable])

    def on_returned(self, ring: str) -> None:
        self.returned += 1


def test_a_device_of_pythons_serves_the_session_that_owns(tmp_path: Path) -> None:
    path = str(tmp_path / "echo.sock")
    tracer = Tracer()

    async def play() -> None:
        queues = Queues(tracer)
        echo = Echo(id="echo0", socket=ListenAt(path=path), local_migration=True, queues=queues, tracer=tracer)
        echo.open()
        try:
            queues.resume()
            echo.thaw()
            with Driver(path, ring_count=1) as first, Driver(path, ring_count=1) as second:
                await beside(first.attach)
                assert await beside(lambda: first.request(0, b"first", room=5)) == b"first"
                await beside(second.attach)
                head = second.add(0, b"second", room=6)
                assert await beside(lambda: first.request(0, b"again", room=5)) == b"again"
                first.disconnect()
                assert await beside(second.take_used, 0) == (head, b"second")
                assert echo.returned
        finally:
            echo.close()

    asyncio.run(play())


def test_a_session_is_ended_by_its_number(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        first, second = site.guest(), site.guest()
        await beside(first.vmm.attach)
        await beside(second.vmm.attach)
        with pytest.raises(NotFoundError, match=r"has no session 7, there is 1 \(owns\), 2 \(held\)"):
            site.device.close_session(7)
        site.device.close_session(1)
        assert await beside(first.vmm.frontend.is_lost, 10.0)
        await owner_is(site, 2)
        await second.talks()

    run(tmp_path, scenario)


def test_a_held_session_whose_rings_cannot_be_costs_the_owner_nothing(tmp_path: Path) -> None:
    class Odd(NetGuest):
        """Its call descriptor is one that cannot be written."""

        def _set_up(self, frontend: Any) -> None:
            super()._set_up(frontend)
            with open("/dev/null", "rb") as null:
                frontend.set_vring_call(RX, null.fileno())

    async def scenario(site: Site) -> None:
        first, odd, third = site.guest(), site.guest(Odd), site.guest()
        await beside(first.vmm.attach)
        await beside(odd.vmm.attach)
        await beside(third.vmm.attach)
        await first.talks()
        site.facts.clear()
        first.vmm.disconnect()
        assert await beside(odd.vmm.frontend.is_lost, 10.0)
        await third.talks()
        assert roles(site) == [(3, "owns")]

    run(tmp_path, scenario)
