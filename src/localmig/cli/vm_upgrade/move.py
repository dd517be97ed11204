"""A guest's move to a new QEMU: what a plan says is carried out, or taken back.

Owns:        the new process until the guest runs in it, the migration, the one point after which nothing is taken back,
             the paths.
Never sees:  how a plan is made.
Read next:   plan.py; process.py.

Theory of operation. The new QEMU is started with -S: it takes the guest and lets it wait. Until this program tells it
to go on, the guest can be let go on in the old one, after the new process has ended: nothing ran on its memory and
disks since. That one command, `cont`, is the commit. Behind it the old QEMU is ended and the guest is never started
there again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from localmig.cli.client import Client, CommandError, connect
from localmig.cli.handover import SETTLE_TIMEOUT_S, UNDER_WAY, Outcome, ignore_signals, say
from localmig.cli.vm_upgrade.plan import Plan, Way
from localmig.cli.vm_upgrade.process import Process
from localmig.errors import ConfigError, KernelError, LocalmigError, PeerError, PeerLostError
from localmig.fds import OwnedFd
from localmig.migration.peer import Peer
from localmig.unix_socket import is_listening

KIND: Final = "QEMU"
"""What errors call the programs here."""

STEP_S: Final = 0.02
"""How often a starting QEMU is tried; no event tells that it listens."""

END_TIMEOUT_S: Final = 10.0
"""How long a QEMU may take to end once it was asked to, on a loaded machine. It is killed then: it has no guest."""

LOG_TAIL_LINES: Final = 10
"""How much of the new QEMU's log is shown when it does not start."""

_BANDWIDTH: Final = 1 << 40
"""Bytes a second: all that there is. QEMU's own 128 MB/s are meant for a network."""

_CAPABILITIES_OFF: Final = (
    "multifd",
    "postcopy-ram",
    "pause-before-switchover",
    "background-snapshot",
    "zero-copy-send",
)
"""What an operator may have switched on for migrations of another kind."""


@dataclass(kw_only=True, slots=True)
class Report:
    """What is known at the end.

    Attributes:
        outcome: who runs the guest.
        way: how its memory moved.
        old_pid: the QEMU that ran it before.
        new_pid: the one that was to take it.
        reason: why it is not the usual outcome.
        stopped_us: when the guest stopped in the old one, in microseconds of Unix time.
        silence_us: from then to its start in the new one.
        phases: how long each step took, in microseconds.
        migration: what the old QEMU tells of the migration.
        notes: what an operator should know besides.
    """

    outcome: Outcome
    way: Way
    old_pid: int
    new_pid: int
    reason: str | None = None
    stopped_us: int | None = None
    silence_us: int | None = None
    phases: dict[str, int] = field(default_factory=dict)
    migration: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Move:
    """One attempt.

    Args:
        old: the QEMU that runs the guest.
        old_process: held by its pidfd.
        process: what /proc tells of it.
        plan: what to do.
        folder: where the migration's sockets may be, empty.
        log: where the new QEMU's output is appended.
    """

    def __init__(
        self, *, old: Client, old_process: Peer, process: Process, plan: Plan, folder: Path, log: Path
    ) -> None:
        self._old = old
        self._old_process = old_process
        self._process = process
        self._plan = plan
        self._main = str(folder / "main.sock")
        self._cpr = str(folder / "cpr.sock")
        self._log = log
        self._settings: list[tuple[str, dict[str, object]]] = []
        self._times: dict[str, int] = {}
        self._clock_us = time.monotonic_ns() // 1000
        self._stopped_us: int | None = None
        self._new: Client | None = None

    async def run(self, timeout_s: float) -> Report:
        """Moves the guest, or lets it go on where it is.

        Raises:
            LocalmigError: nothing was begun.
        """
        successor = Successor.start(self._plan, self._process, self._log, self._incoming())
        say(f"QEMU {successor.process.pid} starts, way '{self._plan.way.value}', its log is {self._log}")
        report = Report(
            outcome=Outcome.ROLLED_BACK,
            way=self._plan.way,
            old_pid=self._old.pid,
            new_pid=successor.process.pid,
            notes=list(self._plan.notes),
        )
        arrived: Client | None = None
        try:
            async with asyncio.timeout(timeout_s):
                arrived = await self._bring(successor)
        except TimeoutError:
            report.reason = f"not done in {timeout_s:g} s"
        except asyncio.CancelledError:
            report.reason = "interrupted"
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
        except LocalmigError as error:
            report.reason = str(error)
        ignore_signals()
        if arrived is None or not await self._commit(arrived, successor, report):
            await self._go_back(successor, report)
        elif report.outcome is Outcome.COMMITTED:
            await self._conclude(arrived, report)
        if self._new is not None:
            await self._new.close()
        successor.forget()
        report.phases = self._times
        return report

    # -- until the guest waits in the new QEMU ------------------------------------------------------------------------

    def _incoming(self) -> list[str]:
        if self._plan.way is Way.CPR:
            # It has no monitor before it has this channel, so where it listens is said beforehand.
            return ["-incoming", f"unix:{self._main}", "-incoming", _channel("cpr", self._cpr, as_option=True)]
        return ["-incoming", "defer"]

    async def _bring(self, successor: Successor) -> Client:
        """Lets the guest move; it waits in the new QEMU then."""
        if self._plan.way is Way.CPR:
            await successor.wait_listening(self._cpr)
        else:
            self._new = await successor.connect()
            await self._new.execute("migrate-set-capabilities", _states(self._wanted_capabilities))
            await self._new.execute("migrate-incoming", {"uri": f"unix:{self._main}"})
        self._lap("start")
        await self._prepare_old()
        arguments: dict[str, object] = {"uri": f"unix:{self._main}"}
        if self._plan.way is Way.CPR:
            channels = (("main", self._main), ("cpr", self._cpr))
            arguments = {"channels": [_channel(kind, path) for kind, path in channels]}
        await self._old.execute("migrate", arguments)
        await self._watch()
        self._lap("migrate")
        if self._new is None:
            self._new = await successor.connect()
        return self._new

    @property
    def _wanted_capabilities(self) -> dict[str, bool]:
        # return-path: the old QEMU believes that the guest arrived only when the new one says so.
        return {"events": True, "return-path": True, "x-ignore-shared": self._plan.way is Way.SHARED}

    async def _prepare_old(self) -> None:
        """Sets what is to be set and is not, and keeps what it was."""
        told = await self._old.execute("query-migrate-capabilities")
        have = {each["capability"]: each["state"] for each in told}
        wanted = {**dict.fromkeys(_CAPABILITIES_OFF, False), **self._wanted_capabilities}
        before = {name: have[name] for name, state in wanted.items() if have.get(name, state) != state}
        if before:
            self._settings.append(("migrate-set-capabilities", _states(before)))
            changed = {name: wanted[name] for name in before}
            await self._old.execute("migrate-set-capabilities", _states(changed))
        parameters = await self._old.execute("query-migrate-parameters")
        settings: dict[str, object] = {"max-bandwidth": _BANDWIDTH}
        if "mode" in parameters:
            settings["mode"] = "cpr-transfer" if self._plan.way is Way.CPR else "normal"
        self._settings.append(("migrate-set-parameters", {name: parameters[name] for name in settings}))
        await self._old.execute("migrate-set-parameters", settings)

    async def _watch(self) -> None:
        """Waits for the end of the old QEMU's migration.

        Raises:
            PeerError: it failed, or was cancelled by somebody.
        """
        while True:
            event = await self._old.next_event(timeout_s=SETTLE_TIMEOUT_S)
            if event is None:
                continue
            if event["event"] == "STOP":
                self._stopped_us = _stamp_us(event)
            if event["event"] == "MIGRATION":
                status = event["data"]["status"]
                say(f"migration: {status}")
                if status == "completed":
                    return
                if status not in UNDER_WAY:
                    told = (await self._old.execute("query-migrate")).get("error-desc", "it tells no reason")
                    raise PeerError(f"the migration {status}: {told}")

    # -- the commit, and the way back ---------------------------------------------------------------------------------

    async def _commit(self, new: Client, successor: Successor, report: Report) -> bool:
        """Lets the guest go on in the new QEMU; False where it certainly did not."""
        try:
            state = await _arrived(new)
        except (LocalmigError, TimeoutError) as error:
            report.reason = f"the guest did not arrive: {error}"
            return False
        if state != "paused":
            report.reason = f"the guest arrived in run state '{state}', not 'paused'"
            return False
        report.outcome = Outcome.COMMITTED
        if not self._plan.resumes:
            return True
        try:
            await new.execute("cont")
        except CommandError as error:
            report.outcome, report.reason = Outcome.ROLLED_BACK, f"the new QEMU does not let the guest go on: {error}"
            return False
        except PeerError as error:
            # It may have run for an instant. Its memory and disks are no longer what the old one left.
            report.outcome = Outcome.UNKNOWN
            report.reason = (
                f"{error}; the guest may have run in QEMU {successor.process.pid}, so it is not started again in "
                f"{self._old.pid}: if the new process is gone, the guest is, as after a crash; end the old one and boot"
            )
            return True
        with contextlib.suppress(PeerError):
            await self._see_resumed(new, report)
        return True

    async def _see_resumed(self, new: Client, report: Report) -> None:
        while (event := await new.next_event(timeout_s=SETTLE_TIMEOUT_S)) is not None:
            if event["event"] == "RESUME":
                if self._stopped_us is not None:
                    report.stopped_us = self._stopped_us
                    report.silence_us = _stamp_us(event) - self._stopped_us
                return

    async def _go_back(self, successor: Successor, report: Report) -> None:
        """Ends the new QEMU, and sees the guest go on in the old one."""
        # Before the old one is asked anything: it may be waiting for the new one, and answer nobody meanwhile.
        await successor.end()
        with contextlib.suppress(PeerError):
            report.migration = await self._old.execute("query-migrate")
            await self._old.execute("migrate_cancel")
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                await self._continue_old()
            for command, arguments in self._settings:
                await self._old.execute(command, arguments)
        except (PeerError, TimeoutError) as error:
            said = report.reason
            report.outcome = Outcome.UNKNOWN
            report.reason = f"{said}; then QEMU {self._old.pid} could not be seen to run the guest: {error}"

    async def _continue_old(self) -> None:
        """Returns when the guest is in the old QEMU as it was before."""
        while (await self._old.execute("query-migrate")).get("status") in UNDER_WAY:
            await self._old.next_event(timeout_s=STEP_S)
        wanted = "running" if self._plan.resumes else "paused"
        while (state := (await self._old.execute("query-status"))["status"]) != wanted:
            if state in ("postmigrate", "paused") and wanted == "running":
                await self._old.execute("cont")
            elif state == "postmigrate":
                return  # as paused as before
            await self._old.next_event(timeout_s=STEP_S)

    # -- behind the commit --------------------------------------------------------------------------------------------

    async def _conclude(self, new: Client, report: Report) -> None:
        """Ends the old QEMU and gives its paths to the new one."""
        self._lap("resume")
        with contextlib.suppress(PeerError):
            report.migration = await self._old.execute("query-migrate")
            await self._old.execute("quit")
        if not await self._old_process.wait_dead(timeout_s=END_TIMEOUT_S):
            self._old_process.kill()
            if not await self._old_process.wait_dead(timeout_s=END_TIMEOUT_S):
                report.notes.append(
                    f"QEMU {self._old.pid} does not end; the new one keeps the paths it has: {self._renames}"
                )
                return
        report.notes += _rename_all(self._renames)
        try:
            state = (await new.execute("query-status"))["status"]
        except PeerError as error:
            report.outcome, report.reason = Outcome.UNKNOWN, f"the guest went on in the new QEMU, and then {error}"
            return
        if self._plan.resumes and state != "running":
            report.notes.append(f"the guest's run state is '{state}'")
        self._lap("end of the old one")

    @property
    def _renames(self) -> dict[str, str]:
        real_path = self._process.real_path
        return {real_path(path): real_path(name) for path, name in self._plan.renames.items()}

    def _lap(self, name: str) -> None:
        now_us = time.monotonic_ns() // 1000
        self._times[name] = now_us - self._clock_us
        self._clock_us = now_us


class Successor:
    """The new QEMU's process, which outlives this program.

    Attributes:
        process: the process.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], *, path: str, log: Path, log_start: int, made: Sequence[str]
    ) -> None:
        self.process = process
        self._path = path
        self._log = log
        self._log_start = log_start
        self._made = made
        self._peer = Peer(OwnedFd(os.pidfd_open(process.pid)))

    @classmethod
    def start(cls, plan: Plan, process: Process, log: Path, incoming: Sequence[str]) -> Successor:
        """Starts it as its predecessor was started. KernelError where that fails."""
        try:
            with log.open("ab") as output:
                log_start = os.fstat(output.fileno()).st_size
                popen = subprocess.Popen(
                    [*plan.argv, *incoming, "-S"],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    cwd=process.directory,
                    env=process.environment,
                )
        except OSError as error:
            raise KernelError(f"cannot start the new QEMU: {error}", errno=error.errno or errno.EIO) from error
        made = [process.real_path(path) for path in plan.renames]
        return cls(popen, path=process.real_path(plan.qmp_socket), log=log, log_start=log_start, made=made)

    async def wait_listening(self, path: str) -> None:
        """Waits until a socket at `path` can be connected to. PeerError where the process ends instead."""
        while not self._is_listening(path):
            if await self._peer.wait_dead(timeout_s=STEP_S):
                raise PeerError(f"the new QEMU did not start{self._tail()}")

    async def connect(self) -> Client:
        """Its QMP, once it answers. PeerError where it ends instead."""
        await self.wait_listening(self._path)
        while True:
            try:
                return await connect(self._path, kind=KIND)
            except (PeerError, ConfigError) as error:
                # A QEMU that waits for a backend does not answer meanwhile.
                if await self._peer.wait_dead(timeout_s=STEP_S):
                    raise PeerLostError(f"the new QEMU ended{self._tail()}") from error

    async def end(self) -> None:
        """Kills it: it has no guest, and what it began with must be over before the old one goes on."""
        self._peer.kill()
        await self._peer.wait_dead(timeout_s=END_TIMEOUT_S)
        self.process.poll()
        _remove_all(self._made)

    def forget(self) -> None:
        """Lets go of the process, however it is."""
        self._peer.close()

    @staticmethod
    def _is_listening(path: str) -> bool:
        try:
            return is_listening(path)
        except ConfigError:
            return False

    def _tail(self) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError:
            return ""
        return ", its log ends with:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""


def _rename_all(renames: Mapping[str, str]) -> list[str]:
    """Renames; a note for each path that could not be."""
    notes = []
    for path, name in renames.items():
        try:
            Path(path).rename(name)
        except OSError as error:
            notes.append(f"'{path}' could not be renamed to '{name}': {error.strerror}; do it by hand")
    return notes


def _remove_all(paths: Sequence[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            Path(path).unlink()


async def _arrived(new: Client) -> str:
    """The run state of a QEMU once the guest is in it. TimeoutError where that does not come."""
    async with asyncio.timeout(SETTLE_TIMEOUT_S):
        while (state := str((await new.execute("query-status"))["status"])) == "inmigrate":
            await new.next_event(timeout_s=STEP_S)
    return state


def _states(capabilities: Mapping[str, bool]) -> dict[str, object]:
    return {"capabilities": [{"capability": name, "state": state} for name, state in capabilities.items()]}


def _channel(kind: str, path: str, *, as_option: bool = False) -> Any:
    channel = {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}
    if not as_option:
        return channel
    return json.dumps(channel)


def _stamp_us(event: Mapping[str, Any]) -> int:
    stamp = event["timestamp"]
    return int(stamp["seconds"]) * 1_000_000 + int(stamp["microseconds"])
