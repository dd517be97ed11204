"""`localmig run`: one daemon, from its command line to its end.

Owns:        the process: logs, signals, the trace file, the order of starting and ending.
Never sees:  devices, migrations, QMP's text.
Read next:   daemon/ and monitor/server.py, which it puts together.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import os
import signal
from collections.abc import Sequence
from typing import Any, Final

from localmig.daemon import Daemon
from localmig.errors import ConfigError, KernelError, LocalmigError
from localmig.fds import OwnedFd
from localmig.migration.parameters import Parameters
from localmig.monitor import QmpServer
from localmig.monitor.schema import PARAMETERS, parameters_changed
from localmig.options import (
    check_together,
    help_for,
    parse_device,
    parse_incoming,
    parse_monitor,
    parse_netdev,
)
from localmig.trace import Event, Tracer, to_json

_EXAMPLES: Final = """\
examples:
  a NIC on a TAP, served to a VMM that connects to nic0.sock:
    localmig run --netdev tap,id=net0,ifname=tap0 \\
                 --device virtio-net,id=nic0,netdev=net0,socket=/run/vm1/nic0.sock \\
                 --qmp unix:/run/vm1/qmp.sock

  a daemon that takes over what another one serves ('localmig upgrade' does all of it):
    localmig run --qmp unix:/run/vm1/qmp.sock --incoming unix:/run/vm1/migrate.sock \\
                 --migration-parameter local=on

  what can be said of a TAP, and of a NIC:
    localmig run --netdev tap,help
    localmig run --device virtio-net,help
"""

_log = logging.getLogger(__name__)


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
        "--netdev",
        metavar="TYPE,id=ID[,OPTION=VALUE...]",
        action="append",
        default=[],
        help="the host side of a NIC, or JSON; 'help' lists the types, 'TYPE,help' its options",
    )
    parser.add_argument(
        "--device",
        metavar="TYPE,id=ID[,OPTION=VALUE...]",
        action="append",
        default=[],
        help="a device for a guest, or JSON; 'help' lists the types, 'TYPE,help' its options",
    )
    parser.add_argument("--qmp", metavar="unix:PATH", help="answer QMP at this UNIX socket, mode 0600")
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
    for kind in ("netdev", "device"):
        for text in getattr(arguments, kind):
            if (help_text := help_for(kind, text)) is not None:
                print(help_text)
                return 0
    _set_up_log(arguments.log, verbose=arguments.verbose)
    return asyncio.run(_serve(arguments))


async def _serve(arguments: argparse.Namespace) -> int:
    tracer = Tracer()
    if arguments.verbose:
        tracer.subscribe(lambda fact: _log.debug("%s", to_json(fact)))
    trace_file = TraceFile(arguments.trace) if arguments.trace else None
    if trace_file is not None:
        tracer.subscribe(trace_file.write)
    netdevs = [parse_netdev(text) for text in arguments.netdev]
    devices = [parse_device(text) for text in arguments.device]
    monitor = parse_monitor(arguments.qmp) if arguments.qmp else None
    incoming = parse_incoming(arguments.incoming) if arguments.incoming else None
    check_together(netdevs, devices, monitor=monitor, incoming=incoming)
    daemon = Daemon(netdevs=netdevs, devices=devices, incoming=incoming, tracer=tracer)
    daemon.set_parameters(read_parameters(arguments.migration_parameter, daemon.parameters))

    signals: list[str] = []

    def end(name: str) -> None:
        signals.append(name)
        daemon.quit()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end, number.name)
    # The address comes first: a second daemon at the same one must end before it opens anything.
    server = QmpServer(daemon, monitor.path, succeeds=incoming is not None) if monitor else None
    failure: str | None = None
    try:
        await daemon.start()
        if server is not None:
            await server.start()
        if arguments.ready_fd is not None:
            _announce(arguments.ready_fd)
        _log.info("process %d is ready, run state '%s'%s", os.getpid(), daemon.run_state, _where(server))
        failure = await daemon.wait_quit()
    finally:
        if server is not None:
            await server.close(reason="host-error" if failure else "host-signal" if signals else "host-qmp-quit")
        if trace_file is not None:
            trace_file.close()
    if failure is not None:
        raise StateError(failure)
    _log.info("process %d ends%s", os.getpid(), f" on {signals[0]}" if signals else "")
    return 0
