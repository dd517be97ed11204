"""The streams of a real daemon, as releases saved them, are still written and still read."""

from __future__ import annotations

import pytest
from tests.compat import nic
from tests.compat.nic import SAMPLES, Daemon, Sample
from tests.compat.synthetic import open_descriptors, read_vector
from tests.compat.vmdesc_reader import walk

from localmig.devices.virtio_net.device import FEATURES
from localmig.devices.virtio_net.state import RINGS, VIRTIO_NET
from localmig.migration.stream import IncomingStream, OutgoingStream
from localmig.netdev.tap import TAP
from localmig.vhost_user.protocol import Offer, check_state
from localmig.vmstate import close_descriptors

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@each_sample
def test_today_writes_the_bytes_of_the_vector(sample: Sample) -> None:
    with nic.written_stream(sample) as (setup, switchover):
        assert len(setup.fds) == sample.descriptor_count
        assert (bytes(setup.data), bytes(switchover.data)) == read_vector(sample.path)


@each_sample
def test_today_reads_the_vector_and_could_write_it_again(sample: Sample) -> None:
    setup, switchover = read_vector(sample.path)
    offsets = walk(setup + switchover).descriptors
    incoming = IncomingStream(setup={nic.TAP_NAME: TAP, nic.NIC_NAME: VIRTIO_NET}, switchover={nic.RINGS_NAME: RINGS})
    with open_descriptors(sample.descriptor_count) as fds:
        tap, device = incoming.setup(setup, zip(offsets, fds, strict=True))
        (rings,) = incoming.switchover(switchover)
        if device.state.socket is not None and device.state.socket.connection is not None:
            session = device.state.socket.connection.session
            # A stream brings tuples.
            session.regions, session.vrings = list(session.regions), list(session.vrings)
            session.unparsed_fds = list(session.unparsed_fds)
        arrived = Daemon(tap=tap.state, nic=device.state, rings=rings.state)
        assert arrived == sample.daemon(fds)
        outgoing = OutgoingStream()
        assert bytes(outgoing.setup(arrived.setup).data) == setup
        outgoing.prepare(arrived.switchover)
        assert bytes(outgoing.switchover(arrived.switchover).data) == switchover
        for section in (tap, device):
            close_descriptors(section.description, section.state)
        assert not any(fd.is_open for fd in fds)


@each_sample
def test_the_vector_explains_itself(sample: Sample) -> None:
    setup, switchover = read_vector(sample.path)
    sections = walk(setup + switchover).sections
    assert sections[nic.TAP_NAME]["ifname"] == b"tap0"
    assert sections[nic.TAP_NAME]["mtu"] == 9000
    rings = sections[nic.RINGS_NAME]
    assert rings["counters"]["rx_packets"] == 1 << 40
    assert rings.get("next_avail", []) == ([] if sample is nic.IDLE else [0x1234, 0xFFFF])


def test_the_session_explains_itself() -> None:
    setup, switchover = read_vector(nic.SESSION.path)
    session = walk(setup + switchover).sections[nic.NIC_NAME]["socket"]["connection"]["session"]
    assert session["features_acked"] == nic.FEATURES
    assert [region["guest_address"] for region in session["regions"]] == [0, 1 << 32]
    assert [vring["size"] for vring in session["vrings"]] == [256, 1024]
    assert [vring["call.present"] for vring in session["vrings"]] == [True, False]


def test_the_session_is_one_that_can_be() -> None:
    with open_descriptors(nic.SESSION.descriptor_count) as fds:
        socket = nic.SESSION.daemon(fds).nic.socket
        assert socket is not None
        assert socket.connection is not None
        check_state(socket.connection.session, Offer(features=FEATURES, vring_count=2, queue_count=1))
