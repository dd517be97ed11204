"""What a process says, awaited with a bound.

Owns:        the wait.
Never sees:  what it means.
Read next:   guests.py and flood.py, whose processes answer in lines; testpmd.py, which has a prompt.
"""

from __future__ import annotations

import os
import select
import time
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


def read_until(fd: int, text: bytes, *, seconds: float, who: str) -> str:
    """All that a process says until `text` is in it. PeerLostError if that does not come within `seconds`."""
    said = b""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while text not in said:
        left = deadline - time.monotonic()
        readable = left > 0 and poll.poll(left * 1000)
        try:
            piece = os.read(fd, 65536) if readable else b""
        except OSError:  # a terminal whose other end is closed
            piece = b""
        if not piece:
            tail = said[-500:].decode(errors="replace")
            raise PeerLostError(f"{who} did not say '{text.decode().strip()}', it said: {tail or 'nothing'}")
        said += piece
    return said.decode(errors="replace")
