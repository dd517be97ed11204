"""Another process's vmdesc, held against our own descriptions.

Owns:        whether both mean the same bytes by a section, before any of them is read.
Never sees:  a state; the bytes.
Read next:   fields.py, where `Field.lines` say what a vmdesc may have.

Who changes what travels counts its version up. Where that was forgotten, or two people counted up to one number, the
section would end where it should not, or, of the same length by chance, be read as something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from localmig.errors import PeerError
from localmig.vmstate.blob import MalformedError
from localmig.vmstate.description import Description, checked_version, subsection_header
from localmig.vmstate.fields import Layout, Line

_COUNT_MAX: Final = 2**32 - 1
"""Bytes and elements: of none there are more than its header, a u32, can say."""


def check_explained(
    description: Description[Any], version: int, explained: Mapping[str, Any], *, section: str | None = None
) -> int:
    """Compares what `explain` gave in another process with what `load` would read here.

    Names, types, order, and sizes where the declaration sets them must be the same; sizes must add up.

    Args:
        description: what is expected.
        version: what is to come, one that is read here.
        explained: any JSON object, of which "fields" and "subsections" are looked at.
        section: what errors call it; the description's name if None.

    Returns:
        Bytes of the section that is to come.

    Raises:
        PeerError: they differ; the text names the field and both sides.
    """
    try:
        return _fields_size(description.layout, version, explained) + _subsections_size(description, explained)
    except MalformedError as error:
        raise PeerError(f'section "{section or description.name}", as described: {error}') from None


def _subsections_size(description: Description[Any], explained: Mapping[str, Any]) -> int:
    waiting = {subsection.name: subsection for subsection in description.subsections}
    total = 0
    for entry in _list_in(explained, "subsections") if "subsections" in explained else ():
        match entry:
            case {"vmsd_name": str(name), "version": int(version)} if name in waiting:
                subsection = waiting.pop(name)
            case {"vmsd_name": str(name), "version": int()}:
                raise MalformedError(f'has a subsection "{name}", expected {" or ".join(waiting) or "none"}')
            case _:
                raise MalformedError("has a subsection without name or version")
        try:
            size = _fields_size(subsection.layout, checked_version(subsection, version), entry)
        except MalformedError as error:
            raise MalformedError(f'subsection "{name}": {error}') from None
        total += len(subsection_header(subsection)) + size
    return total


def _fields_size(layout: Layout, version: int, explained: Mapping[str, Any]) -> int:
    lines = layout.lines_at(version)
    names: dict[str, None] = {}
    total = 0
    for entry in _list_in(explained, "fields"):
        try:
            name, kind, size, count = entry["name"], entry["type"], entry["size"], entry.get("array_len", 1)
            line = lines.get(name)
        except (AttributeError, KeyError, TypeError):
            raise MalformedError("has a field without name, type or size") from None
        if line is None:
            raise MalformedError(f'has a field "{name}", in version {version} there are {", ".join(lines) or "none"}')
        if name in names and "index" not in entry:
            raise MalformedError(f'has field "{name}" twice')
        names[name] = None
        try:
            _check_entry(line, kind, size, count)
            if line.inner is not None:
                _check_struct(line.inner, version, size, entry.get("struct"))
        except MalformedError as error:
            error.add_outer(name)
            raise
        total += size * count
    expected = [name for name, line in lines.items() if line.always or name in names]
    if expected != list(names):
        raise MalformedError(f"has the fields {', '.join(names) or 'none'}, expected {', '.join(expected)}")
    return total


def _check_entry(line: Line, kind: object, size: object, count: object) -> None:
    if kind != line.type or not _is_count(size) or line.size not in (None, size):
        expected = line.type if line.size is None else f"{line.type} of {line.size}"
        raise MalformedError(f"is {kind} of {size!r} bytes, expected {expected}")
    if not _is_count(count) or count == 0:
        raise MalformedError(f"has {count!r} elements")


def _is_count(number: object) -> bool:
    return isinstance(number, int) and 0 <= number <= _COUNT_MAX


def _check_struct(layout: Layout, version: int, size: int, struct: object) -> None:
    if not isinstance(struct, dict):
        raise MalformedError("is a struct without fields")
    fields_size = _fields_size(layout, version, struct)
    if size != fields_size:
        raise MalformedError(f"has {size} bytes, its fields have {fields_size}")


def _list_in(explained: Mapping[str, Any], key: str) -> list[Any]:
    match explained.get(key):
        case list(entries):
            return entries
        case _:
            raise MalformedError(f"has no list of {key}")
