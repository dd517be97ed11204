"""`localmig upgrade`: a new daemon takes over from an old one, and the old one goes.

Owns:        the order of the steps, starting and ending processes, telling the three outcomes apart.
Never sees:  how a handover works: it asks both daemons by QMP, as any operator could.
Read next:   handover.py, what it shares with migrate.py; migration/handover.py for what makes each outcome safe.

Theory of operation. The two daemons settle between them who serves; this program only starts that, watches, and then
asks both. Whatever happens to it in the middle, the guest is served. So an error here never decides anything: it
ends the watching, and the answers of the daemons decide which outcome is reported. A process is ended only when the
answers say that it does not serve.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from localmig.access import PRIVATE_MODE
from localmig.cli.client import Client, connect
from localmig.cli.handover import (
    PARAMETER_DEFAULTS,
    SERVING,
    SETTLE_STEP_S,
    SETTLE_TIMEOUT_S,
    TAKEN_BACK,
    TIMEOUT_S,
    Handover,
    Outcome,
    Report,
    Settings,
    add_record_option,
    ignore_signals,
    let_signals_cancel,
    migration_of,
    process_of,
    read_settings,
    run_state,
    say,
)
from localmig.cli.text import seconds
from localmig.cli.unit import STDERR, Unit, logs_to_journal, unit_of
from localmig.errors import ConfigError, KernelError, LocalmigError, PeerError, PeerLostError, StateError
from localmig.fds import OwnedFd
from localmig.migration.peer import Peer
from localmig.options import SandboxSpec
from localmig.unix_socket import INCOMING_SUFFIX, check_path, is_listening

_EXAMPLES: Final = """\
examples:
  after an update of localmig, while the guest runs:
    localmig upgrade /run/vm1/qmp.sock

  to another installation, with a log of its own:
    localmig upgrade /run/vm1/qmp.sock --exec /opt/localmig-2/bin/localmig --log /var/log/vm1.log

  with more options for the new daemon's 'localmig run':
    localmig upgrade /run/vm1/qmp.sock -- --trace /tmp/trace.jsonl

exit status:
  0  committed: the new daemon serves the guest and answers at QMP-SOCKET
  1  rolled back, or not begun: the old daemon serves on as before, the reason is on stderr
  2  wrong usage
  3  unknown: neither could be found to serve; what is known is on stderr, no process was ended
"""

UNPAUSED: Final = {"pause-before-switchover": False}
"""Nobody else would know that the old daemon waits."""

END_TIMEOUT_S: Final = 10.0
"""How long the old daemon may take to end once it was asked to, on a loaded machine."""

END_UNUSED_TIMEOUT_S: Final = 2.0
"""The same for a new daemon that serves nothing. It is not waited for longer, for it is killed then."""

LOG_TAIL_LINES: Final = 10
"""How much of the new daemon's log is shown when it does not start: its error, and what came right before."""


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "upgrade",
        usage="localmig upgrade [options] QMP-SOCKET [-- OPTION-OF-RUN ...]",
        help="replace a daemon by a new one under its running guest",
        description="Starts a new daemon, lets it take over everything the old one serves, ends the old one, and says "
        "what happened. Clients of QMP-SOCKET and guests need not change anything.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="QMP-SOCKET", help="path of the old daemon's QMP socket")
    parser.add_argument(
        "--exec", dest="program", metavar="PROGRAM", help="the new daemon's 'localmig' (default: this installation's)"
    )
    parser.add_argument(
        "--log",
        metavar="FILE",
        help="where the new daemon's output is appended (default: QMP-SOCKET.log, in a unit the journal)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=TIMEOUT_S,
        help="give the new daemon so long to start, and the handover so long, before it is cancelled (default: 60)",
    )
    add_record_option(parser)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    # The new daemon starts elsewhere, and a rename must replace the socket, not a link to it.
    arguments.socket = str(Path(arguments.socket).resolve())
    try:
        report = asyncio.run(_upgrade(arguments))
    except asyncio.CancelledError:
        raise StateError("interrupted before the handover: nothing was changed") from None
    committed = f"committed: daemon {report.new_pid} serves in place of {report.old_pid}"
    return report.print(committed, as_json=arguments.json)


# -- the steps ------------------------------------------------------------------------------------------------------


async def _upgrade(arguments: argparse.Namespace) -> Report:
    let_signals_cancel()
    path = arguments.socket
    async with contextlib.AsyncExitStack() as resources:
        old = await connect(path)
        resources.push_async_callback(old.close)
        old_process = process_of(old)
        resources.callback(old_process.close)
        settings = await _check_old(old)
        if (unit := unit_of(old.pid)) is not None:
            return await _reload(arguments, unit, old)
        await _check_alone(path + INCOMING_SUFFIX)
        security = await old.execute("query-security")
        address = resources.enter_context(_handover_socket(path))
        successor = _start(arguments, path, address, settings, security, old)
        try:
            say(f"daemon {successor.process.pid} starts, its log is {successor.log}")
            await successor.wait_ready(arguments.timeout)
            new = await connect(successor.path)
        except BaseException:
            await successor.end()
            raise
        resources.push_async_callback(new.close)
        parameters: dict[str, object] = {"local": True}
        if arguments.record is not None:
            parameters["record"] = arguments.record
        handover = Handover(source=old, settings=settings, parameters=parameters, capabilities=UNPAUSED)
        upgrade = Upgrade(path=path, handover=handover, old_process=old_process, new=new)
        await handover.run(f"unix:{address}", arguments.timeout)
        report = await upgrade.conclude()
        if report.outcome is Outcome.ROLLED_BACK:
            await successor.end()
        return report


async def _reload(arguments: argparse.Namespace, unit: Unit, old: Client) -> Report:
    """Lets systemd reload the unit of the old daemon: a process that was started from here would be none of its own.

    What the unit's ExecReload= runs is this program again, inside of the unit.
    """
    elsewhere = {"--exec": arguments.program, "--log": arguments.log, "--record": arguments.record}
    given = [option for option, value in elsewhere.items() if value is not None]
    if given or arguments.run_options:
        raise ConfigError(
            f"daemon {old.pid} is the main process of unit '{unit.name}', whose ExecReload= hands over: "
            f"give {given[0] if given else 'options of run'} there ('systemctl edit {unit.name}')"
        )
    say(f"daemon {old.pid} is the main process of unit '{unit.name}': systemd reloads it")
    ignore_signals()  # systemd would go on: it is bounded, and how it went is told
    reason = None
    try:
        await asyncio.to_thread(unit.reload)
    except StateError as error:
        reason = str(error)
    try:
        new = await connect(old.path)
    except LocalmigError as error:
        return Report(
            outcome=Outcome.UNKNOWN, old_pid=old.pid, reason=f"{reason or 'the unit was reloaded'}, but {error}"
        )
    try:
        serves = await run_state(new) in SERVING
        migration = await migration_of(new)
    finally:
        await new.close()
    if serves and new.pid != old.pid:
        return Report(outcome=Outcome.COMMITTED, old_pid=old.pid, new_pid=new.pid, migration=migration)
    outcome = Outcome.ROLLED_BACK if serves else Outcome.UNKNOWN
    reason = migration.get("error-desc") or reason or "the unit was reloaded, and the old daemon serves on"
    return Report(outcome=outcome, old_pid=old.pid, reason=reason, migration=migration)


async def _check_old(old: Client) -> Settings:
    """Raises where there is nothing to hand over, or not by us; else gives the old daemon's settings."""
    if old.uid != os.geteuid():
        raise ConfigError(
            f"daemon {old.pid} runs as user id {old.uid} and its successor would run as {os.geteuid()}: "
            f"do this as user id {old.uid}"
        )
    return await read_settings(old)


async def _check_alone(path: str) -> None:
    """Raises ConfigError where another new daemon waits for this handover, at `path`."""
    if not is_listening(path):
        return
    try:
        other = await connect(path)
    except LocalmigError:
        return  # the new daemon says what has its path
    pid = other.pid
    await other.close()
    raise ConfigError(
        f"daemon {pid} waits at '{path}' to take over: another 'localmig upgrade' started it; if none runs any more, "
        f"end it with 'kill {pid}' and try again"
    )


@contextmanager
def _handover_socket(path: str) -> Iterator[str]:
    """A path for the migration's socket, in a directory of its own beside the QMP socket, which goes afterwards."""
    parent = os.path.dirname(path)
    try:
        directory = tempfile.mkdtemp(prefix=".up-", dir=parent)
    except OSError as error:
        raise KernelError(
            f"cannot make a directory in '{parent}': {error.strerror}", errno=error.errno or errno.EIO
        ) from error
    try:
        address = os.path.join(directory, "migrate.sock")
        check_path(address)
        yield address
    finally:
        # What the new daemon listened on is in it. Where it waits still, nobody will come.
        shutil.rmtree(directory, ignore_errors=True)


class Successor:
    """The new daemon's process.

    Attributes:
        process: the process.
        path: where it answers QMP until it serves.
        log: where its output goes.
        log_start: where in that file its output begins.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], ready: OwnedFd, *, path: str, log: str, log_start: int
    ) -> None:
        self.process = process
        self.path = path
        self.log = log
        self.log_start = log_start
        self._ready = ready
        self._peer = Peer(OwnedFd(os.pidfd_open(process.pid)))

    async def wait_ready(self, timeout_s: float) -> None:
        """Waits until it says that it is ready.

        Raises:
            PeerError: it ended, or did not say so in time.
        """
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._ready.fileno(), lambda: None if readable.done() else readable.set_result(None))
        try:
            async with asyncio.timeout(timeout_s):
                await readable
        except TimeoutError as error:
            raise PeerError(f"the new daemon is not ready after {timeout_s:g} s{self._tail()}") from error
        finally:
            loop.remove_reader(self._ready.fileno())
        said = os.read(self._ready.fileno(), 1)
        self._ready.close()
        if not said:
            # What it says of the reason comes last.
            await self._peer.wait_dead(timeout_s=END_UNUSED_TIMEOUT_S)
            raise PeerError(f"the new daemon did not start{self._tail()}")

    async def end(self) -> None:
        """Asks for its end, then forces it. Only for a daemon that does not serve."""
        self._ready.close()
        for ask in (signal.SIGTERM, signal.SIGKILL):
            self.process.send_signal(ask)
            if await self._peer.wait_dead(timeout_s=END_UNUSED_TIMEOUT_S):
                break
        self._peer.close()
        self.process.poll()
        self._remove_dead_socket()

    def _remove_dead_socket(self) -> None:
        """A daemon that was killed leaves its socket behind."""
        with contextlib.suppress(ConfigError, OSError):
            if not is_listening(self.path):
                Path(self.path).unlink()

    def _tail(self) -> str:
        if not Path(self.log).is_file():
            return ""  # a terminal or a pipe: whoever reads it has seen it
        try:
            with open(self.log, "rb") as log:
                log.seek(self.log_start)
                lines = log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError:
            return ""
        return ", its log ends with:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""


def options_of(security: Mapping[str, Any]) -> list[str]:
    """The options of `run` that give a daemon the sandbox, and let in those, of the one that answered `security`.

    What stands at its default is left out: there a file of the new daemon's may say otherwise.
    """
    options = []
    if (mode := security["socket-mode"]) != f"{PRIVATE_MODE:04o}":
        options += ["--socket-mode", mode]
    if (sandbox := security["sandbox"]["option"]) != str(SandboxSpec()):
        options += ["--sandbox", sandbox]
    if users := security["allowed-users"]:
        options += ["--allow-user", ",".join(map(str, users))]
    if "socket-group" in security:
        options += ["--socket-group", security["socket-group"]]
    return options


def _start(
    arguments: argparse.Namespace,
    path: str,
    address: str,
    settings: Settings,
    security: Mapping[str, Any],
    old: Client,
) -> Successor:
    """Starts the new daemon, which outlives this program and its terminal."""
    command = [*_program(arguments.program), "run", "--qmp", f"unix:{path}", "--incoming", f"unix:{address}"]
    command += ["--migration-parameter", "local=on"]
    # Only what differs from the defaults: an older program need not know the rest.
    for name in ("downtime-limit", "commit-timeout"):
        if (value := settings.parameters.get(name, PARAMETER_DEFAULTS[name])) != PARAMETER_DEFAULTS[name]:
            command += ["--migration-parameter", f"{name}={value}"]
    command += options_of(security)
    journaled = arguments.log is None and logs_to_journal(os.environ)
    if journaled:
        log = "the journal"
    else:
        log = str(Path(arguments.log or f"{path}.log").absolute())
        # Its output goes there too; the option lets SIGHUP open the file again.
        command += ["--log", log]
    ready, ready_there = os.pipe()
    try:
        # A stream to the journal is a socket, which cannot be opened by a name.
        with open(os.dup(STDERR) if journaled else log, "ab") as output:
            log_start = os.fstat(output.fileno()).st_size
            process = subprocess.Popen(
                [*command, "--ready-fd", str(ready_there), *arguments.run_options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[ready_there],
                # Its service manager is the old daemon's, which tells it.
                env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
                start_new_session=True,
                # Relative paths in the old daemon's options go on meaning the same files.
                cwd=f"/proc/{old.pid}/cwd",
            )
    except OSError as error:
        os.close(ready)
        raise KernelError(f"cannot start the new daemon: {error}", errno=error.errno or errno.EIO) from error
    finally:
        os.close(ready_there)
    return Successor(process, OwnedFd(ready), path=path + INCOMING_SUFFIX, log=log, log_start=log_start)


def _program(program: str | None) -> list[str]:
    if program is None:
        # -P: the old daemon's working directory is no place to import from.
        return [sys.executable, "-P", "-m", "localmig.cli"]
    found = shutil.which(program)
    if found is None:
        raise ConfigError(f"--exec {program}: no such program")
    return [str(Path(found).absolute())]


# -- the handover, and what came of it ------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Upgrade:
    """One attempt, between two daemons that are there."""

    path: str
    handover: Handover
    old_process: Peer
    new: Client

    @property
    def old(self) -> Client:
        """The daemon that hands over."""
        return self.handover.source

    async def conclude(self) -> Report:
        """Asks both daemons who serves, and brings everything in order for that outcome."""
        ignore_signals()
        report = Report(
            outcome=await self._settle(), old_pid=self.old.pid, new_pid=self.new.pid, reason=self.handover.trouble
        )
        report.migration = await self.handover.migration() or await migration_of(self.new)
        if note := report.migration.get("local", {}).get("note"):
            report.notes.append(note)
        if report.outcome is Outcome.COMMITTED:
            await self._end_old(report)
            await self._verify(report)
        elif report.outcome is Outcome.ROLLED_BACK:
            report.reason = report.migration.get("error-desc") or self.handover.trouble
            await self.handover.restore(self.old, report)
        else:
            report.reason = await self._doubt()
        return report

    async def _settle(self) -> Outcome:
        """Who serves, once it is settled."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                while True:
                    old_state = await run_state(self.old)
                    status = (await self.handover.migration()).get("status")
                    # Not where it is completed: that is said a moment before the run state follows.
                    if old_state in SERVING and status in TAKEN_BACK:
                        return Outcome.ROLLED_BACK
                    if await run_state(self.new) in SERVING:
                        return Outcome.COMMITTED
                    if not self.new.is_connected and not self.old.is_connected:
                        return Outcome.UNKNOWN
                    with contextlib.suppress(PeerLostError):
                        await self.new.next_event(timeout_s=SETTLE_STEP_S)
        return Outcome.UNKNOWN

    async def _end_old(self, report: Report) -> None:
        """Ends the old daemon, which serves no more."""
        if self.old_process.is_dead:
            report.notes.append(f"daemon {self.old.pid} died during the handover")
            return
        with contextlib.suppress(PeerError):
            await self.old.execute("quit")
        if not await self.old_process.wait_dead(timeout_s=END_TIMEOUT_S):
            report.notes.append(f"daemon {self.old.pid} does not end: it serves nothing, SIGTERM or SIGKILL may")

    async def _verify(self, report: Report) -> None:
        """Sees the new daemon where clients will look for it, and gives it the operator's settings."""
        try:
            client = await connect(self.path)
        except LocalmigError as error:
            report.outcome, report.reason = Outcome.UNKNOWN, f"daemon {self.new.pid} took over, but {error}"
            return
        try:
            if client.pid != self.new.pid:
                report.outcome = Outcome.UNKNOWN
                report.reason = f"daemon {self.new.pid} took over, but {client.pid} answers at '{self.path}'"
            await self.handover.restore(client, report)
            # Whatever became of an interface, the handover is committed. An older program has no notes.
            with contextlib.suppress(PeerError):
                for netdev in await client.execute("query-netdevs"):
                    report.notes += [f"netdev '{netdev['id']}': {note}" for note in netdev.get("notes", ())]
        finally:
            await client.close()

    async def _doubt(self) -> str:
        """What is known where nothing is settled."""
        facts = [self.handover.trouble] if self.handover.trouble else []
        for name, client in (("old", self.old), ("new", self.new)):
            state = await run_state(client)
            facts.append(f"the {name} daemon {client.pid} " + (f"is '{state}'" if state else "is gone"))
        return ", ".join(facts)
