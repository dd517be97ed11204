"""QMP's types: QEMU's words for what is wrong, and QMP's names for ours."""

from __future__ import annotations

import dataclasses

import pytest
from tests.kit.cases import each_case

from localmig.errors import ConfigError
from localmig.migration.handover import DESTINATION_STATUS, SOURCE_STATUS
from localmig.migration.parameters import Parameters
from localmig.monitor.commands import COMMANDS
from localmig.monitor.schema import (
    CAPABILITIES,
    MIGRATION_STATUS,
    PARAMETERS,
    capabilities_to_qmp,
    parameters_changed,
    parameters_to_qmp,
)
from localmig.qapi import Uint64

UNIX_CHANNEL = {"channel-type": "main", "addr": {"transport": "socket", "type": "unix", "path": "/x"}}

ANNOUNCE = {"announce-initial": 50, "announce-max": 550, "announce-rounds": 5, "announce-step": 100}


def channel(**changes: object) -> dict[str, object]:
    return {"channels": [{"channel-type": "main", "addr": {"transport": "socket", **changes}}]}


@each_case(
    ("command", "arguments", "error"),
    [
        ("migrate-set-parameters", {"downtime-limit": "x"}, "Parameter 'downtime-limit' expects uint64"),
        ("migrate-set-parameters", {"downtime-limit": 1.5}, "Parameter 'downtime-limit' expects uint64"),
        ("migrate-set-parameters", {"downtime-limit": True}, "Parameter 'downtime-limit' expects uint64"),
        ("migrate-set-parameters", {"downtime-limit": None}, "Parameter 'downtime-limit' expects uint64"),
        ("migrate-set-parameters", {"downtime-limit": 2**64}, "Parameter 'downtime-limit' expects uint64"),
        ("migrate-set-parameters", {"local": "yes"}, "Invalid parameter type for 'local', expected: boolean"),
        ("migrate-set-parameters", {"local": 1}, "Invalid parameter type for 'local', expected: boolean"),
        ("migrate-set-parameters", {"bogus": 1}, "Parameter 'bogus' is unexpected"),
        # What was declared is read first.
        ("migrate-set-parameters", {"bogus": 1, "downtime-limit": "x"}, "Parameter 'downtime-limit' expects uint64"),
        ("migrate-set-capabilities", {}, "Parameter 'capabilities' is missing"),
        (
            "migrate-set-capabilities",
            {"capabilities": 5},
            "Invalid parameter type for 'capabilities', expected: array",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [5]},
            "Invalid parameter type for 'capabilities[0]', expected: object",
        ),
        ("migrate-set-capabilities", {"capabilities": [{}]}, "Parameter 'capabilities[0].capability' is missing"),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "nope", "state": True}]},
            "Parameter 'capability' does not accept value 'nope'",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "events"}]},
            "Parameter 'capabilities[0].state' is missing",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "events", "state": "x"}]},
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "events", "state": True, "z": 1}]},
            "Parameter 'capabilities[0].z' is unexpected",
        ),
        ("migrate", {"uri": 5}, "Invalid parameter type for 'uri', expected: string"),
        ("migrate", {"uri": "unix:a.sock", "blk": False}, "Parameter 'blk' is unexpected"),
        ("migrate", channel(), "Parameter 'channels[0].addr.type' is missing"),
        ("migrate", channel(type="unix"), "Parameter 'channels[0].addr.path' is missing"),
        ("migrate", channel(type="vsock"), "Parameter 'type' does not accept value 'vsock'"),
        ("migrate", channel(type="fd", str="3", path="/x"), "Parameter 'channels[0].addr.path' is unexpected"),
        ("migrate", {"channels": [{"channel-type": "main"}]}, "Parameter 'channels[0].addr' is missing"),
        ("migrate-continue", {}, "Parameter 'state' is missing"),
        ("migrate-continue", {"state": "x"}, "Parameter 'state' does not accept value 'x'"),
        ("query-migrate", {"x": 1}, "Parameter 'x' is unexpected"),
    ],
)
def test_wrong_arguments_are_refused_in_qemus_words(command: str, arguments: object, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        COMMANDS[command].arguments.read(arguments)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("command", "arguments", "read"),
    [
        ("migrate-set-parameters", {}, {}),
        (
            "migrate-set-parameters",
            {"local": True, "downtime-limit": 5},
            {"local": True, "downtime_limit_ms": 5},
        ),
        (
            "migrate",
            {"channels": [UNIX_CHANNEL]},
            {
                "channels": [
                    {
                        "channel_type": "main",
                        "address": {"transport": "socket", "type": "unix", "path": "/x"},
                    }
                ]
            },
        ),
    ],
)
def test_right_arguments_are_read_under_our_names(command: str, arguments: object, read: object) -> None:
    assert COMMANDS[command].arguments.read(arguments) == read


def test_a_negative_number_is_the_large_one_with_the_same_bits() -> None:
    assert Uint64().read(-1, "x") == 2**64 - 1
    assert Uint64().read(2**64 - 1, "x") == 2**64 - 1


def test_every_parameter_and_capability_has_a_name_in_qmp() -> None:
    assert {member.attribute for member in PARAMETERS.members} == {row.name for row in dataclasses.fields(Parameters)}
    assert CAPABILITIES == {"events": "events", "pause-before-switchover": "pause_before_switchover"}


def test_parameters_come_back_under_qmps_names_as_they_were_set() -> None:
    changed = parameters_changed(Parameters(), PARAMETERS.read({"local": True, "downtime-limit": 7}))
    assert changed == Parameters(local=True, downtime_limit_ms=7)
    assert parameters_to_qmp(changed) == ANNOUNCE | {
        "commit-timeout": 5000,
        "downtime-limit": 7,
        "events": False,
        "local": True,
        "pause-before-switchover": False,
        "record": "",
    }
    assert capabilities_to_qmp(Parameters(events=True)) == [
        {"capability": "events", "state": True},
        {"capability": "pause-before-switchover", "state": False},
    ]


def test_every_status_a_migration_can_have_is_one_of_qemus() -> None:
    assert {*SOURCE_STATUS.values(), *DESTINATION_STATUS.values()} <= set(MIGRATION_STATUS.words)
