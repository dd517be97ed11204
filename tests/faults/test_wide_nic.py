"""A NIC of several queue pairs with offloads, handed over while a guest with real kernel TCP/IP uses all of it."""

from __future__ import annotations

import json
import socket
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from tests.faults.test_handover_processes import assert_undisturbed, hand_over

from localmig.netdevs.tap import Tap
from localmig.testing.frontend import DRIVER_FEATURES, OFFLOAD_FEATURES, PROTOCOL_FEATURES, Frontend, NetGuest
from localmig.testing.namespace import ip, link
from localmig.testing.traffic import StreamReceiver, StreamReport, StreamSender
from localmig.vhost_user.message import ProtocolFeature
from localmig.virtio import Feature
from localmig.virtio.net import OFFLOADS, NetFeature

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

    from localmig.testing.namespace import NetworkNamespace

PATIENCE_SECONDS = 30.0
"""For a megabyte to pass: it takes milliseconds; a machine under load gets much more."""

PROGRESS = 4_000_000
"""Bytes between two handovers: several thousand packets were they not offloaded."""

LONGEST_UNSEGMENTED = 1514
"""Bytes of a frame at MTU 1500."""

ETH_P_TEST = 0x88B5
"""IEEE 802's for local experiments: nobody else sends it."""

FRAME = b"\xff" * 6 + bytes.fromhex("525400123456") + ETH_P_TEST.to_bytes(2, "big") + bytes(46)

VNET_HEADER_LENGTH = 12

MAC = "52:54:00:12:34:56"

UDP_SEGMENT = 103
"""linux/udp.h: how long the datagrams are that one send is cut into."""


class Traffic:
    """A TCP stream each way, hashed at both ends."""

    def __init__(self, site: Site, ends: ExitStack) -> None:
        assert site.guest is not None
        self._senders: list[StreamSender] = []
        for here, there, address in (
            (site.namespace, site.guest.namespace, site.guest_address),
            (site.guest.namespace, site.namespace, site.host_address),
        ):
            with there.entered():
                receiver = ends.enter_context(StreamReceiver(address))
            with here.entered():
                self._senders.append(StreamSender(address, receiver.port))

    def wait_progress(self) -> None:
        for sender in self._senders:
            assert sender.wait_progress(PROGRESS, PATIENCE_SECONDS)

    def stop(self) -> list[StreamReport]:
        return [sender.stop() for sender in self._senders]


def packets(site: Site) -> dict[str, tuple[int, int]]:
    """(packets, bytes) that the TAP sent to the guest, and got from it."""
    with site.namespace.entered():
        stats = link("tap0")["stats64"]
    return {way: (stats[key]["packets"], stats[key]["bytes"]) for way, key in (("to", "tx"), ("from", "rx"))}


def features(namespace: NetworkNamespace, ifname: str = "tap0") -> dict[str, bool]:
    """What the kernel leaves to whoever reads an interface, as ethtool tells."""
    with namespace.entered():
        try:
            done = subprocess.run(["ethtool", "--json", "-k", ifname], capture_output=True, text=True, check=True)
        except FileNotFoundError:
            pytest.skip("no ethtool: on Debian, apt-get install ethtool")
    (told,) = json.loads(done.stdout)
    return {name: value["active"] for name, value in told.items() if isinstance(value, dict)}


def queues(site: Site) -> tuple[int, int]:
    """(attached, detached) queues of the TAP, as the kernel counts them."""
    with site.namespace.entered():
        (facts,) = json.loads(ip("-details", "-json", "link", "show", "dev", "tap0"))
    info: dict[str, Any] = facts["linkinfo"]["info_data"]
    return info["numqueues"], info["numdisabled"]


def serve_on(site: Site, serving: DaemonProcess, *objects: str) -> DaemonProcess:
    """A handover to a daemon that was given these objects, or none; who serves then."""
    destination = site.destination(*objects)
    info = hand_over(site, serving, destination)
    assert info["status"] == "completed", info
    assert serving.quit() == 0
    destination.execute("migrate-set-parameters", local=True)
    return destination


@pytest.mark.parametrize(("queue_pairs", "packed"), [(1, False), (4, False), (4, True)])
def test_segmentation_is_left_to_the_other_side_both_ways_across_handovers(
    site: Site, queue_pairs: int, packed: bool
) -> None:
    rings = ",packed=on" if packed else ""
    serving = site.source(*site.objects(netdev=f",queues={queue_pairs}", device=rings))
    site.attach(queue_pairs=queue_pairs, packed=packed, offloads=True)
    before = packets(site)
    with ExitStack() as ends:
        traffic = Traffic(site, ends)
        traffic.wait_progress()
        for _ in range(5):
            serving = serve_on(site, serving)
            traffic.wait_progress()
        for report in traffic.stop():
            assert report.intact, report
    after = packets(site)
    for way in ("to", "from"):
        count, size = (new - old for new, old in zip(after[way], before[way], strict=True))
        # Acknowledgements of the other way are among them, so the longest ones are much longer.
        assert size / count > LONGEST_UNSEGMENTED, (way, count, size)
    if queue_pairs > 1:
        assert queues(site) == (queue_pairs, 0)
    assert_undisturbed(site)


def test_the_tap_leaves_to_the_guest_what_it_acknowledged_and_nothing_without_it(site: Site) -> None:
    serving = site.source()
    whole = features(site.namespace)
    assert not whole["tx-checksum-ip-generic"]
    assert not whole["tx-tcp-segmentation"]
    guest = site.attach(offloads=True)
    wanted = ("tx-checksum-ip-generic", "tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-tcp-ecn-segmentation")
    assert all(features(site.namespace)[name] for name in wanted)
    told = features(guest.namespace, "gtap0")
    assert all(told[name] for name in wanted)
    serving = serve_on(site, serving)
    assert all(features(site.namespace)[name] for name in wanted)
    assert_undisturbed(site)
    serving.wait_event("SessionClosed")
    assert features(site.namespace) == whole


def test_an_offload_that_is_switched_off_is_not_offered_and_stays_off(site: Site) -> None:
    serving = site.source(*site.objects(device=",guest_tso4=off,host_tso4=off,host_uso=off"))
    guest = site.attach(offloads=True)
    for _ in range(2):
        ours, theirs = features(site.namespace), features(guest.namespace, "gtap0")
        assert not ours["tx-tcp-segmentation"]
        assert not theirs["tx-tcp-segmentation"]
        assert ours["tx-tcp6-segmentation"]
        assert theirs["tx-tcp6-segmentation"]
        assert not theirs["tx-udp-segmentation"]
        serving = serve_on(site, serving)
    assert_undisturbed(site)


RECEIVE_OFFLOADS = (
    "tx-checksum-ip-generic",
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-udp-segmentation",
)


def left_to_guest(site: Site) -> set[str]:
    """Which of `RECEIVE_OFFLOADS` the kernel leaves to the guest."""
    told = features(site.namespace)
    return {name for name in RECEIVE_OFFLOADS if told[name]}


@pytest.mark.parametrize(
    ("option", "lost"),
    [
        ("guest_csum", RECEIVE_OFFLOADS),
        ("guest_tso4", ("tx-tcp-segmentation",)),
        ("guest_tso6", ("tx-tcp6-segmentation",)),
        ("guest_ecn", ("tx-tcp-ecn-segmentation",)),
        ("guest_uso4", ("tx-udp-segmentation",)),
        ("guest_uso6", ("tx-udp-segmentation",)),
    ],
)
def test_a_new_daemon_leaves_less_to_a_guest_that_acknowledged_more_and_the_next_one_more_again(
    site: Site, option: str, lost: tuple[str, ...]
) -> None:
    serving = site.source()
    guest = site.attach(offloads=True)
    whole, told = left_to_guest(site), features(guest.namespace, "gtap0")
    less = whole - set(lost)
    assert "tx-checksum-ip-generic" in whole
    with ExitStack() as ends:
        traffic = Traffic(site, ends)
        traffic.wait_progress()
        serving = serve_on(site, serving, *site.objects(device=f",{option}=off"))
        traffic.wait_progress()
        assert left_to_guest(site) == less
        # What it is told of travels, and the session keeps what it was offered: a driver may take it all again.
        serving = serve_on(site, serving)
        assert left_to_guest(site) == less
        guest.reset_driver()
        assert left_to_guest(site) == less
        traffic.wait_progress()
        serving = serve_on(site, serving, *site.objects())
        assert left_to_guest(site) == whole
        traffic.wait_progress()
        for report in traffic.stop():
            assert report.intact, report
    assert features(guest.namespace, "gtap0") == told
    assert_undisturbed(site)


def test_a_destination_that_recovers_leaves_no_more_to_the_guest_than_its_options_allow(site: Site) -> None:
    source = site.source(*site.objects(), fault="after-receive:READY=kill")
    destination = site.destination(*site.objects(device=",guest_csum=off"))
    site.attach(offloads=True)
    assert features(site.namespace)["tx-checksum-ip-generic"]
    source.execute("migrate", uri=site.address)
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert not features(site.namespace)["tx-checksum-ip-generic"]
    assert_undisturbed(site)


def test_a_destination_that_fails_has_not_touched_what_is_left_to_the_guest(site: Site) -> None:
    source = site.source()
    site.attach(offloads=True)
    whole = left_to_guest(site)
    for fault in ("after-receive:SETUP=kill", "before-send:READY=kill", "before-send:DONE=kill"):
        site.destination(*site.objects(device=",guest_csum=off"), fault=fault)
        source.execute("migrate", uri=site.address)
        assert source.wait_migration()["status"] == "failed", fault
        assert left_to_guest(site) == whole
    assert_undisturbed(site)


def test_a_session_goes_on_with_what_it_was_offered_and_the_next_one_is_offered_less(site: Site) -> None:
    def offered() -> int:
        with Frontend.connect(str(site.socket)) as frontend:
            return frontend.get_features()

    serving = site.source(*site.objects(device=f",packed=on,mac={MAC}"))
    less = site.objects(device=",packed=off,csum=off,guest_csum=off")
    with NetGuest(
        str(site.socket),
        features=DRIVER_FEATURES | OFFLOAD_FEATURES | Feature.RING_PACKED,
        protocol_features=PROTOCOL_FEATURES | ProtocolFeature.CONFIG,
    ) as guest:
        guest.attach()
        before = guest.frontend.get_features()
        assert before & Feature.RING_PACKED
        serving = serve_on(site, serving, *less)
        for _ in range(2):
            assert guest.frontend.get_features() == before
            assert guest.frontend.get_config(0, 6) == bytes.fromhex(MAC.replace(":", ""))
            guest.reset_driver()
            serving = serve_on(site, serving)
    serving.wait_event("SessionClosed")
    lost = before & ~offered()
    assert lost == Feature.RING_PACKED | NetFeature.MAC | OFFLOADS & before


def test_a_guest_whose_frontend_has_to_connect_again_must_be_offered_what_it_took(site: Site) -> None:
    source = site.source(local=False)
    site.attach(offloads=True)
    site.destination(*site.objects(netdev="", device=",guest_csum=off"), local=False)
    info = hand_over(site, source, source)
    assert info["status"] == "failed"
    assert "are not offered here" in str(info["error-desc"])
    assert_undisturbed(site)


def test_a_destination_that_is_killed_leaves_the_queues_attached(site: Site) -> None:
    source = site.source(*site.objects(netdev=",queues=3"))
    site.attach(queue_pairs=3)
    assert queues(site) == (3, 0)
    for fault in ("after-receive:SETUP=kill", "before-send:READY=kill", "before-send:DONE=kill"):
        site.destination(fault=fault)
        source.execute("migrate", uri=site.address)
        info = source.wait_migration()
        assert info["status"] == "failed", (fault, info)
        assert queues(site) == (3, 0)
        assert site.ping().lost == 0
    serve_on(site, source)
    assert_undisturbed(site)


@pytest.mark.parametrize("fault", ["after-receive:READY=kill", "after-send:COMMIT=kill"])
def test_a_source_that_is_killed_leaves_the_queues_attached(site: Site, fault: str) -> None:
    source = site.source(*site.objects(netdev=",queues=3"), fault=fault)
    destination = site.destination()
    site.attach(queue_pairs=3)
    source.execute("migrate", uri=site.address)
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert queues(site) == (3, 0)
    assert_undisturbed(site)


def test_queues_follow_the_pairs_that_are_enabled_before_and_after_a_handover(site: Site) -> None:
    serving = site.source(*site.objects(netdev=",queues=3"))
    with NetGuest(str(site.socket), queue_pairs=3) as guest:
        guest.attach()
        assert queues(site) == (3, 0)
        for count in (1, 2):
            guest.set_queue_pairs(count)
            assert queues(site) == (count, 3 - count)
            serving = serve_on(site, serving)
            assert queues(site) == (count, 3 - count)
        guest.set_queue_pairs(3)
        assert queues(site) == (3, 0)


def test_what_a_guest_leaves_in_rings_it_uses_no_more_is_sent_before_and_after_a_handover(site: Site) -> None:
    serving = site.source(*site.objects(netdev=",queues=3"))
    with ExitStack() as ends:
        # The kernel's end of the guest's NIC: a socket takes what a TAP queue would.
        kernel, queue_ends = zip(
            *(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) for _ in range(3)),
            strict=True,
        )
        for end in (*kernel, *queue_ends):
            ends.enter_context(end)
        fds = [end.fileno() for end in queue_ends]
        guest = ends.enter_context(NetGuest(str(site.socket), tap_fds=fds, queue_pairs=3))
        guest.attach()
        with site.namespace.entered():
            network = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_TEST)))
        network.bind(("tap0", ETH_P_TEST))
        network.settimeout(PATIENCE_SECONDS)
        guest.set_queue_pairs(1)
        assert queues(site) == (1, 2)
        for generation in range(2):
            for pair in range(3):
                frame = FRAME + bytes([generation, pair])
                kernel[pair].send(bytes(VNET_HEADER_LENGTH) + frame)
                assert network.recv(2048) == frame
            serving = serve_on(site, serving)
            assert queues(site) == (1, 2)
        guest.set_queue_pairs(3)
        assert queues(site) == (3, 0)


def test_queues_of_a_session_that_ended_are_detached(site: Site) -> None:
    serving = site.source(*site.objects(netdev=",queues=3"))
    assert queues(site) == (1, 2)
    site.attach(queue_pairs=3)
    serving = serve_on(site, serving)
    assert queues(site) == (3, 0)
    assert site.guest is not None
    site.guest.stop()
    serving.wait_event("SessionClosed")
    assert queues(site) == (1, 2)
    site.attach(queue_pairs=2)
    assert queues(site) == (2, 1)
    assert_undisturbed(site)


def test_udp_segmentation_is_left_to_the_other_side_both_ways(site: Site) -> None:
    serving = site.source()
    guest = site.attach(offloads=True)
    if not features(guest.namespace, "gtap0")["tx-udp-segmentation"]:
        pytest.skip("this kernel's TAP knows no UDP segmentation: Linux 6.2 does")
    assert features(site.namespace)["tx-udp-segmentation"]
    segments, size = 40, 1400
    for _ in range(2):
        for here, there, address in (
            (site.namespace, guest.namespace, site.guest_address),
            (guest.namespace, site.namespace, site.host_address),
        ):
            with there.entered():
                receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with here.entered():
                sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with receiver, sender:
                receiver.settimeout(PATIENCE_SECONDS)
                receiver.bind((address, 0))
                sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, size)
                before = packets(site)["to" if here is site.namespace else "from"][0]
                sender.sendto(b"".join(bytes([number]) * size for number in range(segments)), receiver.getsockname())
                received = [receiver.recv(65536) for _ in range(segments)]
                after = packets(site)["to" if here is site.namespace else "from"][0]
            assert received == [bytes([number]) * size for number in range(segments)]
            # One packet on the TAP: it was segmented behind it. Another may have been an ARP of the kernel's.
            assert after - before < segments // 2
        serving = serve_on(site, serving)
    assert_undisturbed(site)


def test_queues_that_were_inherited_serve_and_move(site: Site) -> None:
    with site.namespace.entered():
        tap = Tap(id="parent", ifname="tap0", queues=2)
        tap.open()
    numbers = [tap.fileno(queue) for queue in range(2)]
    objects = site.objects()
    objects[1] = f"tap,id=net0,fds={':'.join(map(str, numbers))}"
    source = site.daemon(*objects, inherited=numbers)
    tap.release()
    source.execute("migrate-set-parameters", local=True)
    site.address_tap()
    site.attach(queue_pairs=2)
    assert queues(site) == (2, 0)
    serve_on(site, source)
    assert queues(site) == (2, 0)
    assert_undisturbed(site)


@pytest.mark.parametrize(
    ("netdev", "device", "offered", "config"),
    [
        ("", "", NetFeature(0), "000000000000 0100 0100"),
        (",queues=3", f",mac={MAC}", NetFeature.MQ | NetFeature.MAC, "525400123456 0100 0300"),
    ],
)
def test_a_device_tells_its_address_and_its_queue_pairs_where_it_has_them(
    site: Site, netdev: str, device: str, offered: NetFeature, config: str
) -> None:
    site.source(*site.objects(netdev=netdev, device=device))
    with Frontend.connect(str(site.socket)) as frontend:
        assert frontend.get_features() & (NetFeature.MQ | NetFeature.MAC) == offered
        frontend.set_protocol_features(frontend.get_protocol_features() & ProtocolFeature.CONFIG)
        assert frontend.get_config(0, 10) == bytes.fromhex(config)
