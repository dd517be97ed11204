"""When the methods of a device are called, as the table of docs/devices.md has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tests.examples.conftest import found, hand_over, write_package
from tests.kit.processes import DaemonProcess
from tests.kit.site import Site

from localmig.testing.driver import Driver

SOURCE: Final = '''
"""A device that writes down what is called."""

import os
from dataclasses import dataclass
from pathlib import Path

from localmig.device_api import CallbackDevice, Description, ObjectType, VhostUserSpec, callback_members


@dataclass(frozen=True, kw_only=True, slots=True)
class Nothing:
    pass


class Spy(CallbackDevice):
    device_id = 42
    ring_names = ("requests",)
    own_state = Description(name="spy", version=1, oldest_version=1, state=Nothing, fields=())

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.calls = Path(__file__).with_name(f"calls.{os.getpid()}")

    def note(self, name):
        with self.calls.open("a") as calls:
            calls.write(f"{name}\\n")

    def on_chain(self, chain):
        chain.complete()

    def open(self):
        self.note("open")
        super().open()

    def on_serving(self):
        self.note("on_serving")

    def save(self, *, with_descriptors):
        self.note("save")
        return Nothing()

    def check(self, state):
        self.note("check")

    def load(self, state):
        self.note("load")

    def release(self):
        self.note("release")
        super().release()

    def close(self):
        self.note("close")
        super().close()


@dataclass(frozen=True, kw_only=True, slots=True)
class SpySpec(VhostUserSpec):
    type_name = "spy"
    summary = "a device that writes down what is called"


SPY = ObjectType(spec=SpySpec, build=lambda spec, context: Spy(**spec.arguments(context)), info=callback_members())
'''


def test_a_device_hears_of_its_life_as_the_page_says(site: Site, tmp_path: Path) -> None:
    def has_heard(daemon: DaemonProcess, calls: str) -> bool:
        """Whether its calls are what a regular expression says."""
        heard = " ".join((tmp_path / f"calls.{daemon.pid}").read_text().split())
        return re.fullmatch(calls, heard) is not None

    write_package(tmp_path, "localmig-spy", SOURCE, "spy")
    with found(tmp_path):
        source = site.source("--device", f"spy,id=spy0,socket={site.folder}/spy0.sock", *site.objects())
    with Driver(f"{site.folder}/spy0.sock", ring_count=1) as driver:
        driver.attach()
        driver.request(0, b"asked")
        assert has_heard(source, "open on_serving")
        hand_over(site, source, folders=(tmp_path,), fault="after-receive:SWITCHOVER=kill")
        assert source.wait_migration()["status"] == "failed"
        driver.request(0, b"asked")
        assert has_heard(source, "open on_serving( save)+ on_serving")
        destination = hand_over(site, source, folders=(tmp_path,))
        assert source.wait_migration()["status"] == "completed"
        assert destination.wait_migration()["status"] == "completed"
        assert has_heard(source, "open on_serving( save)+ on_serving( save)+ release")
        assert has_heard(destination, "(check load )+on_serving")
    destination.quit()
    assert has_heard(destination, "(check load )+on_serving close")
