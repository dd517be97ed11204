"""The fork server: what it forks begins and ends as a program does, and is waited for as a child is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from tests.kit.fork_server import ForkServer, fork_server

from localmig.fds import OwnedFd
from localmig.testing.namespace import NetworkNamespace
from localmig.testing.process import Start, start_program

PATIENCE_S = 60.0
REFLECTION = "tests.kernel.reflection"


@pytest.fixture
def server() -> Iterator[ForkServer]:
    """One of the test's own."""
    made = ForkServer()
    yield made
    made.close()


def seen_by(start: Start) -> dict[str, Any]:
    """What a process tells that is given a descriptor of ours and the words "a" and "b"."""
    with TemporaryFile() as output, OwnedFd(os.open("/dev/zero", os.O_RDONLY)) as ours:
        process = start(REFLECTION, ["a", "b"], stdout=output.fileno(), inherited=[ours.fileno()])
        assert process.wait(PATIENCE_S) == 0
        output.seek(0)
        told: dict[str, Any] = json.loads(output.read())
        assert told["descriptors"].pop(str(ours.fileno())) == "/dev/zero"
        assert told["descriptors"].pop("1").endswith("(deleted)")
        return told


def test_a_forked_process_begins_with_what_a_program_begins_with(
    namespace: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_server()
    monkeypatch.setenv("A_VARIABLE", "of the test")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a command that ran in this process may have ignored it
    try:
        forked, started = seen_by(fork_server().start), seen_by(start_program)
    finally:
        signal.signal(signal.SIGHUP, before)
    for name in ("COLUMNS", "LINES"):  # a library of pytest's sets them without telling Python
        forked["environment"].pop(name, None)
        started["environment"].pop(name, None)
    for name, value in started.items():
        assert forked[name] == value, name


def test_a_module_of_a_package_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_server()
    (tmp_path / "added_later.py").write_text("print('found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert fork_server().run("added_later", []).stdout == "found\n"


def test_descriptors_get_their_numbers_whatever_numbers_they_come_by(tmp_path: Path) -> None:
    with ExitStack() as stack:
        ours = [stack.enter_context(OwnedFd(os.open(tmp_path, os.O_RDONLY))) for _ in range(20)]
        numbers = [fd.fileno() for fd in reversed(ours)]
        files = {}
        for number in numbers:
            (tmp_path / str(number)).touch()
            with OwnedFd(os.open(tmp_path / str(number), os.O_RDONLY)) as file:
                os.dup2(file.fileno(), number)
            files[str(number)] = str(tmp_path / str(number))
        output = stack.enter_context(TemporaryFile())
        process = fork_server().start(REFLECTION, [], stdout=output.fileno(), inherited=numbers)
        assert process.wait(PATIENCE_S) == 0
        output.seek(0)
        assert files.items() <= json.loads(output.read())["descriptors"].items()


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('wrong')", 1, "wrong\n"),
        ("raise SystemExit(None)", 0, ""),
        ("raise ValueError('wrong')", 1, "Traceback"),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'left')", 0, "left"),
        ("import threading, sys; threading.Timer(0.01, sys.stderr.write, ['joined']).start()", 0, "joined"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_a_forked_process_ends_as_a_program_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, status: int, said: str
) -> None:
    fork_server()
    (tmp_path / "ending.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = fork_server().run("ending", [])
    assert (ended.returncode, ended.stdout) == (status, "")
    assert ended.stderr.startswith(said)
    assert bool(ended.stderr) == bool(said)


def test_a_stop_is_waited_for_and_the_process_goes_on() -> None:
    with TemporaryFile() as output:
        process = fork_server().start(REFLECTION, ["stop"], stdout=output.fileno(), stderr=output.fileno())
        process.wait_stopped(PATIENCE_S)
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(signal.SIGCONT)
        assert process.wait(PATIENCE_S) == 1
        process.wait_stopped(0.0)  # it has ended
        process.send_signal(signal.SIGTERM)  # nobody is there
        assert process.wait(0) == 1


def test_threads_may_wait_for_one_process_together() -> None:
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    with reader, writer:
        process = fork_server().start("fileinput", [], stdin=reader.fileno(), stdout=writer.fileno())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait_stopped(0.0)
        ended: list[int] = []
        waiters = [threading.Thread(target=lambda: ended.append(process.wait(PATIENCE_S))) for _ in range(4)]
        for waiter in waiters:
            waiter.start()
        process.kill()
        for waiter in waiters:
            waiter.join()
    assert ended == [-signal.SIGKILL] * 4


def test_what_a_server_forked_ends_with_it(server: ForkServer) -> None:
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    with reader:
        with writer:
            process = server.start("fileinput", [], stdin=reader.fileno(), stdout=writer.fileno())
        with process._pidfd:
            server.close()
            assert os.read(reader.fileno(), 1) == b""
        assert not Path(f"/proc/{process.pid}").exists()
