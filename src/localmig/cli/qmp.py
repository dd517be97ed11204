"""`localmig qmp`: sends one command to a daemon and prints the answer.

Owns:        how arguments are written on the command line.
Never sees:  which commands there are.
Read next:   client.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import Any, Final

from localmig.cli.client import connected
from localmig.errors import ConfigError
from localmig.options.json_text import standard_json

_EXAMPLES: Final = """\
examples:
  localmig qmp /run/vm1/qmp.sock query-status
  localmig qmp /run/vm1/qmp.sock migrate-set-parameters local=true downtime-limit=100
  localmig qmp /run/vm1/qmp.sock migrate '{"uri": "unix:/run/vm1/migrate.sock"}'
"""


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "qmp",
        help="send one QMP command to a daemon",
        description="Sends one QMP command to a daemon and prints what it returns, as JSON.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="QMP-SOCKET", help="path of the daemon's QMP socket")
    parser.add_argument("command", metavar="COMMAND", help="its name; 'query-commands' lists all")
    parser.add_argument(
        "arguments",
        metavar="NAME=VALUE",
        nargs="*",
        help="an argument; a VALUE that is JSON is taken so, else as a string. Or all arguments as one JSON object",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    print(json.dumps(asyncio.run(_ask(arguments.socket, arguments.command, arguments.arguments)), indent=2))
    return 0


async def _ask(path: str, command: str, words: Sequence[str]) -> object:
    arguments = read_arguments(words)
    async with connected(path) as client:
        return await client.execute(command, arguments)


def read_arguments(words: Sequence[str]) -> dict[str, object]:
    """The arguments that `words` write.

    Raises:
        ConfigError: they write none.
    """
    if len(words) == 1 and words[0].startswith("{"):
        try:
            read: dict[str, object] = json.loads(standard_json(words[0]))
        except ValueError as error:
            raise ConfigError(f"'{words[0]}' is no JSON object: {error}") from error
        return read
    arguments: dict[str, object] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"'{word}' is no argument, expected NAME=VALUE")
        arguments[name] = _read_value(text)
    return arguments


def _read_value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
