"""The flood as a process: started between a NIC's two outer ends, asked for its counts, ended.

Owns:        the process, its counts as data.
Never sees:  daemons, guests.
Read next:   flood.c, what it is; site.py, which has the ends.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from benchmarks.lines import next_line
from benchmarks.native import program
from localmig.errors import PeerLostError

ANSWER_SECONDS_MAX: Final = 20.0
"""It answers within a tick of 0.2 ms; at its end it waits up to a second for what is on its way."""

VNET_HEADER_LENGTH: Final = 12
"""Bytes before each frame on the guest's side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WayCounts:
    """One way, since the start of the flood.

    Attributes:
        sent: frames sent, those included that the kernel had no room for.
        refused: those it had no room for.
        received: frames that came out.
        late: frames that came after a later one, or twice.
        silence_ns: longest time between two frames since the last question.
    """

    sent: int
    refused: int
    received: int
    late: int
    silence_ns: int

    @property
    def lost(self) -> int:
        """Frames that did not come out; exact once the flood has ended."""
        return self.sent - self.received


@dataclass(frozen=True, kw_only=True, slots=True)
class FloodCounts:
    """`up`: guest to TAP; `down`: TAP to guest."""

    up: WayCounts
    down: WayCounts


class Flood:
    """A flood through NICs, in the network namespace of the thread that starts it.

    Args:
        ends: the guest's end of each NIC, lent for the start, by the name of its TAP; -1: none, and only the way down
            is flooded, which somebody else counts.
        rate: frames a second each way, all NICs together; 0: as fast as it can.
        frame_size: bytes of each frame.

    Raises:
        PeerLostError: it did not start; its stderr says why.
    """

    def __init__(self, ends: Mapping[str, int], *, rate: int, frame_size: int = 64) -> None:
        argv = [str(program("flood")), str(rate), str(frame_size), *(f"{name}:{fd}" for name, fd in ends.items())]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(fd for fd in ends.values() if fd >= 0),
            text=True,
            bufsize=1,
        )
        try:
            self._next_counts()
        except PeerLostError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def counts(self) -> FloodCounts:
        """How it stands; asking begins a new longest silence."""
        return self._ask("counts")

    def only(self, way: str) -> FloodCounts:
        """Floods "up" or "down" alone from now on; how it stands."""
        return self._ask(way)

    def stop(self) -> FloodCounts:
        """Sends no more, waits for what is on its way; the final counts."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._next_counts()
        finally:
            self.close()

    def close(self) -> None:
        """Kills it, if it lives. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, line: str) -> FloodCounts:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
        except BrokenPipeError:
            raise PeerLostError("the flood has ended") from None
        return self._next_counts()

    def _next_counts(self) -> FloodCounts:
        output = self._process.stdout
        assert output is not None
        line = next_line(output, seconds=ANSWER_SECONDS_MAX, who="the flood")
        return FloodCounts(**{way: WayCounts(**counts) for way, counts in json.loads(line).items()})
