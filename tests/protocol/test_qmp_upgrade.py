"""How `localmig upgrade` tells its outcomes apart, with QMP servers in front of daemons that do as a script says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from tests.protocol.scripted import AS_BEFORE, NEVER_S, PATIENCE_S, SETTINGS, ScriptedDaemon, settings_of

from localmig.cli import handover, upgrade
from localmig.cli.client import connect
from localmig.cli.handover import Handover, Outcome, Report
from localmig.cli.upgrade import UNPAUSED, Upgrade
from localmig.daemon import Daemon, RunState
from localmig.errors import StateError
from localmig.migration.parameters import Parameters
from localmig.migration.peer import Peer
from localmig.monitor import QmpServer


class ScriptedProcess:
    """The old daemon's process."""

    def __init__(self) -> None:
        self.is_dead = False

    async def wait_dead(self, *, timeout_s: float) -> bool:
        assert timeout_s > 0
        return True


@dataclass(kw_only=True, slots=True)
class Scene:
    """Two daemons, and the upgrade between them."""

    old: ScriptedDaemon
    new: ScriptedDaemon
    old_server: QmpServer
    new_server: QmpServer
    process: ScriptedProcess
    upgrade: Upgrade

    def complete(self) -> None:
        self.old.become(status="active")
        self.old.become(status="completed", run_state=RunState.POSTMIGRATE)
        self.new.become(run_state=RunState.RUNNING)

    async def lose(self, server: QmpServer) -> None:
        await server.close(reason="host-error")

    async def play(self, *, timeout_s: float = NEVER_S) -> Report:
        await self.upgrade.handover.run("unix:/nowhere", timeout_s)
        return await self.upgrade.conclude()


@asynccontextmanager
async def scene(path: str) -> AsyncIterator[Scene]:
    async with asyncio.timeout(PATIENCE_S):
        old, new = ScriptedDaemon(RunState.RUNNING), ScriptedDaemon(RunState.INMIGRATE)
        old_server = QmpServer(cast(Daemon, old), path, succeeds=False)
        await old_server.start()
        new_server = QmpServer(cast(Daemon, new), path, succeeds=True)
        await new_server.start()
        old_client, new_client = await connect(path), await connect(new_server.path)
        process = ScriptedProcess()
        try:
            yield Scene(
                old=old,
                new=new,
                old_server=old_server,
                new_server=new_server,
                process=process,
                upgrade=Upgrade(
                    path=path,
                    handover=Handover(
                        source=old_client, settings=SETTINGS, parameters={"local": True}, capabilities=UNPAUSED
                    ),
                    old_process=cast(Peer, process),
                    new=new_client,
                ),
            )
        finally:
            for client in (old_client, new_client):
                await client.close()
            for server in (old_server, new_server):
                await server.close(reason="host-signal")


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Scene], Awaitable[None]]], None]:
    async def play(scenario: Callable[[Scene], Awaitable[None]]) -> None:
        async with scene(str(tmp_path / "qmp.sock")) as it:
            await scenario(it)

    return lambda scenario: asyncio.run(play(scenario))


Run = Callable[[Callable[[Scene], Awaitable[None]]], None]


def test_completed_and_served_by_the_new_daemon_is_committed(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.old.on_migrate = it.complete
        report = await it.play()
        assert (report.outcome, report.reason, report.notes) == (Outcome.COMMITTED, None, [])
        assert it.old.calls == ["migrate unix:/nowhere", "quit"]
        assert it.old.at_migrate == Parameters(local=True, downtime_limit_ms=123, events=True)
        assert settings_of(it.new) == AS_BEFORE

    run(scenario)


def test_a_run_state_that_follows_its_migration_late_is_not_taken_for_a_rollback(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.old.on_migrate = lambda: it.old.become(status="completed")
        playing = asyncio.create_task(it.play())
        # It is asked, sees the old daemon running still, and goes on asking.
        await it.old.asked_migration.wait()
        it.new.become(run_state=RunState.RUNNING)
        assert (await playing).outcome is Outcome.COMMITTED

    run(scenario)


def test_a_failure_is_rolled_back_with_the_daemons_reason_and_the_settings_are_as_before(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.old.on_migrate = lambda: it.old.become(status="failed")
        report = await it.play()
        assert (report.outcome, report.reason) == (Outcome.ROLLED_BACK, "as scripted")
        assert settings_of(it.old) == AS_BEFORE
        assert "quit" not in it.old.calls

    run(scenario)


def test_a_migration_that_is_refused_is_rolled_back(run: Run) -> None:
    def refuse() -> None:
        raise StateError("not today")

    async def scenario(it: Scene) -> None:
        it.old.on_migrate = refuse
        report = await it.play()
        assert (report.outcome, report.reason) == (Outcome.ROLLED_BACK, "not today")
        assert settings_of(it.old) == AS_BEFORE

    run(scenario)


def test_no_end_in_time_is_cancelled(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.old.on_migrate = lambda: it.old.become(status="active")
        it.old.on_cancel = lambda: it.old.become(status="cancelled")
        report = await it.play(timeout_s=0.05)
        assert (report.outcome, report.reason) == (Outcome.ROLLED_BACK, "no end of the handover in 0.05 s")
        assert it.old.calls == ["migrate unix:/nowhere", "migrate_cancel"]

    run(scenario)


def test_a_cancel_that_comes_too_late_is_committed_all_the_same(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.old.on_migrate = lambda: it.old.become(status="device")
        it.old.on_cancel = it.complete
        report = await it.play(timeout_s=0.05)
        assert report.outcome is Outcome.COMMITTED

    run(scenario)


def test_an_old_daemon_that_is_lost_is_succeeded_once_the_new_one_serves(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.old.on_migrate = lambda: it.old.become(status="active")
        playing = asyncio.create_task(it.play())
        await it.old.asked.wait()
        it.process.is_dead = True
        await it.lose(it.old_server)
        # Only now: so it was asked before, and waited for.
        it.new.become(run_state=RunState.RUNNING)
        report = await playing
        assert report.outcome is Outcome.COMMITTED
        assert report.notes == [f"daemon {report.old_pid} died during the handover"]

    run(scenario)


def test_both_lost_is_unknown(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.old.on_migrate = lambda: it.old.become(status="active")
        playing = asyncio.create_task(it.play())
        await it.old.asked.wait()
        await it.lose(it.new_server)
        await it.lose(it.old_server)
        report = await playing
        assert report.outcome is Outcome.UNKNOWN
        assert report.reason is not None
        assert "the old daemon" in report.reason
        assert "the new daemon" in report.reason

    run(scenario)


def test_nobody_settling_who_serves_is_unknown_and_nobody_is_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (handover, upgrade):
        monkeypatch.setattr(module, "SETTLE_TIMEOUT_S", 0.2)

    async def scenario(it: Scene) -> None:
        it.old.on_migrate = lambda: it.old.become(status="device")
        report = await it.play(timeout_s=0.05)
        assert report.outcome is Outcome.UNKNOWN
        assert "quit" not in it.old.calls + it.new.calls

    run(scenario)


def test_a_new_daemon_that_nobody_finds_at_the_path_is_unknown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(it: Scene) -> None:
        it.old.on_migrate = it.complete
        monkeypatch.setattr(it.upgrade, "path", "/nonexistent/qmp.sock")
        report = await it.play()
        assert report.outcome is Outcome.UNKNOWN
        assert report.reason is not None
        assert "took over, but no daemon answers at '/nonexistent/qmp.sock'" in report.reason

    run(scenario)
