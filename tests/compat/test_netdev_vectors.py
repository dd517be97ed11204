"""The netdev `stream`, as releases saved it, is still written and still read."""

from __future__ import annotations

import pytest
from tests.compat import netdev
from tests.compat.netdev import SAMPLES, Sample
from tests.compat.synthetic import open_descriptors, read_vector
from tests.compat.vmdesc_reader import walk

from localmig.migration.stream import IncomingStream
from localmig.netdevs.stream import IN_HAND, STREAM

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@each_sample
def test_today_writes_the_bytes_of_the_vector(sample: Sample) -> None:
    with netdev.written_stream(sample) as (setup, pieces):
        assert len(setup.fds) == sample.descriptor_count
        assert pieces == read_vector(sample.path)


@each_sample
def test_today_reads_the_vector_and_could_write_it_again(sample: Sample) -> None:
    pieces = read_vector(sample.path)
    offsets = walk(b"".join(pieces)).descriptors
    incoming = IncomingStream(setup={netdev.SETUP_NAME: STREAM}, switchover={netdev.SWITCHOVER_NAME: IN_HAND})
    with open_descriptors(sample.descriptor_count) as fds:
        incoming.description(pieces.description)
        (stream,) = incoming.setup(pieces.setup, zip(offsets, fds, strict=True))
        (hand,) = incoming.switchover(pieces.switchover)
        assert (stream.state, hand.state) == (sample.state(fds), netdev.HAND)
