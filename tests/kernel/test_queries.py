"""What query-devices and query-netdevs tell of a daemon with a real TAP and a guest that talks, across a handover."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from tests.kit.daemons import Daemons
from tests.kit.processes import localmig

from localmig.testing.frontend import NetGuest
from localmig.virtio.net import header_length

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("namespace")]

PATIENCE_S: Final = 20.0
QUEUE_SIZE: Final = 16
ETH_P_ALL: Final = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
LOCAL: Final = ("--migration-parameter", "local=on")
FRAME: Final = b"\xff" * 6 + bytes.fromhex("525400123456 88b5") + bytes(46)


class Site:
    """A daemon with a NIC, the guest's side of it and the machine's."""

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self.folder = folder
        self._daemons = Daemons(folder, ends)
        self.daemon = self._daemons.daemon(
            *LOCAL,
            *("--netdev", "tap,id=net0,ifname=tap0,mtu=1400"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,mac=52:54:00:12:34:56,socket={folder}/nic0.sock"),
        )
        self.near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.enter_context(self.near)
        ends.enter_context(tap)
        self.near.settimeout(PATIENCE_S)
        tap.setblocking(False)
        self.guest = ends.enter_context(
            NetGuest(str(folder / "nic0.sock"), tap_fds=[tap.fileno()], queue_size=QUEUE_SIZE)
        )
        self.machine = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        self.machine.bind(("tap0", ETH_P_ALL))
        self.machine.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.machine.settimeout(PATIENCE_S)

    def device(self) -> Any:
        (device,) = self.daemon.execute("query-devices")
        return device

    def netdev(self) -> Any:
        (netdev,) = self.daemon.execute("query-netdevs")
        return netdev

    def counters(self) -> Any:
        return self.device()["queue-pairs"][0]["counters"]

    def hear(self) -> None:
        """A frame reaches the guest."""
        self.machine.send(FRAME)
        assert self.near.recv(4096).endswith(FRAME)

    def say(self) -> None:
        """A frame leaves the guest."""
        self.near.send(bytes(header_length(self.guest.features)) + FRAME)
        assert self.machine.recv(4096) == FRAME

    def status(self, *options: str) -> str:
        """What `localmig status` prints."""
        done = localmig("status", *options, str(self.daemon.qmp))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def hand_over(self) -> None:
        successor = self._daemons.destination()
        self.daemon.execute("migrate", uri=self._daemons.address)
        assert self.daemon.wait_migration(seconds=PATIENCE_S)["status"] == "completed"
        assert (self.daemon.execute("query-devices"), self.daemon.execute("query-netdevs")) == ([], [])
        assert self.daemon.quit() == 0
        self.daemon = successor

    def outlive(self) -> None:
        """The daemon dies once its successor has all, and before that one serves."""
        successor = self._daemons.destination()
        self.daemon.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}]
        )
        self.daemon.execute("migrate", uri=self._daemons.address)
        self.daemon.wait_fact(lambda fact: fact.get("status") == "pre-switchover", seconds=PATIENCE_S)
        self.daemon.kill()
        successor.wait_fact(lambda fact: fact.get("status") == "completed", seconds=PATIENCE_S)
        self.daemon = successor


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as ends:
        yield Site(tmp_path, ends)


def test_a_device_without_a_frontend_says_so(site: Site) -> None:
    device = site.device()
    assert device == {
        "id": "nic0",
        "type": "virtio-net",
        "netdev": "net0",
        "socket": f"{site.folder}/nic0.sock",
        "server": True,
        "mac": "52:54:00:12:34:56",
        "sessions": [],
        "vrings": [],
        "queue-pairs": [{"index": 0, "running": False, "counters": dict.fromkeys(site.counters(), 0)}],
        "notes": [],
    }


def test_a_netdev_tells_how_it_is_set(site: Site) -> None:
    assert site.netdev() | {"vnet-header-length": 0, "ifindex": 2} == {
        "id": "net0",
        "type": "tap",
        "open": True,
        "queues": 1,
        "attached-queues": 1,
        "interface": "here",
        "ifname": "tap0",
        "ifindex": 2,
        "mtu": 1400,
        "up": True,
        "vnet-header-length": 0,
        "offloads": [],
        "notes": [],
    }
    site.guest.attach()
    assert site.netdev()["vnet-header-length"] == header_length(site.guest.features)


def test_a_session_is_told_by_name_and_its_rings_by_number(site: Site) -> None:
    site.guest.attach()
    device = site.device()
    session = device["session"]
    assert "VIRTIO_F_VERSION_1" in session["features"]
    assert "VHOST_USER_F_PROTOCOL_FEATURES" in session["features"]
    assert "VHOST_USER_PROTOCOL_F_REPLY_ACK" in session["protocol-features"]
    assert session["memory-regions"] == 1
    assert session["memory-size"] >= 4096
    assert [vring | {"position": 0} for vring in device["vrings"]] == [
        {
            "index": index,
            "size": QUEUE_SIZE,
            "started": True,
            "enabled": True,
            "running": True,
            "position": 0,
            "failed": False,
        }
        for index in (0, 1)
    ]
    assert device["queue-pairs"][0]["running"]


def test_counters_and_positions_go_on_across_a_handover(site: Site) -> None:
    site.guest.attach()
    for _ in range(3):
        site.hear()
    site.say()
    site.daemon.execute("stop")
    before = site.device()
    counters = before["queue-pairs"][0]["counters"]
    assert (counters["rx-packets"], counters["rx-bytes"]) == (3, 3 * len(FRAME))
    assert (counters["tx-packets"], counters["tx-bytes"]) == (1, len(FRAME))
    assert [vring["position"] for vring in before["vrings"]] == [3, 1]
    assert [vring["running"] for vring in before["vrings"]] == [False, False]
    site.hand_over()
    assert site.device() == before
    site.daemon.execute("cont")
    site.say()
    site.hear()
    counters = site.counters()
    assert (counters["rx-packets"], counters["tx-packets"]) == (4, 2)


def test_asking_again_and_again_disturbs_no_packet(site: Site) -> None:
    site.guest.attach()
    for number in range(50):
        site.say()
        site.hear()
        assert site.counters()["tx-packets"] == number + 1


def test_status_shows_what_is_served_and_what_moves(site: Site) -> None:
    site.guest.attach()
    for _ in range(3):
        site.hear()
    shown = site.status().splitlines()
    assert "devices    1, 1 connected; 2 rings run, 0 failed" in shown
    moved = f"nic0 net0 (tap0) connected 2 run 3 packets, {3 * len(FRAME)} B 0 packets, 0 B 0"
    assert shown[-1].split() == moved.split()
    told = json.loads(site.status("--json", "--rate", "0.01"))
    assert told["devices"] == [site.device()]
    assert told["netdevs"] == [site.netdev()]
    assert told["rates"]["nic0"]["rx-packets"] == 0
    detail = site.status("--device", "nic0", "--rate", "0.01").splitlines()
    assert f"0      to guest    {QUEUE_SIZE}    3         runs" in detail
    assert any(line.startswith("features   ") and "VIRTIO" in line for line in detail)


def test_status_tells_of_a_daemon_that_took_over_because_the_other_one_died(site: Site) -> None:
    site.guest.attach()
    site.say()
    site.outlive()
    site.say()
    assert "the source died during the handover; this daemon took over from guest memory" in site.status()
    assert "1 connected; 2 rings run" in site.status()
