"""The command line: what words mean, what is printed, which exit status."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kit.cases import each_case

from localmig.access import Access, nameless_user_id
from localmig.cli import main
from localmig.cli.qmp import read_arguments
from localmig.cli.run import read_parameters, resolve_access
from localmig.cli.status import show_migration
from localmig.cli.text import table
from localmig.cli.upgrade import options_of
from localmig.errors import ConfigError
from localmig.migration.parameters import Parameters
from localmig.options import CONFIG_BYTES_MAX, AccessSpec


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """`run` sets up the process's log; here the process is the tests'."""
    root, ours = logging.getLogger(), logging.getLogger("localmig")
    handlers, level = root.handlers[:], ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        ([], Parameters()),
        (["local=on"], Parameters(local=True)),
        (["local=on", "local=off"], Parameters(local=False)),
        (["local=on", "downtime-limit=7"], Parameters(local=True, downtime_limit_ms=7)),
    ],
)
def test_migration_parameters_are_written_under_qmps_names(words: list[str], parameters: Parameters) -> None:
    assert read_parameters(words, Parameters()) == parameters


def test_a_successor_gets_the_sandbox_and_the_users_of_its_daemon_and_no_default() -> None:
    security: dict[str, Any] = {"socket-mode": "0600", "allowed-users": [], "sandbox": {"option": "on"}}
    assert options_of(security) == []
    security = {
        "socket-mode": "0660",
        "socket-group": "kvm",
        "allowed-users": [1, 2],
        "sandbox": {"option": "on,spawn=deny"},
    }
    assert " ".join(options_of(security)) == (
        "--socket-mode 0660 --sandbox on,spawn=deny --allow-user 1,2 --socket-group kvm"
    )


def test_users_are_looked_up_and_the_one_that_stands_for_all_the_nameless_is_refused() -> None:
    spec = AccessSpec(users=("root", "1234"), mode="0660", group="kvm")
    assert resolve_access(spec) == Access(users=frozenset({0, 1234}), mode=0o660, group="kvm")
    assert resolve_access(AccessSpec()) == Access()
    with pytest.raises(ConfigError, match="there is no user 'nobody-at-all' on this machine"):
        resolve_access(AccessSpec(users=("nobody-at-all",)))
    with pytest.raises(ConfigError, match="stands for every user of a container"):
        resolve_access(AccessSpec(users=(str(nameless_user_id()),)))


@each_case(
    ("word", "error"),
    [
        ("local", "expected NAME=VALUE"),
        ("local=yes", "Invalid parameter type for 'local', expected: boolean"),
        ("local=1", "Invalid parameter type for 'local', expected: boolean"),
        ("downtime-limit=x", "Parameter 'downtime-limit' expects uint64"),
        ("downtime-limit=99999999999999999999999", "Parameter 'downtime-limit' expects uint64"),
        ("mode=normal", "Parameter 'mode' is unexpected"),
    ],
)
def test_a_wrong_migration_parameter_is_named_with_its_error(word: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_parameters([word], Parameters())
    assert str(caught.value) == f"--migration-parameter {word}: {error}"


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], {}),
        (["local=true", "downtime-limit=5"], {"local": True, "downtime-limit": 5}),
        (["uri=unix:/run/x=y.sock"], {"uri": "unix:/run/x=y.sock"}),
        (['{"uri": "unix:/x"}'], {"uri": "unix:/x"}),
    ],
)
def test_arguments_of_a_command_are_pairs_or_one_object(words: list[str], arguments: dict[str, object]) -> None:
    assert read_arguments(words) == arguments


@pytest.mark.parametrize("words", [["local"], ["=1"], ["{local: true}"]])
def test_arguments_that_are_neither_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        read_arguments(words)


@each_case(
    ("words", "code", "error"),
    [
        (["run"], 1, "nothing to serve: give --netdev and --device, --qmp to be given them later, or --incoming to"),
        (["run", "--netdev", "tap"], 1, "--netdev tap: Parameter 'id' is missing"),
        (["run", "--incoming", "foo"], 1, "unknown migration protocol: foo"),
        (["run", "--incoming", "defer", "--ready-fd", "999"], 1, "--ready-fd 999: Bad file descriptor"),
        (["run", "--incoming", "defer", "--trace", "/nonexistent/x"], 1, "--trace /nonexistent/x: No such file"),
        (["run", "--incoming", "defer", "--qmp", "tcp:x"], 1, "--qmp tcp:x"),
        (["run", "--config", "/nonexistent/x"], 1, "--config /nonexistent/x: No such file or directory"),
        (["status", "/nonexistent/x"], 1, "no daemon answers at '/nonexistent/x': No such file or directory"),
        (["upgrade", "/nonexistent/x"], 1, "no daemon answers at '/nonexistent/x': No such file or directory"),
        (["migrate", "/nonexistent/x", "unix:/y"], 1, "no daemon answers at '/nonexistent/x': No such file"),
        (["qmp", "/nonexistent/x", "query-status"], 1, "no daemon answers at '/nonexistent/x'"),
    ],
)
def test_what_cannot_be_done_is_an_error_in_one_line(
    words: list[str], code: int, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("localmig: error: ")
    assert error in line


@pytest.mark.parametrize(
    ("text", "words", "error"),
    [
        ("", [], "nothing to serve"),
        ("[[netdev]]", [], "netdev[0]: Parameter 'type' is missing, one of: tap"),
        ("[migration-parameters]\nlocal='on'", ["--incoming", "defer"], "migration-parameters: Invalid parameter type"),
        ("[migration-parameters]\ndowntime-limit=-1", ["--incoming", "defer"], "migration-parameters: Option"),
        ("[migration-parameters]\ncommit-timeout=99", ["--incoming", "defer"], "migration-parameters: Option"),
        (
            "qmp='unix:/a'",
            ["--qmp", "unix:/b"],
            "qmp is there and on the command line: leave one out, or make them equal",
        ),
        ("incoming='defer'", ["--incoming", "unix:/b"], "incoming is there and on the command line"),
        ("[[netdev]]\ntype='tap'\nid='a'", ["--netdev", "tap,id=a"], "Duplicate ID 'a' for netdev, a netdev has it"),
        ("[[netdev]]\ntype='tap'\nid='a'", ["--device", "virtio-net,id=b,netdev=c,socket=/x"], "there is 'a'"),
        ("#" * (CONFIG_BYTES_MAX + 1), [], f"more than {CONFIG_BYTES_MAX} bytes, which is the limit"),
        ("\udcff", [], "'utf-8' codec can't decode"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_name(
    text: str, words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vm1.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert main(["run", "--config", str(file), *words]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert error in line
    if error.startswith(("netdev", "migration", "qmp", "incoming", "more", "'utf")):
        assert line.startswith(f"localmig: error: --config {file}: {error}")


@each_case(
    "words", [[], ["bogus"], ["upgrade"], ["upgrade", "x", "--timeout", "0"], ["upgrade", "x", "--timeout", "nan"]]
)
def test_wrong_usage_has_exit_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: localmig" in capsys.readouterr().err


@each_case("command", ["run", "upgrade", "migrate", "status", "qmp"])
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"examples:\n  {'localmig ' + command if command in ('status', 'qmp') else ''}" in capsys.readouterr().out


def test_help_for_an_object_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--netdev", "tap,help"]) == 0
    assert "ifname=" in capsys.readouterr().out
    assert main(["run", "--device", "help"]) == 0
    assert "virtio-net" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("migration", "text"),
    [
        ({}, "none yet"),
        ({"status": "setup", "local": {"descriptors": 0}}, "setup"),
        (
            {"status": "completed", "local": {"downtime-us": 215, "descriptors": 11}},
            "completed, downtime 0.215 ms, 11 descriptors",
        ),
        ({"status": "failed", "error-desc": "gone", "local": {"note": "look"}}, "failed: gone: look"),
    ],
)
def test_a_migration_is_shown_in_one_line(migration: dict[str, object], text: str) -> None:
    assert show_migration(migration) == text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(("a", "bb"), [("ccc", "d")]) == "a    bb\nccc  d"
