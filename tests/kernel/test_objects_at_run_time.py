"""NICs that come and go while a daemon runs: real TAPs and guests, handovers right after, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

import pytest
from tests.kit.processes import DaemonProcess, localmig

from localmig.daemon import Daemon
from localmig.devices.virtio_net import VirtioNet
from localmig.errors import PeerError, PeerLostError
from localmig.fds import OwnedFd
from localmig.netdevs import tun
from localmig.netdevs.network import Network
from localmig.netdevs.stream import Stream
from localmig.netdevs.tap import Tap
from localmig.netdevs.tun import Flag
from localmig.testing.frontend import NetGuest
from localmig.testing.namespace import create_tap
from localmig.virtio.net import header_length

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("namespace")]

PATIENCE_S: Final = 60.0
"""For one program to do its part: it takes a second, a machine under load gets much more."""

ETH_P_ALL: Final = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
NIC_COUNT: Final = 200


def frame(number: int) -> bytes:
    return b"\xff" * 6 + bytes.fromhex("525400123456 88b5") + bytes([number]) * 46


class Nic:
    """A guest's NIC, named by its number, and the machine's end of its interface."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.socket = folder / f"nic{number}.sock"
        self._ends = ExitStack()
        self.near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ends.enter_context(self.near)
        self._ends.enter_context(tap)
        self.near.settimeout(PATIENCE_S)
        tap.setblocking(False)
        self.guest = self._ends.enter_context(NetGuest(str(self.socket), tap_fds=[tap.fileno()], queue_size=16))

    def netdev(self, **options: object) -> dict[str, object]:
        return {"type": "tap", "id": f"net{self.number}", "ifname": f"tap{self.number}"} | options

    def device(self, **options: object) -> dict[str, object]:
        ids = {"id": f"nic{self.number}", "netdev": f"net{self.number}"}
        return {"driver": "virtio-net", **ids, "socket": str(self.socket)} | options

    def add(self, daemon: DaemonProcess | Client) -> None:
        assert daemon.execute("netdev_add", **self.netdev()) == {}
        assert daemon.execute("device_add", **self.device()) == {}

    def delete(self, daemon: DaemonProcess | Client) -> None:
        assert daemon.execute("device_del", id=f"nic{self.number}") == {}
        assert daemon.execute("netdev_del", id=f"net{self.number}") == {}

    def exchange(self) -> None:
        """A frame goes each way."""
        with self.machine() as machine:
            machine.send(frame(1))
            assert self.near.recv(4096).endswith(frame(1))
            self.near.send(bytes(header_length(self.guest.features)) + frame(2))
            assert machine.recv(4096) == frame(2)

    def machine(self) -> socket.socket:
        """The machine's end, where what it sends itself is not heard."""
        machine = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        machine.bind((f"tap{self.number}", ETH_P_ALL))
        machine.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        machine.settimeout(PATIENCE_S)
        return machine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends.close()


class Client:
    """One QMP connection: while it lasts, the daemon has the same descriptors before and after a command.

    Attributes:
        events: what was told before the last answer.
    """

    def __init__(self, daemon: DaemonProcess) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(daemon.qmp))
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        assert "QMP" in json.loads(self._lines.readline())
        self.execute("qmp_capabilities")

    def give(self, name: str, fd: int) -> None:
        """Gives the daemon a descriptor by a name."""
        said = json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode()
        socket.send_fds(self._socket, [said], [fd])
        assert self._answer() == {}

    def execute(self, command: str, **arguments: object) -> Any:
        """What the daemon returns; PeerError with class and text of an error."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        return self._answer()

    def _answer(self) -> Any:
        self.events.clear()
        while "event" in (answer := json.loads(self._lines.readline())):
            self.events.append(answer)
        if "error" in answer:
            raise PeerError(f"{answer['error']['class']}: {answer['error']['desc']}")
        return answer["return"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that was started with no object."""
    with DaemonProcess([], qmp=tmp_path / "qmp", log=tmp_path / "log") as daemon:
        yield daemon


def asked(*words: str) -> Any:
    """What a command of `localmig` prints, which is JSON."""
    done = localmig(*words)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def ids(daemon: DaemonProcess | Client) -> list[str]:
    return [each["id"] for kind in ("netdevs", "devices") for each in daemon.execute(f"query-{kind}")]


def held(daemon: DaemonProcess) -> tuple[int, int]:
    """Descriptors and threads of a daemon."""
    process = Path(f"/proc/{daemon.pid}")
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def test_a_nic_that_is_added_moves_packets_and_goes_on_in_a_new_daemon(empty: DaemonProcess, tmp_path: Path) -> None:
    with Nic(tmp_path, 0) as first, Nic(tmp_path, 1) as second:
        assert ids(empty) == []
        first.add(empty)
        first.guest.attach()
        first.exchange()
        second.add(empty)
        second.guest.attach()
        second.exchange()
        first.exchange()
        assert [each["id"] for each in asked("status", "--json", str(empty.qmp))["devices"]] == ["nic0", "nic1"]

        report = asked("upgrade", "--json", str(empty.qmp))
        assert (report["outcome"], empty.wait()) == ("committed", 0), report
        try:
            second.exchange()
            first.exchange()
            shown = asked("status", "--json", str(empty.qmp))
            assert [each["id"] for each in shown["devices"]] == ["nic0", "nic1"]
            # What came by a handover is deleted, and comes again, as what was added here.
            empty.execute("device_del", id="nic0")
            with first.machine() as machine:
                machine.send(frame(3))  # for nobody
            empty.execute("device_add", **first.device())
            with Nic(tmp_path, 0) as third:
                third.guest.attach()
                third.exchange()
            second.exchange()
        finally:
            empty.execute("quit")


def test_a_device_that_is_deleted_ends_its_session_and_is_told_of(empty: DaemonProcess, tmp_path: Path) -> None:
    with Nic(tmp_path, 0) as nic, Nic(tmp_path, 1) as other:
        for each in (nic, other):
            each.add(empty)
            each.guest.attach()
        with Client(empty) as client:
            client.execute("device_del", id="nic0")
            assert [(event["event"], event["data"]) for event in client.events] == [
                ("SESSION_CLOSED", {"device": "nic0", "session": 1, "reason": "the device was closed"}),
                ("DEVICE_DELETED", {"device": "nic0", "path": "/machine/peripheral/nic0"}),
            ]
        assert nic.guest.frontend.is_lost(PATIENCE_S)
        assert not nic.socket.exists()
        assert ids(empty) == ["net0", "net1", "nic1"]
        other.exchange()
        empty.execute("netdev_del", id="net0")
        assert "tap0" not in [name for _, name in socket.if_nameindex()]
        other.exchange()


def test_another_nic_on_the_same_interface_gets_nothing_that_waited_for_the_one_before(
    empty: DaemonProcess, tmp_path: Path
) -> None:
    with Nic(tmp_path, 0) as before:
        before.add(empty)
        before.guest.attach()
        before.exchange()
        empty.execute("device_del", id="nic0")
        with before.machine() as machine:
            machine.send(frame(7))
    with Nic(tmp_path, 0) as after:
        empty.execute("device_add", **after.device())
        after.guest.attach()
        after.exchange()  # whose first frame is not the one that waited


def test_nothing_is_added_or_deleted_in_the_middle_of_a_handover(empty: DaemonProcess, tmp_path: Path) -> None:
    pause = [{"capability": "pause-before-switchover", "state": True}]
    successor = ["--migration-parameter", "local=on", "--incoming", f"unix:{tmp_path}/migrate"]
    with Nic(tmp_path, 0) as nic, Nic(tmp_path, 1) as other:
        nic.add(empty)
        nic.guest.attach()
        with DaemonProcess(successor, qmp=tmp_path / "successor"):
            empty.execute("migrate-set-parameters", local=True)
            empty.execute("migrate-set-capabilities", capabilities=pause)
            empty.execute("migrate", uri=f"unix:{tmp_path}/migrate")
            empty.wait_migration_status("pre-switchover")
            commands: dict[str, dict[str, object]] = {
                "netdev_add": other.netdev(),
                "device_add": other.device(),
                "netdev_del": {"id": "net0"},
                "device_del": {"id": "nic0"},
            }
            for command, arguments in commands.items():
                with pytest.raises(PeerError, match=f"{command} not allowed while migrating"):
                    empty.execute(command, **arguments)
            empty.execute("migrate_cancel")
            assert empty.wait_migration()["status"] == "cancelled"
        nic.exchange()
        other.add(empty)
        nic.delete(empty)
        assert ids(empty) == ["net1", "nic1"]


def test_what_cannot_be_added_leaves_nothing_behind(empty: DaemonProcess, tmp_path: Path) -> None:
    taken, failing = tmp_path / "taken", tmp_path / "failing"
    failing.write_text("#!/bin/sh\nexit 3\n")
    failing.chmod(0o700)
    with Nic(tmp_path, 0) as nic, Nic(tmp_path, 1) as other, Client(empty) as client, ExitStack() as ends:
        listener = ends.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(taken))
        listener.listen()
        nic.add(client)
        nic.guest.attach()
        client.execute("netdev_add", **other.netdev())
        before, interfaces = held(empty), socket.if_nameindex()
        net7 = {"type": "tap", "id": "net7", "ifname": "tap7"}
        for command, arguments, reason in (
            ("netdev_add", net7 | {"ifname": "lo"}, "an interface of that name exists and is no TAP"),
            ("netdev_add", net7 | {"br": "nowhere"}, "bridge 'nowhere': there is no such interface"),
            ("netdev_add", net7 | {"script": str(failing)}, "the sandbox forbids it: --sandbox on,spawn=allow"),
            ("netdev_add", net7 | {"downscript": str(failing)}, "the sandbox forbids this daemon to run programs"),
            (
                "netdev_add",
                {"type": "tap", "id": "net7", "fd": "7"},
                "descriptor 7 is a number, which only the program that starts",
            ),
            (
                "netdev_add",
                {"type": "tap", "id": "net7", "fd": "tap"},
                "File descriptor named 'tap' has not been found",
            ),
            ("device_add", other.device(socket=str(taken)), "is in use by a living process"),
            ("device_add", other.device(socket=str(empty.qmp)), "is in use by a living process"),
            ("device_add", other.device(socket=str(tmp_path / "no" / "where")), "No such file or directory"),
            ("device_add", other.device(socket=str(nic.socket)), "is used by device 'nic0' already"),
            ("netdev_del", {"id": "net0"}, "GenericError: netdev 'net0' is in use by device 'nic0'"),
            ("netdev_del", {"id": "net7"}, "DeviceNotFound: Device 'net7' not found, there is 'net0', 'net1'"),
            ("device_del", {"id": "nic1"}, "DeviceNotFound: Device 'nic1' not found, there is 'nic0'"),
        ):
            with pytest.raises(PeerError, match=reason):
                client.execute(command, **arguments)
            assert (held(empty), socket.if_nameindex(), ids(client)) == (before, interfaces, ["net0", "net1", "nic0"])
        nic.exchange()
        client.execute("device_add", **other.device())
        other.guest.attach()
        other.exchange()


def opened_tap(number: int, queues: int) -> list[OwnedFd]:
    """The queues of a TAP, as a program that may open it has them."""
    flags = Flag.TAP | Flag.NO_PI | Flag.VNET_HDR | (Flag.MULTI_QUEUE if queues > 1 else 0)
    opened = [OwnedFd(tun.open_device()) for _ in range(queues)]
    for queue in opened:
        tun.attach_to(queue.fileno(), f"tap{number}", flags)
    return opened


@pytest.mark.parametrize("queues", [1, 3])
def test_a_tap_that_was_given_by_name_is_a_netdevs(empty: DaemonProcess, tmp_path: Path, queues: int) -> None:
    with Nic(tmp_path, 0) as nic, Client(empty) as client:
        for number, queue in enumerate(opened_tap(0, queues)):
            with queue:
                client.give(f"q{number}", queue.fileno())
        with OwnedFd(os.open("/dev/null", os.O_RDWR)) as other:
            client.give("no-tap", other.fileno())
        names = [f"q{number}" for number in range(queues)]
        options: dict[str, object] = {"fd": names[0]} if queues == 1 else {"fds": ":".join(names)}
        wanted: dict[str, object] = {"type": "tap", "id": "net0", **options}
        before = held(empty)
        for wrong, reason in (
            (wanted | {"fd": "no-tap", "fds": None}, "Invalid parameter type for 'fds', expected: string"),
            ({"type": "tap", "id": "net0", "fd": "no-tap"}, "is no TAP"),
            (
                {"type": "tap", "id": "net0", "fds": f"{names[0]}:no-tap"},
                "is no TAP|was opened without IFF_MULTI_QUEUE",
            ),
            ({"type": "tap", "id": "net0", "fds": f"{names[0]}:nobody"}, "named 'nobody' has not been found"),
            (wanted | {"ifname": "tap0"}, "are invalid with fd"),
        ):
            with pytest.raises(PeerError, match=reason):
                client.execute("netdev_add", **wrong)
            assert held(empty) == before, wrong
        # What could not be had stays as it was: the names are good still.
        assert client.execute("netdev_add", **wanted) == {}
        for name in names:
            with pytest.raises(PeerError, match=f"File descriptor named '{name}' not found"):
                client.execute("closefd", fdname=name)
        assert client.execute("closefd", fdname="no-tap") == {}
        (netdev,) = client.execute("query-netdevs")
        assert (netdev["ifname"], netdev["queues"]) == ("tap0", queues)
        assert client.execute("device_add", **nic.device()) == {}
        nic.guest.attach()
        nic.exchange()
        nic.delete(client)
        assert "tap0" not in [name for _, name in socket.if_nameindex()]


def test_a_daemon_that_starts_knows_no_descriptor_by_name(tmp_path: Path) -> None:
    for arguments in (["--netdev", "tap,id=net0,fd=tap"], ["--netdev", "tap,id=net0,fds=4:tap", "--incoming", "defer"]):
        done = localmig("run", *arguments, folder=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert "there is no descriptor 'tap': names are given by getfd to a daemon that runs" in done.stderr


def test_a_nic_that_is_added_while_the_rings_stand_runs_with_the_others(empty: DaemonProcess, tmp_path: Path) -> None:
    with Nic(tmp_path, 0) as nic:
        empty.execute("stop")
        nic.add(empty)
        nic.guest.attach()
        assert not any(vring["running"] for vring in empty.execute("query-devices")[0]["vrings"])
        empty.execute("cont")
        nic.exchange()


def test_a_netdev_stays_home_as_long_as_a_device_on_it_does(empty: DaemonProcess, tmp_path: Path) -> None:
    with Nic(tmp_path, 0) as nic:
        empty.execute("netdev_add", **nic.netdev())
        for word, transfers in ((False, False), (True, True)):
            empty.execute("device_add", **nic.device(**{"local-migration": word}))
            assert [each["transfers"] for each in empty.execute("query-local-migration")] == [transfers] * 2
            empty.execute("device_del", id="nic0")
            assert [each["transfers"] for each in empty.execute("query-local-migration")] == [True]


def test_a_link_that_is_set_is_the_guests_and_the_interfaces_also_in_a_new_daemon(
    empty: DaemonProcess, tmp_path: Path
) -> None:
    successor = ["--migration-parameter", "local=on", "--incoming", f"unix:{tmp_path}/migrate"]
    with Nic(tmp_path, 0) as nic, Client(empty) as client:
        nic.add(client)
        nic.guest.attach()
        nic.exchange()
        client.execute("set_link", name="nic0", up=False)
        empty.wait_event("InterfaceChanged", device="nic0", link_is_up=False)
        assert [each["up"] for each in client.execute("query-netdevs")] == [False]
        nic.near.send(bytes(header_length(nic.guest.features)) + frame(9))  # lost, as without a cable
        with pytest.raises(PeerError, match="DeviceNotFound: Device 'nic1' not found, there is 'net0', 'nic0'"):
            client.execute("set_link", name="nic1", up=True)
        with DaemonProcess(successor, qmp=tmp_path / "successor") as second:
            client.execute("migrate-set-parameters", local=True)
            empty.execute("migrate", uri=f"unix:{tmp_path}/migrate")
            assert empty.wait_migration()["status"] == "completed"
            with pytest.raises(PeerError, match="set_link not allowed in run state 'postmigrate'"):
                client.execute("set_link", name="net0", up=True)
            assert [each["up"] for each in second.execute("query-netdevs")] == [False]
            second.execute("set_link", name="net0", up=True)
            second.wait_event("InterfaceChanged", device="nic0", link_is_up=True)
            nic.exchange()


def test_a_daemon_without_objects_hands_over_and_its_successor_can_be_given_some(
    empty: DaemonProcess, tmp_path: Path
) -> None:
    report = asked("upgrade", "--json", str(empty.qmp))
    assert (report["outcome"], empty.wait()) == ("committed", 0), report
    try:
        with Nic(tmp_path, 0) as nic:
            nic.add(empty)
            nic.guest.attach()
            nic.exchange()
    finally:
        empty.execute("quit")


def test_hundreds_of_nics_that_come_and_go_leave_nothing_in_the_process(empty: DaemonProcess, tmp_path: Path) -> None:
    with Nic(tmp_path, 0) as witness, Client(empty) as client:
        witness.add(client)
        witness.guest.attach()
        before = held(empty)
        for number in range(1, NIC_COUNT + 1):
            with Nic(tmp_path, number) as nic:
                nic.add(client)
                nic.guest.attach()
                if number % 50 == 0:
                    nic.exchange()
                nic.delete(client)
        assert held(empty) == before
        assert ids(client) == ["net0", "nic0"]
        witness.exchange()


def test_hundreds_of_nics_that_come_and_go_leave_no_object_and_no_task(tmp_path: Path) -> None:
    async def come_and_go(daemon: Daemon, count: int) -> None:
        for number in range(count):
            options = {"driver": "virtio-net", "id": f"nic{number}", "netdev": f"net{number}"}
            netdev = (
                {"type": "tap"} if number % 2 else {"type": "stream", "addr.path": str(tmp_path / "p"), "server": True}
            )
            daemon.add_object("netdev", netdev | {"id": f"net{number}"})
            daemon.add_object("device", options | {"socket": str(tmp_path / "nic.sock")})
            await asyncio.sleep(0)
            daemon.delete_object("device", f"nic{number}")
            daemon.delete_object("netdev", f"net{number}")
            await asyncio.sleep(0)

    def there() -> tuple[object, ...]:
        gc.collect()
        parts = sum(isinstance(each, VirtioNet | Tap | Stream | Network) for each in gc.get_objects())
        return len(asyncio.all_tasks()), threading.active_count(), len(list(Path("/proc/self/fd").iterdir())), parts

    async def play() -> None:
        daemon = Daemon()
        await daemon.start()
        await come_and_go(daemon, 6)
        before = there()
        tracemalloc.start()
        try:
            await come_and_go(daemon, NIC_COUNT)
            assert there() == before
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # Less than any one of the two hundred takes.
        assert kept < NIC_COUNT * 100, kept
        daemon.quit()
        await daemon.wait_quit()

    asyncio.run(play())


def test_an_interface_that_another_process_has_is_refused_and_can_be_had_later(
    empty: DaemonProcess, tmp_path: Path
) -> None:
    create_tap("tap0")
    with Nic(tmp_path, 0) as nic:
        with (
            DaemonProcess(["--netdev", "tap,id=net0,ifname=tap0"]),
            pytest.raises(PeerError, match="another process has it open"),
        ):
            empty.execute("netdev_add", **nic.netdev())
        nic.add(empty)
        nic.guest.attach()
        nic.exchange()


def test_a_frontend_that_comes_while_its_device_goes_is_told_by_the_end(empty: DaemonProcess, tmp_path: Path) -> None:
    with Nic(tmp_path, 0) as nic:
        nic.add(empty)
        nic.guest.attach()
        empty.execute("device_del", id="nic0")
        with pytest.raises(PeerLostError):
            nic.guest.reconnect()
        empty.execute("device_add", **nic.device())
        nic.guest.reconnect()
        nic.exchange()
