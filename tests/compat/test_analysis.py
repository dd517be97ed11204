"""`localmig analyze` explains every saved stream by its own description, and says what is wrong with a spoilt one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.compat.synthetic import VECTOR, read_vector
from tests.compat.vmdesc_reader import Values, walk
from tests.kit.cases import each_case

from localmig.cli import main
from localmig.cli.analyze import show, to_json
from localmig.errors import PeerError
from localmig.migration.analysis import DEPTH_MAX, VALUE_COUNT_MAX, Field, analyze

VECTORS: Final = Path(__file__).parent / "vectors"
GOLDEN: Final = VECTORS / "synthetic.txt"

SYNTHETIC: Final = b"".join(read_vector(VECTOR))

each_vector = each_case("path", sorted(VECTORS.glob("*.hex")), ids=lambda path: path.stem)


@each_vector
def test_every_vector_is_explained_as_another_reader_explains_it(path: Path) -> None:
    data = b"".join(read_vector(path))
    analysis, walked = analyze(data), walk(data)
    assert sum(analysis.descriptors().values()) == len(walked.descriptors)
    sections = {section.name: section.fields for section in analysis.sections}
    expected = {name: values for name, values in walked.sections.items() if name != "configuration"}
    assert {name: plain(fields) for name, fields in sections.items()} == {
        name: without_headers(values) for name, values in expected.items()
    }
    # Sections lie side by side, and the configuration before them.
    ends = [section.offset + section.size for section in analysis.sections]
    assert [section.offset for section in analysis.sections[1:]] == ends[:-1]


def plain(fields: tuple[Field, ...]) -> Values:
    return {field.name: plain_value(field) for field in fields if field.type != "absent"}


def plain_value(field: Field) -> Any:
    if field.type == "array":
        assert isinstance(field.value, tuple)
        return [plain_value(element) for element in field.value]
    if field.type == "fd":
        return "fd"
    return plain(field.value) if isinstance(field.value, tuple) else field.value


def without_headers(values: Mapping[str, Any]) -> Values:
    """What the other reader found, without what stands in front of values, and each array a list."""
    cleaned: Values = {}
    for name, value in values.items():
        base, _, header = name.rpartition(".")
        if header == "count":
            found = values.get(base, [])
            cleaned[base] = [cleaned_value(each) for each in (found if isinstance(found, list) else [found])]
        elif not base and name not in cleaned:
            cleaned[name] = cleaned_value(value)
    return cleaned


def cleaned_value(value: Any) -> Any:
    return without_headers(value) if isinstance(value, dict) else value


def test_the_text_of_a_stream_is_what_it_was() -> None:
    assert show(analyze(SYNTHETIC)) + "\n" == GOLDEN.read_text()


def test_descriptors_are_told_by_kind() -> None:
    assert analyze(SYNTHETIC).descriptors() == {"memory": 2, "eventfd": 1, "unknown": 1}


def test_json_has_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = tmp_path / "stream"
    stream.write_bytes(SYNTHETIC)
    assert main(["analyze", "--json", str(stream)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == to_json(analyze(SYNTHETIC))
    fields = {field["name"]: field for field in facts["sections"][0]["fields"]}
    assert fields["mac"] == {
        "name": "mac",
        "type": "buffer",
        "offset": fields["mac"]["offset"],
        "value": "525400123456",
    }
    assert [element["value"] for element in fields["vlans"]["value"]] == [1, 5, 4094]
    queues = [{field["name"]: field for field in queue["value"]} for queue in fields["queues"]["value"]]
    assert queues[0]["kick"]["kind"] == "eventfd"
    assert queues[1]["kick"]["value"] is None
    assert queues[1]["label"]["text"] == "tx ✓"


# -- spoilt streams ---------------------------------------------------------------------------------------------------


def explained_or_refused(data: bytes) -> None:
    """Nothing but a PeerError may come of bad bytes."""
    with suppress(PeerError):
        analysis = analyze(data)
        show(analysis)
        json.dumps(to_json(analysis))


@each_case("size", range(0, len(SYNTHETIC), 7))
def test_a_cut_stream_is_refused(size: int) -> None:
    with pytest.raises(PeerError):
        analyze(SYNTHETIC[:size])


@given(st.lists(st.tuples(st.integers(0, len(SYNTHETIC) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes_are_explained_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SYNTHETIC)
    for place, byte in changes:
        data[place] = byte
    explained_or_refused(bytes(data))


@given(st.binary(max_size=400), st.integers(0, 200))
def test_bytes_in_front_of_a_good_description_are_explained_or_refused(noise: bytes, kept: int) -> None:
    start = SYNTHETIC.rindex(b"\0\x06")
    explained_or_refused(SYNTHETIC[:kept] + noise + SYNTHETIC[start:])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_a_description_with_anything_in_it_is_explained_or_refused(data: st.DataObject) -> None:
    vmdesc = described(SYNTHETIC)
    place: Any = vmdesc
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if isinstance(place[key], list | dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(json_values)
        break
    explained_or_refused(with_description(vmdesc))


def described(data: bytes) -> Any:
    return json.loads(data[data.index(b"{", data.rindex(b"\0")) :])


def with_description(vmdesc: Any, head: bytes | None = None) -> bytes:
    encoded = json.dumps(vmdesc).encode()
    while b"{" in struct.pack(">I", len(encoded)):
        encoded += b" "
    if head is None:
        head = SYNTHETIC[: SYNTHETIC.rindex(b"\0\x06") + 1]
    return head + b"\x06" + struct.pack(">I", len(encoded)) + encoded


def huge_array(vmdesc: Any) -> None:
    vmdesc["devices"][0]["fields"][0] |= {"type": "nothing", "size": 0, "array_len": VALUE_COUNT_MAX + 1}


def deep_struct(vmdesc: Any) -> None:
    line: dict[str, Any] = {"name": "leaf", "type": "nothing", "size": 0}
    for _ in range(DEPTH_MAX + 1):
        line = {"name": "inner", "type": "struct", "size": 0, "struct": {"fields": [line]}}
    vmdesc["devices"][0]["fields"][0] = line


def undescribed(vmdesc: Any) -> None:
    del vmdesc["devices"][0]


def no_fields(vmdesc: Any) -> None:
    del vmdesc["devices"][0]["fields"]


def other_version(vmdesc: Any) -> None:
    vmdesc["devices"][0]["version"] = 9


def longer_struct(vmdesc: Any) -> None:
    next(line for line in vmdesc["devices"][0]["fields"] if line["name"] == "link")["size"] += 1


@each_case(
    ("spoil", "problem"),
    [
        (huge_array, f"has more than {VALUE_COUNT_MAX} values"),
        (deep_struct, f"structs are nested deeper than {DEPTH_MAX}"),
        (undescribed, 'section "nic0/synthetic-nic" instance 0 at offset 21 is not described'),
        (no_fields, "has a description whose 'fields' is missing somewhere, or no array"),
        (other_version, 'section "nic0/synthetic-nic" has version 2, and 9 is described'),
        (longer_struct, 'section "nic0/synthetic-nic": field "link" has 5 bytes, 6 are described'),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_description_that_cannot_be_is_refused(spoil: Callable[[Any], None], problem: str) -> None:
    vmdesc = described(SYNTHETIC)
    spoil(vmdesc)
    with pytest.raises(PeerError) as caught:
        analyze(with_description(vmdesc))
    assert problem in str(caught.value)


@each_case(
    ("data", "problem"),
    [
        (b"", "is no migration stream: it starts with nothing"),
        (b"\x7fELF" + bytes(100), "is no migration stream: it starts with 7f454c46"),
        (SYNTHETIC[:200], "has no description of itself at its end: it was cut"),
        (SYNTHETIC[:-1], " are there"),
        (SYNTHETIC[:4] + b"\0\0\0\2" + SYNTHETIC[8:], "has version 2 of the format, expected 3"),
        (SYNTHETIC.replace(b"{", b"[", 1), "has no description of itself"),
        (with_description(0), "has no description of itself"),
    ],
)
def test_what_is_no_whole_stream_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(PeerError) as caught:
        analyze(data)
    assert problem in str(caught.value)


def test_json_that_is_nested_without_end_is_refused() -> None:
    nested = b'{"devices":' + b"[" * 100_000
    data = SYNTHETIC[: SYNTHETIC.rindex(b"\0\x06") + 1] + b"\x06" + struct.pack(">I", len(nested)) + nested
    with pytest.raises(PeerError, match="a description that is no JSON"):
        analyze(data)


def test_a_terminal_sees_no_control_characters_of_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vmdesc = described(SYNTHETIC)
    vmdesc["devices"][0]["fields"][0] |= {"name": "\x1b[2J", "type": "\x1b[31m\ud800"}
    stream = tmp_path / "stream"
    stream.write_bytes(with_description(vmdesc))
    assert main(["analyze", str(stream)]) == 0
    shown = capsys.readouterr().out
    assert r"\x1b[2J" in shown
    assert "\x1b" not in shown
    vmdesc["devices"][0]["fields"][0]["size"] = 10**6
    stream.write_bytes(with_description(vmdesc))
    assert main(["analyze", str(stream)]) == 1
    assert r'field "\x1b[2J" needs 1000000 bytes' in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, problem in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        assert main(["analyze", str(path)]) == 1
        assert capsys.readouterr().err == f"localmig: error: cannot read '{path}': {problem}\n"
