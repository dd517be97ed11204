"""`localmig session-close`: ends one frontend's session of a device.

Owns:        how it is asked for.
Never sees:  what a session is.
Read next:   client.py; monitor/commands/objects.py for the command; status.py, which shows the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, Final

from localmig.cli.client import connected

_EXAMPLES: Final = """\
examples:
  which sessions there are, which one owns the device and which wait:
    localmig status --device nic0 /run/vm1/qmp.sock

  end the second one:
    localmig session-close /run/vm1/qmp.sock nic0 2
"""


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "session-close",
        help="disconnect one frontend of a device",
        description="Ends a session of a device: its VMM is disconnected. If it owned the device, the rings of a "
        "session that waits start.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="QMP-SOCKET", help="path of the daemon's QMP socket")
    parser.add_argument("device", metavar="DEVICE", help="the device's id")
    parser.add_argument("session", metavar="NUMBER", type=int, help="the session's number, as status shows it")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    asyncio.run(_close(arguments.socket, arguments.device, arguments.session))
    return 0


async def _close(path: str, device: str, session: int) -> None:
    async with connected(path) as client:
        await client.execute("session-close", {"id": device, "session": session})
