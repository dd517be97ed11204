"""The socket file of QMP: who has the name, and who removes it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from localmig.errors import ConfigError, KernelError
from localmig.monitor.listener import INCOMING_SUFFIX, Listener, peer_credentials


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "qmp.sock")


def reaches(path: str, listener: Listener) -> bool:
    """Whether a client of `path` comes out at `listener`."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        try:
            accepted, _ = listener.socket.accept()
        except BlockingIOError:
            return False
        accepted.close()
        return True


def test_the_socket_is_for_its_user_alone_and_goes_with_its_listener(path: str) -> None:
    before = os.umask(0)
    try:
        listener = Listener(path, succeeds=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    assert reaches(path, listener)
    listener.close()
    listener.close()
    assert not Path(path).exists()


def test_a_name_held_by_the_living_is_refused(path: str) -> None:
    first = Listener(path, succeeds=False)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} answers at '{path}' already"):
        Listener(path, succeeds=False)
    assert reaches(path, first)
    first.close()


def test_a_name_left_by_the_dead_is_taken(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listener = Listener(path, succeeds=False)
    assert reaches(path, listener)
    listener.close()


def test_what_is_no_socket_is_left_alone(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        Listener(path, succeeds=False)
    assert Path(path).read_text() == "precious"


def test_a_directory_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(KernelError, match="No such file or directory"):
        Listener(f"{path}/x", succeeds=False)


def test_a_successor_waits_beside_and_takes_the_name_in_one_step(path: str) -> None:
    old = Listener(path, succeeds=False)
    new = Listener(path, succeeds=True)
    assert (old.path, new.path) == (path, path + INCOMING_SUFFIX)
    assert reaches(new.path, new)
    new.claim()
    new.claim()
    assert new.path == path
    assert reaches(path, new)
    assert not Path(path + INCOMING_SUFFIX).exists()
    old.close()
    assert reaches(path, new), "the old daemon's end took the new one's name away"
    new.close()
    assert list(Path(path).parent.iterdir()) == []


def test_a_successor_of_nobody_has_the_name_at_once(path: str) -> None:
    listener = Listener(path, succeeds=True)
    assert listener.path == path
    listener.close()


def test_only_one_successor_waits(path: str) -> None:
    old = Listener(path, succeeds=False)
    new = Listener(path, succeeds=True)
    with pytest.raises(ConfigError, match=INCOMING_SUFFIX):
        Listener(path, succeeds=True)
    new.close()
    old.close()


def test_a_successor_that_gives_up_leaves_the_old_name_alone(path: str) -> None:
    old = Listener(path, succeeds=False)
    Listener(path, succeeds=True).close()
    assert list(Path(path).parent.iterdir()) == [Path(path)]
    old.close()


def test_the_other_side_of_a_connection_is_known() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert peer_credentials(left) == (os.getpid(), os.geteuid())
