"""Pages are logged across handovers and deaths: what either side wrote is marked, whoever of them is left."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import pytest
from tests.faults.test_handover_processes import hand_over
from tests.kernel.logged_guest import LoggedGuest, churn

from localmig.testing.frontend import DRIVER_FEATURES
from localmig.virtio import Feature

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

ETH_P_ALL: Final = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
PATIENCE_S: Final = 10.0

FEATURES: Final = DRIVER_FEATURES | Feature.RING_INDIRECT_DESC

each_format = pytest.mark.parametrize(
    "features", [pytest.param(FEATURES, id="split"), pytest.param(FEATURES | Feature.RING_PACKED, id="packed")]
)


@contextmanager
def served(site: Site, features: int, *, fault: str | None = None) -> Iterator[Served]:
    """A NIC whose guest logs, on a daemon that may die."""
    source = site.source(*site.objects(device=",packed=on"), fault=fault)
    with ExitStack() as ends:
        with site.namespace.entered():
            machine = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
            machine.bind(("tap0", ETH_P_ALL))
        machine.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        machine.settimeout(PATIENCE_S)
        guest = LoggedGuest(str(site.socket), features, ends, seed=features & 0xFF)
        guest.attach(is_logged=True)
        yield Served(source, machine, guest)


class Served:
    """A guest that logs, and what is at its NIC's other end."""

    def __init__(self, source: DaemonProcess, machine: socket.socket, guest: LoggedGuest) -> None:
        self.source = source
        self.machine = machine
        self.guest = guest

    @contextmanager
    def in_motion(self) -> Iterator[None]:
        """Frames move both ways meanwhile."""
        ended = threading.Event()
        mover = threading.Thread(target=churn, args=(self.machine, self.guest, ended))
        mover.start()
        try:
            yield
        finally:
            ended.set()
            mover.join()

    def check(self) -> None:
        """Frames move still, and all that was written by anybody is marked."""
        sent = self.guest.sent
        for _ in range(20):
            self.guest.fill()
            self.guest.say(bytes(60))
        assert self.guest.sent == sent + 20
        self.guest.stop()
        self.guest.drain()
        assert self.guest.received
        self.guest.check()


@each_format
def test_a_successor_marks_pages_from_its_first_write_on(site: Site, features: int) -> None:
    with served(site, features) as nic:
        serving = nic.source
        with nic.in_motion():
            for _ in range(3):
                destination = site.destination()
                assert hand_over(site, serving, destination)["status"] == "completed"
                serving = destination
                serving.execute("migrate-set-parameters", local=True)
        nic.check()


def test_a_log_that_is_switched_on_by_a_successor_is_marked_there(site: Site) -> None:
    with served(site, FEATURES) as nic:
        nic.guest.switch(is_logged=False)
        destination = site.destination()
        assert hand_over(site, nic.source, destination)["status"] == "completed"
        nic.guest.memory.forget()
        nic.guest.log.clear()
        nic.guest.switch(is_logged=True)
        with nic.in_motion():
            destination.execute("migrate-set-parameters", local=True)
            assert hand_over(site, destination, site.destination())["status"] == "completed"
        nic.check()


@each_format
@pytest.mark.parametrize(
    "fault", ["after-receive:SETUP_ACK=kill", "after-receive:READY=kill", "after-send:COMMIT=kill"]
)
def test_what_a_source_wrote_that_died_is_marked(site: Site, features: int, fault: str) -> None:
    with served(site, features, fault=fault) as nic:
        destination = site.destination()
        with nic.in_motion():
            nic.source.execute("migrate", uri=site.address)
            assert nic.source.wait() == -signal.SIGKILL
            destination.wait_event("MigrationStatusChanged", status="completed")
        nic.check()


@each_format
@pytest.mark.parametrize("fault", ["after-receive:COMMIT=kill", "before-send:DONE=kill"])
def test_what_a_destination_wrote_that_died_is_marked(site: Site, features: int, fault: str) -> None:
    with served(site, features) as nic:
        destination = site.destination(fault=fault)
        with nic.in_motion():
            info = hand_over(site, nic.source, destination)
        assert "serves again" in str(info["error-desc"])
        nic.check()


@each_format
def test_a_daemon_that_is_killed_in_motion_leaves_a_ring_whose_pages_are_marked(site: Site, features: int) -> None:
    with served(site, features) as nic:
        serving = nic.source
        with nic.in_motion():
            for _ in range(3):
                pause = [{"capability": "pause-before-switchover", "state": True}]
                serving.execute("migrate-set-capabilities", capabilities=pause)
                destination = site.destination()
                serving.execute("migrate", uri=site.address)
                serving.wait_event("MigrationStatusChanged", status="pre-switchover")
                serving.send_signal(signal.SIGKILL)
                assert serving.wait() == -signal.SIGKILL
                destination.wait_event("MigrationStatusChanged", status="completed")
                serving = destination
                serving.execute("migrate-set-parameters", local=True)
        nic.check()
