"""Devices whose code is wrong lose their own rings and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from tests.examples.conftest import found, hand_over, moved, write_package
from tests.kit.processes import localmig
from tests.kit.site import Site

from localmig.testing.driver import Driver

pytestmark = pytest.mark.xdist_group("bad-devices")  # they share a package

SOURCE: Final = '''
"""Devices that go wrong."""

from dataclasses import dataclass

from localmig.device_api import (
    CallbackDevice, Choice, Description, ObjectType, PeerError, VhostUserSpec, callback_members, option, u8
)


class Odd(CallbackDevice):
    device_id = 42
    ring_names = ("requests",)

    def on_chain(self, chain):
        match chain.readable:
            case b"raise":
                raise RuntimeError("no idea")
            case b"loop":
                while True:
                    pass
            case b"too long":
                chain.complete(bytes(chain.writable + 1))
            case b"twice":
                chain.complete(b"once")
                chain.complete(b"again")
            case b"nothing":
                self.forgotten = chain
            case _:
                chain.complete(b"fine")


@dataclass(frozen=True, kw_only=True, slots=True)
class OddSpec(VhostUserSpec):
    type_name = "odd"
    summary = "a device that does what it is told"


ODD = ObjectType(spec=OddSpec, build=lambda spec, context: Odd(**spec.arguments(context)), info=callback_members())


class Wide(Odd):
    ring_names = tuple(map(str, range(300)))


@dataclass(frozen=True, kw_only=True, slots=True)
class WideSpec(VhostUserSpec):
    type_name = "odd-wide"
    summary = "a device with 300 rings"


ODD_WIDE = ObjectType(spec=WideSpec, build=lambda spec, context: Wide(**spec.arguments(context)))


class Shy(Odd):
    def on_serving(self):
        raise RuntimeError("not today")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShySpec(VhostUserSpec):
    type_name = "odd-shy"
    summary = "a device that does not begin"


ODD_SHY = ObjectType(
    spec=ShySpec, build=lambda spec, context: Shy(**spec.arguments(context)), info=callback_members()
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    number: int


class Picky(Odd):
    own_state = Description(name="odd-picky", version=1, oldest_version=1, state=Number, fields=(u8("number"),))

    def save(self, *, with_descriptors):
        return Number(number=7)

    def check(self, state):
        raise PeerError(f"device '{self.id}': number {state.number} cannot be served here")

    def load(self, state):
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class PickySpec(VhostUserSpec):
    type_name = "odd-picky"
    summary = "a device that takes nothing over"


class Clumsy(Odd):
    own_state = Description(name="odd-clumsy", version=1, oldest_version=1, state=Number, fields=(u8("number"),))

    def __init__(self, fails, **arguments):
        super().__init__(**arguments)
        self.fails = fails

    def step(self, name):
        if name == self.fails:
            raise KeyError("no idea")

    def save(self, *, with_descriptors):
        self.step("save")
        return Number(number=7)

    def check(self, state):
        self.step("check")

    def load(self, state):
        self.step("load")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClumsySpec(VhostUserSpec):
    type_name = "odd-clumsy"
    summary = "a device that fails in a handover"

    fails: str = option(Choice(("save", "check", "load")), "where it fails")


ODD_CLUMSY = ObjectType(
    spec=ClumsySpec, build=lambda spec, context: Clumsy(spec.fails, **spec.arguments(context))
)

ODD_PICKY = ObjectType(spec=PickySpec, build=lambda spec, context: Picky(**spec.arguments(context)))
'''


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    write_package(folder, "localmig-odd", SOURCE, "odd", "odd-wide", "odd-picky", "odd-shy", "odd-clumsy")
    return folder


def odd_at(site: Site, number: int, kind: str = "odd") -> tuple[str, str]:
    return "--device", f"{kind},id=odd{number},socket={site.folder}/odd{number}.sock"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (b"raise", "its code raised RuntimeError('no idea')"),
        (b"too long", "its code raised ValueError("),
        (b"twice", "its code raised ValueError("),
        (b"loop", "its code has not returned for "),
    ],
)
def test_code_that_goes_wrong_costs_its_own_rings_and_nothing_else(
    site: Site, odd: Path, asked: bytes, reason: str
) -> None:
    with found(odd):
        daemon = site.source(*site.objects(), *odd_at(site, 0), *odd_at(site, 1))
    site.attach()
    pinger = site.pinger()
    with (
        Driver(f"{site.folder}/odd0.sock", ring_count=1) as broken,
        Driver(f"{site.folder}/odd1.sock", ring_count=1) as whole,
    ):
        broken.attach()
        whole.attach()
        assert broken.request(0, b"hello", room=8) == b"fine"
        broken.add(0, asked, room=8)
        failed = daemon.wait_fact(lambda fact: fact["event"] == "RingFailed")
        assert failed["device"] == "odd0"
        assert failed["reason"].startswith(reason)
        assert whole.request(0, b"hello", room=8) == b"fine"
        assert broken.frontend.get_features()
        device = next(each for each in daemon.execute("query-devices") if each["id"] == "odd0")
        assert device["vrings"][0]["failed"]
        daemon = moved(site, daemon, odd)
        assert whole.request(0, b"hello", room=8) == b"fine"
        # A driver that begins anew is served again, by code that runs.
        broken.reset()
        broken.start()
        assert broken.request(0, b"hello", room=8) == b"fine"
    report = pinger.stop()
    assert report.lost == 0


def test_code_that_goes_wrong_before_the_first_chain_costs_its_own_rings(site: Site, odd: Path) -> None:
    with found(odd):
        daemon = site.source(*site.objects(), *odd_at(site, 0, "odd-shy"), *odd_at(site, 1))
    with (
        Driver(f"{site.folder}/odd0.sock", ring_count=1) as broken,
        Driver(f"{site.folder}/odd1.sock", ring_count=1) as whole,
    ):
        broken.attach()
        whole.attach()
        daemon = moved(site, daemon, odd)
        failed = daemon.wait_fact(lambda fact: fact["event"] == "RingFailed")
        assert (failed["device"], failed["reason"]) == ("odd0", "its code raised RuntimeError('not today')")
        assert whole.request(0, b"hello", room=8) == b"fine"


def test_a_chain_that_is_forgotten_holds_nothing_up(site: Site, odd: Path) -> None:
    with found(odd):
        daemon = site.source(*site.objects(), *odd_at(site, 0))
    with Driver(f"{site.folder}/odd0.sock", ring_count=1) as driver:
        driver.attach()
        driver.add(0, b"nothing", room=8)
        assert driver.request(0, b"hello", room=8) == b"fine"
        daemon = moved(site, daemon, odd)
        assert driver.request(0, b"hello", room=8) == b"fine"
        assert driver.stop() == [3]


def test_a_device_with_too_many_rings_is_refused(site: Site, odd: Path) -> None:
    with found(odd), site.namespace.entered():
        ended = localmig("run", *site.objects(), *odd_at(site, 0, "odd-wide"))
    assert ended.returncode == 1
    assert "device 'odd0' has 300 rings, vhost-user can name 256" in ended.stderr


def test_a_state_that_the_device_refuses_stays_where_it_is(site: Site, odd: Path) -> None:
    with found(odd):
        daemon = site.source(*site.objects(), *odd_at(site, 0, "odd-picky"))
    site.attach()
    with Driver(f"{site.folder}/odd0.sock", ring_count=1) as driver:
        driver.attach()
        destination = hand_over(site, daemon, folders=(odd,))
        info = daemon.wait_migration()
        assert (info["status"], destination.wait()) == ("failed", 1)
        assert "device 'odd0': number 7 cannot be served here" in info["error-desc"]
        assert driver.request(0, b"hello", room=8) == b"fine"
        assert site.ping().lost == 0


@pytest.mark.parametrize(("fails", "what"), [("save", "save"), ("check", "take over"), ("load", "take over")])
def test_code_that_raises_in_a_handover_is_named_with_its_package(site: Site, odd: Path, fails: str, what: str) -> None:
    with found(odd):
        daemon = site.source(
            *site.objects(), "--device", f"odd-clumsy,id=odd0,socket={site.folder}/odd0.sock,fails={fails}"
        )
    with Driver(f"{site.folder}/odd0.sock", ring_count=1) as driver:
        driver.attach()
        destination = hand_over(site, daemon, folders=(odd,))
        info = daemon.wait_migration()
        assert (info["status"], destination.wait()) == ("failed", 1)
        culprit = f"device type 'odd-clumsy' (from localmig-odd 1.0) cannot {what} device 'odd0': KeyError: 'no idea'"
        assert culprit in info["error-desc"]
        assert driver.request(0, b"hello", room=8) == b"fine"
