"""What is done so that the downtime is short: nothing else happens in it, and nothing happens in it first.

Owns:        the sections that travel in it; holding back garbage collection and trace events while the guest waits; the
             priority of this thread meanwhile; the rehearsal of the exchange.
Never sees:  the states of a handover, the channel to the other side.
Read next:   outgoing.py and incoming.py, its two users.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from localmig.device_api import Part
from localmig.migration.channel import Channel, FrameKind
from localmig.migration.stream import Section, section_name
from localmig.trace import Tracer

_SAMPLE_BYTES_MAX: Final = 16 * 1024
"""How much of a switchover the rehearsal sends to itself: what any socket's buffer takes at once."""

_PRIORITY: Final = 1
"""The lowest of the real-time priorities goes before everything that is not real-time, and before nothing else."""

_SAMPLE_TIMEOUT_S: Final = 1.0
"""Nobody else is needed for a rehearsal; it takes some hundred microseconds."""


def switchover_sections(parts: Iterable[Part]) -> list[Section]:
    """What travels in the downtime, as it stands: exact once every part is stopped."""
    return [
        Section(name=section_name(part.id, part.switchover), description=part.switchover, state=part.save_switchover())
        for part in parts
        if part.switchover is not None
    ]


@contextmanager
def undisturbed(tracer: Tracer) -> Iterator[None]:
    """Until the end of the block no garbage is collected and no event handed out; events come then, in order.

    A collection takes milliseconds in a large daemon. A subscriber that writes wakes a reader, which on a small
    machine takes the processor from the very process the guest waits for.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with tracer.held():
            yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def urgent() -> Iterator[None]:
    """Until the end of the block this thread goes before all ordinary ones, where this process may say so.

    On a loaded machine the scheduler lets a thread wait for milliseconds, and a guest waits for this one. It takes
    CAP_SYS_NICE or RLIMIT_RTPRIO; without them nothing changes. What the block waits for, it must wait for asleep, but
    for fractions of a millisecond; and it starts no thread and no process, which would inherit the priority.
    """
    # Who chose another policy for this daemon knows better.
    is_ordinary = os.sched_getscheduler(0) == os.SCHED_OTHER
    try:
        if is_ordinary:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    except OSError:
        # EPERM for the most part; sandboxes have numbers of their own for a call that they do not know.
        is_ordinary = False
    try:
        yield
    finally:
        if is_ordinary:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


class MirrorChannel(Channel):
    """A channel to ourselves. Its own type, so that what is injected into real ones does not hit a rehearsal."""


async def rehearse_exchange(switchover: bytes | bytearray) -> None:
    """Sends the frames of a switchover to ourselves and receives them.

    Code that was not run for some milliseconds is several times slower: other processes have had the caches since.
    """
    pair = socket.socketpair()
    for sock in pair:
        sock.setblocking(False)
    near, far = map(MirrorChannel, pair)
    try:
        for sender, receiver, kind, data in (
            (near, far, FrameKind.SWITCHOVER, switchover[:_SAMPLE_BYTES_MAX]),
            (far, near, FrameKind.READY, b""),
            (near, far, FrameKind.COMMIT, bytes(8)),
        ):
            await sender.send(kind, data, timeout_s=_SAMPLE_TIMEOUT_S)
            await receiver.receive(timeout_s=_SAMPLE_TIMEOUT_S, eager=True)
    finally:
        near.close()
        far.close()
