"""The streams of a real daemon, as releases saved them, are still written and still read."""

from __future__ import annotations

import pytest
from tests.compat import nic
from tests.compat.nic import SAMPLES, Daemon, Sample
from tests.compat.synthetic import open_descriptors, read_vector
from tests.compat.vmdesc_reader import walk
from tests.compat.writing import begun

from localmig.device_api.device_state import DEVICE
from localmig.device_api.queues import RINGS, RINGS_SETUP
from localmig.devices.virtio_net.state import VIRTIO_NET
from localmig.migration.stream import IncomingStream
from localmig.netdevs.state import TAP
from localmig.vhost_user.protocol import Offer, check_state
from localmig.vmstate import close_descriptors

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@each_sample
def test_today_writes_the_bytes_of_the_vector(sample: Sample) -> None:
    with nic.written_stream(sample) as (setup, pieces):
        assert len(setup.fds) == sample.descriptor_count
        assert pieces == read_vector(sample.path)


@each_sample
def test_today_reads_the_vector_and_could_write_it_again(sample: Sample) -> None:
    pieces = read_vector(sample.path)
    offsets = walk(b"".join(pieces)).descriptors
    incoming = IncomingStream(
        setup={
            nic.TAP_NAME: TAP,
            nic.NIC_NAME: VIRTIO_NET,
            nic.DEVICE_NAME: DEVICE,
            nic.QUEUE_PAIRS_NAME: RINGS_SETUP,
        },
        switchover={nic.RINGS_NAME: RINGS},
    )
    with open_descriptors(sample.descriptor_count) as fds:
        incoming.description(pieces.description)
        tap, own, device, queue_pairs = incoming.setup(pieces.setup, zip(offsets, fds, strict=True))
        (rings,) = incoming.switchover(pieces.switchover)
        for connection in device.state.socket.connections if device.state.socket is not None else ():
            session = connection.session
            # A stream brings tuples.
            session.regions, session.vrings = list(session.regions), list(session.vrings)
            session.unparsed_fds = list(session.unparsed_fds)
        arrived = Daemon(
            tap=tap.state,
            nic=own.state,
            device=device.state,
            rings=rings.state,
            waiting=queue_pairs.state.waiting,
        )
        assert arrived == sample.daemon(fds)
        outgoing, piece = begun(arrived.setup)
        assert piece.data == pieces.setup
        assert outgoing.describe(arrived.switchover) == pieces.description
        assert outgoing.switchover(arrived.switchover).data == pieces.switchover
        for section in (tap, own, device, queue_pairs):
            close_descriptors(section.description, section.state)
        assert not any(fd.is_open for fd in fds)


@each_sample
def test_the_vector_explains_itself(sample: Sample) -> None:
    sections = walk(b"".join(read_vector(sample.path))).sections
    assert sections[nic.TAP_NAME]["ifname"] == b"tap0"
    assert sections[nic.TAP_NAME]["mtu"] == 9000
    rings = sections[nic.RINGS_NAME]
    position = 0 if sample is nic.IDLE else 0xFFFF
    if sample.queue_pairs > 1:
        assert (rings["rx_packets"], rings["tx_next_avail"]) == ([1 << 40, 0], [position, 0])
        assert sections[nic.TAP_NAME]["descriptors"]["attached"] == [True, False]
    else:
        assert (rings["rx_packets"], rings["tx_next_avail"]) == (1 << 40, position)


def test_the_session_explains_itself() -> None:
    session = walk(b"".join(read_vector(nic.SESSION.path))).sections[nic.DEVICE_NAME]["socket"]["connections"][
        "session"
    ]
    assert session["features_acked"] == nic.FEATURES
    assert [region["guest_address"] for region in session["regions"]] == [0, 1 << 32]
    assert [vring["size"] for vring in session["vrings"]] == [256, 1024]
    assert [vring["call.present"] for vring in session["vrings"]] == [True, False]


@pytest.mark.parametrize("sample", [nic.SESSION, nic.PACKED, nic.WIDE], ids=lambda sample: sample.name)
def test_the_session_is_one_that_can_be(sample: Sample) -> None:
    with open_descriptors(sample.descriptor_count) as fds:
        socket = sample.daemon(fds).device.socket
        assert socket is not None
        count = sample.queue_pairs
        offer = Offer(features=sample.features, vring_count=2 * count)
        check_state(socket.connections[0].session, offer)
