"""QMP's wire: values whole or in pieces, limits, and whatever a hostile client sends."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kit.cases import each_case

from localmig.errors import PeerError
from localmig.monitor.wire import DEPTH_MAX, DIGITS_MAX, VALUE_BYTES_MAX, Decoder, JsonSyntaxError, encode

STREAM = b'{"a": "}\\"{"}[1, {"b": null}] {"c": "\\\\"}\r\n"word" 5 \xff {"d":1,"d":2}{"e": "\xc3\xa9"}'

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def decode(pieces: Iterable[bytes]) -> list[object]:
    decoder = Decoder()
    values = []
    for piece in pieces:
        decoder.feed(piece)
        values += [str(value) if isinstance(value, JsonSyntaxError) else value for value in decoder.values()]
    return values


def decode_one(text: bytes) -> object:
    decoder = Decoder()
    decoder.feed(text)
    [value] = decoder.values()
    return value


def test_values_stand_back_to_back_and_errors_take_the_place_of_what_is_none() -> None:
    assert decode([STREAM]) == [
        {"a": '}"{'},
        [1, {"b": None}],
        {"c": "\\"},
        "word",
        5,
        "JSON parse error, invalid UTF-8 or Unicode character",
        "JSON parse error, duplicate key",
        {"e": "é"},
    ]


def test_bytes_may_be_cut_at_every_offset() -> None:
    whole = decode([STREAM])
    for offset in range(len(STREAM)):
        assert decode([STREAM[:offset], STREAM[offset:]]) == whole, offset
    assert decode(bytes([byte]) for byte in STREAM) == whole


@given(st.lists(JSON, max_size=5), st.integers(1, 40))
def test_what_is_encoded_is_decoded(messages: list[object], step: int) -> None:
    stream = b"".join(encode(message) for message in messages)
    assert decode(stream[at : at + step] for at in range(0, len(stream), step)) == messages


@given(
    st.lists(
        st.binary(max_size=40) | st.sampled_from([b"{", b"}", b'"', b"'", b"\\", b"[", b" ", b"1e999 ", b"nan "]),
        max_size=20,
    )
)
def test_rubbish_gives_values_or_errors_and_nothing_else(pieces: list[bytes]) -> None:
    for value in decode(pieces):
        # Whatever comes out can be echoed as an id.
        json.loads(encode(value))


@each_case(
    ("text", "error"),
    [
        (b"NaN ", "invalid keyword 'NaN'"),
        (b'{"a": Infinity}', "invalid keyword 'Infinity'"),
        (b'{"a": 1e999}', "number is out of range"),
        (b'{"a": ' + b"1" * (DIGITS_MAX + 1) + b"}", f"number has {DIGITS_MAX + 1} digits, limit is {DIGITS_MAX}"),
        (b'{"a" 1}', "Expecting ':' delimiter at character 5"),
        (b'"\\ud800"', "invalid UTF-8 or Unicode character"),
        (b"} ", "Expecting value at character 0"),
        (b"[}", "Expecting value at character 1"),
    ],
)
def test_what_is_no_json_says_why(text: bytes, error: str) -> None:
    value = decode_one(text)
    assert isinstance(value, JsonSyntaxError)
    assert str(value) == f"JSON parse error, {error}"


QEMUS = b"""{'a':'}"{'}['\\'', "\\'", '\\"', "it's", 'say "it"']{'b':{"c'":'\\\\'}} 5'word'{}"""
"""What QEMU's parser takes besides JSON."""


def test_strings_and_names_may_stand_in_single_quotes_cut_anywhere() -> None:
    whole = decode([QEMUS])
    assert whole == [{"a": '}"{'}, ["'", "'", '"', "it's", 'say "it"'], {"b": {"c'": "\\"}}, 5, "word", {}]
    for offset in range(len(QEMUS)):
        assert decode([QEMUS[:offset], QEMUS[offset:]]) == whole, offset
    assert decode(bytes([byte]) for byte in QEMUS) == whole


def in_single_quotes(value: object) -> str:
    """JSON with every string in single quotes."""
    match value:
        case dict():
            return (
                "{" + ",".join(f"{in_single_quotes(key)}:{in_single_quotes(each)}" for key, each in value.items()) + "}"
            )
        case list():
            return "[" + ",".join(map(in_single_quotes, value)) + "]"
        case str():
            return "'" + json.dumps(value)[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"
        case _:
            return json.dumps(value)


@given(JSON.filter(lambda value: isinstance(value, dict | list | str)))
def test_single_quotes_say_the_same(value: object) -> None:
    assert decode_one(in_single_quotes(value).encode()) == value


@each_case("text", [b"['a\nb']", b"['\\x']", b"['a' 'b']", b"{'a' 1}", b"['a'b]"])
def test_single_quotes_excuse_nothing_else(text: bytes) -> None:
    assert isinstance(decode_one(text), JsonSyntaxError)


def test_a_value_may_be_as_long_as_the_limit_and_no_longer() -> None:
    longest = b'"' + b"x" * (VALUE_BYTES_MAX - 2) + b'"'
    assert decode_one(longest) == "x" * (VALUE_BYTES_MAX - 2)
    assert isinstance(decode_one(b'"x' + longest[1:]), JsonSyntaxError)


def test_a_value_without_end_ends_the_connection_at_the_limit() -> None:
    decoder = Decoder()
    decoder.feed(b'"' + b"x" * (VALUE_BYTES_MAX - 1))
    assert list(decoder.values()) == []
    decoder.feed(b"x")
    with pytest.raises(PeerError, match=f"more than {VALUE_BYTES_MAX} bytes"):
        list(decoder.values())


def test_a_value_may_be_as_deep_as_the_limit_and_no_deeper() -> None:
    assert isinstance(decode_one(b"[" * DEPTH_MAX + b"]" * DEPTH_MAX), list)
    with pytest.raises(PeerError, match="JSON nesting depth limit exceeded"):
        decode_one(b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1))
