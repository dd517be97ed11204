"""`localmig migrate`: a daemon hands over to one that waits somewhere, and what came of it is told.

Owns:        telling the outcomes apart by what the source says.
Never sees:  the destination: it may be on another machine.
Read next:   handover.py; upgrade.py, which also starts the destination and asks it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import Any, Final

from localmig.cli.client import connected
from localmig.cli.handover import (
    SERVING,
    SETTLE_STEP_S,
    SETTLE_TIMEOUT_S,
    TAKEN_BACK,
    TIMEOUT_S,
    Handover,
    Outcome,
    Report,
    add_record_option,
    ignore_signals,
    let_signals_cancel,
    read_settings,
    run_state,
    say,
)
from localmig.cli.text import seconds
from localmig.errors import PeerLostError, StateError
from localmig.options import parse_address

_EXAMPLES: Final = """\
examples:
  to a daemon of this machine that was started with --incoming unix:/run/vm1/migrate.sock:
    localmig migrate /run/vm1/qmp.sock unix:/run/vm1/migrate.sock --local

  to another machine, where the VMM connects anew:
    localmig migrate /run/vm1/qmp.sock tcp:192.0.2.7:4444

exit status:
  0  committed: the destination serves the guest; with --detach: begun
  1  rolled back, or not begun: the daemon serves on as before, the reason is on stderr
  2  wrong usage
  3  unknown: the daemon is gone, or does not know; ask the destination
"""


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "migrate",
        help="hand a guest over to a daemon that waits for it",
        description="Lets a daemon hand over to one that was started with --incoming, waits for the end, and says what "
        "happened. Ctrl-C cancels. The daemon keeps running, and serves nothing once it handed over.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="QMP-SOCKET", help="path of the daemon's QMP socket")
    parser.add_argument("uri", metavar="URI", help="where the destination waits: unix:PATH, tcp:HOST:PORT")
    parser.add_argument(
        "--local",
        action="store_true",
        help="move descriptors: source and destination share this machine (default: as the parameter 'local' is set)",
    )
    parser.add_argument(
        "--downtime-limit",
        metavar="MS",
        type=int,
        help="resume the guest where the destination is not ready after so many milliseconds (default: as it is set)",
    )
    add_record_option(parser)
    parser.add_argument(
        "--detach", action="store_true", help="begin, and leave the rest to the daemon; 'localmig status' shows it"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=TIMEOUT_S,
        help=f"cancel where there is no end by then (default: {TIMEOUT_S:g})",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    parse_address(arguments.uri)
    try:
        report = asyncio.run(_migrate(arguments))
    except asyncio.CancelledError:
        raise StateError("interrupted before the handover: nothing was changed") from None
    if report is None:
        say(f"begun: 'localmig status {arguments.socket}' shows how it goes")
        return 0
    committed = f"committed: the daemon at {arguments.uri} serves in place of {report.old_pid}"
    return report.print(committed, as_json=arguments.json)


async def _migrate(arguments: argparse.Namespace) -> Report | None:
    """The report, None where nobody waits for one."""
    let_signals_cancel()
    async with connected(arguments.socket) as source:
        parameters: dict[str, object] = {}
        if arguments.local:
            parameters["local"] = True
        if arguments.downtime_limit is not None:
            parameters["downtime-limit"] = arguments.downtime_limit
        if arguments.record is not None:
            parameters["record"] = arguments.record
        handover = Handover(source=source, settings=await read_settings(source), parameters=parameters)
        if arguments.detach:
            ignore_signals()
            await handover.start(arguments.uri)
            return None
        await handover.run(arguments.uri, arguments.timeout)
        return await conclude(handover)


async def conclude(handover: Handover) -> Report:
    """Asks the source who serves, once that is settled, and gives it the operator's settings."""
    ignore_signals()
    source = handover.source
    report = Report(outcome=await _settle(handover), old_pid=source.pid)
    report.migration = await handover.migration()
    if note := report.migration.get("local", {}).get("note"):
        report.notes.append(note)
    if report.outcome is not Outcome.COMMITTED:
        known = report.migration.get("error-desc") or handover.trouble
        report.reason = known or f"daemon {source.pid} does not tell: ask the destination"
    if source.is_connected:
        await handover.restore(source, report)
    return report


async def _settle(handover: Handover) -> Outcome:
    """What the source knows in the end."""
    source = handover.source
    with contextlib.suppress(TimeoutError, PeerLostError):
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            while True:
                state, status = await run_state(source), (await handover.migration()).get("status")
                # Not where it is completed: that is said a moment before the run state follows.
                if state in SERVING and status in TAKEN_BACK:
                    return Outcome.ROLLED_BACK
                if state == "postmigrate" and status == "completed":
                    return Outcome.COMMITTED
                if state == "postmigrate" and status == "failed":
                    return Outcome.UNKNOWN  # behind COMMIT, and nobody said DONE
                await source.next_event(timeout_s=SETTLE_STEP_S)
    return Outcome.UNKNOWN
