"""One client's conversation, byte for byte where QEMU's is known. The QEMU answers were recorded from QEMU 7.2."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import pytest
from tests.kit.cases import each_case

from localmig.errors import ConfigError, PeerError
from localmig.fds import OwnedFd
from localmig.monitor.protocol import HELD_DESCRIPTOR_COUNT_MAX, Event, Session, greeting, version_info
from localmig.monitor.schema import Command
from localmig.monitor.wire import VALUE_BYTES_MAX
from localmig.qapi import Boolean, Member, Struct

ECHO = Command(
    name="echo",
    run=dict,
    arguments=Struct((Member(name="is-loud", attribute="is_loud", type=Boolean(), required=False),)),
)
FAIL = Command(name="fail", run=dict)


def execute(command: Command, arguments: Mapping[str, object]) -> object:
    if command is FAIL:
        raise ConfigError("it never works")
    return arguments


def session(*, negotiated: bool = True) -> Session:
    fresh = Session({"echo": ECHO, "fail": FAIL}, execute)
    if negotiated:
        assert list(fresh.receive(b'{"execute": "qmp_capabilities"}')) == [b'{"return": {}}\r\n']
    return fresh


def error(desc: str, kind: str = "GenericError") -> dict[str, object]:
    return {"error": {"class": kind, "desc": desc}}


EXPECTING = error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")


@each_case(
    ("sent", "answer"),
    [
        ('{"execute": "echo"}', {"return": {}}),
        ('{"execute": "echo", "arguments": {"is-loud": true}}', {"return": {"is_loud": True}}),
        ('{"execute": "echo", "id": {"a": [1, null]}}', {"return": {}, "id": {"a": [1, None]}}),
        ('{"execute": "fail", "id": null}', error("it never works") | {"id": None}),
        ('{"execute": "echo", "arguments": {"x": 1}}', error("Parameter 'x' is unexpected")),
        ('{"execute": "nope"}', error("The command nope has not been found", "CommandNotFound")),
        (
            '{"execute": "qmp_capabilities", "id": 1}',
            error("Capabilities negotiation is already complete, command ignored", "CommandNotFound") | {"id": 1},
        ),
        ("5 ", error("QMP input must be a JSON object")),
        ('"x"', error("QMP input must be a JSON object")),
        ("[]", error("QMP input must be a JSON object")),
        ('{"foo": 1}', error("QMP input member 'foo' is unexpected")),
        ("{}", error("QMP input lacks member 'execute'")),
        ('{"execute": 5}', error("QMP input member 'execute' must be a string")),
        ('{"execute": "echo", "arguments": 5}', error("QMP input member 'arguments' must be an object")),
        ('{"execute": "echo", "arguments": null}', error("QMP input member 'arguments' must be an object")),
        ('{"execute": "echo", "x": 1, "id": 7}', error("QMP input member 'x' is unexpected") | {"id": 7}),
        ('{"execute": "echo", "execute": "echo"}', error("JSON parse error, duplicate key")),
    ],
)
def test_answers_are_qemus(sent: str, answer: object) -> None:
    assert [json.loads(line) for line in session().receive(sent.encode())] == [answer]


def test_before_negotiation_there_is_nothing_else() -> None:
    client = session(negotiated=False)
    assert [json.loads(line) for line in client.receive(b'{"execute": "echo"}{"execute": "nope"}')] == [EXPECTING] * 2
    assert client.event(Event(name="STOP", at_s=1.0)) == b""


def test_a_capability_that_is_not_there_leaves_the_client_in_negotiation() -> None:
    client = session(negotiated=False)
    sent = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}{"execute": "echo"}'
    answers = [json.loads(line) for line in client.receive(sent)]
    assert answers == [error("Capability oob not available"), EXPECTING]


def test_an_event_has_the_time_and_its_data() -> None:
    client = session()
    assert json.loads(client.event(Event(name="MIGRATION", data={"status": "setup"}, at_s=1795474727.25))) == {
        "timestamp": {"seconds": 1795474727, "microseconds": 250000},
        "event": "MIGRATION",
        "data": {"status": "setup"},
    }
    assert "data" not in json.loads(client.event(Event(name="STOP", at_s=1.0)))


def test_commands_are_carried_out_one_by_one_as_answers_are_taken() -> None:
    done: list[str] = []

    def note(command: Command, arguments: Mapping[str, object]) -> object:
        done.append(command.name)
        return arguments

    client = Session({"echo": ECHO}, note)
    answers = client.receive(b'{"execute": "qmp_capabilities"}{"execute": "echo"}{"execute": "echo"}')
    next(answers)
    assert done == []
    next(answers)
    assert done == ["echo"]
    assert len(list(answers)) == 1


def test_after_an_error_the_next_command_works() -> None:
    client = session()
    answers = [json.loads(line) for line in client.receive(b'{"execute" 1} \xff {"execute": "echo"}')]
    assert [list(answer) for answer in answers] == [["error"], ["error"], ["return"]]


def test_a_command_without_end_ends_the_connection() -> None:
    with pytest.raises(PeerError):
        list(session().receive(b'{"' + b"x" * VALUE_BYTES_MAX))


def test_the_greeting_tells_the_version_in_qemus_shape() -> None:
    version = {"qemu": {"micro": 3, "minor": 2, "major": 1}, "package": "localmig 1.2.3"}
    assert version_info("1.2.3") == version
    assert json.loads(greeting("1.2.3")) == {"QMP": {"version": version, "capabilities": []}}
    assert greeting("1.2.3").endswith(b"\r\n")


def test_no_more_descriptors_are_held_than_some_commands_could_take() -> None:
    client = session()
    many = [OwnedFd(os.open("/dev/null", os.O_RDONLY)) for _ in range(HELD_DESCRIPTOR_COUNT_MAX + 5)]
    assert list(client.receive(b" ", many)) == []
    assert [fd.is_open for fd in many] == [True] * HELD_DESCRIPTOR_COUNT_MAX + [False] * 5
    client.close()
    assert not any(fd.is_open for fd in many)
