"""The conventions of vhost-user for backend programs: how tools find, start and end one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.processes import localmig

from localmig.testing.frontend import Frontend
from localmig.testing.namespace import NetworkNamespace

PROGRAM = [sys.executable, "-c", "import sys; from localmig.cli.backend import main; sys.exit(main())"]
END_SECONDS_MAX = 30
DESCRIPTION = Path(__file__).resolve().parents[2] / "examples/qemu-vhost-user/50-localmig-net.json"


@contextmanager
def backend(namespace: NetworkNamespace, *options: str, pass_fds: tuple[int, ...] = ()) -> Iterator[None]:
    """A backend that is ready, and ends with status 0 at SIGTERM."""
    ready, announce = os.pipe()
    argv = [*PROGRAM, *options, "--", "--ready-fd", str(announce)]
    with namespace.entered():
        process = subprocess.Popen(argv, pass_fds=(*pass_fds, announce))
    os.close(announce)
    try:
        assert os.read(ready, 1), "the backend did not start"
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_SECONDS_MAX) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ready)


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    with NetworkNamespace.create() as fresh:
        yield fresh


def test_it_listens_where_it_is_told(namespace: NetworkNamespace, tmp_path: Path) -> None:
    path = tmp_path / "nic"
    with backend(namespace, f"--socket-path={path}"), Frontend.connect(str(path)) as frontend:
        assert frontend.get_features()
    assert not path.exists()


def test_it_takes_a_socket_that_listens(namespace: NetworkNamespace, tmp_path: Path) -> None:
    path = tmp_path / "nic"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with backend(namespace, f"--fd={listening.fileno()}", pass_fds=(listening.fileno(),)):
            for _ in range(2):
                with Frontend.connect(str(path)) as frontend:
                    assert frontend.get_features()


def test_it_takes_a_socket_that_is_connected(namespace: NetworkNamespace) -> None:
    ours, theirs = socket.socketpair()
    with theirs, backend(namespace, f"--fd={theirs.fileno()}", pass_fds=(theirs.fileno(),)), Frontend(ours) as frontend:
        assert frontend.get_features()


@pytest.mark.parametrize("words", [["--print-capabilities"], ["--fd=99", "--print-capabilities", "--nonsense"]])
def test_it_tells_what_it_can_do_whatever_else_is_said(words: list[str]) -> None:
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, check=True, timeout=END_SECONDS_MAX)
    assert json.loads(done.stdout) == {"type": "net"}


def test_a_descriptor_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        words = [*PROGRAM, f"--fd={file.fileno()}"]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=END_SECONDS_MAX, pass_fds=(file.fileno(),)
        )
    assert done.returncode == 1
    assert "is no UNIX stream socket that listens or is connected" in done.stderr


def test_the_description_tells_what_the_program_tells() -> None:
    description = json.loads(DESCRIPTION.read_text())
    assert description["type"] == "net"
    assert Path(description["binary"]).name == "localmig-backend"


def test_an_inherited_connection_is_looked_for_nowhere_else() -> None:
    device = "virtio-net,id=nic0,netdev=net0,socket=/nowhere,server=off,fd=3,reconnect-ms=5"
    done = localmig("run", "--netdev", "tap,id=net0", "--device", device)
    assert done.returncode == 1
    assert "fd= is invalid with reconnect-ms= and second-socket=" in done.stderr
