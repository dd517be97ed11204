"""A daemon that does as a test says, behind a real QMP server: what `upgrade` and `migrate` are tried on.

Owns:        ScriptedDaemon, the settings an operator had before.
Never sees:  what is being tested.
Read next:   test_qmp_upgrade.py, test_qmp_migrate.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from localmig.access import Access
from localmig.cli.handover import Settings
from localmig.confinement import SandboxState
from localmig.daemon import RunState
from localmig.migration.parameters import Parameters
from localmig.migration.status import MigrationInfo
from localmig.options import Address
from localmig.trace import MigrationStatusChanged, RunStateChanged, Tracer

PATIENCE_S: Final = 30.0
NEVER_S: Final = 1000.0

SETTINGS = Settings(
    parameters={"local": False, "downtime-limit": 123},
    capabilities={"events": False, "pause-before-switchover": True},
)


class ScriptedDaemon:
    """Has the face of a daemon, and does nothing by itself."""

    def __init__(self, run_state: RunState) -> None:
        self.access = Access()
        self.sandbox = SandboxState(option="on", enabled=True, spawn=False)
        self.tracer = Tracer()
        self.run_state = run_state
        self.has_handed_over = False
        self.parameters = Parameters(downtime_limit_ms=123, pause_before_switchover=True)
        self.status = "none"
        self.calls: list[str] = []
        self.asked = asyncio.Event()
        self.asked_migration = asyncio.Event()
        self.on_migrate: Callable[[], None] = lambda: None
        self.on_cancel: Callable[[], None] = lambda: None
        self.at_migrate: Parameters | None = None

    def become(self, *, run_state: RunState | None = None, status: str | None = None) -> None:
        if run_state is not None:
            self.run_state = run_state
            self.tracer.emit(RunStateChanged(state=run_state))
        if status is not None:
            self.status = status
            self.tracer.emit(MigrationStatusChanged(status=status))

    def set_parameters(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def migration_info(self) -> MigrationInfo:
        self.asked_migration.set()
        return MigrationInfo(status=self.status, error_desc="as scripted" if self.status == "failed" else None)

    def infos(self) -> list[object]:
        return []

    def migrate(self, address: Address) -> None:
        self.calls.append(f"migrate {address}")
        self.asked.set()
        self.at_migrate = self.parameters
        self.on_migrate()

    def migrate_cancel(self) -> None:
        self.calls.append("migrate_cancel")
        self.on_cancel()

    def quit(self) -> None:
        self.calls.append("quit")


def settings_of(daemon: ScriptedDaemon) -> tuple[int, bool, bool, bool]:
    return (
        daemon.parameters.downtime_limit_ms,
        daemon.parameters.local,
        daemon.parameters.events,
        daemon.parameters.pause_before_switchover,
    )


AS_BEFORE = (123, False, False, True)
