"""A daemon that hands its guest over, driven and watched through QMP: what `upgrade` and `migrate` share.

Owns:        starting a migration, watching it, taking it back; the operator's settings meanwhile; how it is reported.
Never sees:  who takes over.
Read next:   upgrade.py and migrate.py, its two users; migration/handover.py for what makes each outcome safe.

The two daemons settle between them who serves. A program that dies here, or gives up, decides nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import enum
import errno
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from localmig.cli.client import Client, CommandError
from localmig.cli.text import milliseconds, put, table, tell
from localmig.errors import KernelError, LocalmigError, PeerError, StateError
from localmig.fds import OwnedFd
from localmig.migration.parameters import Parameters
from localmig.migration.peer import Peer
from localmig.monitor.schema import parameters_to_qmp

SETTLE_TIMEOUT_S: Final = 15.0
"""How long the daemons have to settle who serves, once a handover was cancelled or one of them was lost. They fence
and wait for each other's death for a few seconds; this is longer."""

SETTLE_STEP_S: Final = 0.05
"""How often the daemons are asked then, where no event tells to ask again."""

TIMEOUT_S: Final = 60.0
"""How long a handover may take unless the operator says otherwise: it takes milliseconds, on a busy machine seconds."""

SERVING: Final = ("running", "paused")
TAKEN_BACK: Final = (None, "none", "failed", "cancelled")
UNDER_WAY: Final = ("setup", "active", "pre-switchover", "device", "cancelling", "failing")


PARAMETER_DEFAULTS: Final = parameters_to_qmp(Parameters())
"""What a migration parameter is in a daemon that does not know it: it behaves as ours does at these values."""

CAPABILITY_DEFAULT: Final = False


class Outcome(enum.Enum):
    """How it ended. The value is the exit status."""

    COMMITTED = 0
    ROLLED_BACK = 1
    UNKNOWN = 3


@dataclass(kw_only=True, slots=True)
class Report:
    """What is known at the end.

    Attributes:
        outcome: who serves.
        old_pid: the daemon that served before.
        new_pid: the daemon that was to take over; None where it was not ours to start.
        reason: why it is not the usual outcome.
        migration: what query-migrate returned.
        notes: what an operator should know besides.
    """

    outcome: Outcome
    old_pid: int
    new_pid: int | None = None
    reason: str | None = None
    migration: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The report for programs."""
        facts = {
            "outcome": self.outcome.name.lower().replace("_", "-"),
            "old-pid": self.old_pid,
            "new-pid": self.new_pid,
            "reason": self.reason,
            "notes": self.notes,
            "migration": self.migration,
        }
        return json.dumps(facts, indent=2)

    def print(self, committed: str, *, as_json: bool) -> int:
        """Prints the report; the exit status.

        Args:
            committed: the first line for people where it is.
            as_json: whether stdout gets JSON in place of text.
        """
        if as_json:
            put(self.to_json())
        elif self.outcome is Outcome.COMMITTED:
            put("\n".join((committed, *_measured(self.migration))))
        for note in self.notes:
            say(f"note: {note}")
        if self.outcome is not Outcome.COMMITTED:
            said = "rolled back" if self.outcome is Outcome.ROLLED_BACK else "outcome unknown"
            tell(f"localmig: error: {said}: {self.reason}")
        return self.outcome.value


def _measured(migration: Mapping[str, Any]) -> list[str]:
    local = migration.get("local", {})
    lines = []
    if "downtime-us" in local:
        lines.append(f"downtime     {milliseconds(local['downtime-us'])}")
    if "total-time" in migration:
        lines.append(f"in all       {migration['total-time']} ms, {migration.get('setup-time', '?')} ms of it setup")
    lines.append(f"descriptors  {local.get('descriptors', 0)}")
    phases = [(phase["name"], milliseconds(phase["duration-us"])) for phase in local.get("phases", ())]
    if phases:
        lines += ["", table(("phase", "duration"), phases)]
    return lines


def say(line: str) -> None:
    """Tells people how it goes."""
    tell(f"localmig: {line}")


def add_record_option(parser: argparse.ArgumentParser) -> None:
    """Adds --record to `parser`."""
    parser.add_argument(
        "--record",
        metavar="FILE",
        # The daemon that hands over runs in another directory.
        type=lambda path: str(Path(path).absolute()),
        help="let the daemon write what moved to FILE, mode 0600, once the guest is served: see 'localmig analyze'",
    )


def let_signals_cancel() -> None:
    """Ctrl-C and SIGTERM cancel this task: the handover is taken back, and how that went is told.

    SIGHUP ends nothing, here and in programs started from here: nothing stops half-way because a terminal was closed.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def ignore_signals() -> None:
    """For what must be told to its end, and has one soon."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a handover changes for its own purpose, as the operator had it."""

    parameters: Mapping[str, Any]
    capabilities: Mapping[str, bool]


async def read_settings(source: Client) -> Settings:
    """The settings of a daemon that has something to hand over. StateError where it has not."""
    state = (await source.execute("query-status"))["status"]
    if state not in SERVING:
        raise StateError(f"daemon {source.pid} has nothing to hand over, its run state is '{state}'")
    if (await source.execute("query-migrate")).get("status") in UNDER_WAY:
        raise StateError(f"daemon {source.pid} is in a migration already: see 'localmig status {source.path}'")
    return await _settings_of(source)


async def _settings_of(daemon: Client) -> Settings:
    told = await daemon.execute("query-migrate-capabilities")
    capabilities = {each["capability"]: each["state"] for each in told}
    # A daemon that has capabilities among its parameters tells of them twice.
    parameters = await daemon.execute("query-migrate-parameters")
    parameters = {name: value for name, value in parameters.items() if name not in capabilities}
    return Settings(parameters=parameters, capabilities=capabilities)


def _capabilities(states: Mapping[str, bool]) -> dict[str, object]:
    """The arguments of migrate-set-capabilities."""
    return {"capabilities": [{"capability": name, "state": state} for name, state in states.items()]}


async def _set(client: Client, report: Report, command: str, name: str, arguments: Mapping[str, object]) -> None:
    """Sets one thing; where the daemon does not take it, the report has a note."""
    try:
        await client.execute(command, arguments)
    except CommandError as error:
        report.notes.append(f"daemon {client.pid} does not take '{name}' as it was set before: {error}")


@dataclass(kw_only=True, slots=True)
class Handover:
    """One attempt of a daemon to hand over.

    Attributes:
        source: the daemon.
        settings: as the operator had them.
        parameters: what is set for the attempt.
        capabilities: likewise; `events` is on besides.
        trouble: what ended the watching early.
        may_have_begun: whether the source was asked to hand over, and did not refuse.
    """

    source: Client
    settings: Settings
    parameters: Mapping[str, object]
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    trouble: str | None = None
    may_have_begun: bool = False

    async def run(self, uri: str, timeout_s: float) -> None:
        """Lets the source hand over and watches until that ends. Whatever goes wrong is kept in `trouble`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.start(uri)
                await self._watch()
        except TimeoutError:
            await self._cancel(f"no end of the handover in {timeout_s:g} s")
        except asyncio.CancelledError:
            ignore_signals()
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            await self._cancel("interrupted")
        except LocalmigError as error:
            self.trouble = str(error)

    async def start(self, uri: str) -> None:
        """Sets what is to be set and is not, and begins."""
        wanted = {"events": True, **self.capabilities}
        have = self.settings.capabilities
        changed = {name: state for name, state in wanted.items() if state != have.get(name, CAPABILITY_DEFAULT)}
        await self.source.execute("migrate-set-capabilities", _capabilities(changed))
        await self.source.execute("migrate-set-parameters", self.parameters)
        self.may_have_begun = True
        try:
            await self.source.execute("migrate", {"uri": uri})
        except CommandError:
            self.may_have_begun = False
            raise

    async def migration(self) -> Mapping[str, Any]:
        """What the source knows of this attempt: nothing if it did not begin, or cannot be asked any more."""
        return await migration_of(self.source) if self.may_have_begun else {}

    async def restore(self, client: Client, report: Report) -> None:
        """Gives a daemon the operator's settings. An older one need not know those that are at their default."""
        try:
            have = await _settings_of(client)
            for name, state in self.settings.capabilities.items():
                if state != have.capabilities.get(name, CAPABILITY_DEFAULT):
                    await _set(client, report, "migrate-set-capabilities", name, _capabilities({name: state}))
            for name, value in self.settings.parameters.items():
                if value != have.parameters.get(name, PARAMETER_DEFAULTS.get(name)):
                    await _set(client, report, "migrate-set-parameters", name, {name: value})
        except PeerError as error:
            report.notes.append(f"daemon {client.pid} keeps the settings of the handover: {error}")

    async def _watch(self) -> None:
        """Shows the source's progress until its migration ended."""
        while True:
            event = await self.source.next_event(timeout_s=SETTLE_TIMEOUT_S)
            if event is not None and event["event"] == "MIGRATION":
                status = event["data"]["status"]
                say(f"handover: {status}")
                if status not in UNDER_WAY:
                    return

    async def _cancel(self, reason: str) -> None:
        self.trouble = reason
        say(f"{reason}: cancelling")
        # Where this does not work, it is committed or gone: what the daemons answer next tells.
        with contextlib.suppress(PeerError, TimeoutError):
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                await self.source.execute("migrate_cancel")
                await self._watch()


def process_of(client: Client) -> Peer:
    """The process that answers, by a pidfd: its number may be another one's by the time it is ended. KernelError."""
    try:
        return Peer(OwnedFd(os.pidfd_open(client.pid)))
    except OSError as error:
        raise KernelError(
            f"cannot see the process that answers at '{client.path}' (number {client.pid}): {error.strerror}; "
            "is it in another PID namespace?",
            errno=error.errno or errno.EIO,
        ) from error


async def run_state(client: Client) -> str | None:
    """The run state of a daemon, None where it cannot be asked any more."""
    try:
        return str((await client.execute("query-status"))["status"])
    except PeerError:
        return None


async def migration_of(client: Client) -> Mapping[str, Any]:
    """What a daemon knows of its migration, nothing where it cannot be asked any more."""
    try:
        answer: Mapping[str, Any] = await client.execute("query-migrate")
    except PeerError:
        return {}
    return answer
