"""A daemon that is the main process of a unit of a real systemd's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import pytest
from tests.host.conftest import TREE, Host

from localmig.testing.namespace import ip

pytestmark = pytest.mark.xdist_group("systemd")  # they share a host

UNIT: Final = "localmig@vm1.service"
PROGRAM: Final = str(TREE / ".venv/bin/localmig")
QMP: Final = "/run/localmig/vm1/qmp.sock"
SOCKET: Final = "/run/localmig/vm1/nic0.sock"
CONFIG: Final = f"""\
[[netdev]]
type = "tap"
id = "net0"
ifname = "tap0"
[[device]]
driver = "virtio-net"
id = "nic0"
netdev = "net0"
socket = "{SOCKET}"
"""


class Service:
    """The unit with a guest behind its NIC, under pings."""

    def __init__(self, host: Host, ends: ExitStack) -> None:
        self.host = host
        host.systemctl("start", UNIT)
        ends.callback(host.systemctl, "stop", UNIT)
        with host.network.entered():
            ip("addr", "replace", "10.9.0.1/24", "dev", "tap0")
        self.guest = ends.enter_context(host.attach(SOCKET, reconnect_ms=10))
        self.pid = self.main_pid()
        assert host.ping(10).lost == 0

    def main_pid(self) -> str:
        """Of the unit."""
        return self.host.show(UNIT)["MainPID"]

    @contextmanager
    def pinged(self) -> Iterator[None]:
        """Meanwhile the guest loses no ping, and its link does not change."""
        carrier_changes = self.guest.carrier_changes
        pinger = self.host.pinger()
        try:
            yield
        finally:
            report = pinger.stop()
        assert self.host.ping(100).lost == 0
        assert (report.lost, self.guest.carrier_changes) == (0, carrier_changes)
        assert report.sent > 0


@pytest.fixture
def service(host: Host) -> Iterator[Service]:
    host.path("/etc/localmig/vm1.toml").write_text(CONFIG)
    unit = (TREE / "examples/systemd/localmig@.service").read_text().replace("=localmig ", f"={PROGRAM} ")
    host.path("/etc/systemd/system/localmig@.service").write_text(unit)
    shutil.rmtree(host.path(f"/etc/systemd/system/{UNIT}.d"), ignore_errors=True)
    host.systemctl("daemon-reload")
    with ExitStack() as ends:
        yield Service(host, ends)


def give(host: Host, name: str, *lines: str) -> None:
    """A drop-in of the unit's."""
    folder = host.path(f"/etc/systemd/system/{UNIT}.d")
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.conf").write_text("\n".join(["[Service]", *lines, ""]))
    host.systemctl("daemon-reload")


def test_a_reload_moves_the_guest_and_the_unit_follows(service: Service) -> None:
    for _ in range(3):
        with service.pinged():
            before = service.main_pid()
            service.host.systemctl("reload", UNIT)
        facts = service.host.wait(
            UNIT, ActiveState="active", SubState="running", StatusText="serves 1 netdev, 1 device"
        )
        assert facts["MainPID"] != before
        assert (facts["NRestarts"], facts["Result"]) == ("0", "success")
        # The old process is gone, and what it logged as well as its successor is the unit's.
        assert service.host.processes_of(facts) == [facts["MainPID"]]
        assert f"process {facts['MainPID']} is ready" in service.host.journal(UNIT)


def test_an_upgrade_from_a_shell_is_a_reload(service: Service) -> None:
    with service.pinged():
        done = service.host.run(PROGRAM, "upgrade", QMP)
    assert done.returncode == 0, done.stderr
    assert f"is the main process of unit '{UNIT}': systemd reloads it" in done.stderr
    assert f"committed: daemon {service.main_pid()} serves in place of {service.pid}" in done.stdout
    assert service.main_pid() != service.pid


def test_a_reload_that_fails_says_so_and_costs_nothing(service: Service) -> None:
    give(service.host, "reload", "ExecReload=", f"ExecReload={PROGRAM} upgrade {QMP} --exec /bin/false")
    with service.pinged():
        assert service.host.run("systemctl", "reload", UNIT).returncode != 0
        done = service.host.run(PROGRAM, "upgrade", QMP)
    assert done.returncode == 1
    assert f"rolled back: the reload of unit '{UNIT}' failed" in done.stderr
    facts = service.host.wait(UNIT, ActiveState="active", SubState="running")
    assert (facts["MainPID"], facts["NRestarts"]) == (service.pid, "0")
    # What decides how the unit is reloaded stands in the unit.
    refused = service.host.run(PROGRAM, "upgrade", QMP, "--exec", PROGRAM)
    assert refused.returncode == 1
    assert "whose ExecReload= hands over: give --exec there" in refused.stderr


def test_a_unit_without_a_reload_is_not_ended_by_an_upgrade(service: Service) -> None:
    give(service.host, "reload", "ExecReload=")
    with service.pinged():
        done = service.host.run(PROGRAM, "upgrade", QMP)
    assert done.returncode == 1
    assert f"unit '{UNIT}' would end with its main process" in done.stderr
    assert service.main_pid() == service.pid


def test_a_daemon_that_is_killed_is_started_again_and_the_guest_reconnects(service: Service) -> None:
    service.host.systemctl("reload", UNIT)  # also where systemd did not start the process itself
    service.host.systemctl("kill", "--kill-whom=main", "--signal=KILL", UNIT)
    facts = service.host.wait(UNIT, ActiveState="active", SubState="running", NRestarts="1")
    service.guest.wait_for("reconnected", 30)
    assert facts["MainPID"] != service.pid


def test_a_stop_ends_it_in_order_and_leaves_nothing(service: Service) -> None:
    service.host.systemctl("stop", UNIT)
    facts = service.host.show(UNIT)
    assert (facts["ActiveState"], facts["Result"]) == ("inactive", "success")
    assert not service.host.path("/run/localmig/vm1").exists()
