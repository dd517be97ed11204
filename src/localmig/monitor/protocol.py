"""QMP as one client sees it: greeting, negotiation, commands with their answers, events.

Owns:        the shapes of messages, the negotiation, which errors belong to a message and which end the connection.
Never sees:  sockets, the daemon, what a command does.
Read next:   server.py, which brings bytes; schema.py for what a command's arguments may be.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from localmig.errors import ConfigError, LocalmigError, NotFoundError
from localmig.fds import OwnedFd, close_foreign
from localmig.monitor.schema import Command
from localmig.monitor.wire import Decoder, JsonSyntaxError, encode
from localmig.qapi import Array, Member, String, Struct

NEGOTIATE: Final = "qmp_capabilities"
"""The command that opens a session."""

NEGOTIATION: Final = Struct((Member(name="enable", attribute="enable", type=Array(String()), required=False),))
"""Its arguments."""

HELD_DESCRIPTOR_COUNT_MAX: Final = 16
"""Of one client's, until a command takes them: one message may bring 253, and the daemon's are for guests."""

_VERSION: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class CommandNotFoundError(ConfigError):
    """There is no such command, or not at this moment."""


_ERROR_CLASSES: Final = {CommandNotFoundError: "CommandNotFound", NotFoundError: "DeviceNotFound"}
"""QEMU's classes of errors, as far as there are others than GenericError."""


class Mode(enum.Enum):
    """How far a client came."""

    NEGOTIATION = "negotiation"
    """Only `qmp_capabilities` is there, and no events."""
    COMMAND = "command"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One event. `at_s` is the wall clock, seconds since 1970."""

    name: str
    data: Mapping[str, object] | None = None
    at_s: float


def version_info(version: str) -> dict[str, object]:
    """QEMU's VersionInfo for localmig's version."""
    numbers = _VERSION.match(version)
    major, minor, micro = (int(number) for number in numbers.groups()) if numbers else (0, 0, 0)
    return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": f"localmig {version}"}


def greeting(version: str) -> bytes:
    """The first message of a connection, from the server."""
    return encode({"QMP": {"version": version_info(version), "capabilities": []}})


class Session:
    """One client's side of the conversation. Bytes in, bytes out.

    Args:
        commands: what can be asked, by name.
        execute: runs one command with its checked arguments and gives what it returns. It raises LocalmigError
            where the command cannot be carried out; anything else passes through `receive`.
    """

    def __init__(
        self,
        commands: Mapping[str, Command],
        execute: Callable[[Command, Mapping[str, object]], object],
    ) -> None:
        self._commands = commands
        self._execute = execute
        self._decoder = Decoder()
        self._mode = Mode.NEGOTIATION
        self._fds: list[OwnedFd] = []

    def receive(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> Iterator[bytes]:
        """Carries out the commands that `data` completes, one for each answer that is taken from the iterator.

        Args:
            data: what the client sent.
            fds: descriptors that came with it; this session owns them. A command that wants one takes the oldest. As in
                QEMU, what nobody took goes when others come; those beyond HELD_DESCRIPTOR_COUNT_MAX go at once.

        Raises:
            PeerError: the client sent what cannot be read on from: close the connection.
        """
        self._fds += fds
        close_foreign(self._fds[HELD_DESCRIPTOR_COUNT_MAX:])
        del self._fds[HELD_DESCRIPTOR_COUNT_MAX:]
        self._decoder.feed(data)
        for value in self._decoder.values():
            yield encode(self._answer(value))
        # The kernel may hand out the end of one message with the beginning of the next, so not before.
        if fds:
            close_foreign(self._fds[: -len(fds)])
            del self._fds[: -len(fds)]

    def close(self) -> None:
        """Closes the descriptors that nobody took. Idempotent."""
        close_foreign(self._fds)
        self._fds.clear()

    def event(self, event: Event) -> bytes:
        """The event as this client gets it: not at all before negotiation ended."""
        if self._mode is Mode.NEGOTIATION:
            return b""
        seconds = int(event.at_s)
        message: dict[str, object] = {
            "timestamp": {"seconds": seconds, "microseconds": int((event.at_s - seconds) * 1_000_000)},
            "event": event.name,
        }
        if event.data is not None:
            message["data"] = event.data
        return encode(message)

    def _answer(self, value: object) -> dict[str, object]:
        identity = {"id": value["id"]} if isinstance(value, dict) and "id" in value else {}
        try:
            name, arguments = _read_request(value)
            answer: dict[str, object] = {"return": self._run(name, arguments)}
        except LocalmigError as error:
            kinds = (kind for of, kind in _ERROR_CLASSES.items() if isinstance(error, of))
            answer = {"error": {"class": next(kinds, "GenericError"), "desc": str(error)}}
        return answer | identity

    def _run(self, name: str, arguments: Mapping[str, object]) -> object:
        if name == NEGOTIATE:
            return self._negotiate(arguments)
        if self._mode is Mode.NEGOTIATION:
            raise CommandNotFoundError(f"Expecting capabilities negotiation with '{NEGOTIATE}'")
        command = self._commands.get(name)
        if command is None:
            raise CommandNotFoundError(f"The command {name} has not been found")
        values = command.arguments.read(arguments)
        if command.descriptor is not None:
            values[command.descriptor] = self._fds.pop(0) if self._fds else None
        return self._execute(command, values)

    def _negotiate(self, arguments: Mapping[str, object]) -> dict[str, object]:
        if self._mode is Mode.COMMAND:
            raise CommandNotFoundError("Capabilities negotiation is already complete, command ignored")
        enabled = NEGOTIATION.read(arguments).get("enable")
        if enabled:
            assert isinstance(enabled, list), enabled
            raise ConfigError(f"Capability {', '.join(enabled)} not available")
        self._mode = Mode.COMMAND
        return {}


def _read_request(value: object) -> tuple[str, dict[str, object]]:
    """The name and the arguments of a request.

    Raises:
        ConfigError: it is no request, in QEMU's words.
    """
    if isinstance(value, JsonSyntaxError):
        raise value
    if not isinstance(value, dict):
        raise ConfigError("QMP input must be a JSON object")
    for member in value:
        if member not in ("execute", "arguments", "id"):
            raise ConfigError(f"QMP input member '{member}' is unexpected")
    name, arguments = value.get("execute"), value.get("arguments", {})
    if "execute" not in value:
        raise ConfigError("QMP input lacks member 'execute'")
    if not isinstance(name, str):
        raise ConfigError("QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise ConfigError("QMP input member 'arguments' must be an object")
    return name, arguments
