"""The process at the other end: a pidfd that a peer sent is believed where the kernel says the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from localmig.access import is_same_process, peer_process, pid_of
from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.migration.peer import Peer


@pytest.fixture
def children() -> Iterator[tuple[int, int]]:
    """The pids of two processes that live."""
    with ExitStack() as ends:
        pids = []
        for _ in range(2):
            child = ends.enter_context(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
            ends.callback(child.send_signal, signal.SIGKILL)
            pids.append(child.pid)
        yield pids[0], pids[1]


def pidfd_of(pid: int) -> OwnedFd:
    return OwnedFd(os.pidfd_open(pid))


def test_the_pidfd_of_the_process_that_the_kernel_knows_is_taken(children: tuple[int, int]) -> None:
    with pidfd_of(children[0]) as known, closing(Peer.from_descriptor(pidfd_of(children[0]), known=known)) as peer:
        assert not peer.is_dead


def test_the_pidfd_of_a_third_process_is_refused(children: tuple[int, int]) -> None:
    sent = pidfd_of(children[1])
    with pidfd_of(children[0]) as known:
        expected = f"names process {children[1]}, but process {children[0]} is at the other end"
        with pytest.raises(PeerError, match=expected):
            Peer.from_descriptor(sent, known=known)
    assert not sent.is_open


@pytest.mark.parametrize("what", ["is no pidfd", "names this process"])
def test_what_is_no_pidfd_of_another_process_is_refused(what: str) -> None:
    sent = OwnedFd(os.open("/dev/null", os.O_RDONLY)) if what == "is no pidfd" else pidfd_of(os.getpid())
    with pytest.raises(PeerError, match=f"the descriptor in HELLO is no pidfd of another process: it {what}"):
        Peer.from_descriptor(sent)
    assert not sent.is_open


@pytest.mark.parametrize("option", [77, 9999], ids=["SO_PEERPIDFD", "before Linux 6.5"])
def test_whoever_speaks_in_the_place_of_a_process_that_is_gone_is_not_believed(
    option: int, children: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmig.access._SO_PEERPIDFD", option)
    code = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b' '], [s.fileno()])"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")
        listening.listen()
        name = listening.getsockname()
        code = code.replace("sys.argv[1]", repr(name))
        subprocess.run([sys.executable, "-c", code, "-", str(theirs.fileno())], pass_fds=[theirs.fileno()], check=True)
        _, (kept,), _, _ = socket.recv_fds(ours, 1, 1)
        # The one that connected ended; its socket lives on here. Newer kernels still know which process it was.
        with (
            listening.accept()[0] as accepted,
            socket.socket(fileno=kept),
            pytest.raises(PeerError, match="at the other end of the socket"),
        ):
            believe(accepted, children[1])


def believe(accepted: socket.socket, pid: int) -> None:
    """Takes the pidfd of a process as one that came from the other end."""
    with ExitStack() as ends:
        known = peer_process(accepted)
        assert known is not None
        ends.enter_context(known)
        ends.enter_context(closing(Peer.from_descriptor(pidfd_of(pid), known=known)))


@pytest.mark.parametrize("option", [77, 9999], ids=["SO_PEERPIDFD", "before Linux 6.5"])
def test_the_kernel_tells_which_process_is_at_the_other_end(option: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmig.access._SO_PEERPIDFD", option)
    left, right = socket.socketpair()
    with left, right:
        process = peer_process(left)
        assert process is not None
        with process, pidfd_of(os.getpid()) as own:
            assert pid_of(process.fileno()) == os.getpid()
            assert is_same_process(process.fileno(), own.fileno())
