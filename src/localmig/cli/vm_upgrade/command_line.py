"""QEMU's command line: words become options with properties, and options become words again.

Owns:        which options take a value, how a value's properties are written.
Never sees:  processes; what an option means for a move.
Read next:   plan.py, which rewrites options.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

# fmt: off
_FLAGS: Final = frozenset((
    "alt-grab", "ctrl-grab", "daemonize", "enable-fips", "enable-kvm", "enable-sync-profile", "full-screen",
    "h", "help", "mem-prealloc", "no-acpi", "no-fd-bootchk", "no-hpet", "no-quit", "no-reboot", "no-shutdown",
    "no-user-config", "nodefaults", "nographic", "old-param", "only-migratable", "portrait", "preconfig", "s",
    "S", "semihosting", "singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach",
    "xen-domid-restrict",
))
# fmt: on
"""The options that take no value, of QEMU 2.0 to 11.1. All others take one."""

IMAGE: Final = "hda"
"""What a word that belongs to no option means: a disk's image."""

_FIRST_KEYS: Final = {
    "audiodev": "driver",
    "blockdev": "driver",
    "chardev": "backend",
    "device": "driver",
    "display": "type",
    "machine": "type",
    "M": "type",
    "m": "size",
    "mon": "chardev",
    "name": "guest",
    "net": "type",
    "netdev": "type",
    "nic": "type",
    "object": "qom-type",
    "sandbox": "enable",
    "smp": "cpus",
    "tpmdev": "type",
}
"""The property that a value may begin with, without its key."""

_BOUNDARY: Final = re.compile(r"(?<!,)(?:,,)*,(?!,)")
"""A comma that ends a property; two commas are one character of it."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: without its dash.
        value: the word after it; None where it takes none.
    """

    name: str
    value: str | None = None

    @property
    def properties(self) -> dict[str, str]:
        """What the value says, by key. The first property, where it has no key, is called as QEMU calls it."""
        if self.value is None:
            return {}
        if self._is_json:
            return {key: _text(value) for key, value in json.loads(self.value).items()}
        properties = {}
        for number, part in enumerate(_parts(self.value)):
            key, equals, value = part.partition("=")
            if equals:
                properties[key] = value
            elif number == 0:
                properties[_FIRST_KEYS.get(self.name, "")] = part
            else:
                # The old way to write a switch.
                is_off = part.startswith("no") and part != "nonblock"
                properties[part.removeprefix("no") if is_off else part] = "off" if is_off else "on"
        return properties

    @property
    def id(self) -> str | None:
        """The name by which the guest's parts are told apart, None where it has none."""
        return self.properties.get("id")

    def with_property(self, key: str, value: str) -> Option:
        """The same with another value for one property."""
        assert self.value is not None
        if self._is_json:
            return Option(self.name, json.dumps({**json.loads(self.value), key: value}))
        first_key = _FIRST_KEYS.get(self.name)
        parts = []
        is_new = True
        for number, part in enumerate(_parts(self.value)):
            name, equals, _ = part.partition("=")
            if not equals and number == 0 and key == first_key:
                parts.append(value)
                is_new = False
            elif name == key and (equals or number > 0):
                parts.append(f"{key}={value}")
                is_new = False
            else:
                parts.append(part)
        if is_new:
            parts.append(f"{key}={value}")
        return Option(self.name, ",".join(part.replace(",", ",,") for part in parts))

    @property
    def words(self) -> list[str]:
        """As it stands on a command line."""
        return [f"-{self.name}"] if self.value is None else [f"-{self.name}", self.value]

    @property
    def _is_json(self) -> bool:
        return self.value is not None and self.value.startswith("{")

    def __str__(self) -> str:
        return " ".join(self.words)


def parse(words: Sequence[str]) -> tuple[Option, ...]:
    """The options of a command line, without the program's name.

    Raises:
        ValueError: the last option lacks its value.
    """
    return tuple(_options(iter(words)))


def _options(words: Iterator[str]) -> Iterator[Option]:
    for word in words:
        if not word.startswith("-") or word == "-":
            yield Option(IMAGE, word)
            continue
        name = word.removeprefix("-").removeprefix("-")
        if name in _FLAGS:
            yield Option(name)
            continue
        value = next(words, None)
        if value is None:
            raise ValueError(f"option '{word}' has no value")
        yield Option(name, value)


def to_words(options: Iterable[Option]) -> list[str]:
    """The command line that `options` are, without the program's name."""
    return [word for option in options for word in option.words]


def replaced(options: Sequence[Option], others: Sequence[Option]) -> tuple[Option, ...]:
    """`options`, where each of `others` takes the place of those with its name, and with its id if it has one."""
    places = {(option.name, option.id) for option in others}
    return (*(option for option in options if (option.name, option.id) not in places), *others)


def _parts(value: str) -> Iterator[str]:
    start = 0
    for boundary in _BOUNDARY.finditer(value):
        yield value[start : boundary.end() - 1].replace(",,", ",")
        start = boundary.end()
    yield value[start:].replace(",,", ",")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else json.dumps(value)
