"""The migration stream: one handover as bytes, in QEMU's format, version 3.

Owns:        magic, configuration, section headers and footers, the end mark, the vmdesc around all sections.
Never sees:  sockets, devices, clocks.
Read next:   vmstate/ for the inside of a section, channel.py for how a piece travels.

    setup piece        magic u32, version u32, CONFIGURATION u8, machine name
                       sections that travel while the guest runs
    switchover piece   sections that travel inside the downtime
                       EOF u8
    description piece  VMDESCRIPTION u8, size u32, JSON

    a section          FULL u8, id u32, name (u8 size, UTF-8), instance u32, version u32
                       its fields and subsections
                       FOOTER u8, id u32

The three pieces, one after the other, are a stream that QEMU's scripts/analyze-migration.py reads. The description
stands last in it and travels first: it is by far the longest, and all in it is known before the downtime.

Sections whose parts changed before the downtime travel again, with their numbers, behind a description of their own.
A recording has each section once, as it travelled last.

A setup section that is as it would be without a word may stay away: the reader, who may be of a release that does not
know it, has its defaults then. It travels once it is another.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from localmig.errors import ConfigError, PeerError, StateError
from localmig.fds import OwnedFd
from localmig.migration.stream_format import MAGIC, VERSION, Mark
from localmig.vmstate import NAME_SIZE_MAX, Blob, Description, Reader, check_explained, explain, load, save, text

MACHINE: Final = "localmig"
"""The machine name in the configuration section: a QEMU that gets this stream by mistake refuses it."""

VMDESC_SIZE_MAX: Final = 10 * 1024 * 1024 - 5
"""Bytes of the vmdesc's JSON: analyze-migration.py looks for it and its 5-byte header in the last 10 MiB."""

_PAGE_SIZE: Final = 4096
"""Only there because analyze-migration.py insists on it: no memory is in this stream."""

_U32: Final = struct.Struct(">I")
_FILE_HEADER: Final = struct.Struct(">IIB")
_NAME_HEADER: Final = struct.Struct(">BIB")
_VERSION_HEADER: Final = struct.Struct(">II")
_FOOTER: Final = struct.Struct(">BI")
_VMDESC_HEADER: Final = struct.Struct(">BI")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Configuration:
    machine: str


_CONFIGURATION_SECTION: Final = Description(
    name="configuration",
    version=1,
    oldest_version=1,
    state=_Configuration,
    fields=(text("machine", size_max=64),),  # QEMU's longest machine names have half of that
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One part's state, on its way.

    Attributes:
        name: unique in the stream, see `section_name`.
        description: what `state` is.
        state: the state; once read, whoever takes the section owns the descriptors in it.
    """

    name: str
    description: Description[Any]
    state: Any


def section_name(part_id: str, description: Description[Any]) -> str:
    """The name of a part's section: the part's id, a slash, the description's name."""
    return f"{part_id}/{description.name}"


class OutgoingStream:
    """Writes one stream: `start`, `write` for setup sections, `describe` while the guest runs, then `switchover`."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        """Of each setup section, in the order in which they were written first."""
        self._start = b""
        self._written: dict[str, bytes] = {}
        """Each setup section as it was written last."""
        self._explained: dict[str, bytes] = {}
        """The vmdesc of each setup section, likewise."""
        self._explained_switchover: list[bytes] = []
        self._described_shape: list[Any] | None = None

    def start(self) -> Blob:
        """The beginning of the setup piece, to which `write` appends the sections."""
        piece = Blob()
        piece.data += _FILE_HEADER.pack(MAGIC, VERSION, Mark.CONFIGURATION)
        save(_CONFIGURATION_SECTION, _Configuration(machine=MACHINE), piece)
        self._start = bytes(piece.data)
        return piece

    def write(self, section: Section, piece: Blob) -> None:
        """Appends a setup section. Its descriptors are lent: the state keeps them open until the piece is sent.

        A section that changed is written again, into a piece of its own that has no beginning.

        Raises:
            StateError: the state does not fit its description, or a descriptor of it was given away.
            ConfigError: the section's name is too long for the format.
        """
        begin = len(piece.data)
        _append([section], piece, self._numbers.setdefault(section.name, len(self._numbers)))
        self._written[section.name] = bytes(piece.data[begin:])
        self._explained[section.name] = _explain(section)

    def has(self, name: str) -> bool:
        """Whether a setup section was written."""
        return name in self._numbers

    def describe(self, sections: Sequence[Section]) -> bytes:
        """The description piece, for switchover sections of the same shape as `sections`.

        Raises:
            StateError: as `write`.
            ConfigError: as `write`, or there are too many sections to describe.
        """
        sample = Blob()
        _append(sections, sample, len(self._numbers))
        self._explained_switchover = [_explain(section) for section in sections]
        self._described_shape = _shape(sections, sample)
        return self._describe_all()

    def describe_again(self, names: Iterable[str]) -> bytes:
        """The description of setup sections that were written again."""
        return _description([self._explained[name] for name in names])

    def recording(self, switchover: bytes | bytearray) -> list[bytes | bytearray]:
        """The whole stream in its own order, with `switchover` as its switchover piece."""
        sections = (self._written[name] for name in self._numbers)
        return [self._start, *sections, switchover, self._describe_all()]

    def _describe_all(self) -> bytes:
        return _description([*(self._explained[name] for name in self._numbers), *self._explained_switchover])

    def switchover(self, sections: Sequence[Section]) -> Blob:
        """The switchover piece, of sections as they were described.

        Raises:
            StateError: as `write`, or the sections have another shape than the one that was described.
        """
        piece = Blob()
        _append(sections, piece, len(self._numbers))
        if _shape(sections, piece) != self._described_shape:
            raise StateError("the switchover sections have another shape than the one that was described")
        piece.data.append(Mark.EOF)
        return piece


def _append(sections: Sequence[Section], piece: Blob, first_id: int) -> None:
    for section_id, section in enumerate(sections, first_id):
        name = section.name.encode()
        if len(name) > NAME_SIZE_MAX:
            raise ConfigError(f'section name "{section.name}" has {len(name)} bytes, limit is {NAME_SIZE_MAX}')
        piece.data += _NAME_HEADER.pack(Mark.SECTION_FULL, section_id, len(name)) + name
        piece.data += _VERSION_HEADER.pack(0, section.description.version)
        save(section.description, section.state, piece, section=section.name)
        piece.data += _FOOTER.pack(Mark.SECTION_FOOTER, section_id)


def _shape(sections: Sequence[Section], piece: Blob) -> list[Any]:
    """What the vmdesc of the sections in `piece` depends on."""
    return [*piece.shape, *((section.name, section.description) for section in sections)]


def _explain(section: Section) -> bytes:
    """The vmdesc of one section."""
    explained = explain(section.description, section.state)
    return _json({"name": section.name, "instance_id": 0, **explained})


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _description(explained: Sequence[bytes]) -> bytes:
    """The description piece, of sections' vmdescs.

    analyze-migration.py looks for the last NUL of the file and takes the first `{` behind it for the beginning. The
    last NUL is in the u32 size before the JSON: so the JSON has none, and no byte of the size may be a `{`.
    """
    configuration = explain(_CONFIGURATION_SECTION, _Configuration(machine=MACHINE))
    # Put together from its parts, because one call for thousands of sections would hold the event loop up.
    head = _json({"configuration": configuration, "page_size": _PAGE_SIZE})
    vmdesc = head[:-1] + b',"devices":[' + b",".join(explained) + b"]}"
    while b"{" in _U32.pack(len(vmdesc)):
        vmdesc += b" "
    if len(vmdesc) > VMDESC_SIZE_MAX:
        raise ConfigError(f"the stream's description has {len(vmdesc)} bytes, limit is {VMDESC_SIZE_MAX}")
    return _VMDESC_HEADER.pack(Mark.VMDESCRIPTION, len(vmdesc)) + vmdesc


class _Described(NamedTuple):
    version: int
    size: int


class IncomingStream:
    """Reads one stream: `description`, then `setup`, then `switchover`.

    Args:
        setup: descriptions by name of the sections that the setup piece must have, each once, in any order.
        switchover: likewise for the switchover piece.
        defaults: by name the state of a setup section that may stay away.
    """

    def __init__(
        self,
        *,
        setup: Mapping[str, Description[Any]],
        switchover: Mapping[str, Description[Any]],
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self._expected_setup = setup
        self._expected_switchover = switchover
        self._defaults = defaults or {}
        self._numbers: dict[str, int] = {}
        """Of each section that came."""
        self._described: dict[str, _Described] = {}
        self._coming_again: Mapping[str, Description[Any]] = {}

    def description(self, data: bytes) -> None:
        """Reads the description piece: it must tell of the sections that are expected, in versions that can be read,
        with the fields that are read in them.

        So whatever cannot be read is found while the guest runs, and not inside the downtime.

        Raises:
            PeerError: it is none, or it tells of other sections, versions or fields.
        """
        expected = {**self._expected_setup, **self._expected_switchover}
        with _reading("description", data, ()) as reader:
            described = _read_vmdesc(reader)
            for name in expected:
                if name not in described and name not in self._defaults:
                    raise PeerError(f'does not tell of section "{name}"')
            self._check_described(described, expected)

    def description_again(self, data: bytes) -> None:
        """Reads the description of some setup sections that come again. PeerError as `description`."""
        with _reading("description", data, ()) as reader:
            described = _read_vmdesc(reader)
            self._check_described(described, self._expected_setup)
        self._coming_again = {name: self._expected_setup[name] for name in described}

    def _check_described(
        self, described: Mapping[str, dict[str, Any]], expected: Mapping[str, Description[Any]]
    ) -> None:
        alike: dict[str, Any] | None = None
        size = 0
        for name, explained in described.items():
            description = expected.get(name)
            vmsd_name, version = explained["vmsd_name"], explained["version"]
            if description is None or vmsd_name != description.name:
                raise PeerError(
                    f'tells of a section "{name}" of {vmsd_name!r}, which was not expected: hand over to a release '
                    "that knows this state"
                )
            if not description.oldest_version <= version <= description.version:
                raise PeerError(
                    f'tells of version {version} of section "{name}", this release reads '
                    f"{description.oldest_version}..{description.version}"
                )
            if explained != alike:  # most NICs are told of as the one before them
                size, alike = check_explained(description, version, explained, section=name), explained
            self._described[name] = _Described(version, size)

    def setup(self, data: bytes, fds: Iterable[tuple[int, OwnedFd]] = ()) -> list[Section]:
        """Reads the setup piece; the caller owns the descriptors in the states.

        A section that may stay away, and did, is there with its default.

        Args:
            data: the whole piece.
            fds: (offset in `data`, descriptor) of each that came with it.

        Raises:
            PeerError: the piece is not what was expected; every descriptor of it is closed.
        """
        with _reading("setup", data, fds) as reader:
            _read_start(reader)
            away = self._defaults.keys() - self._described.keys()
            sections = self._read_sections(reader, self._expected_setup, may_be_away=away)
        came = {section.name for section in sections}
        return sections + [
            Section(name=name, description=self._expected_setup[name], state=self._defaults[name])
            for name in self._defaults
            if name not in came
        ]

    def setup_again(self, data: bytes, fds: Iterable[tuple[int, OwnedFd]] = ()) -> list[Section]:
        """Reads the sections that `description_again` told of; the rest is as in `setup`."""
        with _reading("setup", data, fds) as reader:
            return self._read_sections(reader, self._coming_again)

    def switchover(self, data: bytes, fds: Iterable[tuple[int, OwnedFd]] = ()) -> list[Section]:
        """Reads the switchover piece; the rest is as in `setup`."""
        with _reading("switchover", data, fds) as reader:
            sections = self._read_sections(reader, self._expected_switchover)
            end = reader.take(1)[0]
            if end != Mark.EOF:
                raise PeerError(
                    f"goes on with {end:#04x}, expected a section {Mark.SECTION_FULL:#04x} or the end {Mark.EOF:#04x}"
                )
            return sections

    def _read_sections(
        self, reader: Reader, expected: Mapping[str, Description[Any]], *, may_be_away: AbstractSet[str] = frozenset()
    ) -> list[Section]:
        sections: dict[str, Section] = {}
        while reader.peek() == Mark.SECTION_FULL:
            section = self._read_section(reader, expected, sections)
            sections[section.name] = section
        missing = [name for name in expected if name not in sections and name not in may_be_away]
        if missing:
            raise PeerError(f'section "{missing[0]}" is missing at offset {reader.position}')
        return list(sections.values())

    def _read_section(
        self, reader: Reader, expected: Mapping[str, Description[Any]], before: Mapping[str, Section]
    ) -> Section:
        _, section_id, name_size = reader.unpack(_NAME_HEADER)
        name = reader.take(name_size).decode(errors="replace")
        instance, version = reader.unpack(_VERSION_HEADER)
        description = expected.get(name)
        if description is None:
            raise PeerError(f'section "{name}" was not expected, but one of {", ".join(expected) or "none"}')
        if name in before:
            raise PeerError(f'section "{name}" came twice')
        number = self._numbers.setdefault(name, len(self._numbers))
        if section_id != number or instance:
            raise PeerError(
                f'section "{name}" is number {section_id} instance {instance}, expected number {number} instance 0'
            )
        described = self._described.get(name)
        if described is not None and version != described.version:
            raise PeerError(f'section "{name}" came in version {version}, described was {described.version}')
        start = reader.position
        state = load(description, version, reader, section=name)
        if described is not None and reader.position - start != described.size:
            raise PeerError(f'section "{name}" has {reader.position - start} bytes, described were {described.size}')
        marker, footer_id = reader.unpack(_FOOTER)
        if marker != Mark.SECTION_FOOTER or footer_id != section_id:
            raise PeerError(
                f'section "{name}" ends with {marker:#04x} {footer_id}, '
                f"expected {Mark.SECTION_FOOTER:#04x} {section_id}"
            )
        return Section(name=name, description=description, state=state)


@contextlib.contextmanager
def _reading(piece: str, data: bytes, fds: Iterable[tuple[int, OwnedFd]]) -> Iterator[Reader]:
    """All of `data` is read inside, or every descriptor is closed."""
    try:
        reader = Reader(data, fds)
        try:
            yield reader
            reader.finish()
        except BaseException:
            reader.close()
            raise
    except PeerError as error:
        raise PeerError(f"{piece} piece of the migration stream: {error}") from None


def _read_start(reader: Reader) -> None:
    magic, version, marker = reader.unpack(_FILE_HEADER)
    if magic != MAGIC:
        raise PeerError(f"starts with {magic:#010x}, expected {MAGIC:#010x}")
    if version != VERSION:
        raise PeerError(f"has version {version}, expected {VERSION}")
    if marker != Mark.CONFIGURATION:
        raise PeerError(f"goes on with {marker:#04x}, expected a configuration, {Mark.CONFIGURATION:#04x}")
    machine = load(_CONFIGURATION_SECTION, _CONFIGURATION_SECTION.version, reader).machine
    if machine != MACHINE:
        raise PeerError(f'is of machine "{machine}", expected "{MACHINE}"')


def _read_vmdesc(reader: Reader) -> dict[str, dict[str, Any]]:
    """What is told of each section, by its name and without it; it has a "vmsd_name" and a "version"."""
    marker, size = reader.unpack(_VMDESC_HEADER)
    if marker != Mark.VMDESCRIPTION:
        raise PeerError(f"starts with {marker:#04x}, expected a vmdesc, {Mark.VMDESCRIPTION:#04x}")
    if size > VMDESC_SIZE_MAX:
        raise PeerError(f"has {size} bytes, limit is {VMDESC_SIZE_MAX}")
    encoded = reader.take(size)
    try:
        vmdesc = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise PeerError(f"is no JSON: {error}") from None
    described: dict[str, dict[str, Any]] = {}
    match vmdesc:
        case {"devices": list(devices)}:
            for device in devices:
                match device:
                    case {"name": str(name), "vmsd_name": _, "version": int(_)} if name not in described:
                        described[name] = {key: told for key, told in device.items() if key != "name"}
                    case _:
                        raise PeerError("tells of a section twice, or without its name or version")
        case _:
            raise PeerError("tells of no devices")
    return described
