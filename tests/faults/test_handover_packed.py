"""Packed rings, whose position stands in no guest memory: handovers and deaths while packets flow both ways."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.faults.test_handover_processes import assert_handovers_lose_nothing, assert_undisturbed, hand_over

from localmig.testing.traffic import Flood

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess, GuestProcess
    from tests.kit.site import Site


def source_of(site: Site, *, fault: str | None = None) -> DaemonProcess:
    return site.source(*site.objects(device=",packed=on"), fault=fault)


def attach(site: Site, source: DaemonProcess) -> GuestProcess:
    """A guest with packed rings: only they have a ledger."""
    guest = site.attach(packed=True)
    assert [target for target in site.descriptors(source) if "packed-ring-ledger" in target]
    return guest


@contextmanager
def flooded(site: Site, guest: GuestProcess) -> Iterator[None]:
    """Packets both ways as fast as they go, so that a death meets rings in motion."""
    with site.namespace.entered():
        inward = Flood(site.guest_address)
    with guest.namespace.entered():
        outward = Flood(site.host_address)
    yield
    assert inward.stop().sent > 0
    assert outward.stop().sent > 0
    site.ping(10)  # behind what the flood left in the TAP, which may be full still


def test_five_handovers_lose_no_packet(site: Site) -> None:
    serving = source_of(site)
    attach(site, serving)
    assert_handovers_lose_nothing(site, serving, count=5)


def test_the_source_keeps_no_ledger_after_a_handover(site: Site) -> None:
    source, destination = source_of(site), site.destination()
    attach(site, source)
    assert hand_over(site, source, destination)["status"] == "completed"
    held = [target for target in site.descriptors(source) if "memfd" in target]
    assert not held
    assert_undisturbed(site)


@pytest.mark.parametrize(
    "fault",
    [
        "after-receive:SETUP_ACK=kill",
        "before-send:SWITCHOVER=kill",
        "after-send:SWITCHOVER=kill",
        "after-receive:READY=kill",
        "before-send:COMMIT=kill",
        "after-send:COMMIT=kill",
    ],
)
def test_a_source_that_dies_under_load_is_taken_over_from(site: Site, fault: str) -> None:
    source, destination = source_of(site, fault=fault), site.destination()
    guest = attach(site, source)
    with flooded(site, guest):
        source.execute("migrate", uri=site.address)
        assert source.wait() == -signal.SIGKILL
        destination.wait_event("MigrationStatusChanged", status="completed")
    # And what was found can be handed on.
    destination.execute("migrate-set-parameters", local=True)
    assert hand_over(site, destination, site.destination())["status"] == "completed"
    assert_undisturbed(site)


@pytest.mark.parametrize("fault", ["after-receive:COMMIT=kill", "before-send:DONE=kill"])
def test_a_destination_that_dies_after_commit_gives_the_guest_back(site: Site, fault: str) -> None:
    source, destination = source_of(site), site.destination(fault=fault)
    guest = attach(site, source)
    with flooded(site, guest):
        info = hand_over(site, source, destination)
    assert info["status"] == "failed"
    assert "serves again" in str(info["error-desc"])
    assert hand_over(site, source, site.destination())["status"] == "completed"
    assert_undisturbed(site)


def test_a_source_killed_in_motion_again_and_again_is_succeeded_exactly(site: Site) -> None:
    serving = source_of(site)
    guest = attach(site, serving)
    with flooded(site, guest):
        for _ in range(5):
            serving.execute(
                "migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}]
            )
            destination = site.destination()
            serving.execute("migrate", uri=site.address)
            serving.wait_event("MigrationStatusChanged", status="pre-switchover")
            # Its rings run: whatever instruction it is at, it dies there.
            serving.send_signal(signal.SIGKILL)
            assert serving.wait() == -signal.SIGKILL
            destination.wait_event("MigrationStatusChanged", status="completed")
            serving = destination
            serving.execute("migrate-set-parameters", local=True)
    assert_undisturbed(site)


def test_a_paused_guest_goes_on_where_it_was_after_its_daemon_died(site: Site) -> None:
    source, destination = source_of(site, fault="after-receive:SETUP_ACK=kill"), site.destination()
    guest = attach(site, source)
    source.execute("stop")
    guest.pause()  # the VMM stops its rings and starts them again, which do not run
    source.execute("migrate", uri=site.address)
    assert source.wait() == -signal.SIGKILL
    destination.wait_event("MigrationStatusChanged", status="completed")
    destination.execute("cont")
    assert_undisturbed(site)
