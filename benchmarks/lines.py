"""What a process says, a line at a time, awaited with a bound.

Owns:        the wait.
Never sees:  what a line means.
Read next:   guests.py and flood.py, whose processes answer in lines.
"""

from __future__ import annotations

import select
from typing import IO

from localmig.errors import PeerLostError


def next_line(output: IO[str], *, seconds: float, who: str) -> str:
    """The next line of a process that says one at a time. PeerLostError if none comes within `seconds`."""
    poll = select.poll()
    poll.register(output, select.POLLIN)
    if not poll.poll(seconds * 1000):
        raise PeerLostError(f"{who} did not answer within {seconds:g} s")
    line = output.readline()
    if not line:
        raise PeerLostError(f"{who} ended without a word")
    return line
