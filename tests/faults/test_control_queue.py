"""A driver that commands its NIC through a control queue of ours, as User-Mode Linux' and crosvm's do."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
from tests.kit.processes import DaemonProcess
from tests.kit.site import Site

from localmig.testing.driver import Driver
from localmig.virtio.net import LinkStatus, NetConfig, NetFeature

CONTROL: Final = 4
"""Behind the rings of two queue pairs."""

OK, ERROR = b"\0", b"\1"

FEATURES: Final = (
    NetFeature.CTRL_VQ
    | NetFeature.MQ
    | NetFeature.CTRL_GUEST_OFFLOADS
    | NetFeature.GUEST_ANNOUNCE
    | NetFeature.MRG_RXBUF
    | NetFeature.GUEST_CSUM
    | NetFeature.GUEST_TSO4
)


def pairs(count: int) -> bytes:
    return struct.pack("<BBH", 4, 0, count)


def offloads(features: int) -> bytes:
    return struct.pack("<BBQ", 5, 0, features)


ANNOUNCED: Final = struct.pack("<BB", 3, 0)


@contextmanager
def driver_of(site: Site, *, features: int = int(FEATURES)) -> Iterator[Driver]:
    with Driver(str(site.socket), ring_count=CONTROL + 1, features=features) as driver:
        driver.attach()
        yield driver


def netdev_of(daemon: DaemonProcess) -> dict[str, Any]:
    (netdev,) = daemon.execute("query-netdevs")
    assert isinstance(netdev, dict)
    return netdev


def upgraded(site: Site, daemon: DaemonProcess) -> DaemonProcess:
    destination = site.destination()
    daemon.execute("migrate", uri=site.address)
    assert daemon.wait_migration()["status"] == "completed"
    destination.wait_migration()
    destination.execute("migrate-set-parameters", local=True)
    daemon.quit()
    return destination


def test_a_driver_says_how_many_pairs_it_uses_and_what_it_takes_over(site: Site) -> None:
    daemon = site.source(*site.objects(netdev=",queues=2"))
    with driver_of(site) as driver:
        assert driver.frontend.get_queue_num() == CONTROL + 1
        assert netdev_of(daemon)["attached-queues"] == 1
        assert driver.request(CONTROL, pairs(2), room=1) == OK
        assert netdev_of(daemon)["attached-queues"] == 2
        assert netdev_of(daemon)["offloads"] == ["TUN_F_CSUM", "TUN_F_TSO4"]
        assert driver.request(CONTROL, offloads(int(NetFeature.GUEST_CSUM)), room=1) == OK
        assert netdev_of(daemon)["offloads"] == ["TUN_F_CSUM"]
        daemon = upgraded(site, daemon)
        facts = netdev_of(daemon)
        assert (facts["attached-queues"], facts["offloads"]) == (2, ["TUN_F_CSUM"])
        assert driver.request(CONTROL, pairs(1), room=1) == OK
        assert driver.request(CONTROL, offloads(int(NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4)), room=1) == OK
        facts = netdev_of(daemon)
        assert (facts["attached-queues"], facts["offloads"]) == (1, ["TUN_F_CSUM", "TUN_F_TSO4"])
        # A driver that begins anew has said nothing yet.
        assert driver.request(CONTROL, pairs(2), room=1) == OK
        driver.reset()
        driver.start()
        assert netdev_of(daemon)["attached-queues"] == 1
        assert driver.request(CONTROL, pairs(2), room=1) == OK
        driver.disconnect()
        daemon.wait_fact(lambda fact: fact["event"] == "SessionClosed")
        driver.attach()
        assert netdev_of(daemon)["attached-queues"] == 1


def test_what_a_driver_commands_stops_each_pair_once_and_not_the_ring_that_it_commands_by(site: Site) -> None:
    daemon = site.source(*site.objects(netdev=",queues=2"))
    with driver_of(site) as driver:

        def command(said: bytes) -> None:
            before = len(daemon.facts)
            assert driver.request(CONTROL, said, room=1) == OK
            last = {"event": "RingsStarted", "device": "nic0", "queue_pair": 1}
            daemon.wait_fact(lambda fact: fact.items() >= last.items(), after=before)

        command(pairs(2))
        before = len(daemon.facts)
        for said in (pairs(1), offloads(int(NetFeature.GUEST_CSUM)), pairs(2)):
            command(said)
        assert daemon.execute("query-devices")[0]["vrings"][CONTROL]["running"]
        assert daemon.quit() == 0
        daemon.wait_event("SessionClosed")
        stopped = [fact["queue_pair"] for fact in daemon.facts[before:] if fact["event"] == "RingsStopped"]
        at_the_end = [0, 1, 2]
        assert stopped == [1, 0, 1, 1, *at_the_end]


@pytest.mark.parametrize(
    "command",
    [
        b"\4",
        b"\4\0",
        pairs(0),
        pairs(3),
        pairs(0xFFFF),
        pairs(1) + b"\0",
        struct.pack("<BBH", 4, 1, 1),
        offloads(int(NetFeature.GUEST_USO4)),
        offloads(int(NetFeature.CSUM)),
        offloads(2**64 - 1),
        b"\0\0\1",
        b"\1\0" + bytes(12),
        ANNOUNCED + b"\0",
        b"\xff" * 64,
    ],
    ids=bytes.hex,
)
def test_what_is_not_offered_or_cannot_be_is_refused_by_its_ack(site: Site, command: bytes) -> None:
    daemon = site.source(*site.objects(netdev=",queues=2"))
    with driver_of(site) as driver:
        assert driver.request(CONTROL, command, room=1) == ERROR
        assert driver.request(CONTROL, pairs(2), room=1) == OK
        assert netdev_of(daemon)["attached-queues"] == 2
        # No room for an answer, and nothing to read.
        driver.add(CONTROL, pairs(1))
        driver.take_used(CONTROL)
        assert driver.request(CONTROL, room=1) == ERROR


def test_a_frontend_that_serves_the_control_queue_itself_has_one_ring_less(site: Site) -> None:
    daemon = site.source(*site.objects(netdev=",queues=2"))
    with driver_of(site, features=int(FEATURES & ~NetFeature.CTRL_VQ)) as driver:
        driver.add(CONTROL, pairs(1), room=1)
        with pytest.raises(TimeoutError):
            driver.take_used(CONTROL, seconds=0.2)
        (device,) = daemon.execute("query-devices")
        assert [vring["index"] for vring in device["vrings"]] == [0, 1, 2, 3]
        # It enables pairs by itself.
        assert netdev_of(daemon)["attached-queues"] == 2


def test_a_driver_announces_itself_where_its_nic_was_moved_to(site: Site) -> None:
    daemon = site.source(*site.objects(netdev=",queues=2", device=",mac=52:54:00:12:34:56"))
    with driver_of(site) as driver:
        daemon.execute("announce-self", initial=50, max=550, rounds=1, step=50)
        daemon.wait_fact(lambda fact: fact["event"] == "GuestAnnounced")
        assert config_of(driver).status == LinkStatus.LINK_UP | LinkStatus.ANNOUNCE
        daemon = upgraded(site, daemon)
        assert config_of(driver).status == LinkStatus.LINK_UP | LinkStatus.ANNOUNCE
        assert driver.request(CONTROL, ANNOUNCED, room=1) == OK
        assert config_of(driver).status == LinkStatus.LINK_UP


def config_of(driver: Driver) -> NetConfig:
    return NetConfig.decode(driver.frontend.get_config(0, 24))
