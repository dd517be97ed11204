"""`localmig run`: one daemon, from its command line to its end.

Owns:        the process: the trace, the order of starting and ending.
Never sees:  devices, migrations, QMP's text.
Read next:   daemon/ and monitor/server.py, which it puts together; log.py for what it logs to, signals.py for what each
             signal does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import resource
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Self

from localmig.access import Access, nameless_user_id, user_id
from localmig.cli.appended import AppendedFile
from localmig.cli.log import set_up_log
from localmig.cli.signals import ignore_until_handled, signals_handled
from localmig.cli.text import tell
from localmig.confinement import Privileges, RunAs, Sandbox
from localmig.daemon import Daemon
from localmig.errors import ConfigError, KernelError
from localmig.fds import OwnedFd
from localmig.migration.parameters import Parameters
from localmig.monitor import QmpServer
from localmig.monitor.schema import PARAMETERS, parameters_changed
from localmig.options import (
    CONFIG_BYTES_MAX,
    KINDS,
    AccessSpec,
    Config,
    SandboxSpec,
    Spec,
    check_together,
    parse_config,
    parse_incoming,
    parse_monitor,
    parse_users,
    read_runas,
    read_sandbox,
)
from localmig.registry import Registry
from localmig.service_manager import ServiceManager
from localmig.trace import Event, Tracer, to_json

_EXAMPLES: Final = """\
examples:
  a NIC on a TAP, served to a VMM that connects to nic0.sock:
    localmig run --netdev tap,id=net0,ifname=tap0 \\
                 --device virtio-net,id=nic0,netdev=net0,socket=/run/vm1/nic0.sock \\
                 --qmp unix:/run/vm1/qmp.sock

  the same from a file, whose form docs/operating.md shows:
    localmig run --config /etc/localmig/vm1.toml

  a daemon that takes over what another one serves ('localmig upgrade' does all of it):
    localmig run --qmp unix:/run/vm1/qmp.sock --incoming unix:/run/vm1/migrate.sock \\
                 --migration-parameter local=on

  what can be said of a TAP, and of a NIC:
    localmig run --netdev tap,help
    localmig run --device virtio-net,help
"""

DESCRIPTOR_TABLE_SIZE: Final = 16384
"""Descriptors of a thousand NICs and more; the table takes 128 KiB of the kernel's memory."""

_NUMBER: Final = re.compile(r"-?[0-9]{1,20}", re.ASCII)
"""What is read as a number: as many digits as 64 bits can have."""

_log = logging.getLogger("localmig")


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "run",
        help="serve devices to guests",
        description="Serves devices to guests until SIGTERM, SIGINT or QMP's 'quit'.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file with objects, QMP socket and parameters, to which the other options add",
    )
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}",
            metavar="TYPE,id=ID[,OPTION=VALUE...]",
            action="append",
            default=[],
            help=f"{KINDS[kind].summary}, or JSON; 'help' lists the types, 'TYPE,help' its options",
        )
    parser.add_argument("--qmp", metavar="unix:PATH", help="answer QMP at this UNIX socket")
    parser.add_argument(
        "--incoming",
        metavar="ADDRESS|defer",
        help="take over from another daemon, which will connect to ADDRESS (unix:PATH, tcp:HOST:PORT or fd:NUMBER); "
        "'defer': QMP's migrate-incoming will tell. Without --netdev and --device, what the other one has",
    )
    parser.add_argument(
        "--migration-parameter",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a migration parameter from the start, as QMP's migrate-set-parameters sets it: local=on",
    )
    parser.add_argument(
        "--allow-user",
        metavar="USER[,USER...]",
        action="append",
        default=[],
        help="who may use QMP and migration sockets, and be the other side of a migration, besides root and this "
        "process's user; --socket-mode or an ACL must let them in as well",
    )
    parser.add_argument(
        "--socket-mode", metavar="MODE", help="permissions of QMP and migration sockets, in octal (default: 0600)"
    )
    parser.add_argument("--socket-group", metavar="GROUP", help="the group of QMP and migration sockets")
    parser.add_argument(
        "--runas",
        metavar="USER|UID:GID",
        help="started as root: open TAPs and files, become this user for good, then make sockets and serve",
    )
    parser.add_argument(
        "--sandbox",
        metavar="on|off[,spawn=allow|deny]",
        help="give up capabilities and system calls that no daemon needs; to run programs, too, unless a TAP has a "
        "script to run or spawn=allow says so (default: on, where the kernel has it)",
    )
    parser.add_argument("--log", metavar="FILE", help="append the log to FILE instead of writing it to stderr")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more: every traced fact")
    parser.add_argument("--trace", metavar="FILE", help="append every traced fact to FILE, one JSON object a line")
    parser.add_argument(
        "--ready-fd",
        metavar="NUMBER",
        type=int,
        help="write one byte to this inherited descriptor and close it, once guests, sources and QMP clients can come",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    registry = Registry()
    for kind in KINDS:
        for text in getattr(arguments, kind):
            if (help_text := registry.help_for(kind, text)) is not None:
                print(help_text)
                return 0
    ignore_until_handled()
    log = set_up_log(arguments.log, logging.DEBUG if arguments.verbose else logging.INFO)
    _raise_descriptor_limit()
    _make_descriptor_table()
    with contextlib.ExitStack() as resources:
        tracer = Tracer()
        tracer.subscribe(_log_fact)
        trace = None
        if arguments.trace is not None:
            trace = resources.enter_context(TraceFile(arguments.trace))
            tracer.subscribe(trace.write)
        ready = resources.enter_context(Readiness(arguments.ready_fd))
        files = [file for file in (log, trace) if file is not None]
        failure = asyncio.run(_serve(arguments, registry, tracer, ready, files))
    if failure is not None:
        tell(f"localmig: error: {failure}")
    return 1 if failure else 0


async def _serve(
    arguments: argparse.Namespace,
    registry: Registry,
    tracer: Tracer,
    ready: Readiness,
    files: Sequence[AppendedFile | TraceFile],
) -> str | None:
    """Serves until the end; gives the reason where the daemon failed. `files` are those that SIGHUP opens again."""
    daemon, server = _build(arguments, registry, tracer)
    with signals_handled(daemon, reopen=lambda: _reopen(files)) as signals:
        return await _serve_until_quit(daemon, server, ready, signals)


def _reopen(files: Sequence[AppendedFile | TraceFile]) -> None:
    """Opens log and trace again. Where one cannot be, lines go on into the old file, and the log says so."""
    for file in files:
        try:
            file.reopen()
        except KernelError as error:
            _log.warning("SIGHUP: cannot open again what %s", error)
        else:
            _log.info("SIGHUP: opened %s again", file.path)
    if not files:
        _log.info("SIGHUP: nothing to open again, there is neither --log nor --trace")


async def _serve_until_quit(
    daemon: Daemon, server: QmpServer | None, ready: Readiness, signals: Sequence[int]
) -> str | None:
    cause = "host-error"
    try:
        await daemon.start()
        if server is not None:
            await server.start()
        daemon.announce_ready()
        ready.announce()
        where = f", QMP at '{server.path}'" if server else ""
        _log.info("process %d is ready: %s%s", os.getpid(), daemon.run_state, where)
        failure = await daemon.wait_quit()
        if failure is None:
            cause = "host-signal" if signals else "host-qmp-quit"
        _log.info("process %d ends: %s", os.getpid(), failure or cause)
        return failure
    finally:
        if server is not None:
            await server.close(reason=cause)


def _build(arguments: argparse.Namespace, registry: Registry, tracer: Tracer) -> tuple[Daemon, QmpServer | None]:
    """The daemon and its monitor, with nothing opened but the monitor's socket.

    That one comes first: a second daemon at the same place must end before it opens what the first one has.
    """
    config = _read_config(arguments.config, registry) if arguments.config is not None else Config()
    objects = [*config.objects, *(registry.parse(kind, text) for kind in KINDS for text in getattr(arguments, kind))]
    monitor = parse_monitor(arguments.qmp) if arguments.qmp else None
    incoming = parse_incoming(arguments.incoming) if arguments.incoming else None
    _check_one("qmp", monitor, config.monitor, arguments.config)
    _check_one("incoming", incoming, config.incoming, arguments.config)
    monitor, incoming = monitor or config.monitor, incoming or config.incoming
    if not objects and monitor is None and incoming is None:
        raise ConfigError(
            "nothing to serve: give --netdev and --device, --qmp to be given them later, or --incoming to take over "
            "from a daemon"
        )
    check_together(objects, monitor=monitor, incoming=incoming)
    privileges = _read_privileges(arguments, config, objects)
    daemon = Daemon(
        objects=objects,
        registry=registry,
        incoming=incoming,
        access=resolve_access(_read_access(arguments, config.access)),
        privileges=privileges,
        service_manager=ServiceManager.take_from(os.environ),
        tracer=tracer,
    )
    try:
        parameters = parameters_changed(daemon.parameters, PARAMETERS.read(config.migration_parameters))
        daemon.set_parameters(parameters)
    except ConfigError as error:
        raise ConfigError(f"--config {arguments.config}: migration-parameters: {error}") from error
    daemon.set_parameters(read_parameters(arguments.migration_parameter, daemon.parameters))
    if monitor is None:
        return daemon, None
    with privileges.as_user():
        return daemon, QmpServer(daemon, monitor.path, succeeds=incoming is not None)


def _read_config(path: str, registry: Registry) -> Config:
    """What the file at `path` asks for. ConfigError where it is wrong, KernelError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise _kernel_error(f"--config {path}", error) from error
    if len(data) > CONFIG_BYTES_MAX:
        raise ConfigError(f"--config {path}: more than {CONFIG_BYTES_MAX} bytes, which is the limit")
    try:
        return parse_config(data.decode(), registry.read)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error


def _read_access(arguments: argparse.Namespace, files: AccessSpec) -> AccessSpec:
    """Who may use control sockets by command line and file. ConfigError where they disagree."""
    _check_one("socket-mode", arguments.socket_mode, files.mode, arguments.config)
    _check_one("socket-group", arguments.socket_group, files.group, arguments.config)
    users = [user for text in arguments.allow_user for user in parse_users(text)]
    return AccessSpec(
        users=(*files.users, *users),
        mode=arguments.socket_mode or files.mode,
        group=arguments.socket_group or files.group,
    )


def _read_privileges(arguments: argparse.Namespace, config: Config, objects: Sequence[Spec]) -> Privileges:
    """What to give up by command line and file. ConfigError where they disagree, or with what is to be served."""
    runas = read_runas(arguments.runas) if arguments.runas else None
    sandbox = read_sandbox(arguments.sandbox) if arguments.sandbox else None
    _check_one("runas", runas, config.runas, arguments.config)
    _check_one("sandbox", sandbox, config.sandbox, arguments.config)
    runas, sandbox = runas or config.runas, sandbox or config.sandbox or SandboxSpec()
    for spec in objects:
        if sandbox.enabled and sandbox.spawn is False and spec.program_at_end is not None:
            raise ConfigError(
                f"--sandbox {sandbox}: {spec.kind} '{spec.id}' has {spec.program_at_end}, which could not be run: "
                "leave out one of them"
            )
    return Privileges(run_as=RunAs.resolve(runas) if runas else None, sandbox=Sandbox(sandbox))


def resolve_access(spec: AccessSpec) -> Access:
    """The same in this machine's numbers.

    Raises:
        ConfigError: there is no such user, or it is the one that stands for all who have no number here.
    """
    users = frozenset(map(user_id, spec.users))
    if nameless_user_id() in users:
        raise ConfigError(
            f"--allow-user {','.join(spec.users)}: {nameless_user_id()} stands for every user of a container who has "
            "no number here; map the one you mean to a number of its own"
        )
    access = Access(users=users, group=spec.group)
    return access if spec.mode is None else replace(access, mode=int(spec.mode, base=8))


def _check_one(name: str, ours: object | None, files: object | None, path: str) -> None:
    """Raises ConfigError where command line and file disagree about what there is one of."""
    if ours is not None and files is not None and ours != files:
        raise ConfigError(
            f"--config {path}: {name} is there and on the command line: leave one out, or make them equal"
        )


def read_parameters(words: Sequence[str], parameters: Parameters) -> Parameters:
    """`parameters` with what `words` (NAME=VALUE, QMP's names) change.

    Raises:
        ConfigError: a word is no such thing, in QEMU's words.
    """
    values: dict[str, object] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--migration-parameter {word}: expected NAME=VALUE")
        switch = {"on": True, "off": False}.get(text)
        values[name] = switch if switch is not None else int(text) if _NUMBER.fullmatch(text) else text
    try:
        return parameters_changed(parameters, PARAMETERS.read(values))
    except ConfigError as error:
        raise ConfigError(f"--migration-parameter {' '.join(words)}: {error}") from error


class TraceFile:
    """A file that gets every fact as one line of JSON."""

    def __init__(self, path: str) -> None:
        self._file = AppendedFile("--trace", path, mode=0o600)
        self._is_full = False

    @property
    def path(self) -> str:
        """Where it is."""
        return self._file.path

    def write(self, fact: Event) -> None:
        """Appends `fact`. A file that takes no more gets no more until it is opened again; the daemon serves on."""
        if self._is_full:
            return
        try:
            self._file.write(to_json(fact))
        except OSError as error:
            _log.warning("the trace ends here: %s", error)
            self._is_full = True

    def reopen(self) -> None:
        """As `AppendedFile.reopen`."""
        self._file.reopen()
        self._is_full = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


class Readiness:
    """The descriptor that says once that the daemon is ready; None says it to nobody."""

    def __init__(self, fd: int | None) -> None:
        self._fd: OwnedFd | None = None
        if fd is not None:
            try:
                # Programs that the daemon runs must not hold it open: its end, too, tells something.
                os.set_inheritable(fd, False)
            except OSError as error:
                raise _kernel_error(f"--ready-fd {fd}", error) from error
            self._fd = OwnedFd(fd)

    def announce(self) -> None:
        """Writes one byte."""
        if self._fd is not None:
            # Who started us may have left: that is no reason to end.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._fd.fileno(), b"\n")
            self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd is not None:
            self._fd.close()


def _raise_descriptor_limit() -> None:
    """A NIC needs a dozen descriptors or more, and the usual soft limit of 1024 is for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # where fs.nr_open was lowered below the hard limit
        _log.warning("RLIMIT_NOFILE stays at %d, it cannot be raised to %d: %s", soft, hard, error)


def _make_descriptor_table() -> None:
    """Lets the kernel make the table of descriptors as large as it may become, while there is one thread.

    It grows by doubling. In a process with threads each growth waits for all processors (synchronize_rcu), some ten
    milliseconds, and guests and frontends would wait with it.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull, "rb") as null:
        try:
            os.close(fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, min(soft, DESCRIPTOR_TABLE_SIZE) - 1))
        except OSError as error:
            _log.debug("the table of descriptors stays small: %s", error.strerror)


def _log_fact(fact: Event) -> None:
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s", to_json(fact))


def _kernel_error(what: str, error: OSError) -> KernelError:
    return KernelError(f"{what}: {error.strerror}", errno=error.errno or errno.EIO)
