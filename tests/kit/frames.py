"""Numbered frames through a NIC, both ways at once: which came, which came twice, and how long none came.

Owns:        the frames, the account of each way.
Never sees:  daemons; what comes of a handover.
Read next:   frontend.py for the guest at whose TAP the frames come out; tests/faults/, which judges by the account.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

ETHERTYPE: Final = 0x88B5
"""Local experimental (IEEE 802): nobody else's frames are taken for ours."""

IN_FLIGHT_MAX: Final = 256
"""Frames of one way that may be under way: a TAP keeps 1000 and drops the next, and a loss shall be the daemons'."""

_HEADER: Final = bytes(12)
"""The guest leaves nothing to the device (virtio 1.2, section 5.1.6)."""

_FRAME: Final = struct.Struct("!6s6sH8sQ")
_FRAME_LENGTH: Final = 60
_HOST, _GUEST = b"\x02host!", b"\x02guest"


class Way(StrEnum):
    """A direction, from the guest's view."""

    IN = "in"
    OUT = "out"


@dataclass(frozen=True, kw_only=True, slots=True)
class WayReport:
    """What became of the frames of one way.

    Attributes:
        lost: how many did not come although a later one did.
        doubled: how many came once more.
        silence_ms: the longest time from one arrival to the next, or until now.
    """

    lost: int
    doubled: int
    silence_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A moment of a stream, to report from."""

    at_ns: int
    arrivals: dict[Way, int]


class _Account:
    """One way. Arrivals are written by the stream's thread alone, and only appended."""

    def __init__(self) -> None:
        self.sent = 0
        self.highest = -1
        self.numbers = array("q")
        self.at_ns = array("q")

    @property
    def has_room(self) -> bool:
        return self.sent - 1 - self.highest < IN_FLIGHT_MAX

    def arrived(self, number: int, at_ns: int) -> None:
        self.numbers.append(number)
        self.at_ns.append(at_ns)
        self.highest = max(self.highest, number)


class FrameStream:
    """Sends a numbered frame each way every `interval_s`, from a thread of its own, until `stop`.

    Args:
        ifname: the host's TAP, in the network namespace of the thread that makes this.
        guest: the guest's end, a SOCK_SEQPACKET whose other end is the TAP of the guest's driver; lent.
        interval_s: time between frames; 0 for as many as get through.
    """

    def __init__(self, ifname: str, guest: socket.socket, *, interval_s: float = 0.001) -> None:
        self._guest = guest
        self._host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
        self._host.bind((ifname, ETHERTYPE))
        self._host.setblocking(False)
        self._interval_s = interval_s
        self._token = os.urandom(8)
        self._accounts = {way: _Account() for way in Way}
        self._changed = threading.Condition()
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)

    def start(self) -> Self:
        """Begins to send."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Sends no more. Idempotent."""
        if self._waker.fileno() < 0:
            return
        self._waker.close()
        self._thread.join()
        self._host.close()
        self._wake.close()

    def mark(self) -> Mark:
        """This moment. What was sent before it and comes behind it counts to what is behind it."""
        with self._changed:
            return Mark(
                at_ns=time.monotonic_ns(),
                arrivals={way: len(account.numbers) for way, account in self._accounts.items()},
            )

    def wait_flow(self, count: int = 10, *, seconds: float) -> bool:
        """Waits until frames that are sent from now on came, `count` each way; whether they did in that time."""
        with self._changed:
            goals = {way: account.sent + count - 1 for way, account in self._accounts.items()}

            def is_there() -> bool:
                return all(self._accounts[way].highest >= goal for way, goal in goals.items())

            return self._changed.wait_for(is_there, seconds)

    def wait_any(self, *, seconds: float) -> bool:
        """Waits until one more frame comes, either way; whether it did in that time."""
        with self._changed:
            before = self._arrivals()
            return self._changed.wait_for(lambda: self._arrivals() > before, seconds)

    def since(self, mark: Mark) -> dict[Way, WayReport]:
        """What came of each way behind `mark`."""
        with self._changed:
            return {way: _report(account, mark.arrivals[way], mark.at_ns) for way, account in self._accounts.items()}

    def _arrivals(self) -> int:
        return sum(len(account.numbers) for account in self._accounts.values())

    def _run(self) -> None:
        due = time.monotonic()
        frames: dict[Way, Callable[[bytes], int]] = {Way.IN: self._host.send, Way.OUT: self._send_out}
        while True:
            now = time.monotonic()
            if now >= due:
                for way, send in frames.items():
                    self._send(way, send)
                due = max(due + self._interval_s, now)
            wait = max(0.0, due - now)
            readable, _, _ = select.select([self._host, self._guest, self._wake], [], [], wait)
            if self._wake in readable:
                return
            if self._host in readable:
                self._receive(Way.OUT)
            if self._guest in readable:
                self._receive(Way.IN)

    def _send_out(self, frame: bytes) -> int:
        return self._guest.send(_HEADER + frame, socket.MSG_DONTWAIT)

    def _send(self, way: Way, send: Callable[[bytes], int]) -> None:
        account = self._accounts[way]
        if not account.has_room:
            return
        ends = (_GUEST, _HOST) if way is Way.IN else (_HOST, _GUEST)
        frame = _FRAME.pack(*ends, ETHERTYPE, self._token, account.sent)
        # No room, or no TAP: not sent, so not lost.
        with contextlib.suppress(OSError):
            send(frame.ljust(_FRAME_LENGTH, b"\0"))
            account.sent += 1

    def _receive(self, way: Way) -> None:
        with self._changed:
            for _ in range(IN_FLIGHT_MAX):
                try:
                    if way is Way.IN:
                        frame = self._guest.recv(2048, socket.MSG_DONTWAIT)[len(_HEADER) :]
                    else:
                        frame, address = self._host.recvfrom(2048)
                        if address[2] == socket.PACKET_OUTGOING:
                            continue
                except OSError:
                    break  # nothing more, or the TAP went down
                if len(frame) < _FRAME.size:
                    continue
                *_, ethertype, token, number = _FRAME.unpack_from(frame)
                if (ethertype, token) == (ETHERTYPE, self._token):
                    self._accounts[way].arrived(number, time.monotonic_ns())
            self._changed.notify_all()


def _report(account: _Account, begin: int, at_ns: int) -> WayReport:
    numbers, times = account.numbers[begin:], account.at_ns[begin:]
    before = max(account.numbers[:begin], default=-1)
    came = set(numbers)
    highest = max(came, default=before)
    # What came before the mark and comes again behind it is doubled, too.
    fresh = {number for number in came if number > before}
    gaps = (later - earlier for earlier, later in zip([at_ns, *times], [*times, time.monotonic_ns()], strict=True))
    return WayReport(
        lost=max(0, highest - before) - len(fresh),
        doubled=len(numbers) - len(fresh),
        silence_ms=max(gaps) / 1e6,
    )
