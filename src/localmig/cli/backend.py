"""`localmig backend`: one NIC, started as programs start vhost-user backends that they look for.

Owns:        the options of vhost-user's "Backend program conventions", and what they are called in `localmig run`.
Never sees:  a daemon: it becomes one by run.py.
Read next:   run.py; examples/qemu-vhost-user for the file by which such programs find it.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from typing import Any, Final

from localmig.cli import run
from localmig.cli.text import put, tell
from localmig.errors import ConfigError, LocalmigError
from localmig.unix_socket import SocketKind, socket_kind

PRINT_CAPABILITIES: Final = "--print-capabilities"

CAPABILITIES: Final = {"type": "net"}
"""In the words of QEMU's docs/interop/vhost-user.json, which knows no features of such a backend."""

_EXAMPLES: Final = """\
examples:
  localmig backend --socket-path=/run/vm1/nic0.sock --ifname=tap0
  localmig backend --fd=3 -- --qmp unix:/run/vm1/qmp.sock
"""


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "backend",
        usage="localmig backend (--socket-path=PATH | --fd=NUMBER | --print-capabilities) [--ifname=NAME] "
        "[-- OPTION-OF-RUN ...]",
        help="serve one NIC as tools start a vhost-user backend",
        description="Serves a virtio-net on a TAP until SIGTERM, by vhost-user's conventions for backend programs. "
        "Options behind '--' are those of 'localmig run'.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(parser)
    parser.set_defaults(execute=execute)


def _add_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket-path", metavar="PATH", help="listen at this UNIX socket")
    where.add_argument("--fd", metavar="NUMBER", type=int, help="an inherited socket, listening or connected")
    where.add_argument(PRINT_CAPABILITIES, action="store_true", help="print what this backend can do, as JSON, and end")
    parser.add_argument("--ifname", metavar="NAME", help="the TAP's name (default: the kernel chooses one)")


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    if arguments.print_capabilities:
        put(json.dumps(CAPABILITIES))
        return 0
    netdev = "tap,id=net0" + (f",ifname={arguments.ifname}" if arguments.ifname else "")
    where = f"socket={arguments.socket_path}" if arguments.fd is None else _inherited(arguments.fd)
    words = ["run", "--netdev", netdev, "--device", f"virtio-net,id=nic0,netdev=net0,{where}"]
    parser = argparse.ArgumentParser(prog="localmig backend")
    run.add_parser(parser.add_subparsers())
    serving = parser.parse_args([*words, *arguments.run_options])
    exit_status: int = serving.execute(serving)
    return exit_status


def _inherited(fd: int) -> str:
    """The options of a device whose socket is there already. ConfigError where it cannot serve one."""
    kind = socket_kind(fd)
    if kind is None:
        raise ConfigError(f"--fd {fd} is no UNIX stream socket that listens or is connected")
    with socket.socket(fileno=fd) as borrowed:
        name = borrowed.getsockname()
        borrowed.detach()
    if kind is SocketKind.CONNECTED:
        return f"socket=fd:{fd},server=off,fd={fd}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"--fd {fd} listens at no path, which a successor needs: give one, or --socket-path")
    return f"socket={name.replace(',', ',,')},fd={fd}"


def main(argv: Sequence[str] | None = None) -> int:
    """The program `localmig-backend`, for descriptions that name a program and no command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if PRINT_CAPABILITIES in words:
        # Everything else is to be ignored then.
        words = [PRINT_CAPABILITIES]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="localmig-backend", description=(__doc__ or "").split("\n")[0])
    _add_options(parser)
    try:
        return execute(parser.parse_args(words[:end], argparse.Namespace(run_options=words[end + 1 :])))
    except LocalmigError as error:
        tell(f"localmig-backend: error: {error}")
        return 1
