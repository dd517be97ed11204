"""Where a migration goes to or comes from, as text and as a type.

Owns:        the address forms, their texts, QEMU's words for what is wrong with one.
Never sees:  sockets, descriptors, which side migrates.
Read next:   migration/transport.py, which connects to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.errors import ConfigError
from localmig.unix_socket import check_path

PORT_MAX: Final = 65535
"""TCP's port field has 16 bits."""

FD_DIGITS_MAX: Final = 10
"""A descriptor is a C int, which has at most 10 digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnixAddress:
    """`unix:PATH`, a UNIX stream socket: bytes and descriptors pass."""

    path: str

    def __post_init__(self) -> None:
        check_path(self.path)

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FdAddress:
    """`fd:NAME` or `fd:NUMBER`, a connected socket this process was given before."""

    name: str

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("invalid file descriptor address 'fd:', expected fd:NAME or fd:NUMBER")

    @property
    def number(self) -> int | None:
        """The descriptor's number where `name` is one (inherited), None where it is a name."""
        is_number = self.name.isascii() and self.name.isdigit() and len(self.name) <= FD_DIGITS_MAX
        return int(self.name) if is_number else None

    def __str__(self) -> str:
        return f"fd:{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TcpAddress:
    """`tcp:HOST:PORT`: bytes pass, descriptors do not. An empty host means every address of this machine."""

    host: str
    port: int

    def __post_init__(self) -> None:
        if not 0 <= self.port <= PORT_MAX:
            raise ConfigError(f"error parsing port in address '{self.host}:{self.port}', highest port is {PORT_MAX}")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Defer:
    """`defer`: the address comes later, by QMP's `migrate-incoming`."""

    def __str__(self) -> str:
        return "defer"


Address = UnixAddress | FdAddress | TcpAddress
IncomingSpec = Address | Defer


def parse_address(text: str) -> Address:
    """Reads `unix:PATH`, `fd:NAME`, `fd:NUMBER` or `tcp:HOST:PORT`.

    Raises:
        ConfigError: it is none of them, in QEMU's words.
    """
    protocol, colon, rest = text.partition(":")
    match protocol if colon else "":
        case "unix":
            return UnixAddress(path=rest)
        case "fd":
            return FdAddress(name=rest)
        case "tcp":
            return _parse_tcp(rest)
        case _:
            raise ConfigError(f"unknown migration protocol: {text}")


def parse_incoming(text: str) -> IncomingSpec:
    """Reads what `--incoming` takes: an address, or `defer`.

    Raises:
        ConfigError: it is neither.
    """
    return Defer() if text == "defer" else parse_address(text)


def _parse_tcp(text: str) -> TcpAddress:
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]:")
        if not bracket or not host or set("[]") & set(host):
            raise ConfigError(f"error parsing IPv6 address '{text}'")
    else:
        host, colon, port = text.partition(":")
        if not colon:
            raise ConfigError(f"error parsing address '{text}'")
    # Only a number: a service's name is looked up in files, and those differ between machines.
    if not (port.isascii() and port.isdigit() and len(port) <= len(str(PORT_MAX))):
        raise ConfigError(f"error parsing port in address '{text}'")
    return TcpAddress(host=host, port=int(port))
