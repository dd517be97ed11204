"""The QMP server in front of a real daemon, driven by the `qemu.qmp` package unchanged, and by worse clients."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient, Runstate

from localmig.access import Access
from localmig.daemon import Daemon, RunState
from localmig.daemon.descriptors import COUNT_MAX as NAMED_COUNT_MAX
from localmig.fds import OwnedFd
from localmig.monitor import QmpServer
from localmig.monitor.events import EVENTS
from localmig.monitor.protocol import Event, Session
from localmig.monitor.schema import Command
from localmig.monitor.server import CLIENT_COUNT_MAX
from localmig.options import Defer
from localmig.trace import MigrationStatusChanged, RunStateChanged
from localmig.unix_socket import ACCEPT_BURST, ACCEPT_INTERVAL_S, INCOMING_SUFFIX

PATIENCE_S = 20.0

DEFAULTS: dict[str, object] = {
    "announce-initial": 50,
    "announce-max": 550,
    "announce-rounds": 5,
    "announce-step": 100,
    "commit-timeout": 5000,
    "downtime-limit": 300,
    "local": False,
    "record": "",
    "events": False,
    "pause-before-switchover": False,
}

COMMANDS = [
    "announce-self",
    "closefd",
    "cont",
    "device_add",
    "device_del",
    "device_socket_add",
    "device_socket_del",
    "getfd",
    "migrate",
    "migrate-continue",
    "migrate-incoming",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "migrate_cancel",
    "netdev_add",
    "netdev_del",
    "qmp_capabilities",
    "query-commands",
    "query-devices",
    "query-local-migration",
    "query-migrate",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "query-netdevs",
    "query-qmp-schema",
    "query-security",
    "query-status",
    "query-version",
    "quit",
    "session-close",
    "set_link",
    "stop",
]


class TruthfulServer(QmpServer):
    """Looks whether all that is returned and told is what query-qmp-schema says of it."""

    def _execute(self, command: Command, arguments: Mapping[str, object]) -> object:
        value = super()._execute(command, arguments)
        command.returns.read(value, command.name)
        return value

    def _broadcast(self, event: Event) -> None:
        EVENTS[event.name].read(event.data or {}, event.name)
        super()._broadcast(event)


class Rig:
    """A daemon that waits for a migration that never comes, its server, and clients of it."""

    def __init__(self, path: str, resources: AsyncExitStack) -> None:
        self.path = path
        self.daemon = Daemon(incoming=Defer())
        self.server = TruthfulServer(self.daemon, path, succeeds=True)
        self._resources = resources

    async def client(self) -> QMPClient:
        client = QMPClient()
        await client.connect(self.path)
        self._resources.push_async_callback(leave, client)
        return client

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(self.path, limit=2**20)
        self._resources.callback(writer.close)
        return reader, writer

    def emit_status(self, count: int) -> None:
        for _ in range(count):
            self.daemon.tracer.emit(MigrationStatusChanged(status="active"))


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def leave(client: QMPClient) -> None:
    if client.runstate is not Runstate.IDLE:
        with suppress(EOFError):
            await client.disconnect()


@asynccontextmanager
async def rig(path: str) -> AsyncIterator[Rig]:
    async with asyncio.timeout(PATIENCE_S), AsyncExitStack() as resources:
        it = Rig(path, resources)
        resources.push_async_callback(it.server.close, reason="host-signal")
        await it.daemon.start()
        await it.server.start()
        yield it


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Rig], Awaitable[None]]], None]:
    """Runs a scenario on a fresh rig; no descriptor may be left of it."""

    async def play(scenario: Callable[[Rig], Awaitable[None]]) -> None:
        async with rig(str(tmp_path / "qmp.sock")) as it:
            await scenario(it)

    def play_and_count(scenario: Callable[[Rig], Awaitable[None]]) -> None:
        before = open_descriptors()
        asyncio.run(play(scenario))
        assert open_descriptors() == before
        assert list(tmp_path.iterdir()) == []

    return play_and_count


Run = Callable[[Callable[[Rig], Awaitable[None]]], None]


async def refused(client: QMPClient, command: str, arguments: Mapping[str, object] | None = None) -> tuple[str, str]:
    with pytest.raises(ExecuteError) as caught:
        await client.execute(command, arguments)
    return caught.value.error_class, str(caught.value)


async def fetch_event(client: QMPClient) -> tuple[object, object]:
    event = await client.events.get()
    return event["event"], event.get("data")


EVENTS_ON: dict[str, object] = {"capabilities": [{"capability": "events", "state": True}]}


def test_the_qemu_qmp_package_drives_it_unchanged(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        client = await it.client()
        assert client.greeting is not None
        version: Any = await client.execute("query-version")
        assert version["package"].startswith("localmig ")
        assert version == client.greeting.QMP.version
        commands: Any = await client.execute("query-commands")
        assert [command["name"] for command in commands] == COMMANDS
        assert await client.execute("query-status") == {"running": False, "status": "inmigrate"}
        assert await client.execute("query-migrate") == {}
        assert await client.execute("query-local-migration") == []
        assert await client.execute("migrate_cancel") == {}
        assert await refused(client, "nope") == ("CommandNotFound", "The command nope has not been found")

    run(scenario)


def test_the_schema_tells_of_every_command(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        schema: Any = await (await it.client()).execute("query-qmp-schema")
        assert sorted(each["name"] for each in schema if each["meta-type"] == "command") == COMMANDS

    run(scenario)


def test_parameters_are_set_all_or_none(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        client = await it.client()
        before = await client.execute("query-migrate-parameters")
        assert before == DEFAULTS
        for limit in (-1, 2_000_001):
            assert await refused(client, "migrate-set-parameters", {"local": True, "downtime-limit": limit}) == (
                "GenericError",
                "Option downtime-limit expects an integer in the range of 0 to (2000 * 1000) ms",
            )
        for timeout in (-1, 0, 99, 2_000_001):
            assert await refused(client, "migrate-set-parameters", {"local": True, "commit-timeout": timeout}) == (
                "GenericError",
                "Option commit-timeout expects an integer in the range of 100 to (2000 * 1000) ms",
            )
        assert await refused(client, "migrate-set-parameters", {"commit-timeout": "5"}) == (
            "GenericError",
            "Parameter 'commit-timeout' expects uint64",
        )
        assert await refused(client, "migrate-set-parameters", {"local": True, "mode": "x"}) == (
            "GenericError",
            "Parameter 'mode' is unexpected",
        )
        assert await refused(client, "migrate-set-parameters", {"local": True, "record": "a\0b"}) == (
            "GenericError",
            "Option record expects a path of at most 4095 bytes without NUL",
        )
        assert await client.execute("query-migrate-parameters") == before
        assert await client.execute("migrate-set-parameters", {"local": True, "downtime-limit": 2_000_000}) == {}
        assert await client.execute("migrate-set-parameters", {"commit-timeout": 100}) == {}
        assert await client.execute("migrate-set-parameters", {}) == {}
        assert await client.execute("migrate-set-parameters", {"record": "/tmp/stream"}) == {}
        assert await client.execute("query-migrate-parameters") == DEFAULTS | {
            "commit-timeout": 100,
            "downtime-limit": 2_000_000,
            "local": True,
            "record": "/tmp/stream",
        }

    run(scenario)


@pytest.mark.parametrize(
    ("name", "wrong", "highest"),
    [
        ("announce-initial", 100_001, 100_000),
        ("announce-max", 100_001, 100_000),
        ("announce-rounds", 1001, 1000),
        ("announce-step", 0, 10_000),
        ("announce-step", 10_001, 10_000),
    ],
)
def test_an_announcement_has_qemus_bounds_and_qemus_words(run: Run, name: str, wrong: int, highest: int) -> None:
    async def scenario(it: Rig) -> None:
        client = await it.client()
        text = f"Option {name} expects a value between 0 and {highest}"
        assert await refused(client, "migrate-set-parameters", {"local": True, name: wrong}) == ("GenericError", text)
        assert await client.execute("query-migrate-parameters") == DEFAULTS
        assert await client.execute("migrate-set-parameters", {name: highest}) == {}
        schedule = {"initial": 0, "max": 0, "rounds": 0, "step": 1} | {name.removeprefix("announce-"): wrong}
        assert await refused(client, "announce-self", schedule) == ("GenericError", text)

    run(scenario)


def test_announce_self_has_qemus_arguments(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        client = await it.client()
        schedule = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
        for wrong, text in (
            ({}, "Parameter 'initial' is missing"),
            (schedule | {"step": "x"}, "Invalid parameter type for 'step', expected: integer"),
            (schedule | {"rounds": 2**63}, "Invalid parameter type for 'rounds', expected: integer"),
            (schedule | {"interfaces": ["a", 5]}, "Invalid parameter type for 'interfaces[1]', expected: string"),
            (schedule | {"bogus": 1}, "Parameter 'bogus' is unexpected"),
            (schedule, "nothing to announce in run state 'inmigrate'"),
        ):
            assert await refused(client, "announce-self", wrong) == ("GenericError", text)

    run(scenario)


def test_capabilities_are_set_all_or_none(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        client = await it.client()
        wrong = {"capabilities": [{"capability": "events", "state": True}, {"capability": "nope", "state": True}]}
        assert (await refused(client, "migrate-set-capabilities", wrong))[0] == "GenericError"
        assert await client.execute("migrate-set-capabilities", EVENTS_ON) == {}
        assert await client.execute("query-migrate-capabilities") == [
            {"capability": "events", "state": True},
            {"capability": "pause-before-switchover", "state": False},
        ]

    run(scenario)


def test_capabilities_are_parameters_too_and_a_wrong_parameter_keeps_all_as_they_were(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        client = await it.client()
        for wrong, text in (
            ({"events": True, "downtime-limit": -1}, "Option downtime-limit expects an integer in the range of 0 to"),
            ({"events": True, "bogus": 1}, "Parameter 'bogus' is unexpected"),
            ({"local": True, "events": "on"}, "Invalid parameter type for 'events', expected: boolean"),
        ):
            assert (await refused(client, "migrate-set-parameters", wrong))[1].startswith(text)
        assert await client.execute("query-migrate-parameters") == DEFAULTS
        changed = {"pause-before-switchover": True, "local": True}
        assert await client.execute("migrate-set-parameters", changed) == {}
        assert await client.execute("query-migrate-capabilities") == [
            {"capability": "events", "state": False},
            {"capability": "pause-before-switchover", "state": True},
        ]
        await client.execute("migrate-set-capabilities", EVENTS_ON)
        assert await client.execute("query-migrate-parameters") == DEFAULTS | changed | {"events": True}

    run(scenario)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "need either 'uri' or 'channels' argument"),
        ({"channels": []}, "need either 'uri' or 'channels' argument"),
        ({"uri": "foo"}, "unknown migration protocol: foo"),
        ({"uri": "unix:"}, "invalid Unix socket address"),
        ({"uri": "tcp:localhost"}, "error parsing address 'localhost'"),
        ({"uri": "unix:/x"}, "nothing to migrate in run state 'inmigrate'"),
    ],
)
def test_migrate_says_what_is_wrong_with_an_address(run: Run, arguments: dict[str, object], error: str) -> None:
    async def scenario(it: Rig) -> None:
        assert await refused(await it.client(), "migrate", arguments) == ("GenericError", error)

    run(scenario)


def test_an_address_may_come_as_a_channel(run: Run, tmp_path: Path) -> None:
    async def scenario(it: Rig) -> None:
        client = await it.client()
        address = {"transport": "socket", "type": "unix", "path": str(tmp_path / "migrate.sock")}
        channel = {"channel-type": "main", "addr": address}
        assert (await refused(client, "migrate-incoming", {"channels": [channel, channel]}))[1] == (
            "Channel list has more than one main entry"
        )
        assert await client.execute("migrate-incoming", {"channels": [channel]}) == {}
        assert (tmp_path / "migrate.sock").is_socket()
        it.daemon.quit()
        await it.daemon.wait_quit()

    run(scenario)


def test_descriptors_have_the_names_they_were_given_and_any_client_may_use_them(run: Run, tmp_path: Path) -> None:
    async def scenario(it: Rig) -> None:
        first, second = await it.client(), await it.client()
        missing = "No file descriptor supplied via SCM_RIGHTS"
        assert (await refused(first, "getfd", {"fdname": "a"}))[1] == missing
        near, far = socket.socketpair()
        with near, far:
            first.send_fd_scm(near.fileno())
            assert await first.execute("getfd", {"fdname": "a"}) == {}
            near.close()
            # It is taken once.
            assert (await refused(first, "getfd", {"fdname": "b"}))[1] == missing
            far.setblocking(False)
            with pytest.raises(BlockingIOError):
                far.recv(1)
            assert (await refused(second, "migrate-incoming", {"uri": "fd:b"}))[1] == (
                "File descriptor named 'b' has not been found"
            )
            await first.disconnect()
            assert await second.execute("migrate-incoming", {"uri": "fd:a"}) == {}
            assert (await refused(second, "closefd", {"fdname": "a"}))[1] == "File descriptor named 'a' not found"
            it.daemon.quit()
            await it.daemon.wait_quit()
            while far.recv(4096):
                pass  # REFUSE; BlockingIOError where the descriptor is still open

    run(scenario)


def is_closed(far: socket.socket) -> bool:
    """Whether nobody has the other end any more."""
    try:
        return far.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_descriptor_that_cannot_be_named_or_was_replaced_is_closed(run: Run) -> None:
    ends: list[socket.socket] = []

    async def scenario(it: Rig) -> None:
        client = await it.client()

        async def give(name: str) -> None:
            near, far = socket.socketpair()
            far.setblocking(False)
            ends.append(far)
            with near:
                client.send_fd_scm(near.fileno())
                await client.execute("getfd", {"fdname": name})

        await give("a")
        await give("a")
        assert [is_closed(far) for far in ends] == [True, False]
        assert await client.execute("closefd", {"fdname": "a"}) == {}
        with pytest.raises(ExecuteError, match="Parameter 'fdname' expects a name not starting with a digit"):
            await give("1a")
        assert all(map(is_closed, ends))
        for number in range(NAMED_COUNT_MAX):
            await give(f"f{number}")
        with pytest.raises(ExecuteError, match="which is the limit: closefd one"):
            await give("one-more")
        assert [is_closed(far) for far in ends] == [True] * 3 + [False] * NAMED_COUNT_MAX + [True]
        it.daemon.quit()
        await it.daemon.wait_quit()
        assert all(map(is_closed, ends))
        for far in ends:
            far.close()

    run(scenario)


def test_a_descriptor_may_come_with_its_commands_bytes_and_commands_may_come_at_once(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(it.path)
            client.sendall(b'{"execute": "qmp_capabilities"}')
            for name, (near, _) in zip("ab", pairs, strict=False):
                socket.send_fds(
                    client, [b'{"execute": "getfd", "arguments": {"fdname": "%s"}}' % name.encode()], [near.fileno()]
                )
            # Nobody takes this one: it goes with its client.
            socket.send_fds(client, [b" "], [pairs[2][0].fileno()])
            client.setblocking(False)
            answers = b""
            while answers.count(b"return") < 3:
                answers += await asyncio.get_running_loop().sock_recv(client, 4096)
        assert b"error" not in answers
        for near, far in pairs:
            near.close()
            far.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(pairs[2][1], 1) == b""
        second = await it.client()
        for name, (_, far) in zip("ab", pairs, strict=False):
            with pytest.raises(BlockingIOError):
                far.recv(1)
            await second.execute("closefd", {"fdname": name})
            assert far.recv(1) == b""
        for _, far in pairs:
            far.close()

    run(scenario)


def test_every_client_hears_of_events_and_migration_only_where_asked_for(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        clients = [await it.client(), await it.client()]
        it.emit_status(1)
        it.daemon.tracer.emit(RunStateChanged(state="running"))
        await clients[0].execute("migrate-set-capabilities", EVENTS_ON)
        it.emit_status(1)
        it.daemon.tracer.emit(RunStateChanged(state="paused"))
        for client in clients:
            heard = [await fetch_event(client) for _ in range(3)]
            assert heard == [("RESUME", None), ("MIGRATION", {"status": "active"}), ("STOP", None)]

    run(scenario)


def test_what_a_command_brought_about_is_told_before_its_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(it: Rig) -> None:
        monkeypatch.setattr(it.daemon, "cont", lambda: it.daemon.tracer.emit(RunStateChanged(state="running")))
        reader, writer = await it.raw()
        writer.write(b'{"execute": "qmp_capabilities"}{"execute": "cont"}')
        lines = [json.loads(await reader.readline()) for _ in range(4)]
        assert [next(key for key in ("QMP", "return", "event") if key in line) for line in lines] == [
            "QMP",
            "return",
            "event",
            "return",
        ]

    run(scenario)


def test_a_client_that_does_not_read_is_dropped_and_nobody_else_notices(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmig.monitor.server.OUTPUT_BYTES_MAX", 64 * 1024)
    loads, load = 10, 500

    async def scenario(it: Rig) -> None:
        good = await it.client()
        await good.execute("migrate-set-capabilities", EVENTS_ON)
        with socket.socket(socket.AF_UNIX) as slow:
            slow.connect(it.path)
            slow.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(slow, b'{"execute": "qmp_capabilities"}')
            for _ in range(loads):
                it.emit_status(load)
                for _ in range(load):
                    await good.events.get()
            received = b""
            # That this ends at all is the proof: somebody closed the connection.
            while data := await asyncio.get_running_loop().sock_recv(slow, 2**20):
                received += data
            assert received.count(b"MIGRATION") < loads * load
        assert await good.execute("query-status") == {"running": False, "status": "inmigrate"}

    run(scenario)


def test_a_flood_of_commands_does_not_keep_others_from_their_answers(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        _, writer = await it.raw()
        writer.write(b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-commands"}' * 20_000)
        good = await it.client()
        for _ in range(10):
            await good.execute("query-status")
        # Its answers were never taken: most of its commands wait still.
        assert writer.transport.get_write_buffer_size() > 0

    run(scenario)


def test_nonsense_costs_its_sender_the_connection_at_most(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        good = await it.client()
        for nonsense in (b"\xff\x00 ", b"[" * 1000, b'{"' + b"x" * 2**17, b'{"execute": "query-stat'):
            _, writer = await it.raw()
            writer.write(nonsense)
            writer.close()
            await good.execute("query-status")

    run(scenario)


def test_one_client_too_many_is_refused_until_another_one_left(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        clients = [await it.client() for _ in range(CLIENT_COUNT_MAX)]
        reader, _ = await it.raw()
        assert await reader.read() == b""
        await clients.pop().disconnect()
        # Its place is free once the server has seen the end of it.
        while not (greeting := await (await it.raw())[0].readline()):
            await clients[0].execute("query-status")
        assert b"QMP" in greeting

    run(scenario)


def test_a_bug_in_a_command_is_an_error_of_that_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(it: Rig) -> None:
        monkeypatch.setattr(it.daemon, "migration_info", lambda: 1 / 0)
        client = await it.client()
        kind, desc = await refused(client, "query-migrate")
        assert (kind, desc) == (
            "GenericError",
            "internal error in query-migrate: ZeroDivisionError('division by zero')",
        )
        assert await client.execute("query-status") == {"running": False, "status": "inmigrate"}
        assert "query-migrate failed" in caplog.text

    run(scenario)


def test_quit_ends_the_daemon_and_tells_everybody(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        asking, watching = await it.client(), await it.client()
        assert await asking.execute("quit") == {}
        assert await it.daemon.wait_quit() is None
        await it.server.close(reason="host-qmp-quit")
        for client in (asking, watching):
            assert await fetch_event(client) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})

    run(scenario)


def test_who_succeeds_answers_at_the_path_before_it_says_resume(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp.sock")

    async def play() -> None:
        async with rig(path) as old, rig_beside(old) as new:
            assert new.server.path == path + INCOMING_SUFFIX
            client = QMPClient()
            await client.connect(new.server.path)
            new.daemon.tracer.emit(RunStateChanged(state=RunState.RUNNING))
            assert await fetch_event(client) == ("RESUME", None)
            await leave(client)
            assert new.server.path == path
            await old.server.close(reason="host-qmp-quit")
            late = QMPClient()
            await late.connect(path)
            await leave(late)

    asyncio.run(play())
    assert list(tmp_path.iterdir()) == []


@asynccontextmanager
async def rig_beside(old: Rig) -> AsyncIterator[Rig]:
    async with rig(old.path) as new:
        yield new


def test_another_user_is_turned_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(it: Rig) -> None:
        reader, _ = await it.raw()
        assert await reader.read() == b""

    monkeypatch.setattr("localmig.access.peer_credentials", lambda _: (4711, os.geteuid() + 1))
    run(scenario)


def test_root_and_the_same_user_are_let_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario_for(uid: int) -> Callable[[Rig], Awaitable[None]]:
        async def scenario(it: Rig) -> None:
            monkeypatch.setattr("localmig.access.peer_credentials", lambda _: (4711, uid))
            await it.client()

        return scenario

    for uid in (0, os.geteuid()):
        run(scenario_for(uid))


def test_users_listed_are_let_in_and_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(it: Rig) -> None:
        it.daemon.access = Access(users=frozenset({4712, 4711}), mode=0o660, group="7")
        client = await it.client()
        assert await client.execute("query-security") == {
            "user-id": os.geteuid(),
            "group-id": os.getegid(),
            "sandbox": {"option": "off", "enabled": False, "spawn": True, "reason": "switched off by --sandbox"},
            "allowed-users": [4711, 4712],
            "socket-mode": "0660",
            "socket-group": "7",
        }

    monkeypatch.setattr("localmig.access.peer_credentials", lambda _: (1, 4711))
    run(scenario)


def test_the_socket_has_the_mode_of_the_operators_choice(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"

    async def play() -> None:
        server = QmpServer(Daemon(incoming=Defer(), access=Access(mode=0o666)), str(path), succeeds=False)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        await server.close(reason="host-signal")

    asyncio.run(play())


def test_a_flood_of_connections_is_accepted_slowly(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        began_s = time.monotonic()
        for _ in range(ACCEPT_BURST + 2):
            reader, writer = await asyncio.open_unix_connection(it.path)
            assert await reader.readline()
            writer.close()
        assert time.monotonic() - began_s >= ACCEPT_INTERVAL_S

    run(scenario)


def test_clients_that_come_before_the_start_are_answered_after_it(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp.sock")

    async def play() -> None:
        daemon = Daemon(incoming=Defer())
        server = QmpServer(daemon, path, succeeds=False)
        with socket.socket(socket.AF_UNIX) as early:
            early.connect(path)
            early.setblocking(False)
            await server.start()
            data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(early, 4096), PATIENCE_S)
        assert b"QMP" in data
        await server.close(reason="host-signal")

    asyncio.run(play())


def test_an_event_from_before_negotiation_never_comes_before_its_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(it: Rig) -> None:
        await (await it.client()).execute("migrate-set-capabilities", EVENTS_ON)
        receive = Session.receive

        def receive_after_an_event(self: Session, data: bytes, fds: Sequence[OwnedFd]) -> Iterator[bytes]:
            it.emit_status(1)
            return receive(self, data, fds)

        monkeypatch.setattr(Session, "receive", receive_after_an_event)
        late = await it.client()
        assert late.runstate is Runstate.RUNNING

    run(scenario)


# -- while a guest changes hands ----------------------------------------------------------------------------------


def test_no_command_is_carried_out_while_a_guest_changes_hands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmig.monitor.server.UNDISTURBED_TIMEOUT_S", PATIENCE_S)

    async def scenario(it: Rig) -> None:
        waits = asyncio.Event()
        on_release = it.daemon.tracer.on_release

        def note_and_wait(callback: Callable[[], None]) -> None:
            on_release(callback)
            waits.set()

        monkeypatch.setattr(it.daemon.tracer, "on_release", note_and_wait)
        client = await it.client()
        with it.daemon.tracer.held():
            answer = asyncio.ensure_future(client.execute("migrate-set-parameters", {"local": True}))
            await waits.wait()
            assert not it.daemon.parameters.local
        assert await answer == {}
        assert it.daemon.parameters.local

    run(scenario)


def test_a_change_of_hands_that_hangs_keeps_nobody_from_being_heard(run: Run) -> None:
    async def scenario(it: Rig) -> None:
        client = await it.client()
        with it.daemon.tracer.held():
            assert await client.execute("migrate-set-parameters", {"local": True}) == {}
            assert it.daemon.parameters.local

    run(scenario)
