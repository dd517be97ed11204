"""What an option's value can be: how its text is read, what range it has and why.

Owns:        value types, their limits, QEMU's words for a wrong value.
Never sees:  which object has which option.
Read next:   specs.py, the tables these stand in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

from localmig.access import ACCOUNT_ID_MAX
from localmig.errors import ConfigError
from localmig.limits import INTERFACE_NAME_BYTES_MAX, PATH_BYTES_MAX
from localmig.qapi import Boolean, Integer, String
from localmig.qapi import ValueType as QapiType
from localmig.unix_socket import check_path

ID_LENGTH_MAX: Final = 63
"""An id is one half of a section's name in the stream, and vmdesc readers want names under 128 bytes."""

FD_MIN: Final = 3
"""0, 1 and 2 are the standard streams."""

FD_MAX: Final = 1048575
"""Highest descriptor the kernel gives out unless fs.nr_open was raised."""

_DIGITS_MAX: Final = 20
"""Digits of the largest unsigned 64-bit number: what is longer is no number of ours, and slow to read."""

GROUP_NAME_LENGTH_MAX: Final = 255
"""LOGIN_NAME_MAX is 256, and the last byte is NUL (linux: sysconf(3)); groups have no limit of their own."""

_MODE: Final = re.compile(r"0[67][0-7]{2}", re.ASCII)
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*", re.ASCII)
_MAC: Final = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", re.ASCII)
_INTERFACE_NAME_WRONG: Final = re.compile(r"[\s/:%\0]")


Value = str | int | bool


class ValueType(Protocol):
    """One type of value: from text to value, and the check that every value passes wherever it came from."""

    @property
    def word(self) -> str:
        """How help writes a value of this type."""

    qapi: ClassVar[QapiType]
    """What QMP's schema says of it; whose words say that a value is of another type."""

    def read(self, name: str, text: str) -> Value:
        """The value that `text` writes. Raises ConfigError where it writes none; the range is `check`'s."""

    def check(self, name: str, value: object) -> None:
        """Raises ConfigError where `value` is of another type or out of range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A whole number in a range that has a reason."""

    word: ClassVar[str] = "<number>"
    qapi: ClassVar[QapiType] = Integer()
    lowest: int
    highest: int
    reason: str

    def read(self, name: str, text: str) -> int:
        """Reads decimal digits."""
        if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
            raise ConfigError(f"Parameter '{name}' expects a number, not '{text}'")
        return int(text)

    def check(self, name: str, value: object) -> None:
        """Checks type and range."""
        number = Integer().read(value, name)
        if not self.lowest <= number <= self.highest:
            span = (
                f"a value between {self.lowest} and {self.highest}" if self.lowest < self.highest else f"{self.lowest}"
            )
            raise ConfigError(f"Parameter '{name}' expects {span}, not {number}: {self.reason}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Switch:
    """`on` or `off`."""

    word: ClassVar[str] = "<on|off>"
    qapi: ClassVar[QapiType] = Boolean()

    def read(self, name: str, text: str) -> bool:
        """Reads `on` and `off`, as QEMU's keyval syntax does."""
        if text not in ("on", "off"):
            raise ConfigError(f"Parameter '{name}' expects 'on' or 'off', not '{text}'")
        return text == "on"

    def check(self, name: str, value: object) -> None:
        """Checks the type."""
        Boolean().read(value, name)


class _Text:
    """What all values that are text share: reading is taking it as it stands."""

    __slots__ = ()
    word: ClassVar[str] = "<str>"
    qapi: ClassVar[QapiType] = String()

    def read(self, name: str, text: str) -> str:
        """Takes `text` as it stands."""
        del name
        return text

    def check(self, name: str, value: object) -> None:
        """Checks the type, then the text."""
        text = String().read(value, name)
        if "\0" in text:
            raise ConfigError(f"Parameter '{name}' has a NUL byte in its value")
        self.check_text(name, text)

    def check_text(self, name: str, text: str) -> None:
        """Raises ConfigError where `text` cannot be."""
        raise NotImplementedError


class Identifier(_Text):
    """The id of an object."""

    __slots__ = ()
    word: ClassVar[str] = "<id>"

    def check_text(self, name: str, text: str) -> None:
        """QEMU's rule for ids, and a limit."""
        if not _ID.fullmatch(text):
            raise ConfigError(
                f"Parameter '{name}' expects an identifier, not '{text}': "
                "identifiers consist of letters, digits, '-', '.', '_', starting with a letter"
            )
        if len(text) > ID_LENGTH_MAX:
            raise ConfigError(f"Parameter '{name}' has {len(text)} letters, limit is {ID_LENGTH_MAX}: '{text}'")


class InterfaceName(_Text):
    """The name of a network interface."""

    __slots__ = ()
    word: ClassVar[str] = "<name>"

    def check_text(self, name: str, text: str) -> None:
        """The kernel's rule (dev_valid_name), and no '%': the kernel would put a number in its place."""
        size = len(text.encode("utf-8", "surrogateescape"))
        if not 0 < size <= INTERFACE_NAME_BYTES_MAX:
            raise ConfigError(f"Parameter '{name}' expects 1 to {INTERFACE_NAME_BYTES_MAX} bytes, not {size}: '{text}'")
        if text in (".", "..") or _INTERFACE_NAME_WRONG.search(text):
            raise ConfigError(
                f"Parameter '{name}' expects an interface name, not '{text}': "
                "no space, '/', ':' or '%', not '.' or '..'"
            )


class Descriptor(_Text):
    """A descriptor, as QEMU writes it: the number of an inherited one, or the name of one that was given by getfd.

    What begins with a digit is a number, so no name does.
    """

    __slots__ = ()
    word: ClassVar[str] = "<fd>"

    def check_text(self, name: str, text: str) -> None:
        """A number in the kernel's range, or a name."""
        _check_descriptor(name, text)


class Descriptors(_Text):
    """Several of them with colons between them: `3:4:5`."""

    __slots__ = ()
    word: ClassVar[str] = "<x:y:…:z>"

    def check_text(self, name: str, text: str) -> None:
        """Each as a `Descriptor`, none of them twice."""
        descriptors = text.split(":")
        for descriptor in descriptors:
            _check_descriptor(name, descriptor)
        if len(set(map(descriptor_of, descriptors))) < len(descriptors):
            raise ConfigError(f"Parameter '{name}' has a descriptor twice: '{text}'")


def descriptor_of(text: str) -> int | str:
    """The number or the name that a `Descriptor` writes."""
    return int(text) if text[0].isdigit() else text


def _check_descriptor(name: str, text: str) -> None:
    if not text:
        raise ConfigError(f"Parameter '{name}' expects a descriptor's number or name, not ''")
    if not text[0].isdigit():
        return
    is_number = text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX
    if not is_number or not FD_MIN <= int(text) <= FD_MAX:
        raise ConfigError(
            f"Parameter '{name}' expects the number of a descriptor, {FD_MIN} to {FD_MAX}, or a name that does not "
            f"begin with a digit, not '{text}'"
        )


class MacAddress(_Text):
    """The Ethernet address of a station."""

    __slots__ = ()
    word: ClassVar[str] = "<xx:xx:xx:xx:xx:xx>"

    def check_text(self, name: str, text: str) -> None:
        """Six bytes, and not the address of a group or of nobody."""
        if not _MAC.fullmatch(text):
            raise ConfigError(f"Parameter '{name}' expects an Ethernet address like 52:54:00:12:34:56, not '{text}'")
        address = mac_bytes(text)
        if address[0] & 1 or not any(address):
            raise ConfigError(f"Parameter '{name}' expects the address of one station, not '{text}'")


def mac_bytes(text: str) -> bytes:
    """The six bytes of an Ethernet address that `MacAddress` let pass."""
    return bytes.fromhex(text.replace(":", ""))


@dataclass(frozen=True, slots=True)
class Choice(_Text):
    """One of a few words."""

    choices: tuple[str, ...]

    @property
    def word(self) -> str:  # type: ignore[override]
        """All of them."""
        return f"<{'|'.join(self.choices)}>"

    def check_text(self, name: str, text: str) -> None:
        """Whether it is one of them, in QEMU's words."""
        if text not in self.choices:
            raise ConfigError(f"Parameter '{name}' does not accept value '{text}', one of: {', '.join(self.choices)}")


class FilePath(_Text):
    """The path of a file."""

    __slots__ = ()
    word: ClassVar[str] = "<file>"

    def check_text(self, name: str, text: str) -> None:
        """Not empty, no longer than the kernel takes."""
        size = len(text.encode("utf-8", "surrogateescape"))
        if not 0 < size <= PATH_BYTES_MAX:
            raise ConfigError(f"Parameter '{name}' expects a path of 1 to {PATH_BYTES_MAX} bytes, not {size}")


class SocketPath(_Text):
    """The path of a UNIX socket."""

    __slots__ = ()
    word: ClassVar[str] = "<path>"

    def check_text(self, name: str, text: str) -> None:
        """As long as `sun_path` can hold."""
        try:
            check_path(text)
        except ConfigError as error:
            raise ConfigError(f"Parameter '{name}': {error}") from error


class FileMode(_Text):
    """The permissions of a file, as chmod(1) writes them. Text: JSON has no octal."""

    __slots__ = ()
    word: ClassVar[str] = "<octal>"

    def check_text(self, name: str, text: str) -> None:
        """Four digits, so that nobody means another base."""
        if not _MODE.fullmatch(text):
            raise ConfigError(f"Parameter '{name}' expects an octal mode between 0600 and 0777, not '{text}'")


class GroupName(_Text):
    """A group of users: its name, or its number."""

    __slots__ = ()
    word: ClassVar[str] = "<group>"

    def check_text(self, name: str, text: str) -> None:
        """Not empty, no number that the kernel has not."""
        if not 0 < len(text) <= GROUP_NAME_LENGTH_MAX:
            raise ConfigError(f"Parameter '{name}' expects 1 to {GROUP_NAME_LENGTH_MAX} letters, not {len(text)}")
        if text.isascii() and text.isdigit() and int(text) > ACCOUNT_ID_MAX:
            raise ConfigError(f"Parameter '{name}' expects a {self.word[1:-1]} up to {ACCOUNT_ID_MAX}, not {text}")


class UserName(GroupName):
    """A user: the name, or the number. Names and numbers are bounded as a group's."""

    __slots__ = ()
    word: ClassVar[str] = "<user>"
