"""A daemon's run state: what it allows, what a call in the wrong state leaves unchanged."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from localmig.daemon import Daemon, RunState
from localmig.device_api import Part
from localmig.device_api.objects import BuildContext
from localmig.devices.virtio_net.options import VirtioNetSpec
from localmig.errors import ConfigError, KernelError, LocalmigError, NotFoundError, StateError
from localmig.migration.parameters import (
    COMMIT_TIMEOUT_MS_MAX,
    COMMIT_TIMEOUT_MS_MIN,
    DOWNTIME_LIMIT_MS_MAX,
    Parameters,
)
from localmig.migration.status import LocalMigrationReport
from localmig.netdevs.tap_options import TapSpec
from localmig.options import Spec
from localmig.options.address import Defer, TcpAddress, UnixAddress
from localmig.registry import RegisteredType
from localmig.trace import Event, MigrationStatusChanged, ObjectAdded, ObjectDeleted, RunStateChanged
from localmig.vmstate import Description

TAP: Final = TapSpec(id="net0", ifname="tap0")
NIC: Final = VirtioNetSpec(id="nic0", netdev="net0", socket="/run/nic0.sock")
NOBODY: Final = UnixAddress(path="/nonexistent/socket")


@dataclass(frozen=True, kw_only=True, slots=True)
class Nothing:
    pass


class RecordingPart(Part):
    """Keeps account of what it was told; `refuses` to open. No migration here comes so far that it is asked more."""

    setup = Description(name="recording", version=1, oldest_version=1, state=Nothing, fields=())
    switchover = None

    def __init__(self, id: str, calls: list[str], *, refuses: bool) -> None:  # noqa: A002
        self.id = id
        self._calls = calls
        self._refuses = refuses

    def _note(self, what: str) -> None:
        self._calls.append(f"{self.id}.{what}")

    def open(self) -> None:
        self._note("open")
        if self._refuses:
            raise KernelError("busy", errno=16)

    def resume(self) -> None:
        self._note("resume")

    def stop(self) -> None:
        self._note("stop")

    def freeze(self) -> None:
        self._note("freeze")

    def thaw(self) -> None:
        self._note("thaw")

    def close(self) -> None:
        self._note("close")

    def local_migration_blocker(self) -> str | None:
        return "it is the host's" if self.id == "net0" else None

    def save_setup(self, *, with_descriptors: bool) -> Any:
        raise AssertionError

    def save_switchover(self) -> Any:
        raise AssertionError

    def release(self) -> None:
        raise AssertionError

    def check_setup(self, state: Any) -> None:
        raise AssertionError

    def adopt_setup(self, state: Any) -> None:
        raise AssertionError

    def check_switchover(self, state: Any) -> None:
        raise AssertionError

    def adopt_switchover(self, state: Any) -> None:
        raise AssertionError

    def recover(self) -> None:
        raise AssertionError

    def source_released(self) -> None:
        raise AssertionError

    def discard(self) -> None:
        raise AssertionError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the parts of every daemon are told."""
    made: list[str] = []

    def build(registered: RegisteredType, spec: Spec, context: BuildContext) -> RecordingPart:
        return RecordingPart(spec.id, made, refuses=spec.id == "refuses")

    monkeypatch.setattr(RegisteredType, "build", build)
    return made


def run(scenario: Callable[[Daemon], Awaitable[None]], daemon: Daemon | None = None) -> list[Event]:
    """Starts a daemon, plays the scenario, quits; gives what was traced."""
    facts: list[Event] = []

    async def play() -> None:
        made = daemon or Daemon(objects=[TAP, NIC])
        made.tracer.subscribe(facts.append)
        await made.start()
        await scenario(made)
        made.quit()
        assert await made.wait_quit() is None

    asyncio.run(play())
    return facts


@contextlib.asynccontextmanager
async def migration(daemon: Daemon) -> AsyncIterator[None]:
    """Waits in the end until the migration that began inside is over."""
    is_over = asyncio.Event()

    def look(event: Event) -> None:
        if isinstance(event, MigrationStatusChanged) and event.status in ("completed", "failed", "cancelled"):
            is_over.set()

    unsubscribe = daemon.tracer.subscribe(look)
    yield
    await is_over.wait()
    unsubscribe()


def test_a_fresh_daemon_opens_serves_and_closes_in_order(calls: list[str]) -> None:
    async def look(daemon: Daemon) -> None:
        assert daemon.run_state is RunState.RUNNING
        assert daemon.migration_info() is None

    facts = run(look)
    assert calls == [
        *("net0.open", "nic0.open"),
        *("net0.resume", "nic0.resume"),
        *("net0.thaw", "nic0.thaw"),
        *("nic0.close", "net0.close"),
    ]
    assert [fact.state for fact in facts if isinstance(fact, RunStateChanged)] == ["running"]


def test_a_part_that_cannot_be_opened_closes_those_before_it(calls: list[str]) -> None:
    daemon = Daemon(objects=[TAP, TapSpec(id="refuses"), TapSpec(id="net2"), NIC])
    with pytest.raises(KernelError, match="busy"):
        asyncio.run(daemon.start())
    assert calls == ["net0.open", "refuses.open", "refuses.close", "net0.close"]


def test_an_object_that_is_added_does_what_the_others_do_and_is_closed_when_it_is_deleted(calls: list[str]) -> None:
    async def play(daemon: Daemon) -> None:
        assert daemon.run_state is RunState.RUNNING
        daemon.add_object("netdev", {"type": "tap", "id": "net0"})
        daemon.stop()
        daemon.add_object("device", {"driver": "virtio-net", "id": "nic0", "netdev": "net0", "socket": "/run/s"})
        daemon.cont()
        daemon.add_object("netdev", {"type": "tap", "id": "net1"})
        assert [each.spec.id for kind in ("netdev", "device") for each in daemon.objects(kind)] == [
            *("net0", "net1", "nic0")
        ]
        daemon.delete_object("device", "nic0")
        daemon.delete_object("netdev", "net0")

    facts = run(play, Daemon())
    assert calls == [
        *("net0.open", "net0.resume", "net0.thaw"),
        *("net0.stop", "nic0.open", "nic0.thaw", "net0.resume", "nic0.resume", "net0.thaw", "nic0.thaw"),
        *("net1.open", "net1.resume", "net1.thaw"),
        *("nic0.close", "net0.close", "net1.close"),
    ]
    changes = [fact for fact in facts if isinstance(fact, ObjectAdded | ObjectDeleted)]
    assert [(type(fact), fact.kind, fact.id) for fact in changes] == [
        (ObjectAdded, "netdev", "net0"),
        (ObjectAdded, "device", "nic0"),
        (ObjectAdded, "netdev", "net1"),
        (ObjectDeleted, "device", "nic0"),
        (ObjectDeleted, "netdev", "net0"),
    ]


NIC1: Final = {"driver": "virtio-net", "id": "nic1", "netdev": "net0", "socket": "/run/nic1.sock"}


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("netdev", {"type": "tap", "id": "refuses"}, "busy"),
        ("netdev", {"type": "tap"}, "Parameter 'id' is missing"),
        ("netdev", {"id": "net1"}, "Parameter 'type' is missing"),
        ("netdev", {"type": "tap", "id": "net0"}, "Duplicate ID 'net0'"),
        ("netdev", {"type": "tap", "id": "nic0"}, "Duplicate ID 'nic0'"),
        (
            "netdev",
            {"type": "tap", "id": "net1", "ifname": "tap0"},
            "interface 'tap0' is used by netdev 'net0' already",
        ),
        ("device", NIC1, "can't take netdev 'net0', it's in use by device 'nic0'"),
        ("device", NIC1 | {"netdev": "net7"}, "can't find netdev 'net7', there is 'net0'"),
        ("device", NIC1 | {"driver": "virtio-tea"}, "does not accept value 'virtio-tea'"),
        ("device", NIC1 | {"tea": "hot"}, "Parameter 'tea' is unexpected"),
    ],
)
def test_what_cannot_be_added_leaves_everything_as_it_was(
    calls: list[str], kind: str, options: dict[str, object], error: str
) -> None:
    async def play(daemon: Daemon) -> None:
        calls.clear()
        with pytest.raises(LocalmigError, match=error):
            daemon.add_object(kind, options)
        assert [each.spec for each in daemon.objects("netdev") + daemon.objects("device")] == [TAP, NIC]
        assert calls == (["refuses.open", "refuses.close"] if error == "busy" else [])
        daemon.add_object("netdev", {"type": "tap", "id": "net1"})

    run(play)


def test_what_another_object_refers_to_is_not_deleted_nor_what_there_is_not(calls: list[str]) -> None:
    async def play(daemon: Daemon) -> None:
        calls.clear()
        with pytest.raises(StateError, match="netdev 'net0' is in use by device 'nic0': delete that one first"):
            daemon.delete_object("netdev", "net0")
        with pytest.raises(NotFoundError, match="Device 'nic7' not found, there is 'nic0'"):
            daemon.delete_object("device", "nic7")
        with pytest.raises(NotFoundError, match="Device 'nic0' not found, there is 'net0'"):
            daemon.delete_object("netdev", "nic0")
        assert calls == []

    run(play)


def test_objects_neither_come_nor_go_while_the_guest_is_another_daemons_or_on_its_way(calls: list[str]) -> None:
    async def migrating(daemon: Daemon) -> None:
        async with migration(daemon):
            daemon.migrate(NOBODY)
            calls.clear()
            for change in changes(daemon):
                with pytest.raises(StateError, match="not allowed while migrating"):
                    change()
        daemon.delete_object("device", "nic0")

    async def waiting(daemon: Daemon) -> None:
        for change in changes(daemon):
            with pytest.raises(StateError, match="not allowed in run state 'inmigrate'"):
                change()

    async def ending(daemon: Daemon) -> None:
        daemon.quit()
        for change in changes(daemon):
            with pytest.raises(StateError, match="told to end"):
                change()

    run(migrating)
    run(waiting, Daemon(incoming=Defer()))
    run(ending)


def changes(daemon: Daemon) -> list[Callable[[], None]]:
    return [
        lambda: daemon.add_object("netdev", {"type": "tap", "id": "net1"}),
        lambda: daemon.delete_object("device", "nic0"),
    ]


def test_stop_and_cont_are_told_once(calls: list[str]) -> None:
    async def pause(daemon: Daemon) -> None:
        calls.clear()
        daemon.stop()
        daemon.stop()
        daemon.cont()
        daemon.cont()
        assert calls == ["net0.stop", "nic0.stop", "net0.resume", "nic0.resume", "net0.thaw", "nic0.thaw"]

    facts = run(pause)
    assert [fact.state for fact in facts if isinstance(fact, RunStateChanged)] == ["running", "paused", "running"]


def test_an_incoming_daemon_waits_and_serves_nothing(calls: list[str]) -> None:
    async def look(daemon: Daemon) -> None:
        assert daemon.run_state is RunState.INMIGRATE
        with pytest.raises(StateError, match="waits for an incoming migration"):
            daemon.cont()
        with pytest.raises(StateError, match="nothing to migrate in run state 'inmigrate'"):
            daemon.migrate(NOBODY)
        daemon.stop()
        assert daemon.run_state is RunState.INMIGRATE

    run(look, Daemon(incoming=Defer()))
    assert calls == []


def test_only_an_incoming_daemon_takes_a_migration_and_only_one(calls: list[str], tmp_path: Path) -> None:
    async def refuse(daemon: Daemon) -> None:
        with pytest.raises(StateError, match="'-incoming' was not specified on the command line"):
            daemon.migrate_incoming(UnixAddress(path=str(tmp_path / "m")))

    run(refuse)

    async def take(daemon: Daemon) -> None:
        daemon.migrate_incoming(UnixAddress(path=str(tmp_path / "m")))
        with pytest.raises(StateError, match="The incoming migration has already been started"):
            daemon.migrate_incoming(UnixAddress(path=str(tmp_path / "n")))

    run(take, Daemon(incoming=Defer()))
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_cannot_be_listened_on_may_be_followed_by_another(calls: list[str], tmp_path: Path) -> None:
    async def take(daemon: Daemon) -> None:
        with pytest.raises(KernelError, match="cannot listen at"):
            daemon.migrate_incoming(NOBODY)
        daemon.migrate_incoming(UnixAddress(path=str(tmp_path / "m")))

    run(take, Daemon(incoming=Defer()))


# -- migrations that come to nothing --------------------------------------------------------------------------


def test_a_migration_to_nobody_fails_and_everything_is_as_before(calls: list[str]) -> None:
    async def migrate(daemon: Daemon) -> None:
        calls.clear()
        for _ in range(2):
            async with migration(daemon):
                daemon.migrate(NOBODY)
            info = daemon.migration_info()
            assert info is not None
            assert (info.status, info.descriptors) == ("failed", 0)
            assert "cannot connect to 'unix:/nonexistent/socket'" in str(info.error_desc)
            assert daemon.run_state is RunState.RUNNING
        assert calls == []
        daemon.stop()

    facts = run(migrate)
    assert [fact.status for fact in facts if isinstance(fact, MigrationStatusChanged)] == ["setup", "failed"] * 2


def test_what_does_not_fit_a_migration_under_way_is_refused(calls: list[str]) -> None:
    async def migrate(daemon: Daemon) -> None:
        async with migration(daemon):
            daemon.migrate(NOBODY)
            with pytest.raises(StateError, match="There's a migration process in progress"):
                daemon.migrate(NOBODY)
            with pytest.raises(StateError, match="There's a migration process in progress"):
                daemon.set_parameters(Parameters(events=True, downtime_limit_ms=1))
            # What is no capability may be set for the next one.
            daemon.set_parameters(Parameters(downtime_limit_ms=2))
            for call in (daemon.stop, daemon.cont):
                with pytest.raises(StateError, match="while a handover is under way"):
                    call()
            with pytest.raises(StateError, match="Migration not in expected state: none"):
                daemon.migrate_continue("pre-switchover")
            assert daemon.parameters == Parameters(downtime_limit_ms=2)

    run(migrate)


def test_a_migration_is_cancelled_as_soon_as_it_is_asked_for(calls: list[str]) -> None:
    async def migrate(daemon: Daemon) -> None:
        async with migration(daemon):
            daemon.migrate(NOBODY)
            daemon.migrate_cancel()
        info = daemon.migration_info()
        assert info is not None
        assert info.status == "cancelled"

    run(migrate)


def test_cancelling_and_continuing_without_a_migration(calls: list[str]) -> None:
    async def ask(daemon: Daemon) -> None:
        daemon.migrate_cancel()
        with pytest.raises(StateError, match="Migration not in expected state: none"):
            daemon.migrate_continue("pre-switchover")

    run(ask)


def test_local_over_tcp_is_refused_before_anything_begins(calls: list[str]) -> None:
    async def migrate(daemon: Daemon) -> None:
        daemon.set_parameters(Parameters(local=True))
        with pytest.raises(ConfigError, match=LOCAL_NEEDS):
            daemon.migrate(TcpAddress(host="127.0.0.1", port=4444))
        assert daemon.migration_info() is None

    run(migrate)


LOCAL_NEEDS: Final = "^local migration requires a UNIX domain socket channel$"
TCP: Final = TcpAddress(host="127.0.0.1", port=0)


def test_local_is_refused_at_once_by_a_daemon_that_is_to_wait_at_tcp_which_may_wait_elsewhere(tmp_path: Path) -> None:
    async def wait() -> None:
        daemon = Daemon(incoming=Defer())
        await daemon.start()
        daemon.set_parameters(Parameters(local=True))
        with pytest.raises(ConfigError, match=LOCAL_NEEDS):
            daemon.migrate_incoming(TCP)
        assert daemon.migration_info() is None
        daemon.migrate_incoming(UnixAddress(path=str(tmp_path / "m")))
        daemon.quit()
        assert await daemon.wait_quit() is None

    asyncio.run(wait())


def test_local_cannot_be_switched_on_while_a_daemon_waits_at_tcp() -> None:
    async def wait() -> None:
        daemon = Daemon(incoming=TCP)
        await daemon.start()
        before = daemon.parameters
        with pytest.raises(ConfigError, match=LOCAL_NEEDS):
            daemon.set_parameters(Parameters(local=True, downtime_limit_ms=1))
        assert daemon.parameters is before
        daemon.set_parameters(Parameters(downtime_limit_ms=1))
        daemon.quit()
        assert await daemon.wait_quit() is None

    asyncio.run(wait())


def test_a_daemon_that_is_to_wait_at_tcp_with_local_on_does_not_start() -> None:
    async def wait() -> None:
        daemon = Daemon(incoming=TCP)
        daemon.set_parameters(Parameters(local=True))
        with pytest.raises(ConfigError, match=LOCAL_NEEDS):
            await daemon.start()
        daemon.quit()
        await daemon.wait_quit()

    asyncio.run(wait())


# -- parameters and reports -----------------------------------------------------------------------------------


def test_parameters_are_set_as_a_whole_or_not_at_all(calls: list[str]) -> None:
    async def set_them(daemon: Daemon) -> None:
        assert daemon.parameters == Parameters(local=False, downtime_limit_ms=300)
        for limit_ms in (0, DOWNTIME_LIMIT_MS_MAX):
            daemon.set_parameters(Parameters(downtime_limit_ms=limit_ms))
        for timeout_ms in (COMMIT_TIMEOUT_MS_MIN, COMMIT_TIMEOUT_MS_MAX):
            daemon.set_parameters(Parameters(commit_timeout_ms=timeout_ms))
        before = daemon.parameters
        for limit_ms in (-1, DOWNTIME_LIMIT_MS_MAX + 1):
            with pytest.raises(ConfigError, match="Option downtime-limit expects an integer in the range of 0 to"):
                daemon.set_parameters(Parameters(local=True, downtime_limit_ms=limit_ms))
        for timeout_ms in (COMMIT_TIMEOUT_MS_MIN - 1, COMMIT_TIMEOUT_MS_MAX + 1):
            with pytest.raises(ConfigError, match="Option commit-timeout expects an integer in the range of 100 to"):
                daemon.set_parameters(Parameters(local=True, commit_timeout_ms=timeout_ms))
        assert daemon.parameters is before

    run(set_them)


def test_each_object_tells_whether_it_would_move(calls: list[str]) -> None:
    async def ask(daemon: Daemon) -> None:
        assert daemon.local_migration_reports() == [
            LocalMigrationReport(id="net0", type="tap", transfers=False, reason="it is the host's"),
            LocalMigrationReport(id="nic0", type="virtio-net", transfers=True),
        ]

    run(ask)
