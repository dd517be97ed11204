"""A type of a package's in real daemons: served, shown, handed over, and refused where the package is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.kit.processes import DaemonProcess, localmig
from tests.packages import COUNTER, install

from localmig.errors import PeerError

PATIENCE_S = 60
"""For one program to do its part: it takes a second, a machine under load gets much more."""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which daemons find packages, with one that has the device `counter`."""
    folder = tmp_path / "site"
    install(folder, "counters", "1.2", {"counter": "counters:OBJECT"}, {"counters": COUNTER})
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def run(*arguments: str, succeeds: bool = True) -> str:
    done = localmig(*arguments)
    assert (done.returncode == 0) == succeeds, done
    return done.stdout if succeeds else done.stderr


def hand_over(source: DaemonProcess, destination: DaemonProcess, socket: Path) -> dict[str, Any]:
    source.execute("migrate-set-parameters", local=True)
    source.execute("migrate", uri=f"unix:{socket}")
    return source.wait_migration()


def destination(tmp_path: Path, name: str, *options: str) -> DaemonProcess:
    incoming = ["--incoming", f"unix:{tmp_path}/migrate.sock", "--migration-parameter", "local=on"]
    return DaemonProcess([*incoming, *options], qmp=tmp_path / f"{name}.sock", log=tmp_path / f"{name}.log")


def test_an_object_of_a_package_is_served_shown_and_upgraded(packages: Path, tmp_path: Path) -> None:
    qmp = tmp_path / "qmp.sock"
    file = tmp_path / "vm.toml"
    file.write_text("[[device]]\ndriver = 'counter'\nid = 'c1'\nafter = 'c0'\n")
    assert "counter                     counts (counters 1.2)" in run("run", "--device", "help")
    assert "first=<number>" in run("run", "--device", "counter,help")
    with DaemonProcess(["--device", "counter,id=c0,first=5", "--config", str(file)], qmp=qmp) as first:
        assert first.execute("query-devices") == [
            {"id": "c0", "type": "counter", "count": 6, "notes": []},
            {"id": "c1", "type": "counter", "count": 1, "notes": []},
        ]
        types = {each["type"] for each in first.execute("query-local-migration")}
        assert types == {"counter"}
        assert "count      6" in run("status", "--device", "c0", str(qmp))
        assert "c1" in run("status", str(qmp))
        schema = first.execute("query-qmp-schema")
        assert any(variant["case"] == "counter" for each in schema for variant in each.get("variants", ()))
        report = json.loads(run("upgrade", "--json", str(qmp)))
        assert report["outcome"] == "committed", report
        second = json.loads(run("status", "--json", str(qmp)))
        assert [device["count"] for device in second["devices"]] == [7, 2]
        run("qmp", str(qmp), "quit")


def test_an_object_of_a_package_is_added_at_run_time_and_one_that_fails_leaves_nothing(
    packages: Path, tmp_path: Path
) -> None:
    bad = COUNTER.replace('"counter"', '"bad"').replace("def thaw(self) -> None: ...", "def thaw(self): 1 / 0")
    install(packages, "bad", "0.1", {"bad": "bad:OBJECT"}, {"bad": bad})
    with DaemonProcess([], qmp=tmp_path / "a.sock") as first:
        first.execute("device_add", driver="counter", id="c0", first=5, place="here")
        first.execute("device_add", driver="counter", id="c1", after="c0")
        both = [
            {"id": "c0", "type": "counter", "count": 6, "notes": []},
            {"id": "c1", "type": "counter", "count": 1, "notes": []},
        ]
        for command, options, reason in (
            ("device_add", {"driver": "bad", "id": "c2"}, "cannot open 'c2': ZeroDivisionError"),
            ("device_add", {"driver": "counter", "id": "c2", "place": "here"}, "is used by device 'c0' already"),
            ("device_add", {"driver": "counter", "id": "c2", "after": "c0"}, "it's in use by device 'c1'"),
            ("device_add", {"driver": "counter", "id": "c2", "after": "c7"}, "can't find device 'c7'"),
            ("device_del", {"id": "c0"}, "device 'c0' is in use by device 'c1': delete that one first"),
        ):
            with pytest.raises(PeerError, match=reason):
                first.execute(command, **options)
            assert first.execute("query-devices") == both
        with destination(tmp_path, "b") as second:
            assert hand_over(first, second, tmp_path / "migrate.sock")["status"] == "completed"
            assert [each["count"] for each in second.execute("query-devices")] == [7, 2]
            second.execute("device_del", id="c1")
            second.execute("device_del", id="c0")
            assert second.execute("query-devices") == []


def test_a_destination_without_the_package_refuses_and_both_sides_say_what_to_install(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DaemonProcess(["--device", "counter,id=c0"], qmp=tmp_path / "a.sock") as source:
        monkeypatch.delenv("PYTHONPATH")
        with destination(tmp_path, "b") as bare:
            info = hand_over(source, bare, tmp_path / "migrate.sock")
            assert bare.wait() == 1
        reason = f"the source has device 'c0' of type 'counter': install counters 1.2 for '{sys.executable}'"
        assert info["status"] == "failed"
        assert reason in info["error-desc"]
        assert reason in (tmp_path / "b.log").read_text()
        assert source.execute("query-status") == {"running": True, "status": "running"}
        monkeypatch.setenv("PYTHONPATH", str(packages))
        with destination(tmp_path, "c") as equipped:
            assert hand_over(source, equipped, tmp_path / "migrate.sock")["status"] == "completed"
            assert equipped.execute("query-devices")[0]["count"] == 2


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("import Any, ClassVar", "import Any, ClassVar, Nonsense", "cannot be imported from 'counters:OBJECT'"),
        ("self.count = spec.first", "self.count = spec.last", "cannot build device 'c0': AttributeError"),
        (
            "def check_setup(self, state: CounterState) -> None: ...",
            "def check_setup(self, state): 1 / 0",
            "division by zero",
        ),
        ("self.count = state.count", "self.count = state.total", "has no attribute 'total'"),
    ],
)
def test_a_package_that_is_broken_at_the_destination_costs_the_source_nothing(
    packages: Path, tmp_path: Path, old: str, new: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in COUNTER
    broken = tmp_path / "broken"
    install(broken, "counters", "1.3", {"counter": "counters:OBJECT"}, {"counters": COUNTER.replace(old, new)})
    with DaemonProcess(["--device", "counter,id=c0"], qmp=tmp_path / "a.sock") as source:
        monkeypatch.setenv("PYTHONPATH", str(broken))
        with destination(tmp_path, "b") as newer:
            info = hand_over(source, newer, tmp_path / "migrate.sock")
            assert newer.wait() == 1
        assert info["status"] == "failed"
        assert reason in info["error-desc"]
        assert source.execute("query-devices") == [{"id": "c0", "type": "counter", "count": 1, "notes": []}]
        assert source.execute("query-status") == {"running": True, "status": "running"}


def test_what_cannot_be_shown_hides_no_other_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shy = COUNTER.replace('"counter"', '"shy"').replace("return self", "raise OSError('not now')")
    install(tmp_path / "site", "counters", "1.2", {"counter": "counters:OBJECT"}, {"counters": COUNTER})
    install(tmp_path / "site", "shy", "1.0", {"shy": "shy:OBJECT"}, {"shy": shy})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    qmp = tmp_path / "qmp.sock"
    with DaemonProcess(["--device", "counter,id=c0", "--device", "shy,id=c1"], qmp=qmp) as daemon:
        assert daemon.execute("query-devices") == [
            {"id": "c0", "type": "counter", "count": 1, "notes": []},
            {
                "id": "c1",
                "type": "shy",
                "notes": ["device type 'shy' (from shy 1.0) cannot show it: OSError: not now"],
            },
        ]
        assert "not now" in run("status", str(qmp))
        assert "not now" in run("status", "--device", "c1", str(qmp))


def test_a_type_that_cannot_be_had_ends_the_start_with_its_reason(packages: Path, tmp_path: Path) -> None:
    install(packages, "broken", "0.1", {"broken": "broken:OBJECT"}, {"broken": "raise ValueError('bad')"})
    said = run("run", "--device", "counter,id=c0", "--device", "broken,id=b0", succeeds=False)
    assert said.splitlines()[-1] == (
        "localmig: error: --device broken,id=b0: type 'broken' of broken 0.1 cannot be imported from 'broken:OBJECT': "
        "ValueError: bad"
    )
    opens = COUNTER.replace('"counter"', '"opens"').replace("def open(self) -> None: ...", "def open(self): 1 / 0")
    install(packages, "opens", "0.1", {"opens": "opens:OBJECT"}, {"opens": opens})
    said = run("run", "--device", "opens,id=o0", succeeds=False)
    assert said.splitlines()[-1] == "localmig: error: cannot open 'o0': ZeroDivisionError: division by zero"
    with pytest.raises(PeerError):
        DaemonProcess(["--device", "counter,id=c0,first=100"], log=tmp_path / "log")
