"""Types of objects by name: this program's, and those that packages add, whatever is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.packages import COUNTER, entry_points, install

from localmig.daemon.objects import Assembly, Objects
from localmig.errors import ConfigError, PeerError
from localmig.migration.hello import Hello, Origin
from localmig.registry import Registry
from localmig.trace import Tracer

LOCALMIG = Origin.own()


class Packages:
    """A folder of packages, and the types that they add."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def add(self, name: str = "counters", text: str = COUNTER, *, version: str = "1.2", **types: str) -> None:
        module = f"module_of_{name}"
        self.modules.append(module)
        wanted = {key.replace("_", "-"): where for key, where in types.items()} or {"counter": f"{module}:OBJECT"}
        install(self.folder, name, version, wanted, {module: text})

    def registry(self) -> Registry:
        return Registry(entry_points=lambda: entry_points(self.folder))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(tmp_path)
    made = Packages(tmp_path)
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)


def test_a_type_of_a_package_has_help_options_and_a_spec(packages: Packages) -> None:
    packages.add()
    registry = packages.registry()
    spec: Any = registry.parse("device", "counter,id=c0,first=5")
    assert (spec.id, spec.first) == ("c0", 5)
    assert registry.parse("device", '{"driver": "counter", "id": "c0", "first": 5}') == spec
    assert "first=<number>" in (registry.help_for("device", "counter,help") or "")
    assert "counter                     counts (counters 1.2)" in (registry.help_for("device", "help") or "")
    assert "counter" not in (registry.help_for("netdev", "help") or "")
    with pytest.raises(ConfigError, match=r"Parameter 'first' expects a value between 0 and 99, not 100: two digits"):
        registry.parse("device", "counter,id=c0,first=100")
    with pytest.raises(ConfigError, match=r"'counter': this is a device type, from counters 1\.2"):
        registry.parse("netdev", "counter,id=c0")


def test_a_type_that_nobody_asks_for_is_not_imported(packages: Packages) -> None:
    packages.add(text="raise AssertionError")
    registry = packages.registry()
    assert registry.parse("device", "virtio-net,id=nic0,netdev=net0,socket=/x").id == "nic0"
    registry.look_up()
    assert "module_of_counters" not in sys.modules


def test_a_daemon_of_nics_imports_no_other_type_and_looks_for_no_package() -> None:
    code = """
        import sys
        from localmig.cli import main
        main(["run", "--netdev", "tap,help"])
        assert "localmig.netdevs.tap" in sys.modules
        assert not [name for name in sys.modules if name.startswith("localmig.devices.")], sys.modules
        from localmig.registry import Registry
        def fail():
            raise AssertionError("packages were looked for")
        Registry(fail).parse("netdev", "tap,id=net0")
    """
    lines = "\n".join(line.removeprefix(" " * 8) for line in code.splitlines())
    subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True)


def test_objects_of_a_package_refer_claim_and_are_built_in_order(packages: Packages) -> None:
    packages.add()
    registry = packages.registry()

    def together(*texts: str) -> Objects:
        return Objects(specs=tuple(registry.parse("device", f"counter,{text}") for text in texts), registry=registry)

    objects = together("id=c2,after=c1", "id=c1,after=c0", "id=c0")
    assert [spec.id for spec in objects.specs] == ["c0", "c1", "c2"]
    built: Any = Assembly.of(objects, Tracer()).objects
    assert [each.part.before for each in built] == [None, built[0].part, built[1].part]
    for texts, error in {
        ("id=c0,after=c1",): "device 'c0': can't find device 'c1', there is 'c0'",
        (
            "id=c0",
            "id=c1,after=c0",
            "id=c2,after=c0",
        ): "device 'c2': can't take device 'c0', it's in use by device 'c1'",
        ("id=c0,after=c1", "id=c1,after=c0"): "device 'c1' refers to 'c0', which refers to it in turn",
        ("id=c0,after=c0",): "device 'c0' refers to 'c0', which refers to it in turn",
        ("id=c0,place=x", "id=c1,place=x"): "device 'c1': place 'x' is used by device 'c0' already",
    }.items():
        with pytest.raises(ConfigError) as caught:
            together(*texts)
        assert str(caught.value) == error


def test_a_type_that_there_is_not_is_refused_with_those_there_are(packages: Packages) -> None:
    with pytest.raises(ConfigError, match=r"does not accept value 'counter', one of: virtio-net$"):
        packages.registry().parse("device", "counter,id=c0")
    packages.add()
    with pytest.raises(
        ConfigError, match=r"one of: virtio-net; 'localmig run --device help' lists those of packages too"
    ):
        packages.registry().parse("device", "virtio-tea,id=c0")


def spoiled(old: str, new: str) -> str:
    assert old in COUNTER, old
    return COUNTER.replace(old, new)


IMPORT = "cannot be imported from 'module_of_counters:OBJECT': "
SAID = "is wrong: 'module_of_counters:OBJECT': "
WRONG = {
    "import nonsense_not_there": f"{IMPORT}ModuleNotFoundError: No module named 'nonsense_not_there'",
    "def f(:": f"{IMPORT}SyntaxError: invalid syntax (module_of_counters.py, line 1)",
    "raise SystemExit(3)": f"{IMPORT}SystemExit: 3",
    "SUBJECT = 1": f"{IMPORT}AttributeError: module 'module_of_counters' has no attribute 'OBJECT'",
    "OBJECT = 1": f"{SAID}this is of type int, expected localmig.device_api.ObjectType",
    spoiled('"where it begins"', '""'): f"{SAID}option 'first' has no help",
    spoiled('"counts"', '" "'): f"{SAID}its spec has no summary, which help shows",
    spoiled(
        'ClassVar[str] = "counter"', 'ClassVar[str] = "clock"'
    ): f"{SAID}its spec has the type name 'clock', and its entry point 'counter'",
    spoiled(
        "summary: ", 'kind: ClassVar[str] = "audiodev"\n    summary: '
    ): f"{SAID}its spec has the kind 'audiodev', this release knows netdev and device",
    spoiled(
        "first: int =", "color: str = 'red'\n    first: int ="
    ): f"{SAID}field 'color' is no option: give it its type and help by option() or reference()",
    spoiled("first: int =", "driver: int ="): f"{SAID}option 'driver' has the name of what selects the type",
    spoiled('Number(lowest=0, highest=99, reason="two digits")', "5"): f"{SAID}option 'first' has int for its type, "
    "expected a ValueType",
    spoiled('"device"', '"teapot"'): f"{SAID}option 'after' refers to the kind 'teapot', which there is not",
    spoiled("build=Counter,", "build=5,"): f"{SAID}its build cannot be called",
    spoiled('info=(Member(name="count", attribute="count", type=Uint64()),)', "info=5"): "is wrong: TypeError: 'int' "
    "object is not iterable",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_type_that_cannot_be_is_an_error_that_names_its_package(packages: Packages, text: str) -> None:
    packages.add(text=text)
    registry = packages.registry()
    reason = f"type 'counter' of counters 1.2 {WRONG[text]}"
    with pytest.raises(ConfigError) as caught:
        registry.parse("device", "counter,id=c0")
    assert str(caught.value) == f"--device counter,id=c0: {reason}"
    assert registry.help_for("device", "counter,help") is None
    # Who asks for another type does not notice, and help tells of all.
    registry.parse("netdev", "tap,id=net0")
    assert f"({reason})" in (registry.help_for("device", "help") or "")


def test_one_name_in_two_packages_is_an_error_that_names_both(packages: Packages) -> None:
    packages.add()
    packages.add("clocks", counter="module_of_counters:OBJECT", clock="module_of_clocks:OBJECT")
    with pytest.raises(
        ConfigError, match=r"type 'counter' is in more than one package: .*: uninstall all but one"
    ) as caught:
        packages.registry().parse("device", "counter,id=c0")
    assert all(name in str(caught.value) for name in ("counters 1.2", "clocks 1.2"))


def test_a_package_hides_no_built_in_type(packages: Packages) -> None:
    packages.add(virtio_net="module_of_counters:OBJECT")
    registry = packages.registry()
    registry.parse("device", "virtio-net,id=nic0,netdev=net0,socket=/x")
    assert "virtio-net                  (hidden by the built-in type: counters 1.2)" in (
        registry.help_for("device", "help") or ""
    )


BUILD = "device type 'counter' (from counters 1.2) cannot build device 'c0': "
BAD_CODE = {
    spoiled("= spec.id", "= spec.idd"): f"{BUILD}AttributeError: 'CounterSpec' object has no attribute 'idd'",
    spoiled("= spec.id", "= 'c9'"): f"{BUILD}what it returned has the id 'c9'",
    spoiled(
        "build=Counter,", "build=lambda *_: 5,"
    ): f"{BUILD}it returned int, which is no Part of localmig.device_api",
    spoiled(
        '"place", self.place', '"place", []'
    ): "device 'c0': its type 'counter' is wrong: TypeError: unhashable type: 'list'",
    spoiled("setup = Description(", "setup = dict("): f"{BUILD}its state ('setup') is no Description",
}


@pytest.mark.parametrize("text", BAD_CODE)
def test_code_of_a_package_that_fails_refuses_its_object_and_says_whose_it_is(packages: Packages, text: str) -> None:
    packages.add(text=text)
    registry = packages.registry()
    with pytest.raises(ConfigError) as caught:
        Assembly.of(Objects(specs=(registry.parse("device", "counter,id=c0,place=x"),), registry=registry), Tracer())
    assert str(caught.value) == BAD_CODE[text]


# -- HELLO ------------------------------------------------------------------------------------------------------------


def hello(objects: Objects, version: str = "0.3.0") -> Hello:
    return Hello.decode(Hello(version=version, local=True, running=True, objects=objects.for_hello()).encode())


def test_hello_tells_which_package_a_type_is_from_and_a_destination_that_has_it_builds_the_object(
    packages: Packages,
) -> None:
    packages.add()
    registry = packages.registry()
    objects = Objects(specs=(registry.parse("device", "counter,id=c0,first=3"),), registry=registry)
    (told,) = hello(objects).objects
    assert told.origin == Origin(distribution="counters", version="1.2")
    assert Objects(registry=packages.registry()).fit(hello(objects)).specs == objects.specs


def test_a_destination_without_the_package_says_what_to_install(packages: Packages, tmp_path: Path) -> None:
    packages.add()
    registry = packages.registry()
    objects = Objects(specs=(registry.parse("device", "counter,id=c0"),), registry=registry)
    with pytest.raises(PeerError) as caught:
        Objects(registry=Registry(entry_points=list)).fit(hello(objects))
    assert str(caught.value) == (
        f"the source has device 'c0' of type 'counter': install counters 1.2 for '{sys.executable}'"
    )


def test_a_destination_whose_release_lacks_a_type_says_which_release_has_it() -> None:
    with pytest.raises(PeerError) as caught:
        Registry(entry_points=list).read_theirs(
            "device", {"driver": "virtio-tea", "id": "tea0"}, Origin(distribution="localmig", version="9.9")
        )
    assert str(caught.value) == (
        "the source has device 'tea0' of type 'virtio-tea': it is a part of localmig 9.9, and this is "
        f"{LOCALMIG.version}; hand over to that release"
    )


def test_a_destination_whose_package_is_broken_says_so(packages: Packages) -> None:
    packages.add(text="raise OSError('no disk')")
    with pytest.raises(PeerError) as caught:
        packages.registry().read_theirs("device", {"driver": "counter", "id": "c0"}, LOCALMIG)
    assert str(caught.value) == (
        "device 'c0' of the other side: type 'counter' of counters 1.2 cannot be imported from "
        "'module_of_counters:OBJECT': OSError: no disk"
    )


@pytest.mark.parametrize("spoil", [{"distribution": 5}, {"distribution": "x"}, {"distribution-version": "1"}])
def test_a_hello_whose_package_is_no_text_is_refused(spoil: dict[str, object]) -> None:
    fields = json.loads(Hello(version="1", local=True, running=True).encode())
    fields["objects"] = [{"kind": "device", "options": {}, **spoil}]
    with pytest.raises(PeerError, match="'distribution' or 'distribution-version' is no string"):
        Hello.decode(json.dumps(fields).encode())
