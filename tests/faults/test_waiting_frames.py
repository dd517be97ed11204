"""Frames that a guest has no buffers for, or no driver, while daemons and drivers change."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.faults.test_handover_processes import hand_over

from localmig.fds import OwnedFd
from localmig.netdevs import tun
from localmig.netdevs.tun import Flag
from localmig.testing.frontend import DRIVER_FEATURES, RX, TX, NetGuest
from localmig.virtio import Feature
from localmig.virtio.net import NetFeature

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

PATIENCE_S: Final = 20.0
ETH_P_ALL: Final = 3
ENTRIES: Final = 16
LARGE: Final = 5000
"""Bytes of a frame that needs three of the driver's buffers."""
HEADER: Final = 12

PACKED: Final = DRIVER_FEATURES | Feature.RING_PACKED
TSO: Final = DRIVER_FEATURES | NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6


def frame(number: int, length: int = 60) -> bytes:
    """To everybody, of a type nobody knows."""
    head = b"\xff" * 6 + bytes.fromhex("525400123456") + b"\x88\xb5" + number.to_bytes(4, "big")
    return head.ljust(length, bytes([number % 256]))


class Machine:
    """The machine's side of the TAP, and guests behind the NIC whose own TAP is a socket."""

    def __init__(self, site: Site, ends: ExitStack) -> None:
        self._site = site
        self._ends = ends
        with site.namespace.entered():
            # The kernel's own frames would take the guest's buffers.
            Path("/proc/sys/net/ipv6/conf/tap0/disable_ipv6").write_text("1\n")
            self._socket = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, ETH_P_ALL))
            self._socket.bind(("tap0", 0))

    def send(self, *frames: bytes) -> None:
        for each in frames:
            self._socket.send(each)

    def guest(self, features: int = DRIVER_FEATURES) -> Guest:
        return Guest(str(self._site.socket), features, self._ends)


class Guest:
    """A driver that can be kept from posting buffers."""

    def __init__(self, path: str, features: int, ends: ExitStack) -> None:
        self._near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.enter_context(self._near)
        ends.enter_context(tap)
        self._near.settimeout(PATIENCE_S)
        tap.setblocking(False)
        self.vmm = ends.enter_context(NetGuest(path, tap_fds=[tap.fileno()], queue_size=ENTRIES, features=features))

    def receive(self) -> bytes:
        """The next frame of this test; others are the kernel's own."""
        while (got := self._near.recv(1 << 17)[HEADER:])[12:14] != b"\x88\xb5":
            pass
        return got

    def freeze(self) -> None:
        """It takes nothing out of its rings and posts nothing."""
        self.vmm._drivers[0].stop()

    def thaw(self) -> None:
        self.vmm._drivers[0].start()

    @property
    def used(self) -> int:
        return self.vmm.used_index(RX)


def counter(daemon: DaemonProcess, name: str) -> int:
    (device,) = daemon.execute("query-devices")
    count: int = device["queue-pairs"][0]["counters"][name]
    return count


def await_that(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end, "it did not come to that"


def leave(daemon: DaemonProcess, guest: Guest) -> None:
    """The guest's VMM goes without a word, and the daemon knows."""
    guest.vmm.disconnect()
    await_that(lambda: daemon.execute("query-devices")[0].get("session") is None)


@contextmanager
def machine_of(site: Site) -> Iterator[Machine]:
    with ExitStack() as ends:
        yield Machine(site, ends)


def let_one_wait(machine: Machine, guest: Guest, daemon: DaemonProcess, *, of: int) -> None:
    """Fills all the guest's buffers but two, then sends a frame that needs three."""
    machine.send(frame(250))
    assert guest.receive() == frame(250)
    guest.freeze()
    before = counter(daemon, "rx-packets")
    machine.send(*(frame(number) for number in range(ENTRIES - 2)))
    await_that(lambda: counter(daemon, "rx-packets") >= before + ENTRIES - 2)
    machine.send(frame(of, LARGE))


def serve(site: Site, *, device: str = "", fault: str | None = None) -> DaemonProcess:
    """A daemon whose TAP has room for large frames."""
    return site.source(*site.objects(device=device, netdev=",mtu=9000"), fault=fault)


@pytest.mark.parametrize(("device", "features"), [("", DRIVER_FEATURES), (",packed=on", PACKED)])
def test_a_frame_that_waits_for_buffers_is_handed_over_and_delivered_once(
    site: Site, device: str, features: int
) -> None:
    source = serve(site, device=device)
    with machine_of(site) as machine:
        guest = machine.guest(features)
        guest.vmm.attach()
        let_one_wait(machine, guest, source, of=77)
        stale = counter(source, "rx-dropped-stale")
        machine.send(frame(78))
        serving = source
        for _ in range(2):
            destination = site.destination()
            assert hand_over(site, serving, destination)["status"] == "completed"
            assert not [target for target in site.descriptors(serving) if "waiting-frames" in target]
            assert serving.quit() == 0
            destination.execute("migrate-set-parameters", local=True)
            serving = destination
        guest.thaw()
        assert [guest.receive() for _ in range(ENTRIES - 2)] == [frame(number) for number in range(ENTRIES - 2)]
        assert guest.receive() == frame(77, LARGE)
        assert guest.receive() == frame(78)
        assert (counter(serving, "rx-dropped-length"), counter(serving, "rx-dropped-stale")) == (0, stale)


def test_a_frame_that_waits_is_the_sources_still_after_a_handover_that_failed(site: Site) -> None:
    source = serve(site)
    with machine_of(site) as machine:
        guest = machine.guest()
        guest.vmm.attach()
        let_one_wait(machine, guest, source, of=77)
        destination = site.destination(fault="before-send:READY=kill")
        assert hand_over(site, source, destination)["status"] == "failed"
        assert destination.wait() == -signal.SIGKILL
        guest.thaw()
        assert [guest.receive() for _ in range(ENTRIES - 2)] == [frame(number) for number in range(ENTRIES - 2)]
        assert guest.receive() == frame(77, LARGE)


@pytest.mark.parametrize(("fault", "kept"), [("before-send:SWITCHOVER=kill", False), ("before-send:COMMIT=kill", True)])
def test_a_frame_that_waits_is_a_packet_in_hand_when_its_daemon_dies(site: Site, fault: str, kept: bool) -> None:
    source, destination = serve(site, fault=fault), site.destination()
    with machine_of(site) as machine:
        guest = machine.guest()
        guest.vmm.attach()
        let_one_wait(machine, guest, source, of=77)
        machine.send(frame(78))
        source.execute("migrate", uri=site.address)
        assert source.wait() == -signal.SIGKILL
        destination.wait_event("MigrationStatusChanged", status="completed")
        guest.thaw()
        assert [guest.receive() for _ in range(ENTRIES - 2)] == [frame(number) for number in range(ENTRIES - 2)]
        if kept:
            assert guest.receive() == frame(77, LARGE)
        assert guest.receive() == frame(78)


def test_a_frame_that_waits_holds_up_neither_what_the_guest_sends_nor_a_pause(site: Site) -> None:
    source = serve(site)
    with machine_of(site) as machine:
        guest = machine.guest()
        guest.vmm.attach()
        let_one_wait(machine, guest, source, of=77)
        sent = counter(source, "tx-packets")
        # The driver's thread is stopped: what it would send is written by hand, by a kick of an empty ring.
        os.eventfd_write(guest.vmm._vrings[TX].kick.fileno(), 1)
        guest.vmm.detach()
        assert counter(source, "tx-packets") == sent
        machine.send(frame(78))
        guest.vmm.attach()
        guest.thaw()
        assert [guest.receive() for _ in range(ENTRIES - 2)] == [frame(number) for number in range(ENTRIES - 2)]
        assert [guest.receive(), guest.receive()] == [frame(77, LARGE), frame(78)]


def test_a_driver_that_is_paused_or_whose_vmm_reconnects_gets_what_waited(site: Site) -> None:
    source = serve(site)
    with machine_of(site) as machine:
        guest = machine.guest()
        guest.vmm.attach()
        assert guest.used == 0
        # Where a new driver would stand as well; but a pause asked for the position.
        guest.vmm.detach()
        machine.send(frame(1), frame(2))
        guest.vmm.attach()
        assert [guest.receive(), guest.receive()] == [frame(1), frame(2)]
        stale = counter(source, "rx-dropped-stale")
        leave(source, guest)
        machine.send(frame(3), frame(4))
        guest.vmm.reconnect()
        assert [guest.receive(), guest.receive()] == [frame(3), frame(4)]
        # Also if another daemon has taken over meanwhile.
        leave(source, guest)
        destination = site.destination()
        assert hand_over(site, source, destination)["status"] == "completed"
        machine.send(frame(5))
        guest.vmm.reconnect()
        assert guest.receive() == frame(5)
        assert counter(destination, "rx-dropped-stale") == stale


def test_a_driver_that_another_daemon_served_gets_what_waited_in_a_tap_that_outlived_it(site: Site) -> None:
    with site.namespace.entered():
        tap = OwnedFd(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        tun.attach_to(tap.fileno(), "tap0", Flag.TAP | Flag.NO_PI | Flag.VNET_HDR)

    def serve_it() -> DaemonProcess:
        device = f"virtio-net,id=nic0,netdev=net0,socket={site.socket}"
        daemon = site.daemon("--netdev", f"tap,id=net0,fd={tap.fileno()}", "--device", device, inherited=[tap.fileno()])
        site.address_tap()
        return daemon

    with tap:
        first = serve_it()
        with machine_of(site) as machine:
            guest = machine.guest()
            guest.vmm.attach()
            machine.send(frame(1))
            assert guest.receive() == frame(1)
            assert first.quit() == 0
            machine.send(frame(2), frame(3))
            second = serve_it()
            guest.vmm.reconnect()
            assert [guest.receive(), guest.receive()] == [frame(2), frame(3)]
            assert counter(second, "rx-dropped-stale") == 0


def test_a_driver_that_another_daemon_served_gets_nothing_that_waited_in_a_tap_that_was_opened_since(
    site: Site,
) -> None:
    first = serve(site)
    with machine_of(site) as before:
        guest = before.guest()
        guest.vmm.attach()
        before.send(frame(1))
        assert guest.receive() == frame(1)
        assert first.quit() == 0
        second = serve(site)
        with machine_of(site) as machine:
            machine.send(frame(2), frame(3))
            guest.vmm.reconnect()
            await_that(lambda: counter(second, "rx-dropped-stale") >= 2)
            machine.send(frame(4))
            assert guest.receive() == frame(4)


@pytest.mark.parametrize("upgraded", ["never", "while it is served", "after it left"])
def test_a_driver_that_begins_gets_nothing_that_waited_for_another_one(site: Site, upgraded: str) -> None:
    serving = serve(site)

    def upgrade(now: str) -> None:
        nonlocal serving
        if now == upgraded:
            destination = site.destination()
            assert hand_over(site, serving, destination)["status"] == "completed"
            serving = destination

    with machine_of(site) as machine:
        machine.send(*(frame(0) for _ in range(10)))
        first = machine.guest(TSO)
        first.vmm.attach()
        await_that(lambda: counter(serving, "rx-dropped-stale") >= 10)
        before = counter(serving, "rx-dropped-stale")
        machine.send(frame(1))
        assert first.receive() == frame(1)
        upgrade("while it is served")
        leave(serving, first)
        first.vmm.close()
        upgrade("after it left")
        machine.send(*(frame(number) for number in range(2, 200)))
        second = machine.guest()
        second.vmm.attach()
        await_that(lambda: counter(serving, "rx-dropped-stale") >= before + 198)
        machine.send(frame(200))
        assert second.receive() == frame(200)
        # Nor one whose driver is reset.
        second.vmm.detach()
        machine.send(frame(201))
        second.vmm.reset_driver()
        await_that(lambda: counter(serving, "rx-dropped-stale") >= before + 199)
        machine.send(frame(202))
        assert second.receive() == frame(202)
