"""A real guest uses several queue pairs and offloads, and changes how many, while daemons replace each other."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Final

import pytest
from qemu.qmp import QMPClient
from tests.guest.lab import EchoTransfer, Guest, Lab, LabError, finish_pings
from tests.guest.service import Service, converse

from localmig.testing.namespace import ip, link
from localmig.testing.qemu import vhost_user_netdev

QUEUE_PAIRS: Final = 4

CHANGED: Final = "guest: changed"
"""What its console says then."""

LONGEST_UNSEGMENTED: Final = 1514
"""Bytes of a frame at MTU 1500."""

CHANGE_SECONDS_MAX: Final = 30
"""For what the guest asked its VMM to reach the TAP; a busy machine emulates slowly."""


@pytest.fixture(autouse=True)
def _ethtool() -> None:
    if shutil.which("ethtool") is None:
        raise LabError("no ethtool: on Debian, apt-get install ethtool")


def start(lab: Lab) -> tuple[Service, Guest]:
    """A service with several queue pairs, and a guest that uses two of them."""
    service = Service(lab)
    service.start(*service.objects(netdev=f",queues={QUEUE_PAIRS}"))
    lab.set_up("tap0")
    netdev = vhost_user_netdev(service.socket, queue_pairs=QUEUE_PAIRS)
    guest = lab.boot_qemu(netdev, queue_pairs=QUEUE_PAIRS)
    guest.wait_ready()
    return service, guest


def attached_queues(lab: Lab) -> int:
    """Queues of the TAP that the kernel steers packets into; all of them are there."""
    with lab.namespace.entered():
        (facts,) = json.loads(ip("-details", "-json", "link", "show", "dev", "tap0"))
    info = facts["linkinfo"]["info_data"]
    assert info["numqueues"] + info["numdisabled"] == QUEUE_PAIRS, info
    attached: int = info["numqueues"]
    return attached


async def wait_attached(lab: Lab, daemon: QMPClient, count: int) -> None:
    """The VMM tells how many pairs the guest uses and awaits no answer; one event loop reads its words and ours."""
    async with asyncio.timeout(CHANGE_SECONDS_MAX):
        while attached_queues(lab) != count:
            await daemon.execute("query-status")


def wait_attached_by(lab: Lab, service: Service, count: int) -> None:
    async def conversation() -> None:
        daemon = QMPClient("daemon")
        await daemon.connect(str(service.qmp))
        try:
            await wait_attached(lab, daemon, count)
        finally:
            await daemon.disconnect()

    converse(conversation())


def use_pairs(guest: Guest, count: int) -> None:
    """The guest's administrator changes how many queue pairs it uses."""
    said = guest.run(f"ethtool -L eth0 combined {count} 2>&1; echo {CHANGED} >/dev/console; ethtool -l eth0")
    assert re.findall(r"Combined:\s+(\d+)", said) == [str(QUEUE_PAIRS), str(count)], said


@pytest.mark.alone
def test_queue_pairs_come_and_go_while_traffic_flows_and_daemons_change(lab: Lab) -> None:
    service, guest = start(lab)
    carrier_changes = guest.carrier_changes()
    assert attached_queues(lab) == 2
    with EchoTransfer(guest) as transfer:
        for count in (4, 1, 3):
            use_pairs(guest, count)
            wait_attached_by(lab, service, count)
            transfer.wait_progress(500_000)
            discarded = guest.discarded_replies()
            pinger = lab.start_pinger()
            service.upgrade()
            assert attached_queues(lab) == count
            transfer.wait_progress(500_000)
            pings = finish_pings(pinger)
            # Changing the number may cost what waits in a queue that goes; a handover costs nothing.
            assert pings.lost == guest.discarded_replies() - discarded, pings
        assert transfer.finish().intact
    assert guest.carrier_changes() == carrier_changes


def boot_qemu(lab: Lab, service: Service) -> Guest:
    return lab.boot_qemu(vhost_user_netdev(service.socket))


def boot_without_merging(lab: Lab, service: Service) -> Guest:
    # Its driver offers buffers of 64 KiB then.
    return lab.boot_qemu(vhost_user_netdev(service.socket), mergeable=False)


def boot_uml(lab: Lab, service: Service) -> Guest:
    return lab.boot_uml(service.socket)


@pytest.mark.parametrize(
    ("boot", "progress_bytes"),
    [
        pytest.param(boot_qemu, 2_000_000, id="qemu"),
        pytest.param(boot_without_merging, 2_000_000, id="qemu-without-merging"),
        pytest.param(boot_uml, 10_000_000, id="uml"),
    ],
)
def test_a_guest_leaves_segmentation_to_the_host_and_the_host_to_the_guest(
    lab: Lab, boot: Callable[[Lab, Service], Guest], progress_bytes: int
) -> None:
    service = Service(lab)
    service.start(*service.objects())
    lab.set_up("tap0")
    guest = boot(lab, service)
    guest.wait_ready()
    told = guest.run("ethtool -k eth0")
    assert re.search(r"tx-tcp-segmentation: on", told), told
    assert re.search(r"tx-checksum-ip-generic: on", told), told
    before = packets(lab)
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(progress_bytes)
        for _ in range(5):
            service.upgrade()
            transfer.wait_progress(progress_bytes)
        assert transfer.finish().intact
    for (packets_before, bytes_before), (packets_after, bytes_after) in zip(before, packets(lab), strict=True):
        # Acknowledgements of the other direction are among them.
        assert (bytes_after - bytes_before) / (packets_after - packets_before) > LONGEST_UNSEGMENTED


RESETS_DONE: Final = "guest: resets done"

TAP_OFFLOADS: Final = ("tx-checksum-ip-generic", "tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-udp-segmentation")


def left_to_guest(lab: Lab) -> set[str]:
    """What the host's kernel leaves to the guest: a frame whose checksum is not done is never among what it is not."""
    with lab.namespace.entered():
        told = subprocess.run(["ethtool", "-k", "tap0"], capture_output=True, text=True, check=True).stdout
    return {name for name in TAP_OFFLOADS if re.search(rf"^\s*{name}: on", told, re.MULTILINE)}


@pytest.mark.parametrize(
    ("boot", "resets"),
    [pytest.param(boot_qemu, True, id="qemu"), pytest.param(boot_uml, False, id="uml")],
)
def test_checksums_are_no_more_left_to_a_running_guest_after_an_upgrade_nor_after_its_driver_was_reset(
    lab: Lab, boot: Callable[[Lab, Service], Guest], resets: bool
) -> None:
    service = Service(lab)
    service.start(*service.objects())
    lab.set_up("tap0")
    guest = boot(lab, service)
    guest.wait_ready()
    before, told = left_to_guest(lab), guest.run("ethtool -k eth0")
    assert "tx-checksum-ip-generic" in before
    carrier_changes = guest.carrier_changes()
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(500_000)
        service.upgrade(*service.objects(device=",guest_csum=off,host_tso4=off"))
        assert left_to_guest(lab) == set()
        transfer.wait_progress(500_000)
        service.upgrade()
        assert left_to_guest(lab) == set()
        transfer.wait_progress(500_000)
        assert transfer.finish().intact
    assert guest.carrier_changes() == carrier_changes
    assert guest.run("ethtool -k eth0") == told
    if not resets:
        return
    # Unbinding resets the device, and the driver acknowledges again what it was once offered.
    guest.run(
        f"""(
        echo virtio0 >/sys/bus/virtio/drivers/virtio_net/unbind
        echo virtio0 >/sys/bus/virtio/drivers/virtio_net/bind
        ip address add 10.9.0.2/24 dev eth0; ip link set eth0 up
        echo "{RESETS_DONE}"
        ) >/dev/console 2>&1 </dev/null &"""
    )
    guest.process.wait_for(RESETS_DONE, seconds_max=CHANGE_SECONDS_MAX)
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(500_000)
        assert transfer.finish().intact
    assert guest.run("ethtool -k eth0") == told
    assert left_to_guest(lab) == set()
    service.upgrade(*service.objects())
    assert left_to_guest(lab) == before
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(500_000)
        assert transfer.finish().intact


def packets(lab: Lab) -> list[tuple[int, int]]:
    """(packets, bytes) that the TAP got from the guest and sent to it."""
    with lab.namespace.entered():
        stats = link("tap0")["stats64"]
    return [(stats[way]["packets"], stats[way]["bytes"]) for way in ("rx", "tx")]


def test_a_guest_whose_control_queue_is_served_here_has_all_its_pairs(lab: Lab) -> None:
    service = Service(lab)
    service.start(*service.objects(netdev=f",queues={QUEUE_PAIRS}"))
    lab.set_up("tap0")
    guest = boot_uml(lab, service)
    guest.wait_ready()
    # It has one processor, and begins with as many pairs. The daemon answers a command once it has done it.
    assert attached_queues(lab) == 1
    for count in (2, 1, QUEUE_PAIRS):
        guest.run(f"ethtool -L eth0 combined {count}")
        assert attached_queues(lab) == count
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(500_000)
        service.upgrade()
        assert attached_queues(lab) == QUEUE_PAIRS
        transfer.wait_progress(500_000)
        assert transfer.finish().intact
    guest.run("ethtool -L eth0 combined 1")
    assert attached_queues(lab) == 1
