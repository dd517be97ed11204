"""Descriptions: a dataclass's fields in the order they travel, with the versions that may arrive.

Owns:        Description and Subsection; save, load, check, explain and close by them.
Never sees:  the frame around a section.
Read next:   fields.py for the encoding.

How state may change from release to release: append a field with `since=` and count the version up; raise
`oldest_version` to stop reading old ones; or add a subsection, which only travels while it is needed, so that
older releases go on reading the rest. What is absent from an old stream takes the dataclass's default. Names, types
and order of what travelled once stay: a destination compares them (comparison.py).
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeVar

from localmig.errors import PeerError
from localmig.fd_kind import FdKind, describe_fd, is_of_kind
from localmig.fds import close_all
from localmig.vmstate.blob import Blob, MalformedError, Reader, UnfitError
from localmig.vmstate.fields import Explained, Field, Layout, Placed

NAME_SIZE_MAX: Final = 127
"""Bytes of a section's or subsection's name. Its length is one byte: signed, says analyze-migration.py."""

SUBSECTION_MARKER: Final = 0x05
"""QEMU_VM_SUBSECTION: stands where a section's fields end and a subsection follows."""

_VERSION: Final = struct.Struct(">I")

T = TypeVar("T")


# Not slotted, against the house rule: a frozen slotted generic cannot be called as `Subsection[NicState](...)`.
@dataclass(frozen=True, kw_only=True, eq=False)
class Subsection(Generic[T]):
    """Fields of a state that travel only while they are needed; elsewhere they have the dataclass's defaults.

    Attributes:
        name: the description's name, a slash, its own.
        version: what is saved.
        oldest_version: the oldest that is loaded.
        needed: whether the state's values of these fields matter, that is, differ from the defaults.
        fields: attributes of the state, none of them in the description's own fields.
    """

    name: str
    version: int
    oldest_version: int
    needed: Callable[[T], bool]
    fields: tuple[Field, ...]
    layout: Layout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.name.encode()) > NAME_SIZE_MAX:
            raise ValueError(f'subsection name "{self.name}" is longer than {NAME_SIZE_MAX} bytes')
        object.__setattr__(self, "layout", _checked_layout(self))


@dataclass(frozen=True, kw_only=True, eq=False)
class Description(Generic[T]):
    """How a state travels: a section of its own, or a struct inside one.

    Attributes:
        name: as it stands in the stream, for example "virtio-net".
        version: what is saved. Inside another description: at most the outer one's.
        oldest_version: the oldest that is loaded.
        state: a dataclass or NamedTuple; its attributes are exactly the fields, its defaults stand in for what is
            absent.
        fields: in the order they travel.
        subsections: rare state, in the order it travels.

    Raises:
        ValueError: fields and attributes do not fit, a field that may be absent has no default, or versions
            contradict each other.
    """

    name: str
    version: int
    oldest_version: int
    state: type[T]
    fields: tuple[Field, ...]
    subsections: tuple[Subsection[T], ...] = ()
    layout: Layout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", _checked_layout(self))
        parts: list[Description[T] | Subsection[T]] = [self, *self.subsections]
        declared = [field.name for part in parts for field in part.fields]
        attributes = _attributes(self.state)
        if sorted(declared) != sorted(attributes):
            odd = sorted(set(declared) ^ set(attributes)) or sorted({n for n in declared if declared.count(n) > 1})
            raise ValueError(
                f'"{self.name}": fields and attributes of {self.state.__name__} differ in {", ".join(odd)}'
            )
        always = {field.name for field in self.fields if field.since <= self.oldest_version}
        for name, has_default in attributes.items():
            if name not in always and not has_default:
                raise ValueError(f'"{self.name}": "{name}" may be absent, so it needs a default')
        for subsection in self.subsections:
            if not subsection.name.startswith(f"{self.name}/"):
                raise ValueError(f'subsection "{subsection.name}" does not begin with "{self.name}/"')


def _attributes(state: type[Any]) -> dict[str, bool]:
    """A state's attributes by name, and whether each has a default."""
    if issubclass(state, tuple):
        defaults: dict[str, Any] = state._field_defaults  # type: ignore[attr-defined]
        return {name: name in defaults for name in state._fields}  # type: ignore[attr-defined]
    assert dataclasses.is_dataclass(state)
    missing = dataclasses.MISSING
    return {it.name: (it.default, it.default_factory) != (missing, missing) for it in dataclasses.fields(state)}


def default_of(description: Description[T]) -> T | None:
    """The state in which every attribute has its default; None where one has none."""
    return description.state() if all(_attributes(description.state).values()) else None


def _checked_layout(part: Description[Any] | Subsection[Any]) -> Layout:
    if not 1 <= part.oldest_version <= part.version:
        raise ValueError(f'"{part.name}": versions {part.oldest_version}..{part.version} are no range')
    for part_field in part.fields:
        if part_field.since > part.version:
            raise ValueError(
                f'"{part.name}" is version {part.version}, its "{part_field.name}" since {part_field.since}'
            )
        inner = part_field.inner
        # A struct has no version on the wire, so it is written and read at this one's.
        if inner is not None and (inner.version > part.version or inner.oldest_version > part.oldest_version):
            raise ValueError(
                f'"{part.name}" has versions {part.oldest_version}..{part.version}, '
                f'too old for "{inner.name}" inside it with {inner.oldest_version}..{inner.version}'
            )
    return Layout(part.fields)


def save(description: Description[T], state: T, into: Blob, *, section: str | None = None) -> None:
    """Appends `state`. Descriptors in it are lent: keep them open until `into` is sent.

    Args:
        description: what `state` is.
        state: to be saved, unchanged by it.
        into: where to.
        section: what errors call it; the description's name if None.

    Raises:
        StateError: a value does not fit its declaration, or a descriptor was given away; `into` is as before.
    """
    start = len(into.data)
    try:
        description.layout.put(state, into)
        for subsection in description.subsections:
            needed = subsection.needed(state)
            into.shape.append(needed)
            if needed:
                into.data += subsection_header(subsection)
                subsection.layout.put(state, into)
    except UnfitError as error:
        into.truncate(start)
        raise UnfitError(f'section "{section or description.name}": {error}') from None
    except BaseException:
        into.truncate(start)
        raise


def subsection_header(subsection: Subsection[Any]) -> bytes:
    """What stands before its fields: the marker, its name's size and its name, its version."""
    name = subsection.name.encode()
    return bytes((SUBSECTION_MARKER, len(name))) + name + _VERSION.pack(subsection.version)


def load(description: Description[T], version: int, reader: Reader, *, section: str | None = None) -> T:
    """Reads a state; the caller owns the descriptors in it.

    Args:
        description: what is expected.
        version: what was saved.
        reader: stands at the first byte, afterwards behind the last.
        section: what errors call it; the description's name if None.

    Raises:
        PeerError: not what was declared. Every descriptor of `reader` is closed, given out or not.
    """
    try:
        values = description.layout.get(reader, checked_version(description, version))
        waiting = {subsection.name: subsection for subsection in description.subsections}
        while reader.peek() == SUBSECTION_MARKER:
            values.update(_load_subsection(waiting, reader))
        return description.state(**values)
    except MalformedError as error:
        reader.close()
        raise PeerError(f'section "{section or description.name}": {error}') from None
    except BaseException:
        reader.close()
        raise


def _load_subsection(waiting: dict[str, Subsection[Any]], reader: Reader) -> dict[str, Any]:
    _, size = reader.take(2)
    name = reader.take(size).decode(errors="replace")
    subsection = waiting.pop(name, None)
    if subsection is None:
        raise MalformedError(f'has a subsection "{name}", expected {" or ".join(waiting) or "none"}')
    (version,) = reader.unpack(_VERSION)
    try:
        return subsection.layout.get(reader, checked_version(subsection, version))
    except MalformedError as error:
        raise MalformedError(f'subsection "{name}": {error}') from None


def checked_version(part: Description[Any] | Subsection[Any], version: int) -> int:
    """`version`, or MalformedError where it is not read here."""
    if not part.oldest_version <= version <= part.version:
        raise MalformedError(f"came in version {version}, this release reads {part.oldest_version}..{part.version}")
    return version


def explain(description: Description[T], state: T) -> Explained:
    """The vmdesc of what `save` writes for `state`: its vmsd_name, version, fields and needed subsections."""
    explained: Explained = {
        "vmsd_name": description.name,
        "version": description.version,
        "fields": description.layout.explain(state),
    }
    needed = [subsection for subsection in description.subsections if subsection.needed(state)]
    if needed:
        explained["subsections"] = [
            {
                "vmsd_name": subsection.name,
                "version": subsection.version,
                "fields": subsection.layout.explain(state),
            }
            for subsection in needed
        ]
    return explained


def check_descriptors(description: Description[T], state: T, *, section: str | None = None) -> None:
    """Looks at what each descriptor of a state that arrived is, where its kind can be told. Changes nothing.

    Args:
        description: what `state` is.
        state: as loaded.
        section: what errors call it; the description's name if None.

    Raises:
        PeerError: a descriptor is not of the kind that its field declares.
    """
    for placed in _descriptors(description, state):
        if isinstance(placed.kind, FdKind) and not is_of_kind(placed.fd.fileno(), placed.kind):
            raise PeerError(
                f'section "{section or description.name}": field "{placed.path}" is a descriptor of kind '
                f"'{placed.kind}', what came is '{describe_fd(placed.fd.fileno())}'"
            )


class FilePlace(NamedTuple):
    """A file, by device and inode, and the words for the field that leads to it."""

    file: tuple[int, int]
    place: str
    kind: FdKind


def files_of(description: Description[Any], state: Any, *, section: str) -> list[FilePlace]:
    """The files of a state that arrived, of kinds of which each file has one user: sockets and memory."""
    places = []
    for placed in _descriptors(description, state):
        if isinstance(placed.kind, FdKind) and placed.kind is not FdKind.TAP:
            status = os.fstat(placed.fd.fileno())
            place = f'field "{placed.path}" of section "{section}"'
            places.append(FilePlace((status.st_dev, status.st_ino), place, placed.kind))
    return places


def check_distinct(places: Iterable[FilePlace]) -> None:
    """Raises PeerError where two fields lead to one file."""
    seen: dict[tuple[int, int], str] = {}
    for file, place, kind in places:
        if (earlier := seen.setdefault(file, place)) is not place:
            raise PeerError(f"{earlier} and {place} are one and the same {kind}")


def close_descriptors(description: Description[T], state: T) -> None:
    """Closes every descriptor in `state`; those given away already are left alone."""
    close_all(placed.fd for placed in _descriptors(description, state))


def _descriptors(description: Description[T], state: T) -> Iterator[Placed]:
    for layout in (description.layout, *(subsection.layout for subsection in description.subsections)):
        yield from layout.descriptors(state)
