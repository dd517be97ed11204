"""The streams of a real daemon, as releases saved them, are still written and still read."""

from __future__ import annotations

import pytest
from tests.compat import nic
from tests.compat.nic import SAMPLES, Daemon, Sample
from tests.compat.synthetic import open_descriptors, read_vector
from tests.compat.vmdesc_reader import walk
from tests.compat.writing import begun
from tests.kit.cases import each_case

from localmig.dataplane import Counters
from localmig.device_api.device_state import DEVICE
from localmig.device_api.queues_state import QUEUES, QUEUES_SETUP
from localmig.devices.virtio_net.state import VIRTIO_NET
from localmig.migration.stream import IncomingStream
from localmig.netdevs.state import TAP
from localmig.vhost_user.protocol import Offer, check_state
from localmig.vmstate import close_descriptors

each_sample = each_case("sample", SAMPLES, ids=lambda sample: sample.name)


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
            nic.QUEUES_SETUP_NAME: QUEUES_SETUP,
        },
        switchover={nic.QUEUES_NAME: QUEUES},
    )
    with open_descriptors(sample.descriptor_count) as fds:
        incoming.description(pieces.description)
        tap, own, device, queues_setup = incoming.setup(pieces.setup, zip(offsets, fds, strict=True))
        (queues,) = incoming.switchover(pieces.switchover)
        for connection in device.state.socket.connections if device.state.socket is not None else ():
            session = connection.session
            # A stream brings tuples.
            session.regions, session.vrings = list(session.regions), list(session.vrings)
            session.unparsed_fds = list(session.unparsed_fds)
        arrived = Daemon(
            tap=tap.state,
            nic=own.state,
            device=device.state,
            queues=queues.state,
            waiting=queues_setup.state.waiting,
        )
        assert arrived == sample.daemon(fds)
        outgoing, piece = begun(arrived.setup)
        assert piece.data == pieces.setup
        assert outgoing.describe(arrived.switchover) == pieces.description
        assert outgoing.switchover(arrived.switchover).data == pieces.switchover
        for section in (tap, own, device, queues_setup):
            close_descriptors(section.description, section.state)
        assert not any(fd.is_open for fd in fds)


@each_sample
def test_the_vector_explains_itself(sample: Sample) -> None:
    sections = walk(b"".join(read_vector(sample.path))).sections
    assert sections[nic.TAP_NAME]["ifname"] == b"tap0"
    assert sections[nic.TAP_NAME]["mtu"] == 9000
    queues = sections[nic.QUEUES_NAME]
    engine = sections[nic.QUEUES_SETUP_NAME]["engines"]
    assert (engine["name"], engine["counters"]) == (b"queue-pair", [name.encode() for name in Counters._fields])
    position = 0 if sample is nic.IDLE else 0xFFFF
    if sample.queue_pairs > 1:
        assert sections[nic.QUEUES_SETUP_NAME]["groups"] == [b"nic0/0", b"nic0/1"]
        assert queues["waiting"] == [0, 0]
        assert sections[nic.TAP_NAME]["descriptors"]["attached"] == [True, False]
    assert queues["positions"][1:] == [position, *(0, 0) * (sample.queue_pairs - 1)]
    assert dict(zip(Counters._fields, queues["counters"], strict=False))["rx_packets"] == 1 << 40


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
