"""Ten thousand descriptors in one frame; and a sender that may have few of them in flight."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from localmig.fds import OwnedFd
from localmig.migration.channel import Channel, FrameKind

COUNT: Final = 10_000
ROOM: Final = 1000
"""Descriptors of this process besides."""

PATIENCE_S: Final = 60.0

NOBODY: Final = 65534

SENDER: Final = """
import asyncio, os, resource, socket, sys
from localmig.errors import LocalmigError, reason_of
from localmig.migration.channel import Channel, FrameKind
number, count, timeout_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
sock = socket.socket(fileno=number)
sock.setblocking(False)
file = os.memfd_create("file")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(*[65534] * 3)
    os.setresuid(*[65534] * 3)
places = [(place, file) for place in range(count)]
try:
    asyncio.run(Channel(sock).send(FrameKind.SETUP, b" " * count, places, timeout_s=timeout_s))
except LocalmigError as error:
    print(reason_of(error))
"""
"""Sends descriptors as a process that may not have more than 64 in flight: root may have any number."""


@contextmanager
def many_may_be_open() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < COUNT + ROOM:
        pytest.skip(f"needs {COUNT + ROOM} descriptors, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, COUNT + ROOM), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def pair() -> tuple[Channel, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return Channel(ours), theirs


def test_ten_thousand_descriptors_arrive_each_at_its_place() -> None:
    async def exchange() -> None:
        with ExitStack() as ends:
            near, theirs = pair()
            theirs.setblocking(False)
            far = Channel(theirs)
            ends.callback(near.close)
            ends.callback(far.close)
            files = [ends.enter_context(OwnedFd(os.memfd_create(name))) for name in ("a", "b", "c")]
            places = [(2 * number, files[number % 3].fileno()) for number in range(COUNT)]
            _, frame = await asyncio.gather(
                near.send(FrameKind.SETUP, b" x" * COUNT, places, timeout_s=PATIENCE_S),
                far.receive(timeout_s=PATIENCE_S),
            )
            try:
                assert frame.data == b" x" * COUNT
                assert [place for place, _ in frame.fds] == [place for place, _ in places]
                inodes = [os.fstat(file.fileno()).st_ino for file in files]
                assert [os.fstat(fd.fileno()).st_ino for _, fd in frame.fds] == [inodes[n % 3] for n in range(COUNT)]
            finally:
                frame.close()

    before = set(Path("/proc/self/fd").iterdir())
    with many_may_be_open():
        asyncio.run(exchange())
    assert set(Path("/proc/self/fd").iterdir()) == before


def sender(sock: socket.socket, count: int, timeout_s: float) -> subprocess.Popen[str]:
    arguments = (f"{sock.fileno()}", f"{count}", f"{timeout_s}")
    return subprocess.Popen(
        [sys.executable, "-c", SENDER, *arguments], pass_fds=[sock.fileno()], stdout=subprocess.PIPE, text=True
    )


def test_a_sender_that_may_have_few_in_flight_waits_for_the_receiver_to_take_them() -> None:
    channel, theirs = pair()
    with theirs:
        process = sender(theirs, 1000, PATIENCE_S)
    try:
        frame = asyncio.run(channel.receive(timeout_s=PATIENCE_S))
        count = len(frame.fds)
        frame.close()
        assert count == 1000
    finally:
        channel.close()
    assert process.communicate(timeout=PATIENCE_S)[0] == ""


def test_a_sender_whose_descriptors_nobody_takes_gives_up_in_time_and_says_what_to_raise() -> None:
    channel, theirs = pair()
    with theirs:
        process = sender(theirs, 1000, 0.1)
    said, _ = process.communicate(timeout=PATIENCE_S)
    channel.close()
    assert said.startswith("cannot send to the other side: Too many references: cannot splice; ")
    assert "may have 64: raise its RLIMIT_NOFILE" in said
