"""A real guest keeps talking while the daemon that serves its NIC is replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from qemu.qmp import QMPClient
from tests.guest.lab import EchoTransfer, Guest, Lab, finish_pings
from tests.guest.service import Service, converse, migrate

from localmig.testing.qemu import vhost_user_netdev, vhost_user_server

HANDOVERS: Final = 10


def boot_qemu(lab: Lab, service: Service) -> Guest:
    return lab.boot_qemu(vhost_user_netdev(service.socket))


def boot_packed(lab: Lab, service: Service) -> Guest:
    return lab.boot_qemu(vhost_user_netdev(service.socket), packed=True)


def has_packed_rings(guest: Guest) -> bool:
    """Whether its driver acknowledged RING_PACKED."""
    return guest.run("cat /sys/bus/virtio/devices/virtio0/features")[34] == "1"


def boot_uml(lab: Lab, service: Service) -> Guest:
    # It cannot reconnect at all: one lost connection, and its NIC is gone for good.
    return lab.boot_uml(service.socket)


@pytest.mark.parametrize(
    ("boot", "device", "progress_bytes"),
    [
        pytest.param(boot_qemu, "", 1_000_000, id="qemu"),
        pytest.param(boot_packed, ",packed=on", 1_000_000, id="qemu-packed"),
        pytest.param(boot_uml, "", 5_000_000, id="uml"),  # runs at native speed
    ],
)
def test_ten_handovers_lose_no_packet_and_change_no_link(
    lab: Lab, boot: Callable[[Lab, Service], Guest], device: str, progress_bytes: int
) -> None:
    service = Service(lab)
    service.start(*service.objects(device=device))
    lab.set_up("tap0")
    guest = boot(lab, service)
    guest.wait_ready()
    assert has_packed_rings(guest) == ("packed" in device)
    carrier_changes = guest.carrier_changes()

    pinger = lab.start_pinger()
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(progress_bytes)
        for _ in range(HANDOVERS):
            service.upgrade()
            transfer.wait_progress(progress_bytes)
        stream = transfer.finish()
    pings = finish_pings(pinger)

    assert stream.intact
    assert pings.lost == guest.discarded_replies(), pings  # on a machine that is not overloaded: 0
    assert pings.duplicates == 0, pings
    assert guest.carrier_changes() == carrier_changes


def test_a_vmm_that_listens_sees_no_change_and_is_found_again_after_its_restart(lab: Lab) -> None:
    service = Service(lab)
    service.start(*service.objects(device=",server=off,reconnect-ms=20"))
    lab.set_up("tap0")
    service.upgrade()  # without a frontend: the new daemon goes on looking for one
    for _ in range(2):
        guest = lab.boot_qemu(vhost_user_server(service.socket))
        guest.wait_ready()
        carrier_changes = guest.carrier_changes()
        with EchoTransfer(guest) as transfer:
            transfer.wait_progress(1_000_000)
            for _ in range(3):
                service.upgrade()
                transfer.wait_progress(1_000_000)
            assert transfer.finish().intact
        assert guest.carrier_changes() == carrier_changes
        guest.process.stop()


@pytest.mark.parametrize(
    ("netdev", "device"),
    [
        pytest.param(vhost_user_netdev, "", id="vmm-connects"),
        pytest.param(vhost_user_server, ",server=off,reconnect-ms=20", id="vmm-listens"),
    ],
)
def test_without_local_the_frontend_reconnects_and_the_guest_talks_on(
    lab: Lab, netdev: Callable[[Path], list[str]], device: str
) -> None:
    lab.add_tap("tap0")  # by an operator: it outlasts the daemon that lets go of it
    lab.set_up("tap0")
    service = Service(lab)
    source = service.start(*service.objects(device=device))
    guest = lab.boot_qemu(netdev(service.socket))
    guest.wait_ready()

    destination_qmp = lab.folder / "destination.sock"
    uri = f"unix:{lab.folder / 'migrate.sock'}"
    service.start(*service.objects(device=device), "--incoming", uri, qmp=destination_qmp)

    async def conversation() -> None:
        client = QMPClient("source")
        await client.connect(str(service.qmp))
        try:
            info = await migrate(client, uri)
            # Nothing but a new connection can serve the guest afterwards.
            assert (info["status"], info["local"]["descriptors"]) == ("completed", 0), info
        finally:
            await client.disconnect()

    converse(conversation())
    source.stop()
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(1_000_000)
        assert transfer.finish().intact


def test_a_driver_reset_during_handovers_leaves_a_working_guest(lab: Lab) -> None:
    service = Service(lab)
    service.start(*service.objects())
    lab.set_up("tap0")
    guest = boot_qemu(lab, service)
    guest.wait_ready()
    # Unbinding resets the device; the address goes with the interface.
    guest.run(
        """(
        for round in $(seq 40); do
            echo virtio0 >/sys/bus/virtio/drivers/virtio_net/unbind
            echo virtio0 >/sys/bus/virtio/drivers/virtio_net/bind
        done
        ip address add 10.9.0.2/24 dev eth0; ip link set eth0 up
        echo "guest: resets done"
        ) >/dev/console 2>&1 </dev/null &"""
    )
    for _ in range(3):
        service.upgrade()
    guest.process.wait_for("guest: resets done", seconds_max=60)
    service.upgrade()
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(1_000_000)
        assert transfer.finish().intact
