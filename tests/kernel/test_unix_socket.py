"""Listening sockets on a real file system: who has the path, and who removes it."""

from __future__ import annotations

import grp
import os
import socket
import stat
from pathlib import Path

import pytest

from localmig import unix_diag
from localmig.access import peer_credentials
from localmig.errors import ConfigError, KernelError
from localmig.unix_socket import INCOMING_SUFFIX, PATH_BYTES_MAX, ListeningSocket, is_listening


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "x.sock")


def waiting(listening: ListeningSocket) -> bool:
    """Whether a connection waits there; it is accepted and closed."""
    with socket.socket(fileno=os.dup(listening.fd.fileno())) as sock:
        try:
            accepted, _ = sock.accept()
        except BlockingIOError:
            return False
        accepted.close()
        return True


def reaches(path: str, listening: ListeningSocket) -> bool:
    """Whether a client of `path` comes out at `listening`."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        return waiting(listening)


def test_the_path_is_for_its_user_alone_and_goes_with_the_socket(path: str) -> None:
    before = os.umask(0)
    try:
        listening = ListeningSocket.bind(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    assert reaches(path, listening)
    listening.close()
    listening.close()
    assert not Path(path).exists()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_the_path_has_the_mode_and_the_group_that_were_asked_for_whatever_the_umask(path: str, mask: int) -> None:
    group = os.getgroups()[-1] if os.geteuid() else 12345
    before = os.umask(mask)
    try:
        listening = ListeningSocket.bind(path, mode=0o660, group=str(group))
    finally:
        os.umask(before)
    status = os.lstat(path)
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group)
    assert reaches(path, listening)
    listening.close()


def test_a_group_has_a_name_or_is_refused(path: str) -> None:
    ours = os.getegid()
    listening = ListeningSocket.bind(path, group=grp.getgrgid(ours).gr_name)
    assert os.lstat(path).st_gid == ours
    listening.close()
    with pytest.raises(ConfigError, match="there is no group 'no such group' on this machine"):
        ListeningSocket.bind(path, group="no such group")
    assert not Path(path).exists()


def test_a_path_of_the_living_is_refused_and_its_owner_does_not_notice(path: str) -> None:
    first = ListeningSocket.bind(path)
    with pytest.raises(ConfigError, match="is in use by a living process"):
        ListeningSocket.bind(path)
    assert not waiting(first)
    assert reaches(path, first)
    first.close()


def test_a_path_left_by_the_dead_is_taken(path: str) -> None:
    ListeningSocket.bind(path).release()
    assert not is_listening(path)
    listening = ListeningSocket.bind(path)
    assert reaches(path, listening)
    listening.close()


def test_what_is_no_socket_is_refused_and_kept(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        ListeningSocket.bind(path)
    assert Path(path).read_text() == "precious"


def test_a_symbolic_link_is_refused_and_kept(path: str, tmp_path: Path) -> None:
    Path(path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a symbolic link: name the path it leads to"):
        ListeningSocket.bind(path)
    assert Path(path).is_symlink()


def test_a_socket_of_another_kind_that_a_process_has_is_in_use(path: str) -> None:
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as bound:
            bound.bind(path)
            with pytest.raises(ConfigError, match="in use by a living process of user"):
                ListeningSocket.bind(path)
        Path(path).unlink()


def test_a_path_that_was_removed_under_its_owner_can_be_had(path: str) -> None:
    old = ListeningSocket.bind(path)
    Path(path).unlink()
    new = ListeningSocket.bind(path)
    assert reaches(path, new)
    old.close()
    assert reaches(path, new)
    new.close()


def test_the_kernels_list_has_a_bound_socket_by_its_file_whatever_it_is_called(path: str) -> None:
    listening = ListeningSocket.bind_beside(path)
    listening.claim()
    assert unix_diag.is_held(path, os.lstat(path))
    listening.release()
    assert not unix_diag.is_held(path, os.lstat(path))


@pytest.mark.parametrize("size", [0, PATH_BYTES_MAX + 1])
def test_a_path_of_an_impossible_length_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=r"invalid Unix socket address|108 bytes, limit is 107"):
        ListeningSocket.bind("x" * size)


def test_a_directory_that_is_not_there_is_the_kernels_answer(path: str) -> None:
    with pytest.raises(KernelError, match="No such file or directory; make its directory first"):
        ListeningSocket.bind(f"{path}/x")


def test_a_successor_waits_beside_and_takes_the_path_in_one_step(path: str) -> None:
    old = ListeningSocket.bind(path)
    new = ListeningSocket.bind_beside(path)
    assert new.bound_path == path + INCOMING_SUFFIX
    assert reaches(path, old)
    new.claim()
    new.claim()
    assert reaches(path, new)
    old.close()
    assert reaches(path, new), "the old process' end took the new one's path away"
    new.close()
    assert list(Path(path).parent.iterdir()) == []


def test_only_one_successor_waits(path: str) -> None:
    new = ListeningSocket.bind_beside(path)
    with pytest.raises(ConfigError, match=INCOMING_SUFFIX):
        ListeningSocket.bind_beside(path)
    new.close()


def test_a_successor_that_gives_up_leaves_the_path_alone(path: str) -> None:
    old = ListeningSocket.bind(path)
    ListeningSocket.bind_beside(path).close()
    assert list(Path(path).parent.iterdir()) == [Path(path)]
    old.close()


def test_the_other_side_of_a_connection_is_known() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert peer_credentials(left) == (os.getpid(), os.geteuid())
