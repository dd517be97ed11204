"""What can be asked: all commands in one table.

Owns:        the table.
Never sees:  clients, sockets, JSON text.
Read next:   machine.py and migration.py, one small function for each command.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from localmig.daemon import Daemon
from localmig.monitor.commands import machine, migration
from localmig.monitor.protocol import NEGOTIATE
from localmig.monitor.schema import Command


def query_commands(daemon: Daemon) -> list[dict[str, object]]:
    """The names of all commands."""
    del daemon
    return [{"name": name} for name in sorted([NEGOTIATE, *COMMANDS])]


COMMANDS: Final[Mapping[str, Command]] = {
    command.name: command
    for command in (
        Command(name="query-commands", run=query_commands),
        *machine.COMMANDS,
        *migration.COMMANDS,
    )
}
