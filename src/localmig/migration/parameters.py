"""Migration parameters and capabilities: what the operator set, validated as a whole.

Owns:        the two sets, their defaults, ranges and the texts of range errors.
Never sees:  QMP's spelling of types (monitor/schema.py), a running migration.
Read next:   outgoing.py for what each one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.errors import ConfigError
from localmig.migration.recording import check_path

DOWNTIME_LIMIT_MS_MAX: Final = 2000 * 1000
"""QEMU's own bound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """The migration parameters.

    Attributes:
        local: the operator's promise that source and destination share a machine, so that descriptors move.
        downtime_limit_ms: how long the source waits inside the downtime for READY before it resumes, milliseconds.
            QEMU's default, 300: hundreds of times what a switchover takes, yet short of a guest's TCP timeouts.
        record: the file that the source writes the migration stream to once the guest is served again; "" for none.
    """

    local: bool = False
    downtime_limit_ms: int = 300
    record: str = ""

    def check(self) -> None:
        """Raises ConfigError where a value is out of range."""
        if not 0 <= self.downtime_limit_ms <= DOWNTIME_LIMIT_MS_MAX:
            raise ConfigError("Option downtime-limit expects an integer in the range of 0 to (2000 * 1000) ms")
        check_path(self.record)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """The migration capabilities.

    Attributes:
        events: MIGRATION events are sent to QMP clients.
        pause_before_switchover: the source waits in `pre-switchover`, rings running, for migrate-continue.
    """

    events: bool = False
    pause_before_switchover: bool = False
