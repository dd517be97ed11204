"""Migration parameters, capabilities among them: what the operator set, validated as a whole.

Owns:        the set, its defaults, ranges and the texts of range errors.
Never sees:  QMP's spelling of types (monitor/schema.py), a running migration.
Read next:   outgoing.py for what each one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from localmig.errors import ConfigError
from localmig.migration.recording import check_path

DOWNTIME_LIMIT_MS_MAX: Final = 2000 * 1000
"""QEMU's own bound."""

COMMIT_TIMEOUT_MS_MIN: Final = 100
"""A loaded machine keeps a process waiting for tens of milliseconds; whoever is killed for that dies for nothing."""

COMMIT_TIMEOUT_MS_MAX: Final = DOWNTIME_LIMIT_MS_MAX
"""As long as a guest may be made to wait before COMMIT."""

ANNOUNCE_MS_MAX: Final = 100_000
ANNOUNCE_ROUNDS_MAX: Final = 1000
ANNOUNCE_STEP_MS_MAX: Final = 10_000
"""QEMU's own bounds, these three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """How often, and with what pauses, the network is told where a guest is.

    Attributes:
        initial_ms: the pause between the first round and the second, milliseconds.
        max_ms: the longest pause, milliseconds.
        rounds: how many there are, 0 for none.
        step_ms: how much longer each pause is than the one before it, milliseconds.
    """

    initial_ms: int = 50
    max_ms: int = 550
    rounds: int = 5
    step_ms: int = 100

    def check(self) -> None:
        """Raises ConfigError where a value is out of range."""
        for name, value, lowest, highest in (
            ("initial", self.initial_ms, 0, ANNOUNCE_MS_MAX),
            ("max", self.max_ms, 0, ANNOUNCE_MS_MAX),
            ("rounds", self.rounds, 0, ANNOUNCE_ROUNDS_MAX),
            ("step", self.step_ms, 1, ANNOUNCE_STEP_MS_MAX),
        ):
            if not lowest <= value <= highest:
                # QEMU says 0 also where it means 1.
                raise ConfigError(f"Option announce-{name} expects a value between 0 and {highest}")

    def pauses_ms(self) -> Iterator[int]:
        """The pauses between rounds, milliseconds."""
        for number in range(self.rounds - 1):
            yield min(self.initial_ms + number * self.step_ms, self.max_ms)


_ANNOUNCEMENT: Final = Announcement()
"""QEMU's defaults."""


CAPABILITIES: Final = ("events", "pause_before_switchover")
"""The parameters that QEMU calls capabilities, and has commands of their own for. None changes during a migration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """The migration parameters.

    Attributes:
        local: the operator's promise that source and destination share a machine, so that descriptors move.
        downtime_limit_ms: how long the source waits inside the downtime for READY before it resumes, milliseconds.
            QEMU's default, 300: hundreds of times what a switchover takes, yet short of a guest's TCP timeouts.
        commit_timeout_ms: how long the source waits past COMMIT for the destination's word that it serves, before it
            kills it and serves again, milliseconds. Starting rings takes microseconds, so a destination silent for the
            default of five seconds hangs, and by then a guest's TCP has barely begun to retransmit slowly.
        record: the file that the source writes the migration stream to once the guest is served again; "" for none.
        announce_initial_ms, announce_max_ms, announce_rounds, announce_step_ms: of `announcement`.
        events: a capability: MIGRATION events are sent to QMP clients.
        pause_before_switchover: a capability: the source waits in `pre-switchover`, rings running, for
            migrate-continue.
    """

    local: bool = False
    downtime_limit_ms: int = 300
    commit_timeout_ms: int = 5000
    record: str = ""
    announce_initial_ms: int = _ANNOUNCEMENT.initial_ms
    announce_max_ms: int = _ANNOUNCEMENT.max_ms
    announce_rounds: int = _ANNOUNCEMENT.rounds
    announce_step_ms: int = _ANNOUNCEMENT.step_ms
    events: bool = False
    pause_before_switchover: bool = False

    @property
    def announcement(self) -> Announcement:
        """How the network is told of a guest that arrived on another TAP."""
        return Announcement(
            initial_ms=self.announce_initial_ms,
            max_ms=self.announce_max_ms,
            rounds=self.announce_rounds,
            step_ms=self.announce_step_ms,
        )

    @property
    def capabilities(self) -> tuple[bool, ...]:
        """Those of `CAPABILITIES`, in that order."""
        return tuple(getattr(self, name) for name in CAPABILITIES)

    def check(self) -> None:
        """Raises ConfigError where a value is out of range."""
        if not 0 <= self.downtime_limit_ms <= DOWNTIME_LIMIT_MS_MAX:
            raise ConfigError("Option downtime-limit expects an integer in the range of 0 to (2000 * 1000) ms")
        if not COMMIT_TIMEOUT_MS_MIN <= self.commit_timeout_ms <= COMMIT_TIMEOUT_MS_MAX:
            raise ConfigError("Option commit-timeout expects an integer in the range of 100 to (2000 * 1000) ms")
        self.announcement.check()
        check_path(self.record)
