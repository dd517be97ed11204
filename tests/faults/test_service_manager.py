"""Whom a service manager takes for the main process, whatever becomes of a handover."""

from __future__ import annotations

import signal
import socket
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from localmig import fds

if TYPE_CHECKING:
    from tests.kit.site import Site

SECONDS_MAX = 20.0
"""For a daemon to tell something; a loaded machine lets it wait."""


class Manager:
    """A service manager that listens at a path in the environment."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def hears(self) -> str:
        """The first line of what it is told next."""
        data, descriptors = fds.receive(self._sock, 4096)
        fds.close_all(descriptors)  # which ends a barrier
        return data.decode().partition("\n")[0]

    def has_heard_all(self) -> bool:
        """Whether nothing waits to be heard."""
        self._sock.setblocking(False)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def manager(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager of the daemons that are started until it is taken out of the environment."""
    path = site.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(SECONDS_MAX)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield Manager(sock)


def test_it_follows_the_guest_and_hears_who_ends(site: Site, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    source = site.source()
    assert manager.hears() == "READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    for _ in range(2):
        destination = site.destination()
        source.execute("migrate", uri=site.address)
        assert source.wait_migration()["status"] == "completed"
        # Both say so, one of them first; the old one waits until it was heard.
        said = Counter(manager.hears() for _ in range(4))
        assert said == {f"MAINPID={destination.pid}": 2, "BARRIER=1": 1, "STATUS=serves 1 netdev, 1 device": 1}
        assert source.quit() == 0
        source = destination
        source.execute("migrate-set-parameters", local=True)
    assert source.quit() == 0
    assert manager.hears() == "STOPPING=1"
    assert manager.has_heard_all()


def test_it_hears_nothing_of_a_handover_that_came_to_nothing(
    site: Site, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = site.source()
    assert manager.hears() == "READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    for fault in ("after-receive:SETUP=kill", "before-send:READY=raise", "after-receive:COMMIT=kill"):
        destination = site.destination(fault=fault)
        source.execute("migrate", uri=site.address)
        assert source.wait_migration()["status"] == "failed"
        destination.wait()
    assert manager.has_heard_all()


@pytest.mark.parametrize("fault", ["after-send:COMMIT=kill", "enter:completed=kill"])
def test_who_took_over_from_a_dead_process_says_so_itself(
    site: Site, manager: Manager, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    source = site.source(fault=fault)
    assert manager.hears() == "READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    destination = site.destination()
    source.execute("migrate", uri=site.address)
    assert source.wait() == -signal.SIGKILL
    assert manager.hears() == f"MAINPID={destination.pid}"


def test_who_waits_for_a_source_keeps_its_own_manager_unless_the_source_has_one(
    site: Site, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = site.destination()
    assert manager.hears() == "READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    source = site.source()
    source.execute("migrate", uri=site.address)
    assert source.wait_migration()["status"] == "completed"
    assert manager.hears() == f"MAINPID={destination.pid}"
    assert manager.hears() == "STATUS=serves 1 netdev, 1 device"
    assert source.quit() == 0
    assert destination.quit() == 0
    assert manager.hears() == "STOPPING=1"
