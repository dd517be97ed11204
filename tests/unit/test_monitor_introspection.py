"""The answer to query-qmp-schema follows the rules of QAPI's introspection, and says what is so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import pytest

from localmig.daemon import Daemon
from localmig.migration.status import MigrationInfo, Phase
from localmig.monitor.commands import COMMANDS
from localmig.options import Defer

Info = Mapping[str, Any]

KEYS: Final[Mapping[str, tuple[set[str], set[str]]]] = {
    "builtin": ({"json-type"}, set()),
    "enum": ({"members", "values"}, set()),
    "array": ({"element-type"}, set()),
    "object": ({"members"}, {"tag", "variants"}),
    "alternate": ({"members"}, set()),
    "command": ({"arg-type", "ret-type"}, {"allow-oob"}),
    "event": ({"arg-type"}, set()),
}
"""QAPI's SchemaInfo: what each meta-type has, and what it may have. `features` may be everywhere."""

BUILTINS: Final = {"str": "string", "bool": "boolean", "int": "int", "any": "value", "number": "number", "null": "null"}


def check_schema(schema: Sequence[Info]) -> None:
    """Asserts all that "Client JSON Protocol introspection" (docs/devel/qapi-code-gen) promises."""
    types = {each["name"]: each for each in schema if each["meta-type"] not in ("command", "event")}
    entities = [each["name"] for each in schema if each["meta-type"] in ("command", "event")]
    assert len(types) + len(set(entities)) == len(schema), "a name is there twice"
    for info in schema:
        required, optional = KEYS[info["meta-type"]]
        keys = set(info) - {"name", "meta-type", "features"}
        assert required <= keys <= required | optional, info

    def use(name: str, *meta_types: str) -> Info:
        assert name in types, name
        assert not meta_types or types[name]["meta-type"] in meta_types, (name, meta_types)
        return types[name]

    for info in schema:
        match info["meta-type"]:
            case "builtin":
                assert BUILTINS[info["name"]] == info["json-type"], info
            case "enum":
                words = [member["name"] for member in info["members"]]
                assert words == info["values"], info
                assert len(set(words)) == len(words), info
            case "array":
                use(info["element-type"])
                assert info["name"] == f"[{info['element-type']}]", info
            case "object":
                check_object(info, use)
            case "alternate":
                for member in info["members"]:
                    use(member["type"])
            case "command":
                use(info["arg-type"], "object")
                use(info["ret-type"])
            case "event":
                use(info["arg-type"], "object")


def check_object(info: Info, use: Callable[..., Info]) -> None:
    """Members are told apart by their names, and a union's tag is an enumeration that names each case."""
    names = [member["name"] for member in info["members"]]
    assert len(set(names)) == len(names), info
    for member in info["members"]:
        use(member["type"])
        assert set(member) - {"features"} <= {"name", "type", "default"}, info
        assert member.get("default") is None, info
    assert ("tag" in info) == ("variants" in info), info
    if "tag" in info:
        (tag,) = (member for member in info["members"] if member["name"] == info["tag"])
        assert "default" not in tag, info
        words = use(tag["type"], "enum")["values"]
        assert sorted(variant["case"] for variant in info["variants"]) == sorted(words), info
        for variant in info["variants"]:
            own = {member["name"] for member in use(variant["type"], "object")["members"]}
            assert not own & set(names), (info, variant)


@pytest.fixture
def schema() -> Sequence[Info]:
    return cast("Sequence[Info]", COMMANDS["query-qmp-schema"].run(Daemon(incoming=Defer())))


def test_the_schema_follows_the_rules_of_introspection(schema: Sequence[Info]) -> None:
    check_schema(schema)
    COMMANDS["query-qmp-schema"].returns.read(schema, "schema")


SPOILS: Final[Mapping[str, Callable[[list[dict[str, Any]]], object]]] = {
    "a type is missing": lambda schema: schema.remove(next(each for each in schema if each["name"] == "str")),
    "a type is there twice": lambda schema: schema.append(
        {"name": "str", "meta-type": "builtin", "json-type": "string"}
    ),
    "a command takes no object": lambda schema: schema[0].update({"arg-type": "str"}),
    "a key nobody knows": lambda schema: schema[0].update({"doc": "x"}),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_the_rules_are_looked_after(schema: Sequence[Info], spoil: str) -> None:
    spoiled = [dict(each) for each in schema]
    SPOILS[spoil](spoiled)
    with pytest.raises(AssertionError):
        check_schema(spoiled)


def test_a_client_finds_the_arguments_and_the_answer_of_a_command(schema: Sequence[Info]) -> None:
    told = {each["name"]: each for each in schema}
    parameters = told[told["migrate-set-parameters"]["arg-type"]]
    assert {"name": "local", "type": "bool", "default": None} in parameters["members"]
    status = told[told["query-status"]["ret-type"]]
    (word,) = (member["type"] for member in status["members"] if member["name"] == "status")
    assert "inmigrate" in told[word]["values"]
    channels = next(each for each in told[told["migrate"]["arg-type"]]["members"] if each["name"] == "channels")
    channel = told[told[channels["type"]]["element-type"]]
    address = told[next(each["type"] for each in channel["members"] if each["name"] == "addr")]
    (socket,) = address["variants"]
    assert {each["case"] for each in told[socket["type"]]["variants"]} == {"inet", "unix", "fd"}


def test_a_migration_is_told_of_as_the_schema_says(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon(incoming=Defer())
    command = COMMANDS["query-migrate"]
    for info in (
        None,
        MigrationInfo(status="setup"),
        MigrationInfo(
            status="failed",
            error_desc="gone",
            note="look",
            total_time_ms=1,
            setup_time_ms=2,
            downtime_us=3,
            phases=(Phase(name="hello", duration_us=4),),
            descriptors=5,
        ),
    ):
        monkeypatch.setattr(daemon, "migration_info", lambda info=info: info)
        told = command.run(daemon)
        assert command.returns.read(told, "query-migrate") == told
