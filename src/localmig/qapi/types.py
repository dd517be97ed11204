"""QAPI's types: what a value may be, QEMU's words where it is something else, QMP's names for ours.

Owns:        the types of arguments, of options and of what is returned; reading and writing by them.
Never sees:  which commands and objects there are, JSON text.
Read next:   introspection.py, which describes these types to clients; options/values.py for values with a range;
             monitor/schema.py for commands.

Arguments are read in the order they are declared, then what was not declared is refused: as QEMU does, so that the
same mistake has the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from localmig.errors import ConfigError

_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
_UINT64_MAX: Final = 2**64 - 1


class ValueType(Protocol):
    """One type of argument."""

    def read(self, value: object, name: str) -> object:
        """The checked value, in our form.

        Args:
            value: what the client sent.
            name: where it stands, as QEMU writes it: `capabilities[0].state`.

        Raises:
            ConfigError: it is of another type, in QEMU's words.
        """


@dataclass(frozen=True, slots=True)
class String:
    """A string."""

    def read(self, value: object, name: str) -> str:
        """Takes any string."""
        if not isinstance(value, str):
            raise ConfigError(f"Invalid parameter type for '{name}', expected: string")
        return value


@dataclass(frozen=True, slots=True)
class Boolean:
    """`true` or `false`."""

    def read(self, value: object, name: str) -> bool:
        """Takes nothing else."""
        if not isinstance(value, bool):
            raise ConfigError(f"Invalid parameter type for '{name}', expected: boolean")
        return value


@dataclass(frozen=True, slots=True)
class Anything:
    """Any value: QEMU's `any`."""

    def read(self, value: object, name: str) -> object:
        """Takes it."""
        del name
        return value


@dataclass(frozen=True, slots=True)
class Integer:
    """QEMU's int: 64 bits with a sign."""

    def read(self, value: object, name: str) -> int:
        """Takes integers of 64 bits."""
        # bool is an int in Python, but `true` is no number in JSON.
        if not isinstance(value, int) or isinstance(value, bool) or not _INT64_MIN <= value <= _INT64_MAX:
            raise ConfigError(f"Invalid parameter type for '{name}', expected: integer")
        return value


@dataclass(frozen=True, slots=True)
class Uint64:
    """QEMU's uint64: a negative number stands for the large one with the same bits, which ranges then refuse."""

    def read(self, value: object, name: str) -> int:
        """Takes integers of 64 bits."""
        # bool is an int in Python, but `true` is no number in JSON.
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not _INT64_MIN <= value <= _UINT64_MAX:  # type: ignore[operator]
            raise ConfigError(f"Parameter '{name}' expects uint64")
        assert isinstance(value, int), value
        return value & _UINT64_MAX


@dataclass(frozen=True, slots=True)
class Enumeration:
    """One of some words."""

    words: tuple[str, ...]

    def read(self, value: object, name: str) -> str:
        """Takes one of the words. QEMU names only the last part of where it stands."""
        word = String().read(value, name)
        if word not in self.words:
            raise ConfigError(f"Parameter '{name.rpartition('.')[2]}' does not accept value '{word}'")
        return word


@dataclass(frozen=True, slots=True)
class Array:
    """Any number of elements of one type."""

    element: ValueType

    def read(self, value: object, name: str) -> list[object]:
        """Reads each element."""
        if not isinstance(value, list):
            raise ConfigError(f"Invalid parameter type for '{name}', expected: array")
        return [self.element.read(item, f"{name}[{index}]") for index, item in enumerate(value)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One argument, or one member of an answer: QMP's name for it, and `attribute`, ours.

    Attributes:
        required: it is always there; another one is left out of an answer where ours is None.
        convert: makes ours what QMP has, in an answer; None where they are alike.
    """

    name: str
    attribute: str
    type: ValueType
    required: bool = True
    convert: Callable[[Any], object] | None = None


@dataclass(frozen=True, slots=True)
class Struct:
    """Members with names. Reading gives a dictionary from our names to values, without what was left out."""

    members: tuple[Member, ...] = ()

    def read(self, value: object, name: str = "") -> dict[str, object]:
        """Reads each member, then refuses what is left."""
        left = _object(value, name)
        read = _read_members(self.members, left, name)
        _refuse(left, name)
        return read


NOTHING: Final = Struct()
"""What a command takes or answers that has nothing to say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Union:
    """Members that depend on the value of one of them, the tag; `base` are others that are always there."""

    tag: Member
    branches: Mapping[str, tuple[Member | Union, ...]]
    base: tuple[Member, ...] = ()

    def read(self, value: object, name: str) -> dict[str, object]:
        """Reads the tag, then what it asks for."""
        left = _object(value, name)
        read = self.read_from(left, name)
        _refuse(left, name)
        return read

    def read_from(self, left: dict[str, object], name: str) -> dict[str, object]:
        """Reads the tag and what it asks for out of `left`."""
        read = _read_members((*self.base, self.tag), left, name)
        for part in self.branches[str(read[self.tag.attribute])]:
            read |= part.read_from(left, name) if isinstance(part, Union) else _read_members((part,), left, name)
        return read


def _object(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ConfigError(f"Invalid parameter type for '{name}', expected: object")
    return dict(value)


def _read_members(members: tuple[Member, ...], left: dict[str, object], name: str) -> dict[str, object]:
    """Takes `members` out of `left`."""
    read = {}
    for member in members:
        where = f"{name}.{member.name}" if name else member.name
        if member.name in left:
            read[member.attribute] = member.type.read(left.pop(member.name), where)
        elif member.required:
            raise ConfigError(f"Parameter '{where}' is missing")
    return read


def _refuse(left: Mapping[str, object], name: str) -> None:
    for unexpected in left:
        where = f"{name}.{unexpected}" if name else unexpected
        raise ConfigError(f"Parameter '{where}' is unexpected")


def returned(name: str, type: ValueType, *, required: bool = True) -> Member:  # noqa: A002
    """A member of what a command returns or an event carries: nobody reads it here, so it needs no name of ours."""
    return Member(name=name, attribute=name, type=type, required=required)


def to_qmp(shape: ValueType, value: Any) -> object:
    """`value`, which has our names, under QMP's: what `shape` declares of it."""
    match shape:
        case Array(element):
            return [to_qmp(element, each) for each in value]
        case Struct(members):
            return _written(members, value)
        case Union(tag=tag, branches=branches, base=base):
            written = _written((*base, tag), value)
            for part in branches[str(written[tag.name])]:
                more = to_qmp(part, value) if isinstance(part, Union) else _written((part,), value)
                assert isinstance(more, dict), part
                written |= more
            return written
        case _:
            return value


def _written(members: tuple[Member, ...], value: Any) -> dict[str, object]:
    written = {}
    for member in members:
        ours = getattr(value, member.attribute)
        if ours is None:
            assert not member.required, member
            continue
        written[member.name] = to_qmp(member.type, ours if member.convert is None else member.convert(ours))
    return written
