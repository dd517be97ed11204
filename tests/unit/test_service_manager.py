"""What a service manager is told, as a socket that plays one hears it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmig import fds
from localmig.cli.unit import logs_to_journal, unit_name
from localmig.errors import PeerError
from localmig.migration.hello import Hello
from localmig.service_manager import ADDRESS_LENGTH_MAX, ServiceManager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A manager that listens at `notify` in the test's folder."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(str(tmp_path / "notify"))
        yield manager


def at(manager: socket.socket) -> ServiceManager:
    return ServiceManager.checked(manager.getsockname())


def test_each_fact_is_a_datagram(manager: socket.socket) -> None:
    at(manager).tell_ready("serves\n1 device")
    at(manager).tell_main_process(17)
    at(manager).tell_status("x" * 10_000)
    at(manager).tell_stopping()
    said = [manager.recv(65536).decode() for _ in range(4)]
    # A newline in a status would begin another fact.
    assert said[:2] == ["READY=1\nSTATUS=serves 1 device", "MAINPID=17"]
    assert said[2] == "STATUS=" + "x" * 512
    assert said[3] == "STOPPING=1"


def test_an_abstract_address_is_a_name() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(f"\0localmig-test-{os.getpid()}")
        ServiceManager.checked(f"@localmig-test-{os.getpid()}").tell_stopping()
        assert manager.recv(100) == b"STOPPING=1"


def test_a_barrier_is_over_when_the_manager_has_read_it(manager: socket.socket) -> None:
    async def wait() -> bool:
        waits = asyncio.create_task(at(manager).wait_heard())
        readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(manager.fileno(), readable.set)
        await readable.wait()
        asyncio.get_running_loop().remove_reader(manager.fileno())
        data, descriptors = fds.receive(manager, 100)
        assert data == b"BARRIER=1"
        assert not waits.done()
        fds.close_all(descriptors)
        return await waits

    assert asyncio.run(wait())


def test_a_manager_that_is_gone_costs_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = ServiceManager.checked(str(tmp_path / "notify"))
    gone.tell_ready("serves")
    assert not asyncio.run(gone.wait_heard())
    assert f"the service manager at '{tmp_path}/notify' is not told READY=1: No such file or directory" in caplog.text


def test_a_manager_that_does_not_read_is_not_waited_for(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("localmig.service_manager.BARRIER_SECONDS_MAX", 0.01)
    assert not asyncio.run(at(manager).wait_heard())
    for _ in range(10_000):
        at(manager).tell_status("once more")
        if "is not told" in caplog.text:
            return  # its queue is full
    raise AssertionError("a queue without an end")


def test_the_environment_tells_once(manager: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "OTHER": "1"}
    assert ServiceManager.take_from(environment) == at(manager)
    assert environment == {"OTHER": "1"}
    assert ServiceManager.take_from(environment) is None
    assert not caplog.text
    assert ServiceManager.take_from({"NOTIFY_SOCKET": "vsock:2:1234"}) is None
    assert (
        "NOTIFY_SOCKET: a service manager's address is a path or a name behind '@', not 'vsock:2:1234'" in caplog.text
    )


@pytest.mark.parametrize("address", [7, "", "relative", "/with\0nul", "/" + "x" * ADDRESS_LENGTH_MAX, ["/x"]])
def test_what_cannot_be_an_address_is_refused(address: object) -> None:
    with pytest.raises(PeerError, match="a service manager's address"):
        ServiceManager.checked(address)


def test_hello_carries_the_address() -> None:
    manager = ServiceManager.checked("/run/systemd/notify")
    hello = Hello(version="1", local=True, running=True, service_manager=manager)
    assert Hello.decode(hello.encode()).service_manager == manager
    assert Hello.decode(Hello(version="1", local=True, running=True).encode()).service_manager is None
    with pytest.raises(PeerError, match="a service manager's address"):
        Hello.decode(hello.encode().replace(b"/run", b"xrun"))


def test_the_unit_of_a_control_group() -> None:
    cases = {
        "0::/system.slice/localmig.service\n": ("localmig.service", False),
        "0::/system.slice/system-localmig.slice/localmig@vm1.service\n": ("localmig@vm1.service", False),
        # Beside version 1, of which each controller has a hierarchy of its own.
        "4:memory:/x.service\n1:name=systemd:/system.slice/a.service/.control\n": ("a.service", False),
        "0::/user.slice/user-7.slice/user@7.service/app.slice/vm.service\n": ("vm.service", True),
        "0::/user.slice/user-7.slice/user@7.service/init.scope\n": None,
        "0::/user.slice/user-7.slice/session-3.scope\n": None,
        "0::/\n": None,
        "": None,
        # A container may call its control groups as it likes: no word for systemctl comes of that.
        "0::/--force.service/x\n": None,
        "0::/a b.service\n": None,
    }
    assert {text: unit_name(text) for text in cases} == cases


def test_output_goes_to_the_journal_where_the_environment_names_the_stream() -> None:
    stream = os.fstat(2)
    assert logs_to_journal({"JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino}"})
    assert not logs_to_journal({"JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino + 1}"})
    assert not logs_to_journal({})
