"""Handovers between real processes with a guest that keeps talking, and what comes of those that fail."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from qemu.qmp import QMPClient
from tests.kit.proxy import StrippingProxy

from localmig.errors import PeerError
from localmig.testing.daemon import ANSWER_SECONDS_MAX
from localmig.testing.traffic import Flood

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

PINGS_MAX = 10
"""One of them gets through once a flood has ended: each is waited for."""


def hand_over(site: Site, source: DaemonProcess, destination: DaemonProcess) -> dict[str, object]:
    source.execute("migrate", uri=site.address)
    info = source.wait_migration()
    if info["status"] == "completed":
        destination.wait_event("MigrationStatusChanged", status="completed")
    return info


def assert_undisturbed(site: Site) -> None:
    """The guest answers, and its connection was never closed (it does not reconnect, so it could not come back)."""
    assert site.guest is not None
    assert site.ping().lost == 0
    report = site.guest.stop()
    assert (report["reason"], report["carrier_changes"]) == (None, 0)


def assert_handovers_lose_nothing(site: Site, serving: DaemonProcess, *, count: int) -> None:
    """Hands an attached guest over again and again while it is pinged."""
    pinger = site.pinger()
    for _ in range(count):
        destination = site.destination()
        info = hand_over(site, serving, destination)
        assert info["status"] == "completed", info
        assert serving.quit() == 0
        serving = destination
        assert serving.execute("query-status")["status"] == "running"
        serving.execute("migrate-set-parameters", local=True)
    report = pinger.stop()
    assert (report.lost, report.duplicates) == (0, 0), report
    assert_undisturbed(site)


def test_ten_handovers_lose_no_packet_and_the_guest_sees_no_link_change(site: Site) -> None:
    serving = site.source()
    site.attach()
    assert_handovers_lose_nothing(site, serving, count=10)


def test_signals_that_mean_no_end_come_all_the_time_and_no_handover_fails(site: Site) -> None:
    serving = site.source()
    site.attach()
    pinger = site.pinger()
    for _ in range(5):
        destination = site.destination()
        serving.execute("migrate", uri=site.address)
        while serving.execute("query-migrate")["status"] not in ("completed", "failed"):
            for daemon in (serving, destination):
                daemon.send_signal(signal.SIGHUP)
                daemon.send_signal(signal.SIGUSR1)
        assert serving.wait_migration()["status"] == "completed"
        destination.wait_event("MigrationStatusChanged", status="completed")
        assert serving.quit() == 0
        serving = destination
        serving.execute("migrate-set-parameters", local=True)
    report = pinger.stop()
    assert (report.lost, report.duplicates) == (0, 0), report
    assert_undisturbed(site)


@pytest.mark.parametrize("point", ["before-send:READY", "after-receive:COMMIT", "before:nic0.thaw", "enter:owner"])
def test_a_hang_up_at_a_delicate_moment_of_the_destination_changes_nothing(site: Site, point: str) -> None:
    source = site.source()
    destination = site.destination(fault=f"{point}=stop")
    site.attach()
    source.execute("migrate-set-parameters", commit_timeout=60_000, downtime_limit=60_000)
    source.execute("migrate", uri=site.address)
    destination.wait_stopped()
    for daemon in (source, destination):
        daemon.send_signal(signal.SIGHUP)
    destination.send_signal(signal.SIGCONT)
    assert source.wait_migration()["status"] == "completed"
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert source.quit() == 0
    assert destination.is_alive
    assert_undisturbed(site)


def test_an_idle_guest_moves_and_answers_afterwards(site: Site) -> None:
    source, destination = site.source(), site.destination()
    site.attach()
    assert hand_over(site, source, destination)["status"] == "completed"
    assert_undisturbed(site)


def test_a_guest_flooded_from_both_sides_moves_and_answers_afterwards(site: Site) -> None:
    source, destination = site.source(), site.destination()
    guest = site.attach()
    with site.namespace.entered():
        inward = Flood(site.guest_address)
    with guest.namespace.entered():
        outward = Flood(site.host_address)
    assert hand_over(site, source, destination)["status"] == "completed"
    assert inward.stop().sent > 0
    assert outward.stop().sent > 0
    # The flood's rest fills the TAP's queue until a busy machine gets round to it: an answer came behind all of it.
    assert any(site.ping(1).received for _ in range(PINGS_MAX))
    assert_undisturbed(site)


def test_a_handover_goes_through_an_inherited_socket(site: Site) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        source = site.daemon(*site.objects(), inherited=[ours.fileno()])
        destination = site.daemon(
            *("--incoming", f"fd:{theirs.fileno()}", "--migration-parameter", "local=on"), inherited=[theirs.fileno()]
        )
        source_address = f"fd:{ours.fileno()}"
    site.address_tap()
    site.attach()
    source.execute("migrate-set-parameters", local=True)
    source.execute("migrate", uri=source_address)
    assert source.wait_migration()["status"] == "completed"
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert_undisturbed(site)


def test_a_handover_goes_through_sockets_that_clients_gave_by_qmp(site: Site) -> None:
    source = site.daemon(*site.objects())
    destination = site.daemon("--incoming", "defer", "--migration-parameter", "local=on")
    site.address_tap()
    site.attach()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        asyncio.run(give(source, ours))
        asyncio.run(give(destination, theirs))
    destination.execute("migrate-incoming", uri="fd:channel")
    source.execute("migrate-set-parameters", local=True)
    source.execute("migrate", uri="fd:channel")
    assert source.wait_migration()["status"] == "completed"
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert_undisturbed(site)


async def give(daemon: DaemonProcess, sock: socket.socket) -> None:
    """Lets a daemon have a socket under the name "channel"."""
    client = QMPClient()
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        await client.connect(str(daemon.qmp))
        client.send_fd_scm(sock.fileno())
        await client.execute("getfd", {"fdname": "channel"})
        await client.disconnect()


def test_a_daemon_without_a_frontend_moves_and_serves_the_next_one(site: Site) -> None:
    source, destination = site.source(), site.destination()
    assert hand_over(site, source, destination)["status"] == "completed"
    source.quit()
    site.attach()
    assert_undisturbed(site)


def test_a_daemon_without_any_ring_hands_over_too(site: Site) -> None:
    source, destination = site.source("--netdev", "tap,id=net0,ifname=tap0"), site.destination()
    info = hand_over(site, source, destination)
    assert info["status"] == "completed", info
    assert destination.execute("query-devices") == []
    assert [netdev["id"] for netdev in destination.execute("query-netdevs")] == ["net0"]
    assert destination.execute("query-status")["status"] == "running"


def test_a_frontend_that_comes_back_is_served_again_after_a_handover(site: Site) -> None:
    source, destination = site.source(), site.destination()
    site.attach()
    assert hand_over(site, source, destination)["status"] == "completed"
    source.quit()
    assert site.guest is not None
    site.guest.stop()
    destination.wait_event("SessionClosed")
    site.attach()
    assert_undisturbed(site)


def test_a_driver_that_resets_while_handovers_go_on_is_served(site: Site) -> None:
    serving = site.source()
    guest = site.attach()
    for _ in range(3):
        destination = site.destination()
        serving.execute("migrate", uri=site.address)
        guest.reset_driver()
        info = serving.wait_migration()
        assert info["status"] == "completed", site.log_of(destination)
        serving.quit()
        serving = destination
        serving.execute("migrate-set-parameters", local=True)
    assert_undisturbed(site)


def test_a_paused_guest_stays_paused_until_cont(site: Site) -> None:
    source, destination = site.source(), site.destination()
    site.attach()
    source.execute("stop")
    assert hand_over(site, source, destination)["status"] == "completed"
    assert destination.execute("query-status") == {"status": "paused", "running": False}
    assert site.ping(20).received == 0
    destination.execute("cont")
    assert_undisturbed(site)


def test_the_source_holds_nothing_after_a_handover(site: Site) -> None:
    source, destination = site.source(), site.destination()
    site.attach()
    hand_over(site, source, destination)
    held = site.descriptors(source)
    assert not [target for target in held if "tun" in target or "memfd" in target], held
    source.quit()
    assert site.socket.exists()
    assert_undisturbed(site)


# -- refused, cancelled, lost: the source serves on ---------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        "after-receive:HELLO=kill",
        "before-send:HELLO=kill",
        "after-receive:SETUP=kill",
        "before-send:SETUP_ACK=kill",
        "after-send:SETUP_ACK=kill",
        "after-receive:SWITCHOVER=kill",
        "before-send:READY=kill",
        "after-receive:HELLO=raise",
        "after-receive:SETUP=raise",
        "before-send:READY=raise",
    ],
)
def test_a_destination_that_dies_before_ready_leaves_the_source_serving(site: Site, fault: str) -> None:
    source = site.source()
    site.attach()
    pinger = site.pinger()
    destination = site.destination(fault=fault)
    info = hand_over(site, source, destination)
    assert info["status"] == "failed"
    assert info["error-desc"]
    destination.wait()
    assert source.execute("query-status")["status"] == "running"
    report = pinger.stop()
    assert report.lost == 0, report
    # And it can be handed over all the same.
    destination = site.destination()
    assert hand_over(site, source, destination)["status"] == "completed"
    assert_undisturbed(site)


@pytest.mark.parametrize("fault", ["after-receive:SWITCHOVER=stop", "before-send:READY=stop"])
def test_a_destination_that_hangs_costs_no_more_than_the_downtime_limit(site: Site, fault: str) -> None:
    source = site.source()
    site.attach()
    source.execute("migrate-set-parameters", downtime_limit=100)
    destination = site.destination(fault=fault)
    info = hand_over(site, source, destination)
    assert info["status"] == "failed"
    assert "downtime-limit" in str(info["error-desc"])
    destination.send_signal(signal.SIGCONT)
    assert destination.wait() == 1
    assert_undisturbed(site)


@pytest.mark.parametrize("fault", ["before-send:COMMIT=kill", "after-send:COMMIT=kill", "after-receive:READY=kill"])
def test_a_source_that_dies_after_ready_is_taken_over_from(site: Site, fault: str) -> None:
    source, destination = site.source(fault=fault), site.destination()
    site.attach()
    source.execute("migrate", uri=site.address)
    assert source.wait() == -signal.SIGKILL
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert destination.execute("query-status")["status"] == "running"
    assert_undisturbed(site)


@pytest.mark.parametrize(
    "fault", ["after-receive:SETUP_ACK=kill", "before-send:SWITCHOVER=kill", "after-send:SWITCHOVER=kill"]
)
def test_a_source_that_dies_after_setup_is_recovered_from_guest_memory(site: Site, fault: str) -> None:
    source, destination = site.source(fault=fault), site.destination()
    site.attach()
    source.execute("migrate", uri=site.address)
    assert source.wait() == -signal.SIGKILL
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert "died" in destination.execute("query-migrate")["local"]["note"]
    assert_undisturbed(site)


def test_a_destination_that_learns_of_the_death_when_it_answers_takes_over(site: Site) -> None:
    source, destination = (
        site.source(fault="after-send:SWITCHOVER=kill"),
        site.destination(fault="after-receive:SWITCHOVER=stop"),
    )
    site.attach()
    source.execute("migrate", uri=site.address)
    assert source.wait() == -signal.SIGKILL
    destination.wait_stopped()
    destination.send_signal(signal.SIGCONT)
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert_undisturbed(site)


@pytest.mark.parametrize("fault", ["after-receive:COMMIT=kill", "before-send:DONE=kill"])
def test_a_destination_that_dies_after_commit_gives_the_guest_back(site: Site, fault: str) -> None:
    source, destination = site.source(), site.destination(fault=fault)
    site.attach()
    info = hand_over(site, source, destination)
    assert info["status"] == "failed"
    assert "serves again" in str(info["error-desc"])
    assert source.execute("query-status")["status"] == "running"
    assert_undisturbed(site)


def test_a_destination_that_hangs_after_commit_is_fenced_before_the_source_serves_again(site: Site) -> None:
    source, destination = site.source(), site.destination(fault="after-receive:COMMIT=stop")
    site.attach()
    info = hand_over(site, source, destination)
    assert info["status"] == "failed"
    assert destination.wait() == -signal.SIGKILL
    assert_undisturbed(site)


def test_a_channel_that_loses_descriptors_is_found_while_the_guest_runs(site: Site) -> None:
    source, destination = site.source(), site.destination()
    site.attach()
    front = site.folder / "proxy"
    with StrippingProxy(str(front), site.address.removeprefix("unix:")):
        source.execute("migrate", uri=f"unix:{front}")
        info = source.wait_migration()
    assert info["status"] == "failed"
    assert "does not pass descriptors" in info["error-desc"]
    assert destination.wait() == 1
    assert "does not pass descriptors" in site.log_of(destination)
    assert not [fact for fact in source.facts if fact["event"] == "RingsStopped" and fact["at_ns"] > site.began_ns]
    assert_undisturbed(site)


def test_sides_that_disagree_about_local_find_out_in_setup(site: Site) -> None:
    source, destination = site.source(), site.destination(local=False)
    site.attach()
    info = hand_over(site, source, destination)
    assert info["status"] == "failed"
    assert "'local' is on in the source and off in the destination" in str(info["error-desc"])
    assert_undisturbed(site)


@pytest.mark.parametrize(
    ("netdev", "device", "complaint"),
    [
        (",mtu=1400", "", "mtu"),
        ("", ",local-migration=off", "local-migration=off here and on there"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_setup(site: Site, netdev: str, device: str, complaint: str) -> None:
    source = site.source()
    site.attach()
    destination = site.destination(*site.objects(netdev=netdev, device=device))
    info = hand_over(site, source, destination)
    assert info["status"] == "failed"
    assert complaint in str(info["error-desc"])
    assert destination.wait() == 1
    assert_undisturbed(site)


def test_a_cancelled_handover_leaves_the_source_serving(site: Site) -> None:
    source, destination = site.source(), site.destination()
    site.attach()
    source.execute("migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}])
    source.execute("migrate", uri=site.address)
    source.wait_event("MigrationStatusChanged", status="pre-switchover")
    assert site.ping().lost == 0
    source.execute("migrate_cancel")
    assert source.wait_migration()["status"] == "cancelled"
    assert destination.wait() == 1
    assert_undisturbed(site)


def test_a_paused_handover_goes_on_with_migrate_continue(site: Site) -> None:
    source, destination = site.source(), site.destination()
    site.attach()
    source.execute("migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}])
    source.execute("migrate", uri=site.address)
    source.wait_event("MigrationStatusChanged", status="pre-switchover")
    with pytest.raises(PeerError, match="not in expected state: pre-switchover"):
        source.execute("migrate-continue", state="device")
    source.execute("migrate-continue", state="pre-switchover")
    assert source.wait_migration()["status"] == "completed"
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert_undisturbed(site)


def test_local_needs_a_channel_that_can_pass_descriptors(site: Site) -> None:
    source = site.source()
    with pytest.raises(PeerError, match=r"^local migration requires a UNIX domain socket channel$"):
        source.execute("migrate", uri="tcp:127.0.0.1:4444")
    assert source.execute("query-migrate") == {}
    assert source.execute("query-status")["status"] == "running"


# -- without descriptors ------------------------------------------------------------------------------------------


def test_without_local_the_frontend_reconnects_and_the_same_tap_is_opened_again(site: Site) -> None:
    source, destination = site.source(local=False), site.destination(local=False)
    guest = site.attach(reconnect_ms=1)
    info = hand_over(site, source, destination)
    assert info["status"] == "completed", info
    guest.wait_for("reconnected", 20)
    site.address_tap()
    assert site.ping().received > 0
    assert guest.stop()["reconnects"] == 1


def test_without_local_state_travels_over_tcp_to_another_tap(site: Site) -> None:
    source = site.source(local=False)
    guest = site.attach(reconnect_ms=1)
    with site.namespace.entered():
        destination = site.daemon(
            *("--netdev", "tap,id=net0,ifname=tap1"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,socket={site.socket}"),
            *("--incoming", "tcp:127.0.0.1:4321"),
        )
    source.execute("migrate", uri="tcp:127.0.0.1:4321")
    assert source.wait_migration()["status"] == "completed"
    destination.wait_event("MigrationStatusChanged", status="completed")
    site.address_tap("tap1")
    guest.wait_for("reconnected", 20)
    assert site.ping().received > 0


def test_a_device_with_local_migration_off_keeps_its_descriptors_home(site: Site) -> None:
    source = site.source(*site.objects(device=",local-migration=off"))
    guest = site.attach(reconnect_ms=1)
    assert [report["transfers"] for report in source.execute("query-local-migration")] == [False, False]
    destination = site.destination()
    info = hand_over(site, source, destination)
    assert info["status"] == "completed", info
    guest.wait_for("reconnected", 20)
    site.address_tap()
    assert site.ping().received > 0


def test_who_took_over_hands_over_again_only_once_its_source_has_let_go(site: Site) -> None:
    """Else its end would bring a source back that is in doubt, beside the third daemon."""
    source, destination = site.source(fault="after-send:COMMIT=stop"), site.destination()
    site.attach()
    source.execute("migrate", uri=site.address)
    # The source stands still between COMMIT and its answer, and is waited for no longer.
    destination.wait_event("MigrationStatusChanged", status="completed")
    third = site.destination()
    with pytest.raises(PeerError, match="the daemon that had the guest before has not let go of it"):
        destination.execute("migrate", uri=site.address)
    assert site.ping().lost == 0
    source.send_signal(signal.SIGCONT)
    assert source.wait_migration()["status"] == "completed"
    assert hand_over(site, destination, third)["status"] == "completed"
    assert_undisturbed(site)


# -- told to end ----------------------------------------------------------------------------------------------------


def test_a_source_that_is_told_to_end_serves_until_the_handover_is_over(site: Site) -> None:
    source = site.source()
    site.attach()
    destination = site.destination(fault="before-send:SETUP_ACK=stop")
    source.execute("migrate", uri=site.address)
    destination.wait_stopped()
    source.execute("quit")
    assert source.execute("query-migrate")["status"] == "active"
    assert site.ping().lost == 0
    pinger = site.pinger()
    destination.send_signal(signal.SIGCONT)
    assert source.wait() == 0
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert pinger.stop().lost == 0
    assert_undisturbed(site)


@pytest.mark.parametrize("is_paused", [False, True], ids=["told twice", "while the operator is awaited"])
def test_a_handover_is_taken_back_by_who_insists_that_the_source_ends(site: Site, is_paused: bool) -> None:
    source = site.source()
    site.attach()
    if is_paused:
        source.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}]
        )
    destination = site.destination(fault=None if is_paused else "before-send:SETUP_ACK=stop")
    source.execute("migrate", uri=site.address)
    if is_paused:
        source.wait_event("MigrationStatusChanged", status="pre-switchover")
    else:
        destination.wait_stopped()
        source.execute("quit")
    source.execute("quit")
    assert source.wait() == 0
    source.wait_event("MigrationStatusChanged", status="cancelled")
    destination.send_signal(signal.SIGCONT)
    assert destination.wait() == 1
    assert site.guest is not None
    assert site.guest.stop()["reason"]


def test_a_destination_that_is_told_to_end_before_it_has_the_guest_leaves_it_to_the_source(site: Site) -> None:
    source, destination = site.source(), site.destination()
    site.attach()
    pause = [{"capability": "pause-before-switchover", "state": True}]
    source.execute("migrate-set-capabilities", capabilities=pause)
    source.execute("migrate", uri=site.address)
    source.wait_event("MigrationStatusChanged", status="pre-switchover")
    pinger = site.pinger()
    destination.quit()
    info = source.wait_migration()
    assert (info["status"], pinger.stop().lost) == ("failed", 0)
    assert source.execute("query-status")["status"] == "running"
    assert_undisturbed(site)


def test_a_source_that_is_told_to_end_takes_no_guest_from_a_destination_that_hangs(site: Site) -> None:
    source, destination = site.source(), site.destination(fault="after-receive:COMMIT=stop")
    site.attach()
    source.execute("migrate-set-parameters", commit_timeout=3000)
    source.execute("migrate", uri=site.address)
    destination.wait_stopped()
    source.execute("quit")
    assert source.wait() == 0
    destination.send_signal(signal.SIGCONT)
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert_undisturbed(site)


def test_a_destination_that_is_told_to_end_while_the_source_may_return_leaves_it_everything(site: Site) -> None:
    source, destination = site.source(), site.destination(fault="before-send:DONE=raise")
    site.attach()
    source.execute("migrate", uri=site.address)
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert destination.quit() == 0
    assert source.wait_migration()["status"] == "failed"
    assert source.execute("query-status")["status"] == "running"
    assert_undisturbed(site)


def test_a_daemon_that_is_told_to_end_begins_no_handover(site: Site) -> None:
    source, destination = site.source(), site.destination(fault="before-send:SETUP_ACK=stop")
    site.attach()
    source.execute("migrate", uri=site.address)
    destination.wait_stopped()
    source.execute("quit")
    with pytest.raises(PeerError, match="this daemon was told to end"):
        source.execute("migrate", uri=site.address)
    destination.send_signal(signal.SIGCONT)
    assert source.wait() == 0
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert_undisturbed(site)
