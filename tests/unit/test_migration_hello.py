"""HELLO, DONE and reasons: there and back, and every field spoiled in turn."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.kit.cases import each_case

from localmig.errors import PeerError
from localmig.migration.hello import (
    NOTE_LENGTH_MAX,
    NOTES_MAX,
    OBJECT_COUNT_MAX,
    PROTOCOL,
    REASON_LENGTH_MAX,
    Done,
    HandoverObject,
    Hello,
    decode_reason,
    encode_reason,
    program_version,
)

HELLO = Hello(
    version="0.1.0",
    local=True,
    running=False,
    objects=(
        HandoverObject(kind="netdev", options={"type": "tap", "id": "net0", "ifname": "tap0"}),
        HandoverObject(kind="device", options={"driver": "virtio-net", "id": "nic0", "mac": None, "queues": 1}),
    ),
)
DONE = Done(serving_ns=1_234_567_890_123, phases=(("adopt", 5_000), ("start", 70_000)), notes=("vring 0 goes on",))
ABSENT = object()


def spoiled(base: bytes, path: tuple[str | int, ...], value: object) -> bytes:
    """The JSON in `base` with one value changed, or gone."""
    document = json.loads(base)
    inner: Any = document
    for step in path[:-1]:
        inner = inner[step]
    if value is ABSENT:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(document).encode()


# -- HELLO ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hello", [HELLO, Hello(version="", local=False, running=True), Hello(version="ü✓", local=True, running=True)]
)
def test_hello_comes_back_as_it_went(hello: Hello) -> None:
    assert Hello.decode(hello.encode()) == hello


def test_the_byte_of_the_descriptor_behind_it_does_not_matter() -> None:
    assert Hello.decode(HELLO.encode() + b" ") == HELLO


@each_case(
    ("path", "value", "complaint"),
    [
        (("protocol",), ABSENT, "handover protocol is None there and 2 here"),
        (("protocol",), PROTOCOL + 1, "handover protocol is 3 there and 2 here"),
        (("protocol",), "1", "handover protocol is 1 there"),
        (("protocol",), "x" * 1000, "handover protocol is x{32} there"),
        *(
            ((name,), value, "HELLO lacks 'version', 'local', 'running' or 'objects'")
            for name, values in {
                "version": (ABSENT, None, 1, ["0.1.0"]),
                "local": (ABSENT, None, 0, 1, "true"),
                "running": (ABSENT, None, 0, 1, "true"),
                "objects": (ABSENT, None, {}, "netdev"),
            }.items()
            for value in values
        ),
        (("objects", 0), "netdev", "HELLO has an object that is no JSON object"),
        (("objects", 1), None, "HELLO has an object that is no JSON object"),
        (("objects", 0, "kind"), ABSENT, "HELLO has an object without 'kind' or 'options'"),
        (("objects", 0, "kind"), 7, "HELLO has an object without 'kind' or 'options'"),
        (("objects", 1, "options"), ABSENT, "HELLO has an object without 'kind' or 'options'"),
        (("objects", 1, "options"), [], "HELLO has an object without 'kind' or 'options'"),
    ],
)
def test_a_hello_with_one_wrong_field_is_refused(path: tuple[str | int, ...], value: object, complaint: str) -> None:
    with pytest.raises(PeerError, match=complaint):
        Hello.decode(spoiled(HELLO.encode(), path, value))


@each_case(
    ("data", "complaint"),
    [
        (b"", "HELLO is no JSON"),
        (b"{", "HELLO is no JSON"),
        (b"\xff\xfe\x00", "HELLO is no JSON"),
        (b"[" * 100_000, "HELLO is no JSON"),
        (b"9" * 100_000, "HELLO is no JSON"),
        (b"[]", "HELLO is no JSON object"),
        (b"null", "HELLO is no JSON object"),
    ],
)
def test_what_is_no_json_object_is_no_hello(data: bytes, complaint: str) -> None:
    with pytest.raises(PeerError, match=complaint):
        Hello.decode(data)


def test_fields_this_release_does_not_know_are_passed_over() -> None:
    assert Hello.decode(spoiled(HELLO.encode(), ("color",), "blue")) == HELLO


def test_more_objects_than_the_limit_are_refused_and_the_limit_itself_is_not() -> None:
    most = Hello(
        version="0.1.0",
        local=True,
        running=True,
        objects=(HandoverObject(kind="netdev", options={}),) * OBJECT_COUNT_MAX,
    )
    assert len(Hello.decode(most.encode()).objects) == OBJECT_COUNT_MAX
    more = json.loads(most.encode())
    more["objects"].append(more["objects"][0])
    with pytest.raises(PeerError, match=f"HELLO has {OBJECT_COUNT_MAX + 1} objects, limit is {OBJECT_COUNT_MAX}"):
        Hello.decode(json.dumps(more).encode())


def test_long_words_are_cut_before_anybody_shows_them() -> None:
    decoded = Hello.decode(
        Hello(
            version="1" * 1000, local=True, running=True, objects=(HandoverObject(kind="k" * 99, options={}),)
        ).encode()
    )
    assert len(decoded.version) == 64
    assert len(decoded.objects[0].kind) == 64


def test_this_program_has_a_version() -> None:
    assert program_version()[0].isdigit()


# -- DONE -----------------------------------------------------------------------------------------------------


def test_done_comes_back_as_it_went() -> None:
    assert Done.decode(DONE.encode()) == DONE
    assert Done.decode(Done(serving_ns=0, phases=()).encode()) == Done(serving_ns=0, phases=())


@each_case(
    ("path", "value"),
    [
        (("serving-ns",), ABSENT),
        (("serving-ns",), None),
        (("serving-ns",), 1.5),
        (("serving-ns",), "1"),
        (("phases",), ABSENT),
        (("phases",), {}),
        (("phases",), "ab"),
        (("phases", 0), "ab"),
        (("phases", 0), []),
        (("phases", 0), ["adopt"]),
        (("phases", 0), ["adopt", 1, 2]),
        (("phases", 1, 0), 1),
        (("phases", 1, 1), "1"),
        (("phases", 1, 1), 1.5),
        (("notes",), None),
        (("notes",), "ab"),
        (("notes",), [1]),
    ],
)
def test_a_done_with_one_wrong_field_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(PeerError, match="DONE lacks 'serving-ns' or 'phases'"):
        Done.decode(spoiled(DONE.encode(), path, value))


def test_a_done_of_a_release_without_notes_has_none() -> None:
    assert Done.decode(b'{"serving-ns": 1, "phases": []}').notes == ()


def test_a_done_says_how_many_notes_it_left_out() -> None:
    notes = tuple(f"{number}: \033 and {'long' * 100}" for number in range(NOTES_MAX + 2))
    arrived = Done.decode(Done(serving_ns=1, phases=(), notes=notes).encode()).notes
    assert [note[:8] for note in arrived[:-1]] == [f"{number}:   and" for number in range(NOTES_MAX)]
    assert {len(note) for note in arrived[:-1]} == {NOTE_LENGTH_MAX}
    assert arrived[-1] == "2 more of these are in the log of the destination"


def test_notes_without_end_are_cut() -> None:
    arrived = Done.decode(json.dumps({"serving-ns": 1, "phases": [], "notes": ["x" * 1000] * 1000}).encode()).notes
    assert arrived == ("x" * NOTE_LENGTH_MAX,) * (NOTES_MAX + 1)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff"])
def test_what_is_no_json_object_is_no_done(data: bytes) -> None:
    with pytest.raises(PeerError, match="DONE is no JSON"):
        Done.decode(data)


# -- reasons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["", "device 'nic0': no", "ü ✓ 𝄞"])
def test_a_reason_comes_back_as_it_went(reason: str) -> None:
    assert decode_reason(encode_reason(reason)) == reason


def test_a_reason_is_cut_on_both_sides() -> None:
    assert len(decode_reason(encode_reason("✓" * 10_000))) == REASON_LENGTH_MAX
    assert len(decode_reason(b"x" * 60_000)) == REASON_LENGTH_MAX


def test_a_reason_cannot_speak_to_the_terminal() -> None:
    assert decode_reason(b"\x1b[2Jno\nway\x00\xff") == " [2Jno way \N{REPLACEMENT CHARACTER}"
