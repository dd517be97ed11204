"""The answer to query-qmp-schema, made from the declarations that read arguments: QEMU's introspection format.

Owns:        SchemaInfo, and how a type becomes one.
Never sees:  clients, the daemon, which commands there are.
Read next:   types.py, the types.

A type that has a name only in our code gets a number, as QEMU does it: a client finds a type through the command or
event that uses it, never by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from localmig.qapi.types import (
    Anything,
    Array,
    Boolean,
    Enumeration,
    Integer,
    Member,
    String,
    Struct,
    Uint64,
    Union,
    ValueType,
    returned,
)

_BUILTINS: Final[Mapping[type, tuple[str, str]]] = {
    String: ("str", "string"),
    Boolean: ("bool", "boolean"),
    # QEMU calls every size of integer so.
    Uint64: ("int", "int"),
    Integer: ("int", "int"),
    Anything: ("any", "value"),
}
"""Name and JSON type."""

_MEMBERS: Final = Array(
    Struct((returned("name", String()), returned("type", String()), returned("default", Anything(), required=False)))
)

SCHEMA_INFO: Final = Union(
    base=(returned("name", String()),),
    tag=returned("meta-type", Enumeration(("builtin", "enum", "array", "object", "alternate", "command", "event"))),
    branches={
        "builtin": (
            returned(
                "json-type",
                Enumeration(("string", "number", "int", "boolean", "null", "object", "array", "value")),
            ),
        ),
        "enum": (
            returned("members", Array(Struct((returned("name", String()),)))),
            returned("values", Array(String())),
        ),
        "array": (returned("element-type", String()),),
        "object": (
            returned("members", _MEMBERS),
            returned("tag", String(), required=False),
            returned(
                "variants",
                Array(Struct((returned("case", String()), returned("type", String())))),
                required=False,
            ),
        ),
        "alternate": (returned("members", Array(Struct((returned("type", String()),)))),),
        "command": (
            returned("arg-type", String()),
            returned("ret-type", String()),
            returned("allow-oob", Boolean(), required=False),
        ),
        "event": (returned("arg-type", String()),),
    },
)
"""QEMU's SchemaInfo, as far as localmig has what it tells of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A command, as far as a client is told of it: what it is called, takes and returns."""

    name: str
    arguments: ValueType
    returns: ValueType


def introspect(commands: Iterable[Described], events: Mapping[str, Struct]) -> list[dict[str, object]]:
    """What can be asked and heard, and every type that this needs.

    Args:
        commands: all of them.
        events: what each carries, by its name.
    """
    types = _Types()
    told: list[dict[str, object]] = [
        {
            "name": command.name,
            "meta-type": "command",
            "arg-type": types.name(command.arguments),
            "ret-type": types.name(command.returns),
        }
        for command in commands
    ]
    told += [{"name": name, "meta-type": "event", "arg-type": types.name(data)} for name, data in events.items()]
    return told + types.told


class _Types:
    """The types that were named so far. Equal ones are one."""

    def __init__(self) -> None:
        self.told: list[dict[str, object]] = []
        self._named: list[tuple[ValueType, str]] = []

    def name(self, what: ValueType) -> str:
        """The name of a type, which is told of from now on."""
        for known, name in self._named:
            if known == what:
                return name
        if type(what) in _BUILTINS:
            name, json_type = _BUILTINS[type(what)]
            if any(name == known for _, known in self._named):
                return name
            return self._tell(what, name, {"meta-type": "builtin", "json-type": json_type})
        if isinstance(what, Array):
            element = self.name(what.element)
            return self._tell(what, f"[{element}]", {"meta-type": "array", "element-type": element})
        description = self._describe(what)  # which names other types, so the number comes after it
        return self._tell(what, str(len(self._named)), description)

    def _tell(self, what: ValueType, name: str, description: Mapping[str, object]) -> str:
        self._named.append((what, name))
        self.told.append({"name": name, **description})
        return name

    def _describe(self, what: ValueType) -> dict[str, object]:
        match what:
            case Enumeration(words=words):
                return {
                    "meta-type": "enum",
                    "members": [{"name": word} for word in words],
                    "values": list(words),  # what QEMU had before `members`, and has still
                }
            case Struct(members=members):
                return {"meta-type": "object", "members": [self._member(member) for member in members]}
            case Union(base=base, tag=tag, branches=branches):
                return {
                    "meta-type": "object",
                    "members": [self._member(member) for member in (*base, tag)],
                    "tag": tag.name,
                    "variants": [
                        {"case": case, "type": self.name(_branch(members))} for case, members in branches.items()
                    ],
                }
        raise AssertionError(what)

    def _member(self, member: Member) -> dict[str, object]:
        told: dict[str, object] = {"name": member.name, "type": self.name(member.type)}
        return told if member.required else {**told, "default": None}


def _branch(parts: tuple[Member | Union, ...]) -> Struct | Union:
    """The type whose members a branch adds."""
    if len(parts) == 1 and isinstance(parts[0], Union):
        return parts[0]
    members = tuple(part for part in parts if isinstance(part, Member))
    assert len(members) == len(parts), "a branch has members, or is one union"
    return Struct(members)
