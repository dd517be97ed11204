"""Several frontends of one NIC, and daemons that hand it over meanwhile: all sessions move, and one owns throughout."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest
from tests.kit.processes import localmig

from localmig.errors import PeerError
from localmig.testing.frontend import DRIVER_FEATURES, FrontendListener, NetGuest
from localmig.virtio import Feature
from localmig.virtio.net import header_length

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

PATIENCE_S: Final = 20.0
ETH_P_ALL: Final = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23


def frame(number: int) -> bytes:
    return b"\xff" * 6 + bytes.fromhex("525400123456 88b5") + number.to_bytes(4, "big") + bytes(42)


class Nic:
    """Guests of one NIC, by VMMs that connect to it, and the host's end of its TAP."""

    def __init__(self, site: Site, ends: ExitStack) -> None:
        self.site = site
        self._ends = ends
        with site.namespace.entered():
            self.host = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
            self.host.bind(("tap0", ETH_P_ALL))
        self.host.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.host.settimeout(PATIENCE_S)

    def guest(
        self, *, packed: bool = False, where: str | FrontendListener | None = None
    ) -> tuple[NetGuest, socket.socket]:
        """A guest's VMM, not connected yet, and the end of the guest's own TAP."""
        near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ends.enter_context(near)
        self._ends.enter_context(tap)
        near.settimeout(PATIENCE_S)
        tap.setblocking(False)
        features = DRIVER_FEATURES | (Feature.RING_PACKED if packed else 0)
        vmm = NetGuest(where or str(self.site.socket), tap_fds=[tap.fileno()], queue_size=16, features=features)
        return self._ends.enter_context(vmm), near

    def second_vmm(self, first: NetGuest, where: str | FrontendListener | None = None) -> NetGuest:
        """The VMM that the guest of `first` moves to, connected as one that waits for it."""
        vmm = self._ends.enter_context(NetGuest(where or str(self.site.socket), moved_from=first))
        vmm.connect()
        return vmm

    def exchange(self, guest: NetGuest, near: socket.socket, *, count: int = 20) -> None:
        """Frames go each way, more than a ring has entries: each once, in order."""
        for number in range(count):
            self.host.send(frame(number))
            assert near.recv(4096)[header_length(guest.features) :] == frame(number)
            near.send(bytes(header_length(guest.features)) + frame(1000 + number))
            assert self.host.recv(4096) == frame(1000 + number)


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def without_ipv6(site: Site) -> None:
    """So that no frame is sent but ours."""
    with site.namespace.entered():
        subprocess.run(["sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1"], check=True)


def sessions(daemon: DaemonProcess) -> list[tuple[int, str]]:
    (device,) = daemon.execute("query-devices")
    return [(session["number"], session["role"]) for session in device["sessions"]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_guest_moves_to_another_vmm_between_handovers(site: Site, ends: ExitStack, packed: bool) -> None:
    without_ipv6(site)
    serving = site.source(*site.objects(device=",packed=on" if packed else ""))
    nic = Nic(site, ends)
    first, near = nic.guest(packed=packed)
    first.attach()
    nic.exchange(first, near)
    second = nic.second_vmm(first)
    serving = site.hand_over(serving)
    assert sessions(serving) == [(1, "owns"), (2, "idle")]
    nic.exchange(first, near)
    first.detach()
    nic.host.send(frame(7))
    # The move goes on while the daemon is replaced: what comes waits.
    serving = site.hand_over(serving)
    second.arrive(first.bases)
    assert near.recv(4096).endswith(frame(7))
    nic.exchange(second, near)
    first.attach()
    assert sessions(serving) == [(1, "held"), (2, "owns")]
    serving = site.hand_over(serving)
    assert sessions(serving) == [(1, "held"), (2, "owns")]
    nic.exchange(second, near)
    # It had its turn, also by the word of a daemon that is gone.
    second.detach()
    assert sessions(serving) == [(1, "held"), (2, "owns")]
    serving = site.hand_over(serving)
    second.disconnect()
    serving.wait_event("OwnerChanged", session=1, former_session=2)
    if not packed:
        # Where packed rings stand only the VMM knows that was told last, and this one was not.
        nic.exchange(first, near)
    # Numbers are not given again.
    third = nic.second_vmm(first)
    assert sessions(serving) == [(1, "owns"), (3, "idle")]
    third.disconnect()


def test_an_owner_that_changes_after_the_setup_is_known_to_the_successor(site: Site, ends: ExitStack) -> None:
    without_ipv6(site)
    source = site.source()
    nic = Nic(site, ends)
    first, near = nic.guest()
    first.attach()
    nic.exchange(first, near)
    second = nic.second_vmm(first)
    source.execute("migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}])
    destination = site.destination()
    source.execute("migrate", uri=site.address)
    source.wait_event("MigrationStatusChanged", status="pre-switchover")
    first.detach()
    second.arrive(first.bases)
    nic.exchange(second, near)
    source.execute("migrate-continue", state="pre-switchover")
    assert source.wait_migration()["status"] == "completed"
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert sessions(destination) == [(1, "idle"), (2, "owns")]
    nic.exchange(second, near)


@pytest.mark.parametrize("fault", ["before-send:SWITCHOVER=kill", "after-receive:READY=kill", "after-send:COMMIT=kill"])
def test_a_source_that_dies_leaves_its_successor_all_sessions(site: Site, ends: ExitStack, fault: str) -> None:
    without_ipv6(site)
    source = site.source(fault=fault)
    nic = Nic(site, ends)
    first, near = nic.guest()
    other, other_near = nic.guest()
    first.attach()
    other.attach()
    nic.exchange(first, near)
    destination = site.destination()
    source.execute("migrate", uri=site.address)
    source.wait()
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert sessions(destination) == [(1, "owns"), (2, "held")]
    nic.exchange(first, near)
    first.disconnect()
    destination.wait_event("OwnerChanged", session=2, former_session=1)
    nic.exchange(other, other_near)


@pytest.mark.parametrize("fault", ["before-send:READY=kill", "after-receive:COMMIT=kill"])
def test_a_destination_that_dies_costs_no_session(site: Site, ends: ExitStack, fault: str) -> None:
    without_ipv6(site)
    source = site.source()
    nic = Nic(site, ends)
    first, near = nic.guest()
    other, other_near = nic.guest()
    first.attach()
    other.attach()
    destination = site.destination(fault=fault)
    source.execute("migrate", uri=site.address)
    destination.wait()
    source.wait_migration()
    assert sessions(source) == [(1, "owns"), (2, "held")]
    nic.exchange(first, near)
    source.execute("session-close", id="nic0", session=1)
    assert first.frontend.is_lost(PATIENCE_S)
    nic.exchange(other, other_near)


def test_qmp_and_the_command_line_tell_of_sessions_and_end_them(site: Site, ends: ExitStack) -> None:
    without_ipv6(site)
    daemon = site.source()
    nic = Nic(site, ends)
    first, _ = nic.guest()
    other, other_near = nic.guest()
    first.attach()
    before = json.loads(_localmig("status", "--json", str(daemon.qmp)))
    other.attach()
    (device,) = before["devices"]
    assert "sessions" in device
    (session,) = device["sessions"]
    assert (session["number"], session["role"], session["socket"]) == (1, "owns", str(site.socket))
    assert (session["pid"], session["user-id"]) == (os.getpid(), os.getuid())
    note = daemon.wait_fact(lambda fact: fact["event"] == "DeviceNoted" and "waits for the rings" in fact["note"])
    shown = _localmig("status", "--device", "nic0", str(daemon.qmp))
    assert note["note"] in shown
    assert "held" in shown
    assert "owns" in shown
    assert "1 owns, 1 held" in _localmig("status", str(daemon.qmp))
    _localmig("session-close", str(daemon.qmp), "nic0", "1")
    daemon.wait_event("OwnerChanged", session=2, former_session=1)
    nic.exchange(other, other_near)
    with pytest.raises(PeerError, match=r"Device 'nic0' has no session 1, there is 2 \(owns\)"):
        daemon.execute("session-close", id="nic0", session=1)
    assert "closed: ended by the operator" in site.log_of(daemon)
    assert "owns the device now, because session 1" in site.log_of(daemon)


def _localmig(*arguments: str) -> str:
    done = localmig(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_device_that_connects_is_given_a_second_address_and_it_is_taken_back(site: Site, ends: ExitStack) -> None:
    without_ipv6(site)
    old, new = str(site.folder / "old.sock"), str(site.folder / "new.sock")
    listener = ends.enter_context(FrontendListener(old))
    daemon = site.source(
        *("--netdev", "tap,id=net0,ifname=tap0"),
        *("--device", f"virtio-net,id=nic0,netdev=net0,socket={old},server=off,reconnect-ms=10"),
    )
    nic = Nic(site, ends)
    first, near = nic.guest(where=listener)
    first.attach()
    nic.exchange(first, near)
    with pytest.raises(PeerError, match="cannot give 'x' up, it has"):
        daemon.execute("device_socket_del", id="nic0", socket="x")
    second_listener = ends.enter_context(FrontendListener(new))
    assert daemon.execute("device_socket_add", id="nic0", socket=new) == {}
    second = nic.second_vmm(first, second_listener)
    with pytest.raises(PeerError, match="has two addresses"):
        daemon.execute("device_socket_add", id="nic0", socket=f"{new}2")
    assert sessions(daemon) == [(1, "owns"), (2, "idle")]
    # It is an option by now, so a successor has it.
    daemon = site.hand_over(daemon)
    (device,) = daemon.execute("query-devices")
    assert (device["socket"], device["second-socket"]) == (old, new)
    first.detach()
    second.arrive(first.bases)
    nic.exchange(second, near)
    assert daemon.execute("device_socket_del", id="nic0", socket=old) == {}
    first.disconnect()
    daemon.wait_event("SessionClosed", session=1)
    daemon = site.hand_over(daemon)
    (device,) = daemon.execute("query-devices")
    assert device["socket"] == new
    assert "second-socket" not in device
    nic.exchange(second, near)
