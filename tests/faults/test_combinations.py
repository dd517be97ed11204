"""NICs of several kinds in one daemon: what happens to a handover happens to all of them, one thing after the other."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.faults.test_handover_processes import hand_over
from tests.kit.processes import GuestProcess

from localmig.errors import PeerError
from localmig.testing.guest import GuestSettings
from localmig.testing.namespace import ip
from localmig.testing.traffic import PING_COUNT_MAX, Pinger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"packed": True},
    {"queue_pairs": 2, "offloads": True},
    {"queue_pairs": 2, "packed": True},
)
"""Of each guest, what it takes of what its NIC offers."""


class Nics:
    """A daemon with a NIC of each kind, a guest behind each."""

    def __init__(self, site: Site, ends: ExitStack) -> None:
        self._site = site
        self._guests: list[GuestProcess] = []
        objects: list[str] = []
        for index, kind in enumerate(KINDS):
            objects += ["--netdev", f"tap,id=net{index},ifname=tap{index},queues={kind.get('queue_pairs', 1)}"]
            packed = ",packed=on" if "packed" in kind else ""
            socket = f"{site.folder}/n{index}"
            objects += ["--device", f"virtio-net,id=nic{index},netdev=net{index},socket={socket}{packed}"]
        self.serving = site.daemon(*objects)
        self.serving.execute("migrate-set-parameters", local=True)
        with site.namespace.entered():
            for index, kind in enumerate(KINDS):
                ip("addr", "replace", f"10.9.{index}.1/24", "dev", f"tap{index}")
                settings = GuestSettings(socket=f"{site.folder}/n{index}", address=f"10.9.{index}.2/24", **kind)
                self._guests.append(ends.enter_context(GuestProcess(settings)))

    def pingers(self, count: int = PING_COUNT_MAX) -> list[Pinger]:
        with self._site.namespace.entered():
            return [Pinger(f"10.9.{index}.2", count_max=count).start() for index in range(len(KINDS))]

    def assert_all_answer(self) -> None:
        pingers = self.pingers(50)
        assert all(pinger.wait(20) for pinger in pingers)
        assert [pinger.stop().lost for pinger in pingers] == [0] * len(KINDS)

    def held(self) -> Counter[str]:
        """Threads of the daemon that serves, and its descriptors by kind, without its conversations and its files."""
        kinds = Counter(target.split(":")[0] for target in self._site.descriptors(self.serving))
        kinds = Counter(
            {kind: count for kind, count in kinds.items() if kind in ("anon_inode", "/memfd", "/dev/net/tun")}
        )
        kinds["threads"] = len(list(Path(f"/proc/{self.serving.pid}/task").iterdir()))
        return kinds

    def move(self) -> None:
        """Hands over, in order."""
        destination = self._site.destination()
        assert hand_over(self._site, self.serving, destination)["status"] == "completed"
        assert self.serving.quit() == 0
        self._go_on_with(destination)

    def lose_to(self, destination: DaemonProcess) -> None:
        self.serving.kill()
        destination.wait_event("MigrationStatusChanged", status="completed")
        self._go_on_with(destination)

    def _go_on_with(self, destination: DaemonProcess) -> None:
        self.serving = destination
        destination.execute("migrate-set-parameters", local=True)

    def assert_undisturbed(self) -> None:
        self.assert_all_answer()
        for guest in self._guests:
            report = guest.stop()
            assert (report["reason"], report["carrier_changes"]) == (None, 0)


@pytest.fixture
def nics(site: Site) -> Iterator[Nics]:
    with ExitStack() as ends:
        yield Nics(site, ends)


def pause_before_switchover(source: DaemonProcess, site: Site, *, on: bool) -> None:
    capability = {"capability": "pause-before-switchover", "state": on}
    source.execute("migrate-set-capabilities", capabilities=[capability])
    if on:
        source.execute("migrate", uri=site.address)
        source.wait_event("MigrationStatusChanged", status="pre-switchover")


def test_handovers_that_fail_and_succeed_in_turn_lose_no_packet_and_leave_nothing_behind(
    site: Site, nics: Nics
) -> None:
    pingers = nics.pingers()
    nics.move()
    before = nics.held()

    given_up = site.destination()
    pause_before_switchover(nics.serving, site, on=True)
    for command in ("stop", "cont"):
        with pytest.raises(PeerError, match=f"cannot {command} while a handover is under way"):
            nics.serving.execute(command)
    nics.serving.execute("migrate_cancel")
    assert nics.serving.wait_migration()["status"] == "cancelled"
    assert given_up.wait() == 1
    pause_before_switchover(nics.serving, site, on=False)

    for fault in ("after-send:READY=kill", "after-receive:COMMIT=kill"):
        doomed = site.destination(fault=fault)
        assert hand_over(site, nics.serving, doomed)["status"] == "failed"
        assert doomed.wait() == -signal.SIGKILL
    assert nics.held() == before

    nics.move()
    assert nics.held() == before
    reports = [pinger.stop() for pinger in pingers]
    assert [(report.lost, report.duplicates) for report in reports] == [(0, 0)] * len(KINDS)
    nics.assert_undisturbed()


def test_guests_that_stand_still_outlive_the_source_and_go_on_where_they_were(site: Site, nics: Nics) -> None:
    nics.assert_all_answer()
    nics.serving.execute("stop")
    heir = site.destination()
    pause_before_switchover(nics.serving, site, on=True)
    nics.lose_to(heir)
    assert nics.serving.execute("query-status")["status"] == "paused"
    nics.move()
    assert nics.serving.execute("query-status")["status"] == "paused"
    nics.serving.execute("cont")
    nics.assert_undisturbed()
