"""A real guest keeps talking while the daemon that serves its NIC is replaced."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

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


@pytest.mark.alone
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


@pytest.mark.parametrize(
    ("boot", "device"),
    [
        pytest.param(boot_qemu, "", id="split"),
        pytest.param(boot_packed, ",packed=on", id="packed"),
        # It never asks where a ring stands; without mac= each of its drivers makes up an address.
        pytest.param(boot_uml, ",mac=52:54:00:12:34:56", id="uml"),
    ],
)
def test_a_driver_reset_during_handovers_leaves_a_working_guest(
    lab: Lab, boot: Callable[[Lab, Service], Guest], device: str
) -> None:
    service = Service(lab)
    service.start(*service.objects(device=device))
    lab.set_up("tap0")
    guest = boot(lab, service)
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


def test_a_daemon_killed_while_packets_flow_is_succeeded_exactly(lab: Lab) -> None:
    service = Service(lab)
    serving = service.start(*service.objects(device=",packed=on"))
    lab.set_up("tap0")
    guest = boot_packed(lab, service)
    guest.wait_ready()
    assert has_packed_rings(guest)
    carrier_changes = guest.carrier_changes()

    async def die_prepared(source: Path, destination: Path, uri: str) -> None:
        """The source dies with its rings running, and the destination has what it needs."""
        old, new = QMPClient("source"), QMPClient("destination")
        await old.connect(str(source))
        await new.connect(str(destination))
        wanted = [{"capability": name, "state": True} for name in ("events", "pause-before-switchover")]
        for client in (old, new):
            await client.execute("migrate-set-parameters", {"local": True})
            await client.execute("migrate-set-capabilities", {"capabilities": wanted})
        with old.listener("MIGRATION") as here, new.listener("MIGRATION") as there:
            await old.execute("migrate", {"uri": uri})
            await status_reached(here, "pre-switchover")
            serving.kill()
            await status_reached(there, "completed")
        await new.disconnect()
        with contextlib.suppress(EOFError):  # how it learns that the source is gone
            await old.disconnect()

    qmp = service.qmp
    with EchoTransfer(guest) as transfer:
        for number in range(3):
            transfer.wait_progress(1_000_000)
            successor, uri = lab.folder / f"qmp{number}.sock", f"unix:{lab.folder / f'migrate{number}.sock'}"
            destination = service.start("--incoming", uri, "--migration-parameter", "local=on", qmp=successor)
            converse(die_prepared(qmp, successor, uri))
            serving, qmp = destination, successor
        transfer.wait_progress(1_000_000)
        assert transfer.finish().intact
    assert guest.carrier_changes() == carrier_changes


async def status_reached(listener: AsyncIterable[Mapping[str, Any]], status: str) -> None:
    """Wait for a migration to come to `status`, and to no other end."""
    async for event in listener:
        assert event["data"]["status"] not in {"failed", "cancelled"}, event
        if event["data"]["status"] == status:
            return


def test_the_guests_link_follows_the_interface_and_its_session_outlives_it(lab: Lab) -> None:
    service = Service(lab)
    service.start(*service.objects())
    lab.set_up("tap0")
    # QEMU keeps the configuration space itself; this guest's VMM takes it from the device and hears of changes.
    guest = boot_uml(lab, service)
    guest.wait_ready()
    changes = guest.carrier_changes()
    lab.set_down("tap0")
    service.upgrade()
    service.upgrade()
    lab.set_up("tap0")
    assert guest.carrier_changes() == changes + 2
    # As by an operator's mistake.
    lab.delete("tap0")
    (note,) = service.upgrade()["notes"]
    assert "'tap0' was deleted: make it again and it is attached by itself" in note
    lab.add_tap("tap0")
    lab.set_up("tap0")
    assert guest.carrier_changes() == changes + 4
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(5_000_000)
        assert service.upgrade()["notes"] == []
        transfer.wait_progress(5_000_000)
        assert transfer.finish().intact
    assert guest.carrier_changes() == changes + 4
