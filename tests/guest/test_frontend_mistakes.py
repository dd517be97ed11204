"""A QEMU that was given something wrong: the operator learns of it, and of nothing where all is right."""

from __future__ import annotations

from typing import Final

from tests.guest.lab import EchoTransfer, Lab
from tests.guest.service import Service

from localmig.testing.qemu import vhost_user_netdev

NOTE_SECONDS_MAX: Final = 30
"""For a guest that boots and brings its interface up, and for two looks."""


def test_memory_that_qemu_does_not_share_is_told_of(lab: Lab) -> None:
    service = Service(lab)
    daemon = service.start("-v", *service.objects())
    lab.set_up("tap0")
    lab.boot_qemu(vhost_user_netdev(service.socket), shares_memory=False)
    daemon.wait_for('"DeviceNoted"', seconds_max=NOTE_SECONDS_MAX)
    (note,) = service.nic()["notes"]
    assert "share=on" in note


def test_more_queue_pairs_than_there_are_are_told_of_once(lab: Lab) -> None:
    service = Service(lab)
    daemon = service.start("-v", *service.objects(netdev=",queues=2"))
    lab.set_up("tap0")
    guest = lab.boot_qemu(vhost_user_netdev(service.socket, queue_pairs=4), queue_pairs=4)
    guest.wait_ready()
    daemon.wait_for('"DeviceNoted"', seconds_max=NOTE_SECONDS_MAX)
    # Its two processors use the two pairs that are there.
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(1_000_000)
        assert transfer.finish().intact
    (note,) = service.nic()["notes"]
    assert note.startswith("QEMU asks for 4 pairs, nic0 has 2")
    assert daemon.log.read_text().count('"DeviceNoted"') == 1
