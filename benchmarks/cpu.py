"""How many processors a process keeps busy: its own time, and the kernel's on its behalf.

Owns:        /proc/PID/stat, the clock beside it.
Never sees:  what the process does.
Read next:   packet_rates.py, which divides by it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")

WARM_UP_SECONDS: Final = 0.3
"""Until queues are as full as they stay and threads run where they stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """What moved in a while, and what it took.

    Attributes:
        moved: how many of whatever was counted.
        seconds: how long.
        cores: processors the backend kept busy meanwhile, on average.
    """

    moved: int
    seconds: float
    cores: float

    @property
    def a_second(self) -> float:
        """How many a second."""
        return self.moved / self.seconds

    @property
    def a_core_second(self) -> float | None:
        """How many a second for each processor kept busy; None where it was too idle to tell."""
        return self.a_second / self.cores if self.cores > 0.01 else None


def busy_seconds(pids: Iterable[int]) -> float:
    """Processor time of all threads of these processes so far, in user and in kernel mode."""
    # The name, in parentheses, may have blanks in it. proc(5): utime and stime are the fields 14 and 15.
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / _TICKS_A_SECOND


def measure(count: Callable[[], int], *, pids: Sequence[int], seconds: float) -> Rate:
    """Lets it run for `seconds` and counts.

    Args:
        count: how many have moved so far. Called once before it begins.
        pids: the backend's processes.
        seconds: how long.
    """
    count()
    time.sleep(min(WARM_UP_SECONDS, seconds))
    busy, moved, begun = busy_seconds(pids), count(), time.monotonic()
    time.sleep(seconds)
    busy_after, moved_after, ended = busy_seconds(pids), count(), time.monotonic()
    return Rate(moved=moved_after - moved, seconds=ended - begun, cores=(busy_after - busy) / (ended - begun))
