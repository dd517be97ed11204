"""What is known of a migration: the facts behind query-migrate.

Owns:        MigrationInfo, LocalMigrationReport.
Never sees:  QMP's spelling, sockets.
Read next:   monitor/commands/ for how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One step of a handover and how long it took, in microseconds."""

    name: str
    duration_us: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationInfo:
    """One migration as one side knows it.

    Attributes:
        status: QEMU's MigrationStatus.
        error_desc: why it failed, None where it did not.
        note: what an operator should know of a migration that did not end in the usual way.
        total_time_ms: from the start until the end, or until now.
        setup_time_ms: from the start until everything was in the destination's hands.
        downtime_us: from the first ring asked to stop until the last one runs again, microseconds.
        phases: the steps in the order they ended.
        descriptors: how many descriptors moved.
    """

    status: str
    error_desc: str | None = None
    note: str | None = None
    total_time_ms: int | None = None
    setup_time_ms: int | None = None
    downtime_us: int | None = None
    phases: tuple[Phase, ...] = ()
    descriptors: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalMigrationReport:
    """Whether a local migration would move an object's descriptors, and why not."""

    id: str
    type: str
    transfers: bool
    reason: str | None = None
