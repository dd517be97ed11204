"""A captured migration stream, explained by its own vmdesc alone.

Owns:        finding the vmdesc, walking the bytes by it, the limits of both.
Never sees:  our descriptions of state, so that streams of other releases are explained too; files.
Read next:   stream.py, which writes such streams; cli/analyze.py for how one is shown.

QEMU's own streams are explained as well: pages of memory are passed over, and what its vmdesc does not describe is an
error.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from localmig.errors import PeerError
from localmig.migration.stream import MACHINE, VMDESC_SIZE_MAX
from localmig.migration.stream_format import MAGIC, VERSION, Mark
from localmig.vmstate import Reader
from localmig.vmstate.blob import MalformedError

STREAM_SIZE_MAX: Final = 256 * 1024 * 1024
"""Bytes of a stream: room for hundreds of localmig's largest, and for QEMU's with a small guest's memory in it."""

VALUE_COUNT_MAX: Final = 1_000_000
"""Values and sections in a stream: 512 NICs have some ten thousand. An array's length stands in the vmdesc, and its
elements may have no bytes at all."""

DEPTH_MAX: Final = 32
"""How deep structs may be nested: deeper than anyone's, and far from what Python can recurse."""

_PARTS: Final = {
    Mark.SECTION_START: "start",
    Mark.SECTION_PART: "part",
    Mark.SECTION_END: "end",
    Mark.SECTION_FULL: "full",
}

# RAM_SAVE_FLAG_… of migration/ram.c, in the low bits of a page's address.
_RAM_ZERO: Final = 0x02
_RAM_MEM_SIZE: Final = 0x04
_RAM_PAGE: Final = 0x08
_RAM_EOS: Final = 0x10
_RAM_CONTINUE: Final = 0x20
_RAM_MULTIFD_FLUSH: Final = 0x200

_U8: Final = struct.Struct(">B")
_U16X2: Final = struct.Struct(">HH")
_U32: Final = struct.Struct(">I")
_U32X2: Final = struct.Struct(">II")
_U64: Final = struct.Struct(">Q")

_VMDESC_HEADER_SIZE: Final = _U8.size + _U32.size

_INTEGER: Final = re.compile(r"(u?)int(?:8|16|32|64)( le)?(?: equal)?")
_INTEGER_SIZE_MAX: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One named value.

    Attributes:
        name: as the vmdesc has it; `[2]` for an element of an array.
        type: as the vmdesc has it; besides "array", "subsection", and "absent" for an optional field without a value.
        offset: of its first byte in the stream.
        value: an integer, a bool, bytes of what is neither, None for an absent one; the fields or elements inside.
        kind: what a descriptor is of, where the stream says it.
    """

    name: str
    type: str
    offset: int
    value: int | bool | bytes | tuple[Field, ...] | None
    kind: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One section.

    Attributes:
        name: of whose state it is.
        instance: tells sections of one name apart.
        part: "full", or "start", "part" or "end" of what travels in several pieces.
        version: of its description.
        description: that description's name, None where it has none.
        offset: of its first byte in the stream.
        size: in bytes, header and footer included.
        fields: what is in it.
    """

    name: str
    instance: int
    part: str
    version: int
    description: str | None
    offset: int
    size: int
    fields: tuple[Field, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """All that a stream says.

    Attributes:
        size: in bytes.
        vmdesc_size: those of them that describe the others.
        configuration: whose stream it is.
        sections: in the order they travelled.
    """

    size: int
    vmdesc_size: int
    configuration: tuple[Field, ...]
    sections: tuple[Section, ...]

    def descriptors(self) -> dict[str, int]:
        """How many descriptors travelled, by kind; "unknown" where the stream does not say it."""
        counts: dict[str, int] = {}
        for section in self.sections:
            for field in _leaves(section.fields):
                if field.type == "fd":
                    kind = field.kind or "unknown"
                    counts[kind] = counts.get(kind, 0) + 1
        return counts


def _leaves(fields: Sequence[Field]) -> Iterator[Field]:
    for field in fields:
        if isinstance(field.value, tuple):
            yield from _leaves(field.value)
        else:
            yield field


def analyze(data: bytes) -> Analysis:
    """Explains a whole stream.

    Raises:
        PeerError: it is none, it was cut or spoilt, or it is beyond a limit; the text says where.
    """
    if len(data) > STREAM_SIZE_MAX:
        raise PeerError(f"has {len(data)} bytes, limit is {STREAM_SIZE_MAX}")
    if data[:4] != _U32.pack(MAGIC):
        raise PeerError(f"is no migration stream: it starts with {data[:4].hex() or 'nothing'}, expected {MAGIC:x}")
    start, vmdesc = _find_vmdesc(data)
    walk = _Walk(data[: start - _VMDESC_HEADER_SIZE], vmdesc)
    configuration, sections = walk.stream()
    return Analysis(
        size=len(data), vmdesc_size=len(data) - start, configuration=configuration, sections=tuple(sections)
    )


def _find_vmdesc(data: bytes) -> tuple[int, Mapping[str, Any]]:
    """Where the JSON begins, and what it says: the last NUL of a stream is in the JSON's size, right before it."""
    start = data.find(b"{", data.rfind(b"\0"))
    header = start - _VMDESC_HEADER_SIZE
    if start < 0 or header < 0 or data[header] != Mark.VMDESCRIPTION:
        raise PeerError("has no description of itself at its end: it was cut, or was never to be read by people")
    (size,) = _U32.unpack_from(data, header + 1)
    if size > VMDESC_SIZE_MAX:
        raise PeerError(f"has a description of {size} bytes, limit is {VMDESC_SIZE_MAX}")
    if start + size != len(data):
        raise PeerError(f"has a description of {size} bytes, and {len(data) - start} are there")
    try:
        vmdesc = json.loads(data[start:])
    except (ValueError, RecursionError) as error:
        raise PeerError(f"has a description that is no JSON: {error}") from error
    if not isinstance(vmdesc, dict):
        raise PeerError("has a description that is no JSON object")
    return start, vmdesc


class _Walk:
    """One way through a stream, from front to back."""

    def __init__(self, data: bytes, vmdesc: Mapping[str, Any]) -> None:
        self._reader = Reader(data)
        self._vmdesc = vmdesc
        self._values_left = VALUE_COUNT_MAX
        self._is_ours = True
        """Whether localmig wrote it: then there are headers to leave out."""
        self._devices: dict[tuple[str, int], Mapping[str, Any]] = {}
        for device in _member(vmdesc, "devices", list):
            if not isinstance(device, dict):
                raise PeerError("has a description whose devices are no objects")
            self._devices[_member(device, "name", str), _number(device, "instance_id")] = device

    def stream(self) -> tuple[tuple[Field, ...], list[Section]]:
        """The configuration, and all sections up to the end."""
        try:
            return self._stream()
        except MalformedError as error:
            raise PeerError(f"was cut or spoilt: {error}") from error

    def _stream(self) -> tuple[tuple[Field, ...], list[Section]]:
        _, version = self._reader.unpack(_U32X2)
        if version != VERSION:
            raise PeerError(f"has version {version} of the format, expected {VERSION}")
        configuration: tuple[Field, ...] = ()
        sections: list[Section] = []
        names: dict[int, tuple[str, int, int]] = {}
        while (mark := self._mark()) is not Mark.EOF:
            match mark:
                case Mark.CONFIGURATION:
                    configuration = self._configuration()
                case Mark.COMMAND:
                    _, size = self._reader.unpack(_U16X2)
                    self._reader.take(size)
                case Mark.SECTION_START | Mark.SECTION_FULL | Mark.SECTION_PART | Mark.SECTION_END:
                    sections.append(self._section(mark, names))
                case _:
                    raise MalformedError(f"{mark.name} stands at offset {self._reader.position - 1}")
        self._reader.finish()
        return configuration, sections

    def _mark(self) -> Mark:
        (byte,) = self._reader.unpack(_U8)
        try:
            return Mark(byte)
        except ValueError:
            raise MalformedError(
                f"byte {byte:#04x} stands at offset {self._reader.position - 1}, where a section begins"
            ) from None

    def _configuration(self) -> tuple[Field, ...]:
        described = self._vmdesc.get("configuration")
        if described is None:
            # QEMU before 10.0 does not describe it.
            self._is_ours = False
            offset = self._reader.position
            (size,) = self._reader.unpack(_U32)
            return (Field(name="name", type="buffer", offset=offset, value=self._reader.take(size)),)
        if not isinstance(described, dict):
            raise PeerError("has a description whose configuration is no object")
        configuration = self._located("configuration", described)
        self._is_ours = any(field.value == MACHINE.encode() for field in configuration)
        return configuration

    def _section(self, mark: Mark, names: dict[int, tuple[str, int, int]]) -> Section:
        offset = self._reader.position - 1
        self._count_value()
        (section_id,) = self._reader.unpack(_U32)
        if mark in (Mark.SECTION_START, Mark.SECTION_FULL):
            name = self._short_text()
            instance, version = self._reader.unpack(_U32X2)
            names[section_id] = name, instance, version
        if section_id not in names:
            raise MalformedError(f"section {section_id} goes on at offset {offset}, and never began")
        name, instance, version = names[section_id]
        device = self._devices.get((name, instance))
        if device is not None:
            self._check_version(name, version, device)
            fields = self._located(f'section "{name}"', device)
        elif name == "ram":
            fields = self._memory()
        else:
            raise PeerError(
                f'section "{name}" instance {instance} at offset {offset} is not described: its end is unknown'
            )
        self._footer(name, section_id)
        return Section(
            name=name,
            instance=instance,
            part=_PARTS[mark],
            version=version,
            description=None if device is None else _optional_text(device, "vmsd_name"),
            offset=offset,
            size=self._reader.position - offset,
            fields=fields,
        )

    def _check_version(self, name: str, version: int, device: Mapping[str, Any]) -> None:
        described = _number(device, "version")
        if version != described:
            raise MalformedError(f'section "{name}" has version {version}, and {described} is described')

    def _footer(self, name: str, section_id: int) -> None:
        # QEMU's oldest machines write none.
        if self._reader.peek() == Mark.SECTION_FOOTER:
            self._reader.take(1)
            (footer_id,) = self._reader.unpack(_U32)
            if footer_id != section_id:
                raise MalformedError(f'section "{name}" is number {section_id}, and ends as number {footer_id}')

    def _located(self, where: str, described: Mapping[str, Any]) -> tuple[Field, ...]:
        try:
            return self._fields(described, 0)
        except MalformedError as error:
            raise MalformedError(f"{where}: {error}") from error

    # -- by the vmdesc ------------------------------------------------------------------------------------------

    def _fields(self, described: Mapping[str, Any], depth: int) -> tuple[Field, ...]:
        if depth > DEPTH_MAX:
            raise MalformedError(f"structs are nested deeper than {DEPTH_MAX}")
        raw: _Raw = []
        for line in _member(described, "fields", list):
            if not isinstance(line, dict):
                raise PeerError("has a description whose fields are no objects")
            name = _member(line, "name", str)
            count = _number(line, "array_len") if "array_len" in line else None
            index = _number(line, "index") if "index" in line else None
            try:
                if count is None:
                    raw.append((index, self._field(line, name, depth)))
                else:
                    raw += [(each, self._field(line, name, depth)) for each in range(count)]
            except MalformedError as error:
                error.add_outer(name)
                raise
        fields = _folded(_without_headers(raw) if self._is_ours else raw)
        for subsection in _member(described, "subsections", list) if "subsections" in described else ():
            fields.append(self._subsection(subsection, depth))
        return tuple(fields)

    def _field(self, line: Mapping[str, Any], name: str, depth: int) -> Field:
        self._count_value()
        offset = self._reader.position
        kind = _member(line, "type", str)
        size = _number(line, "size")
        if kind == "struct":
            value: Any = self._fields(_member(line, "struct", dict), depth + 1)
            if self._reader.position - offset != size:
                raise MalformedError(f"has {self._reader.position - offset} bytes, {size} are described")
        else:
            value = _decoded(kind, self._reader.take(size))
        descriptor_kind = _optional_text(line, "kind") if kind == "fd" else None
        return Field(name=name, type=kind, offset=offset, value=value, kind=descriptor_kind)

    def _subsection(self, described: Any, depth: int) -> Field:
        if not isinstance(described, dict):
            raise PeerError("has a description whose subsections are no objects")
        name = _member(described, "vmsd_name", str)
        offset = self._reader.position
        (mark,) = self._reader.unpack(_U8)
        if mark != Mark.SUBSECTION or self._short_text() != name:
            raise MalformedError(f'subsection "{name}" is described at offset {offset}, and is not there')
        self._reader.unpack(_U32)
        try:
            return Field(name=name, type="subsection", offset=offset, value=self._fields(described, depth + 1))
        except MalformedError as error:
            error.add_outer(name)
            raise

    # -- QEMU's memory ------------------------------------------------------------------------------------------

    def _memory(self) -> tuple[Field, ...]:
        """Passes pages over: their counts, and each block's size."""
        page_size = _number(self._vmdesc, "page_size")
        offset = self._reader.position
        if page_size & (page_size - 1) or page_size <= _RAM_MULTIFD_FLUSH:
            raise PeerError(f"has memory in pages of {page_size} bytes, expected a power of two")
        blocks: list[Field] = []
        pages = zero_pages = 0
        while True:
            (word,) = self._reader.unpack(_U64)
            flags = word & (page_size - 1)
            if flags & _RAM_MEM_SIZE:
                blocks += self._memory_blocks(word - flags)
                flags &= ~_RAM_MEM_SIZE
            if flags & (_RAM_ZERO | _RAM_PAGE):
                if not flags & _RAM_CONTINUE:
                    self._short_text()
                self._reader.take(1 if flags & _RAM_ZERO else page_size)
                pages += bool(flags & _RAM_PAGE)
                zero_pages += bool(flags & _RAM_ZERO)
                flags &= ~(_RAM_ZERO | _RAM_PAGE | _RAM_CONTINUE)
            if flags & ~_RAM_EOS & ~_RAM_MULTIFD_FLUSH:
                raise PeerError(f"has memory with flags {flags:#x} at offset {self._reader.position}: not known here")
            if flags & _RAM_EOS:
                break
        counts = (("pages", pages), ("zero-pages", zero_pages))
        return (*blocks, *(Field(name=name, type="count", offset=offset, value=value) for name, value in counts))

    def _memory_blocks(self, total: int) -> Iterator[Field]:
        while total > 0:
            offset = self._reader.position
            name = self._short_text()
            (size,) = self._reader.unpack(_U64)
            total -= size
            self._count_value()
            yield Field(name=name, type="block", offset=offset, value=size)

    # -- small things -------------------------------------------------------------------------------------------

    def _count_value(self) -> None:
        self._values_left -= 1
        if self._values_left < 0:
            raise PeerError(f"has more than {VALUE_COUNT_MAX} values")

    def _short_text(self) -> str:
        (size,) = self._reader.unpack(_U8)
        return self._reader.take(size).decode(errors="replace")


def _decoded(kind: str, data: bytes) -> int | bool | bytes:
    if kind == "bool":
        return any(data)
    if (integer := _INTEGER.fullmatch(kind)) and 0 < len(data) <= _INTEGER_SIZE_MAX:
        return int.from_bytes(data, "little" if integer[2] else "big", signed=not integer[1])
    return data


_Raw = list[tuple[int | None, Field]]
"""Fields as the vmdesc lists them, each with its index where it is an array's element."""


def _without_headers(raw: _Raw) -> _Raw:
    """Without what localmig puts in front of a value (see vmstate/fields.py): the value says it too."""
    kept: _Raw = []
    arrays: set[str] = set()
    for place, (index, field) in enumerate(raw):
        base, _, header = field.name.rpartition(".")
        following = raw[place + 1][1].name if place + 1 < len(raw) else None
        if header == "count":
            arrays.add(base)
            kept.append((None, replace(field, name=base, type="array", value=())))
        elif header == "present" and not field.value:
            kept.append((index, replace(field, name=base, type="absent", value=None)))
        elif header != "present" and not (header == "size" and following == base):
            kept.append((index, field))
    # An array's only element is explained without an index.
    return [
        (0 if index is None and field.name in arrays and field.type != "array" else index, field)
        for index, field in kept
    ]


def _folded(raw: _Raw) -> list[Field]:
    """The fields, each array in one place."""
    folded: dict[str | int, Field] = {}
    elements: dict[str, list[Field]] = {}
    for place, (index, field) in enumerate(raw):
        if index is None and field.type != "array":
            # By its place: a name may stand twice, QEMU's "unused" for one.
            folded[place] = field
            continue
        if field.name not in elements:
            elements[field.name] = []
            folded[field.name] = replace(field, type="array", kind=None)
        if index is not None:
            elements[field.name].append(replace(field, name=f"[{len(elements[field.name])}]"))
    return [
        replace(field, value=tuple(elements[key])) if isinstance(key, str) else field for key, field in folded.items()
    ]


# -- the vmdesc's members ---------------------------------------------------------------------------------------------

_JSON_NAMES: Final[Mapping[type, str]] = {str: "string", list: "array", dict: "object"}

_NUMBER_MAX: Final = 2**63 - 1
"""No count or size is greater; JSON could have thousands of digits."""


def _member(described: Mapping[str, Any], name: str, kind: type) -> Any:
    value = described.get(name)
    if not isinstance(value, kind):
        raise PeerError(f"has a description whose '{name}' is missing somewhere, or no {_JSON_NAMES[kind]}")
    return value


def _optional_text(described: Mapping[str, Any], name: str) -> str | None:
    return _member(described, name, str) if name in described else None


def _number(described: Mapping[str, Any], name: str) -> int:
    value = described.get(name)
    # bool is an int in Python, but `true` is no number in JSON.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _NUMBER_MAX:
        raise PeerError(f"has a description whose '{name}' is missing somewhere, or no number of 0..{_NUMBER_MAX}")
    return value
