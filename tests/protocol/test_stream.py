"""A whole stream, out of one end and into the other; every piece of its frame spoilt in turn."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from tests.compat.synthetic import Pieces
from tests.compat.vmdesc_reader import find_vmdesc, walk
from tests.compat.writing import begun
from tests.kit.cases import each_case
from tests.unit.test_vmstate import OUTER, OUTERS, Outer

from localmig.errors import ConfigError, PeerError, StateError
from localmig.migration import stream as stream_module
from localmig.migration.stream import IncomingStream, Section, section_name
from localmig.vmstate import Blob, Description, array, explain, text, u16, u64


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rings:
    positions: tuple[int, ...]
    requests: int


DISK = Description(name="disk", version=1, oldest_version=1, state=Disk, fields=(text("path", size_max=4096),))
RINGS = Description(
    name="disk-rings",
    version=4,
    oldest_version=2,
    state=Rings,
    fields=(array("positions", u16, count_max=8), u64("requests")),
)


def disk(part_id: str, path: str = "/dev/null") -> Section:
    return Section(name=section_name(part_id, DISK), description=DISK, state=Disk(path=path))


def rings(part_id: str, *positions: int) -> Section:
    state = Rings(positions=positions, requests=9)
    return Section(name=section_name(part_id, RINGS), description=RINGS, state=state)


def section_of(section: Section, number: int) -> bytes:
    """A section as it stands in a stream."""
    piece = Blob()
    stream_module._append([section], piece, number)
    return bytes(piece.data)


SETUP = [disk("a"), disk("b", "/tmp/b")]
SWITCHOVER = [rings("a", 1, 2), rings("b")]


def written(setup: list[Section] = SETUP, switchover: list[Section] = SWITCHOVER) -> Pieces:
    outgoing, first = begun(setup)
    description = outgoing.describe(switchover)
    return Pieces(bytes(first.data), bytes(outgoing.switchover(switchover).data), description)


def expecting(setup: list[Section] = SETUP, switchover: list[Section] = SWITCHOVER) -> IncomingStream:
    return IncomingStream(
        setup={section.name: section.description for section in setup},
        switchover={section.name: section.description for section in switchover},
    )


def read(pieces: Pieces, incoming: IncomingStream) -> tuple[list[Section], list[Section]]:
    incoming.description(pieces.description)
    return incoming.setup(pieces.setup), incoming.switchover(pieces.switchover)


def test_what_goes_out_comes_in() -> None:
    assert read(written(), expecting()) == (SETUP, SWITCHOVER)


def with_defaults() -> IncomingStream:
    """Expects what `expecting` does; that `b` stays away is no error."""
    return IncomingStream(
        setup={section.name: section.description for section in SETUP},
        switchover={section.name: section.description for section in SWITCHOVER},
        defaults={SETUP[1].name: DEFAULT},
    )


DEFAULT = disk("b", "/default").state


def test_a_section_with_a_default_may_stay_away() -> None:
    default = Section(name=SETUP[1].name, description=SETUP[1].description, state=DEFAULT)
    assert read(written(SETUP[:1]), with_defaults()) == ([SETUP[0], default], SWITCHOVER)
    assert read(written(), with_defaults()) == (SETUP, SWITCHOVER)
    with pytest.raises(PeerError, match='does not tell of section "a/disk"'):
        read(written(SETUP[1:]), with_defaults())


def test_a_section_that_was_told_of_may_not_stay_away() -> None:
    incoming = with_defaults()
    incoming.description(written().description)
    with pytest.raises(PeerError, match='section "b/disk" is missing'):
        incoming.setup(written(SETUP[:1]).setup)


def test_a_section_that_stayed_away_may_come_later() -> None:
    outgoing, first = begun(SETUP[:1])
    incoming = with_defaults()
    incoming.description(outgoing.describe(SWITCHOVER))
    incoming.setup(bytes(first.data))
    again = Blob()
    outgoing.write(SETUP[1], again)
    incoming.description_again(outgoing.describe_again([SETUP[1].name]))
    assert incoming.setup_again(bytes(again.data)) == SETUP[1:]
    switchover = bytes(outgoing.switchover(SWITCHOVER).data)
    assert incoming.switchover(switchover) == SWITCHOVER
    # The recording has it too, and is a stream like any other.
    recorded = b"".join(map(bytes, outgoing.recording(switchover)))
    assert recorded == b"".join(written())


def test_a_stream_may_have_no_sections() -> None:
    assert read(written([], []), expecting([], [])) == ([], [])


def test_sections_may_come_in_any_order() -> None:
    assert read(written(SETUP[::-1], SWITCHOVER[::-1]), expecting()) == (SETUP[::-1], SWITCHOVER[::-1])


def test_sections_of_the_described_shape_need_no_other_description() -> None:
    outgoing, _ = begun(SETUP)
    description = outgoing.describe([rings("a", 7, 8), rings("b")])
    assert outgoing.switchover(SWITCHOVER).data == written().switchover
    assert description == written().description


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param([rings("a", 7), rings("b", 8)], id="same size, another shape"),
        pytest.param([rings("a", 7, 8, 9), rings("b")], id="another size"),
        pytest.param([rings("a", 7, 8)], id="another number of sections"),
        pytest.param([rings("b", 7, 8), rings("a")], id="another order"),
    ],
)
def test_sections_of_another_shape_are_not_written(sample: list[Section]) -> None:
    outgoing, _ = begun(SETUP)
    outgoing.describe(sample)
    with pytest.raises(StateError, match="have another shape than the one that was described"):
        outgoing.switchover(SWITCHOVER)


def test_nothing_is_explained_inside_the_downtime(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = written().switchover
    outgoing, _ = begun(SETUP)
    outgoing.describe([rings("a", 7, 8), rings("b")])
    monkeypatch.setattr(stream_module, "explain", None)
    assert outgoing.switchover(SWITCHOVER).data == expected


def test_a_failed_write_can_be_repeated() -> None:
    outgoing, _ = begun(SETUP)
    outgoing.describe(SWITCHOVER)
    with pytest.raises(StateError, match=r'"a/disk-rings": field "positions\[0\]" is 65536, outside'):
        outgoing.switchover([rings("a", 1 << 16, 2), rings("b")])
    assert outgoing.switchover(SWITCHOVER).data == written().switchover


def test_a_section_name_too_long_for_the_format_is_refused() -> None:
    longest = disk("x" * (127 - len("/disk")))
    begun([longest])
    with pytest.raises(ConfigError, match="has 128 bytes, limit is 127"):
        begun([disk("x" * (128 - len("/disk")))])


def test_a_stream_too_long_to_describe_is_refused_while_the_guest_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "VMDESC_SIZE_MAX", 400)
    outgoing, _ = begun(SETUP)
    with pytest.raises(ConfigError, match=r"the stream's description has \d+ bytes, limit is 400"):
        outgoing.describe(SWITCHOVER)


def test_the_vmdesc_is_found_whatever_its_length() -> None:
    """0x7b is `{`: a length with such a byte would lead a reader astray."""
    dangerous = 0
    for id_size in range(1, 121):
        pieces = written([disk("x" * id_size)], [])
        vmdesc = find_vmdesc(b"".join(pieces))
        assert vmdesc["devices"][0]["name"] == "x" * id_size + "/disk"
        dangerous += pieces.description.endswith(b" ")
    assert dangerous, "no length in the range had to be avoided"


@given(OUTERS)
def test_a_stream_explains_whatever_state_is_in_it(state: Outer) -> None:
    section = Section(name="x/outer", description=OUTER, state=state)
    found = walk(b"".join(written([], [section]))).sections["x/outer"]
    assert found["quad"] == state.quad
    assert found["name"].decode() == state.name
    assert found["inners.count"] == len(state.inners)
    assert found.get("maybe") == state.maybe
    assert found.get("outer/rare", {"rare": 0})["rare"] == state.rare


def test_a_long_name_in_any_script_is_explained() -> None:
    assert walk(b"".join(written([disk("диск")], []))).sections["диск/disk"]["path"] == b"/dev/null"


def section_bytes(
    name: str, body: bytes, *, section_id: int = 0, instance: int = 0, version: int = 1, footer: bytes = b""
) -> bytes:
    header = struct.pack(">BIB", 4, section_id, len(name)) + name.encode()
    return header + struct.pack(">II", instance, version) + body + (footer or struct.pack(">BI", 0x7E, section_id))


START = b"QEVM\0\0\0\3\7\0\0\0\x08localmig"
PATH = b"\0\0\0\1/"
END = b"\0"
ONE_DISK = section_bytes("a/disk", PATH)


def test_the_frame_of_these_tests_is_right() -> None:
    incoming = expecting([disk("a")], [])
    assert incoming.setup(START + ONE_DISK) == [disk("a", "/")]
    assert incoming.switchover(END) == []


@each_case(
    ("setup", "problem"),
    [
        (b"", r"needs 9 bytes at offset \d+, 0 are left"),
        (b"QEVN" + START[4:], "starts with 0x5145564e, expected 0x5145564d"),
        (b"QEVM\0\0\0\2" + START[8:], "has version 2, expected 3"),
        (b"QEVM\0\0\0\3\4" + START[9:], "goes on with 0x04, expected a configuration, 0x07"),
        (START[:9] + b"\0\0\0\2pc", 'is of machine "pc", expected "localmig"'),
        (START[:9] + b"\0\0\0\x41" + b"p" * 0x41, 'field "machine" has 65 bytes, limit is 64'),
        (START, 'section "a/disk" is missing at offset 21'),
        (START + ONE_DISK + section_bytes("a/disk", PATH, section_id=1), 'section "a/disk" came twice'),
        (START + section_bytes("b/disk", PATH), 'section "b/disk" was not expected, but one of a/disk'),
        (START + section_bytes("a/disk", PATH, section_id=1), "is number 1 instance 0, expected number 0"),
        (START + section_bytes("a/disk", PATH, instance=1), "is number 0 instance 1, expected number 0 inst"),
        (START + section_bytes("a/disk", PATH, version=2), r"came in version 2, this release reads 1\.\.1"),
        (START + section_bytes("a/disk", PATH, footer=PATH), "ends with 0x00 303, expected 0x7e 0"),
        (START + section_bytes("a/disk", PATH + b"\1"), "ends with 0x01 2113929216, expected 0x7e 0"),
        (
            START + section_bytes("a/disk", PATH, footer=b"\x7e\0\0\0\1"),
            "ends with 0x7e 1, expected 0x7e 0",
        ),
        (START + ONE_DISK[:-1], r"needs 5 bytes at offset \d+, 4 are left"),
        (START + ONE_DISK + b"\0", "1 bytes are left over"),
        (START + ONE_DISK + END + END, "2 bytes are left over"),
        (START + b"\1" + ONE_DISK[1:], 'section "a/disk" is missing at offset 21'),
    ],
)
def test_a_setup_piece_with_another_frame_is_refused(setup: bytes, problem: str) -> None:
    with pytest.raises(PeerError, match="setup piece of the migration stream: .*" + problem):
        expecting([disk("a")], []).setup(setup)


@pytest.mark.parametrize(
    ("switchover", "problem"),
    [
        (b"", r"needs 1 bytes at offset \d+, 0 are left"),
        (b"\2" + END[1:], "goes on with 0x02, expected a section 0x04 or the end 0x00"),
        (END + b" ", "1 bytes are left over"),
        (ONE_DISK + END, 'section "a/disk" was not expected, but one of none'),
    ],
)
def test_a_switchover_piece_with_another_frame_is_refused(switchover: bytes, problem: str) -> None:
    incoming = expecting([], [])
    incoming.setup(START)
    with pytest.raises(PeerError, match="switchover piece of the migration stream: " + problem):
        incoming.switchover(switchover)


EXPLAINED = {"disk": explain(DISK, Disk(path="/")), "disk-rings": explain(RINGS, Rings(positions=(), requests=0))}


def described(*devices: tuple[object, object, object]) -> bytes:
    rows = [
        {**EXPLAINED.get(str(vmsd_name), {}), "name": name, "vmsd_name": vmsd_name, "version": version}
        for name, vmsd_name, version in devices
    ]
    encoded = json.dumps({"devices": rows}).encode()
    return b"\6" + len(encoded).to_bytes(4) + encoded


A_DISK = ("a/disk", "disk", 1)
B_RINGS = ("b/disk-rings", "disk-rings", 4)


@each_case(
    ("description", "problem"),
    [
        (b"", r"needs 5 bytes at offset 0, 0 are left"),
        (b"\7\0\0\0\2{}", "starts with 0x07, expected a vmdesc, 0x06"),
        (b"\6\0\0\0\2{", r"needs 2 bytes at offset \d+, 1 are left"),
        (described(A_DISK, B_RINGS) + b" ", "1 bytes are left over"),
        (b"\6\0\xa0\0\0{}", "has 10485760 bytes, limit is 10485755"),
        (b"\6\0\0\0\2[]", "tells of no devices"),
        (b"\6\0\0\0\2{}", "tells of no devices"),
        (b"\6\0\0\0\2{]", "is no JSON"),
        (b"\6\0\0\0\0", "is no JSON"),
        (b"\6\0\0\0\2\xff{", "is no JSON"),
        (described(A_DISK), 'does not tell of section "b/disk-rings"'),
        (described(B_RINGS), 'does not tell of section "a/disk"'),
        (described(A_DISK, A_DISK, B_RINGS), "tells of a section twice, or without its name or version"),
        (described(A_DISK, ("b/disk-rings", "disk-rings", "4")), "tells of a section twice, or without"),
        (described(A_DISK, B_RINGS, ("c/disk", "disk", 1)), "tells of a section \"c/disk\" of 'disk', which was not"),
        (described(("a/disk", "tape", 1), B_RINGS), "tells of a section \"a/disk\" of 'tape', which was not"),
        (
            described(("a/disk", "disk", 2), B_RINGS),
            r'tells of version 2 of section "a/disk", this release reads 1\.\.1',
        ),
        (
            described(A_DISK, ("b/disk-rings", "disk-rings", 5)),
            r'tells of version 5 of section "b/disk-rings", this release reads 2\.\.4',
        ),
        (
            described(A_DISK, ("b/disk-rings", "disk-rings", 1)),
            r'tells of version 1 of section "b/disk-rings", this release reads 2\.\.4',
        ),
    ],
)
def test_a_description_of_something_else_is_refused_while_the_guest_runs(description: bytes, problem: str) -> None:
    incoming = expecting([disk("a")], [rings("b")])
    with pytest.raises(PeerError, match="description piece of the migration stream: " + problem):
        incoming.description(description)


def test_a_section_in_another_version_than_described_is_refused() -> None:
    incoming = expecting([], [rings("b")])
    incoming.description(described(("b/disk-rings", "disk-rings", 3)))
    incoming.setup(START)
    with pytest.raises(PeerError, match='section "b/disk-rings" came in version 4, described was 3'):
        incoming.switchover(section_bytes("b/disk-rings", bytes(12), version=4) + END)


def test_a_section_with_other_fields_than_described_is_refused_while_the_guest_runs() -> None:
    description = described(("a/disk", "disk", 1)).replace(b'"path"', b'"file"')
    with pytest.raises(PeerError, match='section "a/disk", as described: has a field "file", in version 1 there are'):
        expecting([disk("a")], []).description(description)


def test_a_section_of_another_size_than_described_is_refused() -> None:
    incoming = expecting([disk("a")], [])
    incoming.description(described(A_DISK))
    with pytest.raises(PeerError, match='section "a/disk" has 6 bytes, described were 5'):
        incoming.setup(START + section_bytes("a/disk", b"\0\0\0\2//"))


def test_every_truncation_of_a_stream_is_refused() -> None:
    pieces = written()
    for size in range(len(pieces.setup)):
        with pytest.raises(PeerError):
            expecting().setup(pieces.setup[:size])
    incoming = expecting()
    for size in range(len(pieces.description)):
        with pytest.raises(PeerError):
            incoming.description(pieces.description[:size])
    for size in range(len(pieces.switchover)):
        incoming = expecting()
        incoming.setup(pieces.setup)
        with pytest.raises(PeerError):
            incoming.switchover(pieces.switchover[:size])


# -- sections that come again -----------------------------------------------------------------------------------


def changed(*sections: Section) -> tuple[bytes, bytes, list[bytes | bytearray]]:
    """The description and the setup piece of sections that changed, and the recording of the whole stream."""
    outgoing, _ = begun(SETUP)
    outgoing.describe(SWITCHOVER)
    piece = Blob()
    for section in sections:
        outgoing.write(section, piece)
    description = outgoing.describe_again([section.name for section in sections])
    return description, bytes(piece.data), outgoing.recording(outgoing.switchover(SWITCHOVER).data)


def prepared() -> IncomingStream:
    incoming, pieces = expecting(), written()
    incoming.description(pieces.description)
    incoming.setup(pieces.setup)
    return incoming


def test_a_section_that_changed_comes_again_in_another_shape_and_the_switchover_follows() -> None:
    incoming = prepared()
    for path in ("/tmp/longer", "/"):
        description, setup, _ = changed(disk("b", path))
        incoming.description_again(description)
        assert incoming.setup_again(setup) == [disk("b", path)]
    assert incoming.switchover(written().switchover) == SWITCHOVER


def test_a_recording_has_each_section_once_as_it_travelled_last() -> None:
    newer = disk("a", "/tmp/newer")
    assert b"".join(changed(newer)[2]) == b"".join(written([newer, SETUP[1]]))
    assert b"".join(changed()[2]) == b"".join(written())


@each_case(
    ("sections", "piece", "problem"),
    [
        ([disk("c")], None, r'tells of a section "c/disk" of \'disk\', which was not expected'),
        (SWITCHOVER[:1], None, r'tells of a section "a/disk-rings" of .*, which was not expected'),
        ([disk("a")], section_of(disk("b"), 1), 'section "b/disk" was not expected, but one of a/disk'),
        (
            [disk("b")],
            section_of(disk("b"), 0),
            'section "b/disk" is number 0 instance 0, expected number 1 instance 0',
        ),
        ([disk("a")], b"", 'section "a/disk" is missing'),
        ([disk("a")], 2 * section_of(disk("a"), 0), 'section "a/disk" came twice'),
        ([disk("a")], section_of(disk("a", "/"), 0), "has 5 bytes, described were 13"),
        ([], section_of(disk("a"), 0), "10 bytes are left over|was not expected, but one of none"),
    ],
)
def test_a_change_that_cannot_be_is_refused(sections: list[Section], piece: bytes | None, problem: str) -> None:
    incoming = prepared()
    described = written(sections, []).description
    if piece is None:
        with pytest.raises(PeerError, match=problem):
            incoming.description_again(described)
        return
    incoming.description_again(described)
    with pytest.raises(PeerError, match=problem):
        incoming.setup_again(piece)


def test_sections_are_numbered_on_across_the_pieces() -> None:
    pieces = written()
    vmdesc: Any = find_vmdesc(b"".join(pieces))
    assert [device["name"] for device in vmdesc["devices"]] == [s.name for s in SETUP + SWITCHOVER]
    fresh = expecting()
    with pytest.raises(PeerError, match="is number 2 instance 0, expected number 0 instance 0"):
        fresh.switchover(pieces.switchover)
