"""A file that describes a daemon, as an equal of its command line.

Owns:        the file's keys, the place of what is wrong in it.
Never sees:  the file itself: its text is brought.
Read next:   specs.py for the tables that say what each object may have.

    qmp = "unix:/run/vm1/qmp.sock"          # as --qmp
    incoming = "defer"                      # as --incoming
    allow-user = "vmm,1001"                 # as --allow-user; likewise socket-mode, socket-group
    runas = "vm1"                           # as --runas; likewise sandbox

    [migration-parameters]                  # as --migration-parameter
    downtime-limit = 250

    [[netdev]]                              # as --netdev with JSON; once for each
    type = "tap"
    id = "net0"
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from localmig.errors import ConfigError
from localmig.options.address import IncomingSpec, parse_incoming
from localmig.options.process import (
    AccessSpec,
    MonitorSpec,
    RunAsSpec,
    SandboxSpec,
    parse_users,
    read_monitor,
    read_runas,
    read_sandbox,
)
from localmig.options.specs import KINDS, Spec

CONFIG_BYTES_MAX: Final = 16 << 20
"""Longest file: ten thousand NICs with every option given have less than a kilobyte each."""

_KEYS: Final = (
    "qmp",
    "incoming",
    "allow-user",
    "socket-mode",
    "socket-group",
    "runas",
    "sandbox",
    "migration-parameters",
    *KINDS,
)

Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What a file asks for; each object is checked, not yet what they are together.

    Attributes:
        migration_parameters: values by QMP's names, unchecked: what there is, QMP's tables know.
    """

    objects: tuple[Spec, ...] = ()
    monitor: MonitorSpec | None = None
    incoming: IncomingSpec | None = None
    access: AccessSpec = field(default_factory=AccessSpec)
    runas: RunAsSpec | None = None
    sandbox: SandboxSpec | None = None
    migration_parameters: Mapping[str, object] = field(default_factory=dict)


class ReadObject(Protocol):
    """Makes a spec of an object's mapping."""

    def __call__(self, kind: str, values: Mapping[str, object]) -> Spec:
        """The spec of that kind. ConfigError where `values` describe none."""


def parse_config(text: str, read_object: ReadObject) -> Config:
    """Reads the text of a file.

    Args:
        text: the file's.
        read_object: knows which types of objects there are.

    Raises:
        ConfigError: with the place in it, and what is wrong in the words of the command line.
    """
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"TOML parse error, {error}") from error
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"Parameter '{key}' is unexpected, a file has: {', '.join(_KEYS)}")
    parameters = values.get("migration-parameters", {})
    if not isinstance(parameters, dict):
        raise ConfigError("Invalid parameter type for 'migration-parameters', expected: table")
    return Config(
        objects=tuple(spec for kind in KINDS for spec in _objects(values, kind, read_object)),
        monitor=_string(values, "qmp", read_monitor),
        incoming=_string(values, "incoming", parse_incoming),
        access=AccessSpec(
            users=_string(values, "allow-user", parse_users) or (),
            mode=_string(values, "socket-mode", str),
            group=_string(values, "socket-group", str),
        ),
        runas=_string(values, "runas", read_runas),
        sandbox=_string(values, "sandbox", read_sandbox),
        migration_parameters=parameters,
    )


def _objects(values: Mapping[str, object], kind: str, read: ReadObject) -> Iterator[Spec]:
    tables = values.get(kind, [])
    if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise ConfigError(f"Invalid parameter type for '{kind}', expected: array of tables, [[{kind}]]")
    for index, table in enumerate(tables):
        try:
            yield read(kind, table)
        except ConfigError as error:
            raise ConfigError(f"{kind}[{index}]: {error}") from error


def _string(values: Mapping[str, object], key: str, read: Callable[[str], Read]) -> Read | None:
    if key not in values:
        return None
    value = values[key]
    if not isinstance(value, str):
        raise ConfigError(f"Invalid parameter type for '{key}', expected: string")
    try:
        return read(value)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
