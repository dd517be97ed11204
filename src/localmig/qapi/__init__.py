"""QEMU's API language, as far as localmig speaks it: types of values, and how a client is told of them.

Owns:        nothing; the modules beside this one do.
Never sees:  commands, options, clients.
Read next:   types.py, then introspection.py.
"""

from __future__ import annotations

from localmig.qapi.types import (
    NOTHING,
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
    to_qmp,
)

__all__ = [
    "NOTHING",
    "Anything",
    "Array",
    "Boolean",
    "Enumeration",
    "Integer",
    "Member",
    "String",
    "Struct",
    "Uint64",
    "Union",
    "ValueType",
    "returned",
    "to_qmp",
]
