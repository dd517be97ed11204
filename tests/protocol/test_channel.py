"""Frames of bytes with descriptors at their places: cut apart from any pieces, and over a real socket pair."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.kit.cases import each_case

from localmig import fds
from localmig.errors import KernelError, PeerError, PeerLostError
from localmig.fds import OwnedFd
from localmig.migration import channel as channel_module
from localmig.migration.channel import LENGTH_MAX, Channel, Frame, FrameBuffer, FrameKind

PATIENCE_S = 10.0
AT_ONCE_S = 0.01


@pytest.fixture(autouse=True)
def no_descriptor_is_lost() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) == before


def header(kind: int, length: int, *, magic: bytes = b"LMIG", padding: bytes = bytes(3)) -> bytes:
    return magic + bytes([kind]) + padding + length.to_bytes(4, "big")


def a_file() -> OwnedFd:
    return OwnedFd(os.memfd_create("test", os.MFD_CLOEXEC))


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


# -- cutting --------------------------------------------------------------------------------------------------


@contextmanager
def new_buffer() -> Iterator[FrameBuffer]:
    made = FrameBuffer()
    yield made
    made.close()


@pytest.fixture
def buffer() -> Iterator[FrameBuffer]:
    with new_buffer() as made:
        yield made


STREAM = b"".join(
    (
        header(FrameKind.HELLO, 5) + b"first",
        header(FrameKind.SETUP, 4) + b"a d ",
        header(FrameKind.SETUP_ACK, 0),
        header(FrameKind.COMMIT, 8) + bytes(range(8)),
    )
)
DESCRIPTOR_AT = (12 + 5 + 12 + 1, 12 + 5 + 12 + 3)
FRAMES = [
    (FrameKind.HELLO, b"first", []),
    (FrameKind.SETUP, b"a d ", [1, 3]),
    (FrameKind.SETUP_ACK, b"", []),
    (FrameKind.COMMIT, bytes(range(8)), []),
]


def take_all(buffer: FrameBuffer) -> list[tuple[FrameKind, bytes, list[int]]]:
    taken = []
    while (frame := buffer.next_frame()) is not None:
        taken.append((frame.kind, frame.data, [offset for offset, _ in frame.fds]))
        frame.close()
    return taken


@each_case("cut", range(len(STREAM) + 1), fresh={"buffer": new_buffer})
def test_frames_are_the_same_wherever_the_bytes_are_cut(buffer: FrameBuffer, cut: int) -> None:
    taken = []
    # The kernel ends what it delivers behind a byte that carries a descriptor.
    ends = sorted({cut, *(at + 1 for at in DESCRIPTOR_AT), len(STREAM)} - {0})
    start = 0
    for end in ends:
        buffer.feed(STREAM[start:end], [a_file()] if end - 1 in DESCRIPTOR_AT else [])
        start = end
        taken += take_all(buffer)
    assert taken == FRAMES


def test_frames_are_the_same_byte_by_byte(buffer: FrameBuffer) -> None:
    taken = []
    for at in range(len(STREAM)):
        buffer.feed(STREAM[at : at + 1], [a_file()] if at in DESCRIPTOR_AT else [])
        taken += take_all(buffer)
    assert taken == FRAMES


@each_case(
    ("spoiled", "complaint"),
    [
        (header(1, 0, magic=b"QEVM"), "channel starts with 5145564d, expected 4c4d4947"),
        (header(1, 0, magic=b"LMIH"), "is the other side localmig"),
        (header(0, 0), "frame kind 0 is unknown, the last one known is 10"),
        (header(11, 0), "frame kind 11 is unknown"),
        (header(255, 0), "frame kind 255 is unknown"),
        *(
            (header(kind, limit + 1), f"{kind.name} frame has {limit + 1} bytes, limit is {limit}")
            for kind, limit in LENGTH_MAX.items()
        ),
        (header(FrameKind.SETUP, 0xFFFF_FFFF), "SETUP frame has 4294967295 bytes"),
    ],
    fresh={"buffer": new_buffer},
)
def test_a_header_that_is_none_is_refused_before_its_payload_comes(
    buffer: FrameBuffer, spoiled: bytes, complaint: str
) -> None:
    buffer.feed(spoiled[:-1])
    assert buffer.next_frame() is None
    buffer.feed(spoiled[-1:])
    with pytest.raises(PeerError, match=complaint):
        buffer.next_frame()


@each_case("kind", FrameKind, fresh={"buffer": new_buffer})
def test_every_kind_has_a_limit_and_may_reach_it(buffer: FrameBuffer, kind: FrameKind) -> None:
    buffer.feed(header(kind, LENGTH_MAX[kind]))
    buffer.feed(bytes(LENGTH_MAX[kind]))
    frame = buffer.next_frame()
    assert frame == Frame(kind=kind, data=bytes(LENGTH_MAX[kind]))


def test_bytes_in_the_header_that_mean_nothing_yet_are_passed_over(buffer: FrameBuffer) -> None:
    buffer.feed(header(FrameKind.READY, 0, padding=b"\1\2\3"))
    assert take_all(buffer) == [(FrameKind.READY, b"", [])]


def test_a_descriptor_at_another_byte_is_refused_and_closed(buffer: FrameBuffer) -> None:
    fd = a_file()
    with pytest.raises(PeerError, match="1 descriptors came with byte 21, expected one with byte 20"):
        buffer.feed(header(FrameKind.SETUP, 4) + b"a !", [fd])
    assert not fd.is_open


def test_two_descriptors_at_one_byte_are_refused_and_closed(buffer: FrameBuffer) -> None:
    both = [a_file(), a_file()]
    with pytest.raises(PeerError, match="2 descriptors came with byte 20"):
        buffer.feed(header(FrameKind.SETUP, 4) + b"a ", both)
    assert not any(fd.is_open for fd in both)


def test_a_descriptor_in_a_header_is_refused(buffer: FrameBuffer) -> None:
    # Its length ends with the byte 20 by chance.
    fd = a_file()
    buffer.feed(header(FrameKind.SETUP, 0x20), [fd])
    buffer.feed(bytes(0x20))
    with pytest.raises(PeerError, match="a descriptor came with the header of a SETUP frame"):
        buffer.next_frame()
    buffer.close()
    assert not fd.is_open


def test_descriptors_of_a_frame_that_nobody_took_are_closed_with_it(buffer: FrameBuffer) -> None:
    taken, left = a_file(), a_file()
    buffer.feed(header(FrameKind.SETUP, 1) + b" ", [taken])
    buffer.feed(header(FrameKind.SETUP, 2) + b" ", [left])
    frame = buffer.next_frame()
    assert frame is not None
    buffer.close()
    assert (taken.is_open, left.is_open) == (True, False)
    frame.close()
    assert not taken.is_open


# -- over a socket --------------------------------------------------------------------------------------------


@contextmanager
def pair(*, send_buffer: int | None = None) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the bare socket at its other end, blocking."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    theirs.settimeout(PATIENCE_S)
    if send_buffer is not None:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    channel = Channel(ours)
    try:
        with theirs:
            yield channel, theirs
    finally:
        channel.close()


@contextmanager
def channels() -> Iterator[tuple[Channel, Channel]]:
    with pair() as (near, theirs):
        theirs.setblocking(False)
        far = Channel(theirs)
        try:
            yield near, far
        finally:
            far.close()


@pytest.mark.parametrize("count", [0, 1, 300])
def test_every_descriptor_arrives_at_its_place(count: int) -> None:
    async def exchange() -> None:
        with ExitStack() as stack, channels() as (near, far):
            sent = [stack.enter_context(a_file()) for _ in range(count)]
            # Descriptors side by side, and bytes 20 that are none in between.
            data = b" x" + b"".join(b" " if number % 3 else b"  x" for number in range(count)) + b"end "
            places, at = [], 2
            for number in range(count):
                places.append(at)
                at += 1 if number % 3 else 3
            lent = [(place, fd.fileno()) for place, fd in zip(places, sent, strict=True)]
            _, frame = await asyncio.gather(
                near.send(FrameKind.SETUP, data, lent, timeout_s=PATIENCE_S), far.receive(timeout_s=PATIENCE_S)
            )
            assert (frame.kind, frame.data) == (FrameKind.SETUP, data)
            assert [offset for offset, _ in frame.fds] == places
            assert [inode(fd.fileno()) for _, fd in frame.fds] == [inode(fd.fileno()) for fd in sent]
            assert not any(os.get_inheritable(fd.fileno()) for _, fd in frame.fds)
            frame.close()

    asyncio.run(exchange())


def test_frames_sent_at_once_are_received_one_by_one() -> None:
    async def exchange() -> None:
        with channels() as (near, far):
            for kind in (FrameKind.SETUP_ACK, FrameKind.READY):
                await near.send(kind, timeout_s=PATIENCE_S)
            await near.send(FrameKind.COMMIT, bytes(8), timeout_s=PATIENCE_S)
            near.close()
            kinds = [(await far.receive(timeout_s=PATIENCE_S)).kind for _ in range(3)]
            assert kinds == [FrameKind.SETUP_ACK, FrameKind.READY, FrameKind.COMMIT]
            # What was said is read to the end before the end is believed.
            with pytest.raises(PeerLostError, match="the other side closed the channel"):
                await far.receive(timeout_s=PATIENCE_S)

    asyncio.run(exchange())


def test_a_large_frame_passes_a_small_buffer() -> None:
    async def exchange() -> None:
        with channels() as (near, far):
            data = os.urandom(4 * 1024 * 1024)
            _, frame = await asyncio.gather(
                near.send(FrameKind.SETUP, data, timeout_s=PATIENCE_S), far.receive(timeout_s=PATIENCE_S)
            )
            assert frame.data == data

    asyncio.run(exchange())


def test_a_frame_without_descriptors_leaves_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    send = fds.send

    def count(sock: socket.socket, data: bytes | memoryview, lent: tuple[int, ...] = ()) -> int:
        pieces.append(len(data))
        return send(sock, data, lent)

    monkeypatch.setattr(fds, "send", count)
    with pair() as (channel, _):
        asyncio.run(channel.send(FrameKind.COMMIT, bytes(8), timeout_s=PATIENCE_S))
    assert pieces == [12 + 8]


@each_case("cut", [1, 11, 12, 13, 15])
def test_a_side_that_leaves_within_a_frame_is_lost(cut: int) -> None:
    whole = header(FrameKind.SETUP, 4) + b"a bc"
    with pair() as (channel, theirs), a_file() as lent:
        theirs.send(whole[: min(cut, 13)])
        if cut > 13:
            fds.send(theirs, whole[13:14], [lent.fileno()])
            theirs.send(whole[14:cut])
        theirs.close()
        with pytest.raises(PeerLostError, match="the other side closed the channel"):
            asyncio.run(channel.receive(timeout_s=PATIENCE_S))


def test_a_side_that_reads_nothing_is_given_up_in_time() -> None:
    with pair() as (channel, _):
        with pytest.raises(TimeoutError):
            asyncio.run(channel.send(FrameKind.SETUP, bytes(8 * 1024 * 1024), timeout_s=AT_ONCE_S))
        # Half a frame is out: whatever followed would be read as its rest.
        assert not channel.try_send(FrameKind.CANCEL, b"no")


def test_a_side_that_says_nothing_is_given_up_in_time() -> None:
    with pair() as (channel, theirs):
        theirs.send(header(FrameKind.READY, 0)[:-1])
        with pytest.raises(TimeoutError):
            asyncio.run(channel.receive(timeout_s=AT_ONCE_S))


def test_a_side_that_is_gone_cannot_be_sent_to() -> None:
    with pair() as (channel, theirs):
        theirs.close()
        with pytest.raises(PeerLostError, match="the other side is gone"):
            asyncio.run(channel.send(FrameKind.READY, timeout_s=PATIENCE_S))


def test_a_wait_that_is_cancelled_leaves_nothing_in_the_loop() -> None:
    async def cancel() -> None:
        with pair() as (channel, theirs):
            waiting = asyncio.ensure_future(channel.receive(timeout_s=None))
            await asyncio.sleep(0)
            number = channel._sock.fileno()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert not asyncio.get_running_loop().remove_reader(number)
            theirs.close()

    asyncio.run(cancel())


def test_descriptors_the_process_has_no_room_for_are_named_as_its_own_lack() -> None:
    with pair() as (channel, theirs), a_file() as lent:
        theirs.send(header(FrameKind.SETUP, 1))
        fds.send(theirs, b" ", [lent.fileno()])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

        async def receive() -> None:
            # Every number below the limit is taken.
            resource.setrlimit(resource.RLIMIT_NOFILE, (first_free(), hard))
            try:
                await channel.receive(timeout_s=PATIENCE_S)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        with pytest.raises(KernelError, match="descriptors were lost on the way: this process has no room"):
            asyncio.run(receive())


def first_free() -> int:
    with a_file() as probe:
        return probe.fileno()


# -- in the downtime ------------------------------------------------------------------------------------------


def test_one_small_frame_can_be_sent_without_waiting() -> None:
    with pair() as (channel, theirs):
        assert channel.try_send(FrameKind.CANCEL, b"no")
        assert theirs.recv(64) == header(FrameKind.CANCEL, 2) + b"no"


def test_a_side_that_does_not_read_cannot_be_told() -> None:
    with pair() as (channel, theirs):
        sent = 0
        while channel.try_send(FrameKind.READY):
            sent += 1
        assert not channel.try_send(FrameKind.READY)
        # Nothing of the frame that did not fit is out, so that the channel is of use again once there is room.
        theirs.setblocking(False)
        assert len(theirs.recv(16 * 1024 * 1024)) == sent * 12
        assert channel.try_send(FrameKind.READY)


def test_a_frame_that_went_half_is_not_told_and_ends_the_channel() -> None:
    with pair(send_buffer=4096) as (channel, theirs):
        assert not channel.try_send(FrameKind.CANCEL, bytes(64 * 1024))
        assert theirs.recv(64 * 1024)
        assert not channel.try_send(FrameKind.CANCEL)


def test_nobody_needs_to_be_told_where_nobody_is() -> None:
    with pair() as (channel, theirs):
        theirs.close()
        assert channel.try_send(FrameKind.CANCEL, b"no")


def test_an_eager_wait_spares_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "EAGER_WAIT_MS", PATIENCE_S * 1000)

    async def receive(channel: Channel, theirs: socket.socket) -> None:
        loop_ran = threading.Event()
        asyncio.get_running_loop().call_soon(loop_ran.set)
        other_side = threading.Thread(target=theirs.send, args=[header(FrameKind.READY, 0)])
        other_side.start()
        frame = await channel.receive(timeout_s=PATIENCE_S, eager=True)
        assert frame.kind is FrameKind.READY
        assert not loop_ran.is_set()
        other_side.join()

    with pair() as (channel, theirs):
        asyncio.run(receive(channel, theirs))


def test_an_eager_wait_that_got_nothing_lets_the_loop_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "EAGER_WAIT_MS", 1)

    async def receive(channel: Channel, theirs: socket.socket) -> None:
        asyncio.get_running_loop().call_soon(theirs.send, header(FrameKind.READY, 0))
        assert (await channel.receive(timeout_s=PATIENCE_S, eager=True)).kind is FrameKind.READY
        with pytest.raises(TimeoutError):
            await channel.receive(timeout_s=0, eager=True)

    with pair() as (channel, theirs):
        asyncio.run(receive(channel, theirs))


# -- its end --------------------------------------------------------------------------------------------------


def test_the_end_is_awaited() -> None:
    with pair() as (channel, theirs):
        with pytest.raises(TimeoutError):
            asyncio.run(channel.receive_end(timeout_s=AT_ONCE_S))
        theirs.close()
        asyncio.run(channel.receive_end(timeout_s=PATIENCE_S))


def test_more_where_the_end_should_be_is_an_error_and_its_descriptors_are_closed() -> None:
    with pair() as (channel, theirs), a_file() as lent:
        theirs.send(header(FrameKind.SETUP, 1))
        fds.send(theirs, b" ", [lent.fileno()])
        with pytest.raises(PeerError, match="SETUP came where the channel should end"):
            asyncio.run(channel.receive_end(timeout_s=PATIENCE_S))


def test_a_channel_over_tcp_passes_no_descriptors() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        sock.setblocking(False)
        assert not Channel(sock).passes_descriptors
    with pair() as (channel, _):
        assert channel.passes_descriptors
        channel.close()
        channel.close()


def test_what_is_there_counts_more_than_a_deadline_that_passed_while_the_process_stood_still() -> None:
    async def receive_late(channel: Channel, theirs: socket.socket) -> Frame:
        waiting = asyncio.ensure_future(channel.receive(timeout_s=AT_ONCE_S))
        await asyncio.sleep(0)
        theirs.send(header(FrameKind.READY, 0))
        # The process stands still, as under SIGSTOP: afterwards the loop finds the frame and the deadline at once.
        threading.Event().wait(2 * AT_ONCE_S)
        return await waiting

    with pair() as (channel, theirs):
        assert asyncio.run(receive_late(channel, theirs)).kind is FrameKind.READY
