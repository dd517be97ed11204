"""The clock of one handover: when what happened, and the facts that follow from it.

Owns:        time stamps, phases, MigrationInfo as far as it is about time.
Never sees:  states, sockets, parts.
Read next:   status.py for the facts, outgoing.py and incoming.py, which keep one each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from localmig.migration.status import MigrationInfo, Phase
from localmig.trace import PhaseEnded, Tracer


class Progress:
    """All stamps are CLOCK_MONOTONIC nanoseconds, which source and destination share on one machine.

    Attributes:
        prepared_ns: when everything was in the destination's hands.
        stopped_ns: when the first ring was asked to stop.
        serving_ns: when the last ring ran again.
        error: why the handover failed.
        note: what an operator should know besides.
        descriptors: how many moved.
    """

    def __init__(self, role: str, tracer: Tracer) -> None:
        self._role = role
        self._tracer = tracer
        self._phases: list[tuple[str, int]] = []
        self._started_ns = time.monotonic_ns()
        self._ended_ns: int | None = None
        self.prepared_ns: int | None = None
        self.stopped_ns: int | None = None
        self.serving_ns: int | None = None
        self.error: str | None = None
        self.note: str | None = None
        self.descriptors = 0

    @property
    def has_ended(self) -> bool:
        """Whether the handover is over."""
        return self._ended_ns is not None

    def add_note(self, text: str) -> None:
        """Something more that an operator should know."""
        self.note = text if self.note is None else f"{self.note}; {text}"

    def start(self) -> None:
        """It begins now."""
        self._started_ns = time.monotonic_ns()

    def end(self) -> None:
        """It is over now."""
        self._ended_ns = time.monotonic_ns()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is a phase, also where it raises."""
        begun_ns = time.monotonic_ns()
        try:
            yield
        except BaseException as error:
            self.add_phase(name, time.monotonic_ns() - begun_ns, error=str(error) or type(error).__name__)
            raise
        self.add_phase(name, time.monotonic_ns() - begun_ns)

    def add_phase(self, name: str, duration_ns: int, *, error: str | None = None) -> None:
        """A phase of this side ended."""
        self._phases.append((name, duration_ns))
        self._tracer.emit(PhaseEnded(role=self._role, name=name, duration_ns=duration_ns, error=error))

    def add_phases_of_the_other_side(self, role: str, phases: tuple[tuple[str, int], ...]) -> None:
        """What the other side told of its own; it traces them itself."""
        self._phases += [(f"{role}-{name}", duration_ns) for name, duration_ns in phases]

    def info(self, status: str) -> MigrationInfo:
        """The facts so far."""
        end_ns = self._ended_ns or time.monotonic_ns()
        downtime_us = None
        if self.stopped_ns is not None and self.serving_ns is not None:
            downtime_us = (self.serving_ns - self.stopped_ns) // 1000
        return MigrationInfo(
            status=status,
            error_desc=self.error,
            note=self.note,
            total_time_ms=(end_ns - self._started_ns) // 1_000_000,
            setup_time_ms=None if self.prepared_ns is None else (self.prepared_ns - self._started_ns) // 1_000_000,
            downtime_us=downtime_us,
            phases=tuple(Phase(name=name, duration_us=ns // 1000) for name, ns in self._phases),
            descriptors=self.descriptors,
        )
