"""`localmig run` as a process: readiness, signals, the trace file, its place at the QMP path."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit.processes import localmig, start_ready

from localmig.cli.client import connected
from localmig.migration.parameters import Parameters
from localmig.monitor.schema import parameters_to_qmp
from localmig.testing.process import Process, Start, start_program

PATIENCE_S = 60


class Launcher:
    """Starts daemons that wait for a migration that never comes."""

    def __init__(self, directory: Path) -> None:
        self.qmp = directory / "qmp.sock"
        self._log = directory / "stderr"
        self.processes: list[Process] = []

    def start(self, *options: str, start: Start | None = None) -> Process:
        """A daemon, ready."""
        arguments = ["--incoming", "defer", "--qmp", f"unix:{self.qmp}", *options]
        with open(self._log, "ab") as log:
            self.processes.append(start_ready(arguments, start=start, stderr=log.fileno()))
        return self.processes[-1]

    def end_of(self, process: Process) -> tuple[int, str]:
        """Waits for its end: the exit status, and what it wrote to stderr."""
        return process.wait(PATIENCE_S), self._log.read_text()

    def end(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE_S)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    it = Launcher(tmp_path)
    yield it
    it.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_in_good_order(launcher: Launcher, number: signal.Signals) -> None:
    daemon = launcher.start(start=start_program)

    async def watch() -> object:
        async with connected(str(launcher.qmp)) as client:
            assert client.pid == daemon.pid
            daemon.send_signal(number)
            event = await client.next_event(timeout_s=PATIENCE_S)
            assert event is not None
            return event["event"], event["data"]

    assert asyncio.run(watch()) == ("SHUTDOWN", {"guest": False, "reason": "host-signal"})
    status, log = launcher.end_of(daemon)
    assert status == 0, log
    assert "Traceback" not in log
    assert not launcher.qmp.exists()


def test_quit_ends_the_daemon_in_good_order(launcher: Launcher) -> None:
    daemon = launcher.start()
    done = localmig("qmp", str(launcher.qmp), "quit")
    assert (done.returncode, done.stdout, done.stderr) == (0, "{}\n", "")
    status, log = launcher.end_of(daemon)
    assert status == 0, log
    assert "Traceback" not in log


def test_every_fact_is_a_line_of_the_trace_file_at_once(launcher: Launcher, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    launcher.start("--trace", str(trace))
    # The daemon runs still: nothing is held back.
    [event] = [json.loads(line) for line in trace.read_text().splitlines()]
    assert (event["event"], event["state"]) == ("RunStateChanged", "inmigrate")


def test_a_daemon_may_be_started_with_migration_parameters(launcher: Launcher) -> None:
    launcher.start("--migration-parameter", "local=on", "--migration-parameter", "pause-before-switchover=on")

    async def ask() -> object:
        async with connected(str(launcher.qmp)) as client:
            return await client.execute("query-migrate-parameters")

    assert asyncio.run(ask()) == parameters_to_qmp(Parameters(local=True, pause_before_switchover=True))


def test_the_log_goes_to_its_file(launcher: Launcher, tmp_path: Path) -> None:
    log = tmp_path / "log"
    daemon = launcher.start("--log", str(log), "-v")
    daemon.send_signal(signal.SIGTERM)
    assert launcher.end_of(daemon) == (0, "")
    assert "RunStateChanged" in log.read_text()


def test_one_incoming_daemon_may_wait_beside_another_and_no_more(launcher: Launcher) -> None:
    launcher.start()
    launcher.start()
    third = localmig("run", "--incoming", "defer", "--qmp", f"unix:{launcher.qmp}")
    assert third.returncode == 1
    assert third.stderr.startswith("localmig: error: socket")
    assert "is in use by a living process" in third.stderr
