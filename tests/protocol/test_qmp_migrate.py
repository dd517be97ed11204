"""How `localmig migrate` tells its outcomes apart, with a QMP server in front of a scripted daemon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, cast

import pytest
from tests.kit.fork_server import ForkedProcess, fork_server
from tests.protocol.scripted import AS_BEFORE, NEVER_S, PATIENCE_S, SETTINGS, ScriptedDaemon, settings_of

from localmig.cli import handover, main, migrate
from localmig.cli.client import connect
from localmig.cli.handover import Handover, Outcome, Report
from localmig.daemon import Daemon, RunState
from localmig.errors import StateError
from localmig.migration.parameters import Parameters
from localmig.monitor import QmpServer


@dataclass(kw_only=True, slots=True)
class Scene:
    """A daemon that hands over, and the attempt."""

    source: ScriptedDaemon
    server: QmpServer
    handover: Handover

    def complete(self) -> None:
        self.source.become(status="active")
        self.source.become(status="completed", run_state=RunState.POSTMIGRATE)

    async def play(self, *, timeout_s: float = NEVER_S) -> Report:
        await self.handover.run("unix:/nowhere", timeout_s)
        return await migrate.conclude(self.handover)


@asynccontextmanager
async def scene(path: str) -> AsyncIterator[Scene]:
    async with asyncio.timeout(PATIENCE_S):
        source = ScriptedDaemon(RunState.RUNNING)
        server = QmpServer(cast(Daemon, source), path, succeeds=False)
        await server.start()
        client = await connect(path)
        attempt = Handover(source=client, settings=SETTINGS, parameters={"local": True, "downtime-limit": 7})
        try:
            yield Scene(source=source, server=server, handover=attempt)
        finally:
            await client.close()
            await server.close(reason="host-signal")


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Scene], Awaitable[None]]], None]:
    async def play(scenario: Callable[[Scene], Awaitable[None]]) -> None:
        async with scene(str(tmp_path / "qmp.sock")) as it:
            await scenario(it)

    return lambda scenario: asyncio.run(play(scenario))


Run = Callable[[Callable[[Scene], Awaitable[None]]], None]


def test_completed_is_committed_with_the_operators_parameters_and_his_pause(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.source.on_migrate = it.complete
        report = await it.play()
        assert (report.outcome, report.reason, report.notes) == (Outcome.COMMITTED, None, [])
        assert it.source.calls == ["migrate unix:/nowhere"], "the daemon is not ended"
        assert it.source.at_migrate == Parameters(
            local=True, downtime_limit_ms=7, events=True, pause_before_switchover=True
        )
        assert settings_of(it.source) == AS_BEFORE

    run(scenario)


def test_a_run_state_that_follows_its_migration_late_is_waited_for(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.source.on_migrate = lambda: it.source.become(status="completed")
        playing = asyncio.create_task(it.play())
        await it.source.asked_migration.wait()
        it.source.become(run_state=RunState.POSTMIGRATE)
        assert (await playing).outcome is Outcome.COMMITTED

    run(scenario)


def test_a_failure_is_rolled_back_with_the_daemons_reason_and_the_settings_are_as_before(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.source.on_migrate = lambda: it.source.become(status="failed")
        report = await it.play()
        assert (report.outcome, report.reason) == (Outcome.ROLLED_BACK, "as scripted")
        assert settings_of(it.source) == AS_BEFORE

    run(scenario)


def test_a_migration_that_is_refused_is_rolled_back(run: Run) -> None:
    def refuse() -> None:
        raise StateError("not today")

    async def scenario(it: Scene) -> None:
        it.source.on_migrate = refuse
        report = await it.play()
        assert (report.outcome, report.reason) == (Outcome.ROLLED_BACK, "not today")

    run(scenario)


def test_no_end_in_time_is_cancelled(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.source.on_migrate = lambda: it.source.become(status="active")
        it.source.on_cancel = lambda: it.source.become(status="cancelled")
        report = await it.play(timeout_s=0.05)
        assert (report.outcome, report.reason) == (Outcome.ROLLED_BACK, "no end of the handover in 0.05 s")
        assert it.source.calls == ["migrate unix:/nowhere", "migrate_cancel"]

    run(scenario)


def test_a_cancel_that_comes_too_late_is_committed_all_the_same(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.source.on_migrate = lambda: it.source.become(status="device")
        it.source.on_cancel = it.complete
        assert (await it.play(timeout_s=0.05)).outcome is Outcome.COMMITTED

    run(scenario)


def test_a_source_in_doubt_is_unknown_with_its_reason(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.source.on_migrate = lambda: it.source.become(run_state=RunState.POSTMIGRATE, status="failed")
        report = await it.play()
        assert (report.outcome, report.reason) == (Outcome.UNKNOWN, "as scripted")

    run(scenario)


def test_a_source_that_is_lost_is_unknown(run: Run) -> None:
    async def scenario(it: Scene) -> None:
        it.source.on_migrate = lambda: it.source.become(status="active")
        playing = asyncio.create_task(it.play())
        await it.source.asked.wait()
        await it.server.close(reason="host-error")
        report = await playing
        assert report.outcome is Outcome.UNKNOWN
        assert report.reason

    run(scenario)


def test_nothing_settled_is_unknown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (handover, migrate):
        monkeypatch.setattr(module, "SETTLE_TIMEOUT_S", 0.2)

    async def scenario(it: Scene) -> None:
        it.source.on_migrate = lambda: it.source.become(status="device")
        assert (await it.play(timeout_s=0.05)).outcome is Outcome.UNKNOWN

    run(scenario)


# -- the command ----------------------------------------------------------------------------------------------


@dataclass
class Command:
    """The command as a process."""

    process: ForkedProcess
    stdout: IO[bytes]
    stderr: IO[bytes]

    async def end(self) -> tuple[int, bytes, bytes]:
        """Waits for its end: the exit status, and what it wrote to stdout and stderr."""
        status = await asyncio.to_thread(self.process.wait, PATIENCE_S)
        self.stdout.seek(0)
        self.stderr.seek(0)
        return status, self.stdout.read(), self.stderr.read()


@asynccontextmanager
async def command(path: Path, source: ScriptedDaemon, *options: str) -> AsyncIterator[Command]:
    """The command, that asks `source`."""
    server = QmpServer(cast(Daemon, source), str(path), succeeds=False)
    await server.start()
    words = ("migrate", str(path), "unix:/nowhere", *options)
    with TemporaryFile() as stdout, TemporaryFile() as stderr:
        process = fork_server().start("localmig.cli", words, stdout=stdout.fileno(), stderr=stderr.fileno())
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield Command(process, stdout, stderr)
        finally:
            process.kill()
            await asyncio.to_thread(process.wait)
            await server.close(reason="host-signal")


def test_ctrl_c_cancels_and_the_report_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = ScriptedDaemon(RunState.RUNNING)
        source.on_migrate = lambda: source.become(status="active")
        source.on_cancel = lambda: source.become(status="cancelled")
        async with command(tmp_path / "qmp.sock", source, "--json", "--local") as migrate:
            await source.asked.wait()
            migrate.process.send_signal(signal.SIGINT)
            status, report, said = await migrate.end()
        assert status == 1, said
        assert json.loads(report) == {
            "outcome": "rolled-back",
            "old-pid": os.getpid(),
            "new-pid": None,
            "reason": "interrupted",
            "notes": [],
            "migration": {"status": "cancelled", "local": {"phases": [], "descriptors": 0}},
        }
        assert settings_of(source) == AS_BEFORE

    asyncio.run(scenario())


def test_detached_it_begins_and_leaves(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = ScriptedDaemon(RunState.RUNNING)
        source.on_migrate = lambda: source.become(status="active")
        options = ("--detach", "--local", "--downtime-limit", "7")
        async with command(tmp_path / "qmp.sock", source, *options) as migrate:
            status, _, said = await migrate.end()
        assert status == 0, said
        assert b"begun: 'localmig status" in said
        assert source.calls == ["migrate unix:/nowhere"]
        assert source.parameters == Parameters(
            local=True, downtime_limit_ms=7, events=True, pause_before_switchover=True
        )

    asyncio.run(scenario())


def test_where_to_must_be_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "/nonexistent/qmp.sock", "nowhere"]) == 1
    assert capsys.readouterr().err == "localmig: error: unknown migration protocol: nowhere\n"
