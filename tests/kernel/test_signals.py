"""Signals, logs that are moved away, terminals that are closed: what a daemon lives through. None of it needs a TAP."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.kit.processes import localmig, start_ready

from localmig.cli.signals import UNRELATED
from localmig.testing.process import Process, start_program

PATIENCE_S = 60


class Daemon:
    """One that waits for another one, which nobody sends: it answers QMP and needs nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.qmp = folder / "qmp.sock"
        self.process: Process | None = None

    def start(self, *options: str, launcher: Sequence[str] = (), stdio: int | None = None) -> None:
        """Starts it and waits until it is ready.

        Args:
            options: of `localmig run`.
            launcher: a command that does something first and then becomes the one that follows it.
            stdio: its stdin, stdout and stderr.
        """
        start = partial(start_program, launcher=launcher) if launcher else None
        arguments = ["--incoming", "defer", "--qmp", f"unix:{self.qmp}", *options]
        self.process = start_ready(arguments, start=start, stdin=stdio, stdout=stdio, stderr=stdio)

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def ask(self, command: str = "query-status") -> Any:
        """An answer also means that what was sent before has been acted upon."""
        done = localmig("qmp", str(self.qmp), command)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def end(self) -> int:
        """Ends it in order; its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    made.end()


def events(path: Path) -> list[str]:
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def test_logrotate_moves_log_and_trace_away_and_sighup_opens_new_ones(daemon: Daemon, tmp_path: Path) -> None:
    log, trace = tmp_path / "a.log", tmp_path / "a.trace"
    daemon.start("--log", str(log), "--trace", str(trace))
    for file in (log, trace):
        file.rename(f"{file}.1")
    daemon.send(signal.SIGHUP)
    assert daemon.ask()["status"] == "inmigrate"
    assert log.read_text().count("opened") == 2
    assert daemon.end() == 0
    assert "ends: host-signal" in log.read_text()
    assert "is ready" in Path(f"{log}.1").read_text()
    assert trace.exists()
    assert "RunStateChanged" in events(Path(f"{trace}.1"))


def test_a_log_that_logrotate_copied_and_truncated_goes_on_from_its_beginning(daemon: Daemon, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    daemon.start("--log", str(log))
    daemon.ask()
    os.truncate(log, 0)
    daemon.send(signal.SIGUSR1)
    daemon.ask()
    assert "signal SIGUSR1 ignored" in log.read_text().splitlines()[0]


def test_stderr_follows_the_log_that_it_was_sent_into(daemon: Daemon, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with open(log, "ab") as output:
        daemon.start("--log", str(log), stdio=output.fileno())
    assert daemon.process is not None
    log.rename(f"{log}.1")
    daemon.send(signal.SIGHUP)
    daemon.ask()
    assert Path(f"/proc/{daemon.process.pid}/fd/2").readlink() == log


def test_files_that_cannot_be_opened_again_go_on_and_the_old_log_says_so(daemon: Daemon, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log, trace = folder / "a.log", folder / "a.trace"
    daemon.start("--log", str(log), "--trace", str(trace))
    folder.rename(tmp_path / "moved")
    daemon.send(signal.SIGHUP)
    daemon.ask()
    moved = tmp_path / "moved"
    for name, option in (("a.log", "--log"), ("a.trace", "--trace")):
        assert (
            f"cannot open again what {option} {folder / name}: No such file or directory; "
            f"lines go on into '{moved / name}'" in (moved / "a.log").read_text()
        )
    # Once it can be, it is.
    folder.mkdir()
    daemon.send(signal.SIGHUP)
    daemon.ask()
    assert log.exists()
    assert trace.exists()


def test_a_log_that_is_a_pipe_without_a_reader_holds_nothing_up(daemon: Daemon, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    daemon.start("--log", str(log))
    log.rename(f"{log}.1")
    os.mkfifo(log)
    daemon.send(signal.SIGHUP)
    daemon.ask()
    assert "No such device or address" in Path(f"{log}.1").read_text()


@pytest.mark.parametrize("number", [signal.SIGHUP, *UNRELATED[:9], UNRELATED[9], UNRELATED[-1]])
def test_a_signal_that_means_nothing_ends_nothing(daemon: Daemon, number: int) -> None:
    daemon.start()
    for _ in range(3):
        daemon.send(number)
    assert daemon.ask()["status"] == "inmigrate"
    assert daemon.end() == 0


def test_a_flood_of_signals_ends_nothing(daemon: Daemon) -> None:
    daemon.start()
    for _ in range(5000):
        daemon.send(signal.SIGHUP)
        daemon.send(signal.SIGUSR1)
    assert daemon.ask()["status"] == "inmigrate"
    assert daemon.end() == 0


def test_a_hang_up_ends_nothing_before_the_daemon_listens_to_it_nor_while_it_ends(daemon: Daemon) -> None:
    # As `upgrade` starts one: from exec on.
    daemon.start(launcher=("sh", "-c", 'trap "" HUP; kill -HUP $$; exec "$@"', "sh"))
    daemon.send(signal.SIGTERM)
    assert daemon.process is not None
    while daemon.process.poll() is None:
        daemon.send(signal.SIGHUP)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.process.wait(0.001)
    assert daemon.end() == 0


def test_a_terminal_that_is_closed_ends_nothing(daemon: Daemon) -> None:
    ours, theirs = pty.openpty()
    daemon.start("-v", launcher=("setsid", "--ctty"), stdio=theirs)
    os.close(theirs)
    os.close(ours)  # SIGHUP to the session's leader; each line that it logs is EIO from now on
    for _ in range(3):
        daemon.send(signal.SIGHUP)
        assert daemon.ask()["status"] == "inmigrate"
    assert daemon.end() == 0


def test_a_reader_of_its_output_who_left_changes_nothing(daemon: Daemon) -> None:
    reader, writer = os.pipe()
    daemon.start("-v", stdio=writer)
    os.close(writer)
    os.close(reader)
    daemon.send(signal.SIGHUP)
    assert daemon.ask()["status"] == "inmigrate"
    assert daemon.end() == 0


def test_nothing_of_a_guest_gets_the_number_of_a_closed_stderr(daemon: Daemon) -> None:
    daemon.start("-v", launcher=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"))
    assert daemon.process is not None
    numbers = Path(f"/proc/{daemon.process.pid}/fd")
    assert {str((numbers / str(number)).readlink()) for number in range(3)} == {os.devnull}
    daemon.send(signal.SIGHUP)
    assert daemon.ask()["status"] == "inmigrate"
    assert daemon.end() == 0


def test_an_error_that_nobody_can_read_is_exit_status_1_all_the_same() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "localmig.cli", "run"], stderr=full, timeout=PATIENCE_S, check=False
        )
    assert done.returncode == 1
