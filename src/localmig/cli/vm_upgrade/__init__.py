"""`localmig vm-upgrade`: a guest moves from the QEMU that runs it to a new one on the same machine.

Owns:        this command's line, its report, its exit statuses.
Never sees:  how QEMU migrates: it asks by QMP, as any operator could.
Read next:   plan.py for what is decided beforehand, move.py for what is done.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from localmig.cli.client import Client, connect
from localmig.cli.handover import Outcome, let_signals_cancel, process_of, say
from localmig.cli.text import milliseconds, put, seconds, table, tell
from localmig.cli.vm_upgrade.move import KIND, Move, Report
from localmig.cli.vm_upgrade.plan import Plan, Way, Wishes, make
from localmig.cli.vm_upgrade.process import Process, ask, look_at, version_of
from localmig.errors import ConfigError, KernelError, StateError
from localmig.unix_socket import check_path

_EXAMPLES: Final = """\
examples:
  after an update of QEMU, while the guest runs:
    localmig vm-upgrade /run/vm1/qemu.sock

  what would be done, and what is in the way:
    localmig vm-upgrade /run/vm1/qemu.sock --dry-run

  to another QEMU, with its VNC server elsewhere and without its serial line:
    localmig vm-upgrade /run/vm1/qemu.sock --exec /opt/qemu/bin/qemu-system-x86_64 --without serial -- -vnc :7

exit status:
  0  committed: the new QEMU runs the guest and answers at QEMU-QMP-SOCKET
  1  rolled back, or not begun: the old QEMU runs the guest as before, the reason is on stderr
  2  wrong usage
  3  unknown: what is known is on stderr

Under libvirt this command is refused: libvirt starts the processes of its guests itself. See docs/vmm-upgrade.md.
"""

TIMEOUT_S: Final = 120.0
"""How long a move may take unless the operator says otherwise: memory is copied at some gigabytes a second."""


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "vm-upgrade",
        usage="localmig vm-upgrade [options] QEMU-QMP-SOCKET [-- OPTION-OF-QEMU ...]",
        help="replace the QEMU that runs a guest, under the running guest",
        description="Starts a new QEMU with the old one's options, lets the guest move there, ends the old one, and "
        "says what happened. Options behind '--' take the place of old ones with the same name and id.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="QEMU-QMP-SOCKET", help="path of the old QEMU's QMP socket")
    parser.add_argument("--exec", dest="program", metavar="PROGRAM", help="the new QEMU (default: the old one's file)")
    parser.add_argument(
        "--way",
        choices=[way.value for way in Way],
        help="how memory moves: by its descriptor, as a named file that both map, or as a copy (default: the first of "
        "these that can work)",
    )
    parser.add_argument(
        "--without",
        metavar="OPTION[:ID]",
        action="append",
        default=[],
        help="leave an option of the old QEMU out; repeatable",
    )
    parser.add_argument(
        "--log", metavar="FILE", help="where the new QEMU's output is appended (default: QEMU-QMP-SOCKET.log)"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=TIMEOUT_S,
        help="go back where the guest is not in the new QEMU by then (default: %(default)g)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    given = Path(arguments.socket)
    # Not where a link leads to: the path changes hands.
    arguments.socket = str(given.parent.resolve() / given.name)
    # The new QEMU runs in another directory.
    arguments.log = Path(arguments.log or f"{arguments.socket}.log").absolute()
    if arguments.program is not None:
        found = shutil.which(arguments.program)
        if found is None:
            raise ConfigError(f"--exec {arguments.program}: no such program")
        arguments.program = str(Path(found).absolute())
    try:
        report = asyncio.run(_vm_upgrade(arguments))
    except asyncio.CancelledError:
        raise StateError("interrupted before the move: nothing was changed") from None
    return 0 if report is None else _print(report, as_json=arguments.json)


async def _vm_upgrade(arguments: argparse.Namespace) -> Report | None:
    """The report, None where nothing was to be done."""
    let_signals_cancel()
    async with contextlib.AsyncExitStack() as resources:
        old = await connect(arguments.socket, kind=KIND)
        resources.push_async_callback(old.close)
        old_process = process_of(old)
        resources.callback(old_process.close)
        process = look_at(old)
        plan = await _plan(old, process, arguments)
        if arguments.dry_run:
            _print_plan(plan, as_json=arguments.json)
            return None
        folder = resources.enter_context(_folder(arguments.socket))
        move = Move(old=old, old_process=old_process, process=process, plan=plan, folder=folder, log=arguments.log)
        return await move.run(arguments.timeout)


async def _plan(old: Client, process: Process, arguments: argparse.Namespace) -> Plan:
    program = arguments.program or process.program
    wishes = Wishes(
        program=program,
        version=version_of(program),
        qmp_socket=arguments.socket,
        changes=arguments.run_options,
        without=arguments.without,
        way=None if arguments.way is None else Way(arguments.way),
    )
    plan = make(await ask(old, process), wishes, real_path=process.real_path)
    for path in plan.renames:
        check_path(process.real_path(path))
    return plan


@contextlib.contextmanager
def _folder(path: str) -> Iterator[Path]:
    """A folder for the migration's sockets beside the QMP socket, for as long as that is needed."""
    parent = os.path.dirname(path)
    try:
        folder = tempfile.mkdtemp(prefix=".vm-", dir=parent)
    except OSError as error:
        raise KernelError(f"cannot make a directory in '{parent}': {error.strerror}", errno=error.errno or 0) from error
    try:
        check_path(os.path.join(folder, "main.sock"))
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- what is printed ------------------------------------------------------------------------------------------------


def _print(report: Report, *, as_json: bool) -> int:
    if as_json:
        put(json.dumps(_facts(report), indent=2))
    elif report.outcome is Outcome.COMMITTED:
        put("\n".join(_measured(report)))
    for note in report.notes:
        say(f"note: {note}")
    if report.outcome is not Outcome.COMMITTED:
        said = "rolled back" if report.outcome is Outcome.ROLLED_BACK else "outcome unknown"
        tell(f"localmig: error: {said}: {report.reason}")
    return report.outcome.value


def _facts(report: Report) -> dict[str, object]:
    return {
        "outcome": report.outcome.name.lower().replace("_", "-"),
        "way": report.way.value,
        "old-pid": report.old_pid,
        "new-pid": report.new_pid,
        "reason": report.reason,
        "stopped-at-us": report.stopped_us,
        "silence-us": report.silence_us,
        "phases": [{"name": name, "duration-us": duration} for name, duration in report.phases.items()],
        "notes": report.notes,
        "migration": report.migration,
    }


def _measured(report: Report) -> list[str]:
    lines = [f"committed: QEMU {report.new_pid} runs the guest in place of {report.old_pid}"]
    lines.append(f"way          {report.way.value}")
    if report.silence_us is not None:
        lines.append(f"silence      {milliseconds(report.silence_us)}")
    if (ram := report.migration.get("ram")) is not None:
        lines.append(f"memory       {ram['transferred'] / 1e6:.1f} MB copied of {ram['total'] / 1e6:.1f} MB")
    return [*lines, "", table(("phase", "duration"), [(n, milliseconds(us)) for n, us in report.phases.items()])]


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        facts = {"way": plan.way.value, "command": plan.argv, "renames": plan.renames, "notes": plan.notes}
        put(json.dumps(facts, indent=2))
        return
    put(f"way          {plan.way.value}")
    put(f"command      {' '.join(plan.argv)}")
    for path, name in plan.renames.items():
        put(f"then         {path} is renamed to {name}")
    for note in plan.notes:
        say(f"note: {note}")
