"""Descriptors in a stream: lent on the way out, owned on the way in, closed whatever goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.compat import synthetic
from tests.compat.writing import begun

from localmig.errors import PeerError, StateError
from localmig.fds import OwnedFd
from localmig.migration.stream import IncomingStream
from localmig.vmstate import Blob, Description, Reader, close_descriptors, fd, load, save, u8


def open_numbers() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@contextmanager
def no_descriptor_is_left() -> Iterator[None]:
    before = open_numbers()
    yield
    assert open_numbers() == before


def incoming() -> IncomingStream:
    return IncomingStream(
        setup={synthetic.SETUP_NAME: synthetic.NIC}, switchover={synthetic.RINGS_NAME: synthetic.NIC_RINGS}
    )


def duplicated(blob: Blob) -> list[tuple[int, OwnedFd]]:
    """The descriptors of a blob as a socket would deliver them."""
    return [(offset, OwnedFd(os.dup(number))) for offset, number in blob.fds]


def test_a_descriptor_travels_at_its_place() -> None:
    with no_descriptor_is_left(), synthetic.open_descriptors(synthetic.DESCRIPTOR_COUNT) as fds:
        _, piece = begun([synthetic.setup_section(fds)])
        assert [number for _, number in piece.fds] == [fd.fileno() for fd in fds]
        assert all(piece.data[offset] == 0x20 for offset, _ in piece.fds)
        arrived = duplicated(piece)
        (section,) = incoming().setup(bytes(piece.data), arrived)
        nic = section.state
        found = [nic.regions[0].file, nic.regions[1].file, nic.queues[0].kick, nic.socket]
        assert found == [fd for _, fd in arrived]
        close_descriptors(section.description, nic)
        assert not any(fd.is_open for fd in found)
        # Closing what is closed already, or was taken out, is nothing.
        close_descriptors(section.description, nic)


def test_no_spoilt_byte_leaks_a_descriptor() -> None:
    with synthetic.written_stream() as (piece, _):
        for offset in range(len(piece.data)):
            for value in {0, 1, 5, 0x20, 0xFF} - {piece.data[offset]}:
                spoilt = bytearray(piece.data)
                spoilt[offset] = value
                with no_descriptor_is_left():
                    try:
                        (section,) = incoming().setup(bytes(spoilt), duplicated(piece))
                    except PeerError:
                        continue
                    close_descriptors(section.description, section.state)


def test_a_stream_without_its_descriptors_is_refused() -> None:
    with (
        synthetic.written_stream() as (piece, _),
        no_descriptor_is_left(),
        pytest.raises(PeerError, match=r'field "regions\[0\].file" has no descriptor at offset 91'),
    ):
        incoming().setup(bytes(piece.data))


def test_each_missing_descriptor_is_noticed_and_the_others_are_closed() -> None:
    with synthetic.written_stream() as (piece, _), no_descriptor_is_left():
        for missing in range(len(piece.fds)):
            arrived = duplicated(piece)
            arrived.pop(missing)[1].close()
            with pytest.raises(PeerError, match="has no descriptor at offset"):
                incoming().setup(bytes(piece.data), arrived)


@pytest.mark.parametrize(
    ("offset", "problem"),
    [
        (0, "a descriptor came at offset 0, where none belongs"),
        (91, "5 descriptors came, some at one place"),
        (-1, "descriptor came at offset -1 of 200 bytes"),
        (1 << 20, "descriptor came at offset 1048576 of 200 bytes"),
    ],
)
def test_a_descriptor_too_many_is_noticed_and_all_are_closed(offset: int, problem: str) -> None:
    with synthetic.written_stream() as (piece, _), no_descriptor_is_left():
        extra = OwnedFd(os.dup(piece.fds[0][1]))
        with pytest.raises(PeerError, match=problem):
            incoming().setup(bytes(piece.data), [*duplicated(piece), (offset, extra)])


def test_a_bad_last_section_closes_the_descriptors_of_the_first() -> None:
    with (
        synthetic.written_stream() as (piece, _),
        no_descriptor_is_left(),
        pytest.raises(PeerError, match="1 bytes are left over"),
    ):
        incoming().setup(bytes(piece.data) + b"\0", duplicated(piece))


def test_a_descriptor_in_the_switchover_piece_is_refused() -> None:
    with synthetic.written_stream() as (piece, pieces), no_descriptor_is_left():
        stream = incoming()
        (section,) = stream.setup(bytes(piece.data), duplicated(piece))
        stray = OwnedFd(os.dup(piece.fds[0][1]))
        with pytest.raises(PeerError, match="where none belongs"):
            stream.switchover(pieces.switchover, [(0, stray)])
        # What setup gave out belongs to its taker.
        assert section.state.socket.is_open
        close_descriptors(section.description, section.state)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plug:
    number: int
    cable: OwnedFd


PLUG = Description(name="plug", version=1, oldest_version=1, state=Plug, fields=(u8("number"), fd("cable")))


def test_a_failed_load_closes_what_the_same_reader_gave_out_before() -> None:
    with no_descriptor_is_left(), synthetic.open_descriptors(2) as (one, other):
        reader = Reader(b"\1 \2!", [(1, one), (3, other)])
        first = load(PLUG, 1, reader)
        assert first.cable.is_open
        with pytest.raises(PeerError, match='field "cable" is byte 0x21, a descriptor is 0x20'):
            load(PLUG, 1, reader)
        assert not first.cable.is_open
        assert not other.is_open


def test_a_descriptor_given_away_is_not_saved() -> None:
    with no_descriptor_is_left(), synthetic.open_descriptors(1) as (cable,):
        into = Blob()
        save(PLUG, Plug(number=1, cable=cable), into)
        cable.close()
        with pytest.raises(StateError, match="given away or closed"):
            save(PLUG, Plug(number=2, cable=cable), into)
        assert into.data == b"\1 "
        assert [offset for offset, _ in into.fds] == [1]


def test_a_state_that_does_not_fit_lends_no_descriptor() -> None:
    with no_descriptor_is_left(), synthetic.open_descriptors(synthetic.DESCRIPTOR_COUNT) as fds:
        state = replace(synthetic.setup_state(fds), mac=bytes(7))
        into = Blob()
        with pytest.raises(StateError, match='field "mac" has 7 bytes, limit is 6'):
            save(synthetic.NIC, state, into)
        assert not into.data
        assert not into.fds
        assert all(fd.is_open for fd in fds)
