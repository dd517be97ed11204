"""What can be asked: all commands in one table.

Owns:        the table.
Never sees:  clients, sockets, JSON text.
Read next:   machine.py, migration.py and objects.py, one small function for each command.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from localmig.daemon import Daemon
from localmig.monitor.commands import machine, migration, objects
from localmig.monitor.events import EVENTS
from localmig.monitor.protocol import NEGOTIATE, NEGOTIATION
from localmig.monitor.schema import Command
from localmig.qapi import Array, String, Struct, returned
from localmig.qapi.introspection import SCHEMA_INFO, introspect


def query_commands(daemon: Daemon) -> list[dict[str, object]]:
    """The names of all commands."""
    del daemon
    return [{"name": name} for name in sorted([NEGOTIATE, *COMMANDS])]


def query_qmp_schema(daemon: Daemon) -> list[dict[str, object]]:
    """Every command and event with its types, in QEMU's introspection format."""
    # The session answers this one itself, so it is in no table.
    negotiate = Command(name=NEGOTIATE, run=query_commands, arguments=NEGOTIATION)
    commands = (command.described(daemon.registry) for command in (negotiate, *COMMANDS.values()))
    return introspect(commands, EVENTS)


COMMANDS: Final[Mapping[str, Command]] = {
    command.name: command
    for command in (
        Command(name="query-commands", run=query_commands, returns=Array(Struct((returned("name", String()),)))),
        Command(name="query-qmp-schema", run=query_qmp_schema, returns=Array(SCHEMA_INFO)),
        *machine.COMMANDS,
        *migration.COMMANDS,
        *objects.COMMANDS,
    )
}
