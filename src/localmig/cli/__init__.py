"""The command line: `localmig run`, `upgrade`, `vm-upgrade`, `migrate`, `status` and others; `_parser` has them all.

Owns:        argv, exit statuses, what is printed.
Never sees:  what a daemon is inside: everything but `run` asks by QMP.
Read next:   run.py for a daemon's process, upgrade.py for its succession.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

from localmig.cli import analyze, backend, migrate, qmp, run, sessions, status, upgrade, vm_upgrade
from localmig.cli.text import tell
from localmig.errors import LocalmigError
from localmig.migration.hello import program_version

_EXAMPLES: Final = """\
examples:
  localmig run --netdev tap,id=net0,ifname=tap0 \\
               --device virtio-net,id=nic0,netdev=net0,socket=/run/vm1/nic0.sock \\
               --qmp unix:/run/vm1/qmp.sock
  localmig upgrade /run/vm1/qmp.sock
  localmig vm-upgrade /run/vm1/qemu.sock
  localmig status /run/vm1/qmp.sock
  localmig analyze /tmp/handover.stream
  localmig demo

'localmig COMMAND --help' tells more of each command.
"""

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Carries out one command line.

    Args:
        argv: the words after the program's name; those of this process by default.

    Returns:
        The exit status: 0 done, 1 not done (the reason is on stderr), 2 wrong usage, 3 unknown (`upgrade`,
        `vm-upgrade`, `migrate`).
    """
    _open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["demo"]:
        # Another program, whose options are its own: it needs what only tests and demonstrations need.
        os.execv(sys.executable, [sys.executable, "-P", "-m", "localmig.demo", *words[1:]])
    run_options: list[str] = []
    if words[:1] in (["upgrade"], ["vm-upgrade"], ["backend"]) and "--" in words:
        # Not by argparse, which would read them as options of the command wherever another option stands before.
        end = words.index("--")
        words, run_options = words[:end], words[end + 1 :]
    arguments = _parser().parse_args(words, argparse.Namespace(run_options=run_options))
    try:
        exit_status: int = arguments.execute(arguments)
        sys.stdout.flush()
    except LocalmigError as error:
        tell(f"localmig: error: {error}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. Nothing may be written again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return exit_status


def _open_standard_streams() -> None:
    """Descriptors 0, 1 and 2 are open from now on: a TAP that got such a number would send what is meant for people."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, the lowest that is free
    # Python has None for a stream whose descriptor was not open when it started.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="localmig",
        description="Keeps a guest's devices alive while the process that serves them is replaced.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"localmig {program_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (run, backend, upgrade, vm_upgrade, migrate, status, sessions, qmp, analyze):
        module.add_parser(commands)
    commands.add_parser("demo", help="show handovers under traffic; touches nothing of this machine's network")
    return parser
