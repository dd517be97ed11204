"""Declared state without descriptors: what is saved is loaded, and nothing else is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kit.cases import each_case

from localmig.errors import PeerError, StateError
from localmig.vmstate import (
    Blob,
    Description,
    Field,
    Reader,
    Subsection,
    array,
    blob,
    boolean,
    check_explained,
    explain,
    fd,
    load,
    numbers,
    optional,
    save,
    struct,
    text,
    u8,
    u16,
    u32,
    u64,
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    number: int
    flag: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    byte: int
    word: int
    long: int
    quad: int
    flag: bool
    name: str
    data: bytes
    inner: Inner
    inners: tuple[Inner, ...]
    numbers: tuple[int, ...]
    maybe: int | None
    names: tuple[str | None, ...]
    added: int = 7
    rare: int = 0
    odd: str = ""


INNER = Description(name="inner", version=1, oldest_version=1, state=Inner, fields=(u16("number"), boolean("flag")))
RARE = Subsection[Outer](
    name="outer/rare",
    version=3,
    oldest_version=2,
    needed=lambda state: state.rare != 0,
    fields=(u64("rare"),),
)
ODD = Subsection[Outer](
    name="outer/odd",
    version=1,
    oldest_version=1,
    needed=lambda state: bool(state.odd),
    fields=(text("odd", size_max=12),),
)
OUTER = Description(
    name="outer",
    version=3,
    oldest_version=2,
    state=Outer,
    fields=(
        u8("byte"),
        u16("word"),
        u32("long"),
        u64("quad"),
        boolean("flag"),
        text("name", size_max=12),
        blob("data", size_max=4),
        struct("inner", INNER),
        array("inners", INNER, count_max=3),
        array("numbers", u32, count_max=3),
        optional(u64("maybe")),
        array("names", lambda name: optional(text(name, size_max=12)), count_max=2),
        u16("added", since=3),
    ),
    subsections=(RARE, ODD),
)


def uint(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


INNERS = st.builds(Inner, number=uint(16), flag=st.booleans())
OUTERS = st.builds(
    Outer,
    byte=uint(8),
    word=uint(16),
    long=uint(32),
    quad=uint(64),
    flag=st.booleans(),
    name=st.text(max_size=3),
    data=st.binary(max_size=4),
    inner=INNERS,
    inners=st.lists(INNERS, max_size=3).map(tuple),
    numbers=st.lists(uint(32), max_size=3).map(tuple),
    maybe=st.none() | uint(64),
    names=st.lists(st.none() | st.text(max_size=3), max_size=2).map(tuple),
    added=uint(16),
    rare=uint(64),
    odd=st.text(max_size=3),
)
BASE = Outer(
    byte=1,
    word=2,
    long=3,
    quad=4,
    flag=True,
    name="ab",
    data=b"cd",
    inner=Inner(number=5, flag=False),
    inners=(Inner(number=6, flag=True), Inner(number=7, flag=False)),
    numbers=(8, 9),
    maybe=10,
    names=("e", None),
    added=11,
    rare=12,
    odd="f",
)


def saved(description: Description[T], state: T) -> Blob:
    into = Blob()
    save(description, state, into)
    return into


def loaded(description: Description[T], version: int, data: bytes | bytearray) -> T:
    reader = Reader(data)
    state = load(description, version, reader)
    reader.finish()
    return state


@given(OUTERS)
def test_what_is_saved_is_loaded(state: Outer) -> None:
    assert loaded(OUTER, 3, saved(OUTER, state).data) == state


@given(OUTERS, OUTERS)
def test_equal_shapes_are_explained_alike(one: Outer, other: Outer) -> None:
    same_shape = saved(OUTER, one).shape == saved(OUTER, other).shape
    assert not same_shape or explain(OUTER, one) == explain(OUTER, other)


@given(OUTERS)
def test_the_explanation_accounts_for_every_byte(state: Outer) -> None:
    explained = explain(OUTER, state)
    headers = sum(1 + 1 + len(part["vmsd_name"]) + 4 for part in explained.get("subsections", ()))
    assert explained_size(explained) + headers == len(saved(OUTER, state).data)


@given(OUTERS)
def test_what_is_explained_here_is_understood_here(state: Outer) -> None:
    assert check_explained(OUTER, 3, explain(OUTER, state)) == len(saved(OUTER, state).data)


def explained_size(part: dict[str, Any]) -> int:
    fields: int = sum(line["size"] * line.get("array_len", 1) for line in part["fields"])
    return fields + sum(explained_size(subsection) for subsection in part.get("subsections", ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class One:
    value: Any


def one(field: Field) -> Description[One]:
    return Description(name="one", version=1, oldest_version=1, state=One, fields=(field,))


@each_case(
    ("field", "value", "data"),
    [
        (u8("value"), 0xAB, "ab"),
        (u16("value"), 0xABCD, "abcd"),
        (u32("value"), 0xABCD, "0000abcd"),
        (u64("value"), 0xABCD, "000000000000abcd"),
        (boolean("value"), True, "01"),
        (boolean("value"), False, "00"),
        (text("value", size_max=9), "é", "00000002c3a9"),
        (blob("value", size_max=9), b"\0{", "00000002007b"),
        (struct("value", INNER), Inner(number=1, flag=True), "000101"),
        (array("value", INNER, count_max=9), (Inner(number=1, flag=True),), "00000001000101"),
        (array("value", u8, count_max=9), (1, 2), "000000020102"),
        (array("value", u8, count_max=9), (), "00000000"),
        (numbers("value", u8, count_max=9), b"\1\2", "000000020102"),
        (numbers("value", u64, count_max=1), bytes(7) + b"\1", "000000010000000000000001"),
        (numbers("value", u16, count_max=9), b"", "00000000"),
        (optional(u8("value")), None, "00"),
        (optional(u8("value")), 0, "0100"),
    ],
)
def test_each_kind_has_its_bytes(field: Field, value: object, data: str) -> None:
    assert saved(one(field), One(value=value)).data.hex() == data
    assert loaded(one(field), 1, bytes.fromhex(data)).value == value


@each_case(
    ("field", "value", "lines"),
    [
        (u16("value"), 1, [{"name": "value", "type": "uint16", "size": 2}]),
        (boolean("value"), True, [{"name": "value", "type": "bool", "size": 1}]),
        (
            text("value", size_max=9),
            "é",
            [
                {"name": "value.size", "type": "uint32", "size": 4},
                {"name": "value", "type": "buffer", "size": 2},
            ],
        ),
        (
            array("value", u8, count_max=9),
            (1, 2),
            [
                {"name": "value.count", "type": "uint32", "size": 4},
                {"name": "value", "type": "uint8", "size": 1, "array_len": 2},
            ],
        ),
        (
            array("value", u8, count_max=9),
            (1,),
            [
                {"name": "value.count", "type": "uint32", "size": 4},
                {"name": "value", "type": "uint8", "size": 1},
            ],
        ),
        (
            numbers("value", u16, count_max=9),
            bytes(6),
            [
                {"name": "value.count", "type": "uint32", "size": 4},
                {"name": "value", "type": "uint16", "size": 2, "array_len": 3},
            ],
        ),
        (numbers("value", u16, count_max=9), b"", [{"name": "value.count", "type": "uint32", "size": 4}]),
        (
            array("value", lambda name: blob(name, size_max=9), count_max=9),
            (b"a", b"bc"),
            [
                {"name": "value.count", "type": "uint32", "size": 4},
                {"name": "value.size", "type": "uint32", "size": 4, "index": 0},
                {"name": "value", "type": "buffer", "size": 1, "index": 0},
                {"name": "value.size", "type": "uint32", "size": 4, "index": 1},
                {"name": "value", "type": "buffer", "size": 2, "index": 1},
            ],
        ),
        # A descriptor is explained without a look at it.
        (fd("value"), None, [{"name": "value", "type": "fd", "size": 1}]),
        (fd("value", kind="eventfd"), None, [{"name": "value", "type": "fd", "size": 1, "kind": "eventfd"}]),
        (optional(u8("value")), None, [{"name": "value.present", "type": "bool", "size": 1}]),
        (
            optional(u8("value")),
            1,
            [
                {"name": "value.present", "type": "bool", "size": 1},
                {"name": "value", "type": "uint8", "size": 1},
            ],
        ),
        (
            struct("value", INNER),
            Inner(number=1, flag=True),
            [
                {
                    "name": "value",
                    "type": "struct",
                    "struct": {
                        "vmsd_name": "inner",
                        "version": 1,
                        "fields": [
                            {"name": "number", "type": "uint16", "size": 2},
                            {"name": "flag", "type": "bool", "size": 1},
                        ],
                    },
                    "size": 3,
                }
            ],
        ),
    ],
)
def test_each_kind_has_its_lines_in_the_vmdesc(field: Field, value: object, lines: list[dict[str, object]]) -> None:
    explained = explain(one(field), One(value=value))
    assert explained == {"vmsd_name": "one", "version": 1, "fields": lines}


@each_case(
    ("field", "data", "problem"),
    [
        (boolean("value"), "02", 'field "value" is 2, a bool is 0 or 1'),
        (array("value", boolean, count_max=2), "000000020103", r'"value\[1\]" is 3, a bool is 0 or 1'),
        (optional(u8("value")), "0201", 'field "value" has presence 2, which is 0 or 1'),
        (text("value", size_max=2), "00000003616263", 'field "value" has 3 bytes, limit is 2'),
        (text("value", size_max=2), "00000001ff", 'field "value" is not UTF-8: invalid start byte at byte 0'),
        (blob("value", size_max=2), "ffffffff", 'field "value" has 4294967295 bytes, limit is 2'),
        (array("value", u8, count_max=2), "00000003010203", 'field "value" has 3 elements, limit is 2'),
        (numbers("value", u8, count_max=2), "00000003010203", 'field "value" has 3 elements, limit is 2'),
        (numbers("value", u64, count_max=2), "0000000200", r'field "value" needs 16 bytes at offset \d+, 1 are left'),
        (
            array("value", INNER, count_max=2),
            "00000002000100000102",
            r'field "value\[1\].flag" is 2, a bool is 0 or 1',
        ),
        (
            array("value", INNER, count_max=2),
            "000000020001000001",
            r'"value\[1\].flag" needs 1 bytes at offset \d+, 0 are left',
        ),
        (u64("value"), "00", r'section "one": field "value" needs 8 bytes at offset \d+, 1 are left'),
        (u8("value"), "0105", r"needs 2 bytes at offset \d+, 1 are left"),
        (u8("value"), "0106", "1 bytes are left over"),
    ],
)
def test_what_was_not_declared_is_refused_by_its_field(field: Field, data: str, problem: str) -> None:
    with pytest.raises(PeerError, match=problem):
        loaded(one(field), 1, bytes.fromhex(data))


@each_case(
    ("field", "value", "problem"),
    [
        (u8("value"), 256, 'section "one": field "value" is 256, outside 0..255'),
        (u8("value"), -1, 'field "value" is -1, outside 0..255'),
        (u8("value"), None, 'field "value" is None, outside 0..255'),
        (boolean("value"), 2, 'field "value" is 2, outside 0..1'),
        (text("value", size_max=2), "abc", 'field "value" has 3 bytes, limit is 2'),
        (array("value", u8, count_max=2), (1, 2, 3), 'field "value" has 3 elements, limit is 2'),
        (array("value", u8, count_max=2), (1, 256), r'field "value\[1\]" is 256, outside 0..255'),
        (numbers("value", u8, count_max=2), b"abc", 'field "value" has 3 elements, limit is 2'),
        (numbers("value", u32, count_max=2), b"abc", 'field "value" has 3 bytes, an element has 4'),
        (
            optional(struct("value", INNER)),
            Inner(number=1 << 16, flag=True),
            '"value.number" is 65536, outside 0..65535',
        ),
    ],
)
def test_what_does_not_fit_is_not_saved(field: Field, value: object, problem: str) -> None:
    into = Blob()
    save(one(u8("value")), One(value=1), into)
    with pytest.raises(StateError, match=problem):
        save(one(field), One(value=value), into)
    assert into.data == b"\1"


def test_every_truncation_is_refused() -> None:
    data = saved(OUTER, BASE).data
    main_size = explained_size({"fields": explain(OUTER, BASE)["fields"]})
    rare_end = data.rindex(b"\5\x09outer/odd")
    for size in range(len(data)):
        # State without its subsections is whole: whether one is missing, only who knows the length can tell.
        if size not in (main_size, rare_end):
            with pytest.raises(PeerError, match='section "outer": '):
                loaded(OUTER, 3, data[:size])


def test_no_spoilt_byte_does_more_than_be_refused() -> None:
    data = saved(OUTER, BASE).data
    refused = 0
    for offset in range(len(data)):
        for value in {0, 1, 5, 0x7F, 0xFF, data[offset] ^ 1}:
            spoilt = bytearray(data)
            spoilt[offset] = value
            try:
                state = loaded(OUTER, 3, spoilt)
            except PeerError:
                refused += 1
            else:
                assert loaded(OUTER, 3, saved(OUTER, state).data) == state
    assert refused


def test_an_older_version_is_filled_up_with_defaults() -> None:
    # Version 2 is version 3 without the two bytes of `added` in the end.
    state = loaded(OUTER, 2, saved(OUTER, without_subsections()).data[:-2])
    assert (state.added, state.names) == (7, BASE.names)


def without_subsections() -> Outer:
    attributes = {name: getattr(BASE, name) for name in Outer.__slots__}
    return Outer(**{**attributes, "rare": 0, "odd": ""})


@pytest.mark.parametrize("version", [0, 1, 4, 0xFFFF_FFFF])
def test_other_versions_are_refused_with_both_values(version: int) -> None:
    with pytest.raises(PeerError, match=rf'"outer": came in version {version}, this release reads 2\.\.3'):
        loaded(OUTER, version, saved(OUTER, BASE).data)


def test_a_subsection_travels_only_while_it_is_needed() -> None:
    plain = saved(OUTER, without_subsections()).data
    both = saved(OUTER, BASE).data
    assert both[: len(plain)] == plain
    assert both[len(plain) :] == (b"\5\x0aouter/rare\0\0\0\3\0\0\0\0\0\0\0\x0c" + b"\5\x09outer/odd\0\0\0\1\0\0\0\1f")
    assert loaded(OUTER, 3, plain) == without_subsections()


@each_case(
    ("extra", "problem"),
    [
        (b"\5\x09outer/new\0\0\0\1", 'has a subsection "outer/new", expected outer/rare or outer/odd'),
        (
            b"\5\x0aouter/rare\0\0\0\1",
            r'subsection "outer/rare": came in version 1, this release reads 2\.\.3',
        ),
        (b"\5\x0aouter/rare\0\0\0\4", 'subsection "outer/rare": came in version 4'),
        (
            b"\5\x0aouter/rare\0\0\0\2\1",
            r'subsection "outer/rare": field "rare" needs 8 bytes at offset \d+, 1 are left',
        ),
        (b"\5\x09outer/odd\0\0\0\1\0\0\0\0" * 2, 'has a subsection "outer/odd", expected outer/rare'),
        (b"\5\x09outer", r'section "outer": needs 9 bytes at offset \d+, 5 are left'),
        (b"\5", r'section "outer": needs 2 bytes at offset \d+, 1 are left'),
    ],
)
def test_a_wrong_subsection_is_refused(extra: bytes, problem: str) -> None:
    with pytest.raises(PeerError, match=problem):
        loaded(OUTER, 3, saved(OUTER, without_subsections()).data + extra)


def test_an_older_version_is_explained_without_what_came_later() -> None:
    explained = explain(OUTER, without_subsections())
    explained["fields"].pop()
    assert check_explained(OUTER, 2, explained) == len(saved(OUTER, without_subsections()).data) - 2
    with pytest.raises(PeerError, match=r"has the fields .*, names, expected .*, names, added"):
        check_explained(OUTER, 3, explained)
    with pytest.raises(PeerError, match='has a field "added", in version 2 there are byte, word'):
        check_explained(OUTER, 2, explain(OUTER, BASE))


@each_case(
    ("place", "told", "problem"),
    [
        (("fields", 1, "type"), "uint32", 'field "word" is uint32 of 2 bytes, expected uint16 of 2'),
        (("fields", 1, "size"), 4, 'field "word" is uint16 of 4 bytes, expected uint16 of 2'),
        (("fields", 1, "size"), "2", "field \"word\" is uint16 of '2' bytes, expected uint16 of 2"),
        (("fields", 6, "size"), -1, 'field "name" is buffer of -1 bytes, expected buffer'),
        (("fields", 1, "name"), "width", 'has a field "width", in version 3 there are byte, word'),
        (("fields", 1, "name"), "byte", 'has field "byte" twice'),
        (("fields", 6, "size"), 2**32, 'field "name" is buffer of 4294967296 bytes, expected buffer'),
        (("fields", 11, "array_len"), 2**32, 'field "inners" has 4294967296 elements'),
        (("fields", 1, "name"), [], "has a field without name, type or size"),
        (("fields", 1), 7, "has a field without name, type or size"),
        (("fields", 6, "type"), "uint8", 'field "name" is uint8 of 2 bytes, expected buffer'),
        (("fields", 9, "size"), 4, 'field "inner" has 4 bytes, its fields have 3'),
        (("fields", 9, "struct"), [], 'field "inner" is a struct without fields'),
        (("fields", 9, "struct"), {}, 'field "inner" has no list of fields'),
        (("fields", 9, "struct", "fields", 0, "size"), 1, 'field "inner.number" is uint16 of 1 bytes, expected'),
        (("fields", 9, "struct", "fields", 0, "name"), "flag", 'field "inner.flag" is uint16 of 2 bytes'),
        (("fields", 11, "array_len"), 0, 'field "inners" has 0 elements'),
        (("fields", 11, "array_len"), "2", "field \"inners\" has '2' elements"),
        (("fields",), [], "has the fields none, expected byte, word"),
        (("fields",), None, "has no list of fields"),
        (("subsections",), {}, "has no list of subsections"),
        (("subsections", 0), 7, "has a subsection without name or version"),
        (
            ("subsections", 0, "vmsd_name"),
            "outer/new",
            'has a subsection "outer/new", expected outer/rare or outer/odd',
        ),
        (("subsections", 1, "vmsd_name"), "outer/rare", 'has a subsection "outer/rare", expected outer/odd'),
        (("subsections", 0, "version"), 4, r'subsection "outer/rare": came in version 4, this release reads 2\.\.3'),
        (("subsections", 0, "fields"), [], 'subsection "outer/rare": has the fields none, expected rare'),
    ],
)
def test_what_is_explained_otherwise_is_refused(place: tuple[Any, ...], told: object, problem: str) -> None:
    explained = explain(OUTER, BASE)
    inside: Any = explained
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = told
    with pytest.raises(PeerError, match='section "x/outer", as described: ' + problem):
        check_explained(OUTER, 3, explained, section="x/outer")


def test_fields_explained_in_another_order_are_refused() -> None:
    explained = explain(OUTER, BASE)
    explained["fields"][0:2] = reversed(explained["fields"][0:2])
    with pytest.raises(PeerError, match=r"has the fields word, byte, long, .*, expected byte, word, long, "):
        check_explained(OUTER, 3, explained)


def test_a_caller_can_name_the_section() -> None:
    with pytest.raises(PeerError, match='section "nic0/one": field "value" needs'):
        load(one(u8("value")), 1, Reader(b""), section="nic0/one")
    with pytest.raises(StateError, match='section "nic0/one": field "value" is'):
        save(one(u8("value")), One(value=-1), Blob(), section="nic0/one")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    first: int
    second: int = 0


def describe_pair(*fields: Field, version: int = 1, oldest_version: int = 1) -> Description[Pair]:
    return Description(name="pair", version=version, oldest_version=oldest_version, state=Pair, fields=fields)


@each_case(
    ("fields", "versions", "problem"),
    [
        ((u8("first"),), (1, 1), "fields and attributes of Pair differ in second"),
        ((u8("first"), u8("second"), u8("third")), (1, 1), "differ in third"),
        ((u8("first"), u8("second"), u8("first")), (1, 1), "a name stands twice"),
        ((u8("first", since=2), u8("second")), (2, 1), '"first" may be absent, so it needs a default'),
        ((u8("first"), u8("second", since=3)), (2, 1), '"pair" is version 2, its "second" since 3'),
        ((u8("first"), u8("second", since=2)), (1, 1), '"pair" is version 1, its "second" since 2'),
        ((u8("first"), u8("second")), (1, 2), r"versions 2\.\.1 are no range"),
        ((u8("first"), u8("second")), (1, 0), r"versions 0\.\.1 are no range"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(
    fields: tuple[Field, ...], versions: tuple[int, int], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        describe_pair(*fields, version=versions[0], oldest_version=versions[1])


def test_a_field_that_is_no_longer_absent_anywhere_needs_no_default() -> None:
    describe_pair(u8("first", since=2), u8("second"), version=2, oldest_version=2)


def test_a_struct_may_not_be_newer_than_what_it_is_in() -> None:
    pair = describe_pair(u8("first"), u8("second", since=2), version=2)
    with pytest.raises(ValueError, match=r'"one" has versions 1\.\.1, too old for "pair" inside it with 1\.\.2'):
        one(struct("value", pair))
    with pytest.raises(ValueError, match='too old for "pair"'):
        one(optional(array("value", pair, count_max=1)))


def test_a_struct_is_read_at_the_version_of_its_section() -> None:
    pair = describe_pair(u8("first"), u8("second", since=2), version=2)
    outer = Description(name="o", version=2, oldest_version=1, state=One, fields=(struct("value", pair),))
    assert loaded(outer, 1, b"\1").value == Pair(first=1)
    assert loaded(outer, 2, b"\1\2").value == Pair(first=1, second=2)


def test_only_a_section_has_subsections() -> None:
    with pytest.raises(ValueError, match='"outer" has subsections, so it can only be a section'):
        struct("value", OUTER)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("rare", 'does not begin with "one/"'), ("one/" + "x" * 124, "longer than 127 bytes")],
)
def test_a_subsection_is_named_after_its_section(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Description(
            name="one",
            version=1,
            oldest_version=1,
            state=Pair,
            fields=(u8("first"),),
            subsections=(
                Subsection(name=name, version=1, oldest_version=1, needed=lambda _: True, fields=(u8("second"),)),
            ),
        )


def test_truncating_a_blob_takes_back_its_descriptors() -> None:
    into = Blob(data=bytearray(b"abcd"), fds=[(1, 10), (3, 11)])
    into.truncate(2)
    assert into == Blob(data=bytearray(b"ab"), fds=[(1, 10)])


class Named(NamedTuple):
    first: int
    second: int = 5


def test_a_named_tuple_is_a_state_with_its_defaults() -> None:
    fields = (u16("first"), u16("second", since=2))
    named = Description(name="named", version=2, oldest_version=1, state=Named, fields=fields)
    blob = Blob()
    save(named, Named(3, 4), blob)
    assert load(named, 2, Reader(bytes(blob.data))) == Named(3, 4)
    assert load(named, 1, Reader(bytes(blob.data[:2]))) == Named(3, 5)
    with pytest.raises(ValueError, match='"first" may be absent, so it needs a default'):
        Description(name="named", version=2, oldest_version=1, state=Named, fields=(u16("first", since=2), fields[1]))
