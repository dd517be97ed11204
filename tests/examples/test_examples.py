"""The example devices, installed by pip and served to the kit's driver, while they are handed over, changed, killed."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from tests.examples.conftest import EXAMPLES, found, hand_over, moved, write_package
from tests.kit.processes import DaemonProcess, localmig
from tests.kit.site import Site

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.testing.driver import Driver

pytestmark = pytest.mark.xdist_group("examples")  # they share the packages of examples/, which takes long to install

HANDOVERS: Final = 10
RECEIVE, TRANSMIT = 0, 1
BUFFERS: Final = 4


def rng_at(site: Site, more: str = "") -> tuple[str, str]:
    return "--device", f"virtio-rng,id=rng0,socket={site.folder}/rng0.sock{more}"


def console_at(site: Site) -> tuple[str, str]:
    return "--device", f"virtio-console,id=con0,socket={site.folder}/con0.sock,link={site.folder}/console"


class Console:
    """The guest's side of a console, and somebody at the terminal."""

    def __init__(self, site: Site) -> None:
        self.driver = Driver(f"{site.folder}/con0.sock", ring_count=2)
        self.driver.attach()
        for _ in range(BUFFERS):
            self.driver.add(RECEIVE, room=64)
        self.terminal = OwnedFd(os.open(site.folder / "console", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))

    def prints(self, text: bytes) -> None:
        self.driver.request(TRANSMIT, text)
        assert self.shown(len(text)) == text

    def shown(self, size: int) -> bytes:
        poll = select.poll()
        poll.register(self.terminal.fileno(), select.POLLIN)
        text = b""
        while len(text) < size:
            assert poll.poll(10_000), f"{text!r} was shown, {size} bytes were printed"
            text += os.read(self.terminal.fileno(), size)
        return text

    def types(self, text: bytes) -> None:
        os.write(self.terminal.fileno(), text)
        _, typed = self.driver.take_used(RECEIVE)
        assert typed == text
        self.driver.add(RECEIVE, room=64)

    def close(self) -> None:
        self.terminal.close()
        self.driver.close()


@contextmanager
def console_of(site: Site) -> Iterator[Console]:
    console = Console(site)
    try:
        yield console
    finally:
        console.close()


def test_an_entropy_device_is_used_while_it_is_handed_over(site: Site, examples: Path) -> None:
    with found(examples):
        daemon = site.source(*site.objects(), *rng_at(site))
    with Driver(f"{site.folder}/rng0.sock", ring_count=1) as driver:
        driver.attach()
        for _ in range(HANDOVERS):
            assert len({driver.request(0, room=32) for _ in range(10)}) == 10
            daemon = moved(site, daemon, examples)
        assert len(driver.request(0, room=4096)) == 4096
        (device,) = (each for each in daemon.execute("query-devices") if each["id"] == "rng0")
        assert device["session"]["memory-regions"] == 1
        assert device["vrings"][0]["running"]
        (ring,) = device["rings"]
        assert (ring["name"], ring["counters"]["chains"]) == ("requests", 10 * HANDOVERS + 1)
        assert daemon.qmp is not None
        shown = localmig("status", str(daemon.qmp), "--device", "rng0").stdout
        assert "device     rng0, virtio-rng" in shown
        assert re.search(r"^requests +101 ", shown, re.MULTILINE), shown


def test_a_console_keeps_its_buffers_and_its_terminal_over_handovers(site: Site, examples: Path) -> None:
    with found(examples):
        daemon = site.source(*site.objects(), *console_at(site))
    with console_of(site) as console:
        for number in range(HANDOVERS):
            console.prints(b"printed %d" % number)
            console.types(b"typed %d" % number)
            os.write(console.terminal.fileno(), b"meanwhile %d" % number)
            daemon = moved(site, daemon, examples)
            assert console.driver.take_used(RECEIVE)[1] == b"meanwhile %d" % number
            console.driver.add(RECEIVE, room=64)
        # All buffers are the device's still: none was lost, none came back empty.
        for number in range(2 * BUFFERS):
            console.types(b"%d" % number)


def test_the_link_leads_to_the_terminal_of_the_daemon_that_serves(site: Site, examples: Path) -> None:
    link = site.folder / "console"
    with found(examples):
        daemon = site.source(*site.objects(), *console_at(site), local=False)
    before = link.readlink()
    with pytest.raises(PeerError, match=f"cannot make '{site.folder}': Is a directory"):
        daemon.execute(
            "device_add", driver="virtio-console", id="con1", socket=f"{site.folder}/con1.sock", link=str(site.folder)
        )
    with found(examples):
        site.destination(*site.objects(), *console_at(site)).quit()  # nobody handed over to it
        # Descriptors stay home: each daemon has a terminal of its own.
        destination = site.destination(*site.objects(), *console_at(site), local=False, fault="before-send:READY=raise")
    daemon.execute("migrate", uri=site.address)
    assert daemon.wait_migration()["status"] == "failed"
    destination.wait()
    with console_of(site) as console:
        console.prints(b"still here")
    assert link.readlink() == before
    with found(examples):
        destination = site.destination(*site.objects(), *console_at(site), local=False)
    daemon.execute("migrate", uri=site.address)
    assert daemon.wait_migration()["status"] == "completed"
    daemon.quit()
    assert destination.wait_migration()["status"] == "completed"
    with console_of(site) as console:
        console.prints(b"here now")
    assert link.readlink() != before
    destination.quit()
    assert not list(site.folder.glob("console*"))


def test_a_daemon_that_serves_no_nic_hands_over_what_its_rings_counted(site: Site, examples: Path) -> None:
    with found(examples):
        daemon = site.daemon(*console_at(site), *rng_at(site))
    daemon.execute("migrate-set-parameters", local=True)
    with console_of(site) as console, Driver(f"{site.folder}/rng0.sock", ring_count=1) as driver:
        driver.attach()
        for number in range(1, 4):
            console.prints(b"printed")
            driver.request(0, room=32)
            counted = chains_of(daemon)
            assert counted == {"con0": [0, number], "rng0": [number]}
            daemon = moved(site, daemon, examples)
            assert chains_of(daemon) == counted


def chains_of(daemon: DaemonProcess) -> dict[str, list[int]]:
    """How many chains of each ring were completed."""
    return {
        device["id"]: [ring["counters"]["chains"] for ring in device["rings"]]
        for device in daemon.execute("query-devices")
    }


CHANGED: Final = (
    (EXAMPLES / "virtio-rng" / "localmig_rng.py")
    .read_text()
    .replace("OBJECT: Final", "VIRTIO_RNG: Final")
    .replace("from dataclasses", "from localmig.device_api import Description, Subsection, u64\nfrom dataclasses")
    .replace(
        "class VirtioRng(CallbackDevice):",
        '''@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """How many requests were answered."""

    requests: int = 0


SERVED = Description(
    name="virtio-rng",
    version=1,
    oldest_version=1,
    state=Served,
    fields=(),
    subsections=(
        Subsection[Served](
            name="virtio-rng/served",
            version=1,
            oldest_version=1,
            needed=lambda served: served.requests > 0,
            fields=(u64("requests"),),
        ),
    ),
)


class VirtioRng(CallbackDevice):''',
    )
    .replace(
        '    ring_names = ("requests",)\n', '    ring_names = ("requests",)\n    own_state = SERVED\n    served = 0\n'
    )
    .replace(
        "        chain.complete(os.urandom(min(chain.writable, self.max_bytes)))\n",
        '''        self.served += 1
        chain.complete(b"%d" % self.served)

    def save(self, *, with_descriptors: bool) -> Served:
        """How many."""
        return Served(requests=self.served)

    def load(self, state: Served) -> None:
        """Goes on counting."""
        self.served = state.requests
''',
    )
)
"""virtio-rng with another behaviour and a state of its own, which travels once it is needed."""


def test_a_device_is_changed_under_a_running_guest_and_back(site: Site, tmp_path: Path) -> None:
    plain = CHANGED.replace("fields=(u64", "fields=(u64")  # the same state without the new behaviour
    plain = plain.replace('b"%d" % self.served', 'b"old"')
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, source, version in ((old, plain, "1.0"), (new, CHANGED, "2.0")):
        folder.mkdir()
        write_package(folder, "localmig-rng", source, "virtio-rng", version=version)
    with found(old):
        daemon = site.source(*site.objects(), *rng_at(site))
    with Driver(f"{site.folder}/rng0.sock", ring_count=1) as driver:
        driver.attach()
        assert driver.request(0, room=32) == b"old"
        daemon = moved(site, daemon, new)
        assert [driver.request(0, room=32) for _ in range(3)] == [b"2", b"3", b"4"]
        daemon = moved(site, daemon, old)
        assert driver.request(0, room=32) == b"old"
        daemon = moved(site, daemon, new)
        assert driver.request(0, room=32) == b"6"


@pytest.fixture
def gained(tmp_path: Path) -> tuple[Path, Path]:
    """A package whose second release has a state of the device's own, and whose first has none."""
    old, new = tmp_path / "old", tmp_path / "new"
    without = (EXAMPLES / "virtio-rng" / "localmig_rng.py").read_text().replace("OBJECT: Final", "VIRTIO_RNG: Final")
    for folder, source, version in ((old, without, "1.0"), (new, CHANGED, "2.0")):
        folder.mkdir()
        write_package(folder, "localmig-rng", source, "virtio-rng", version=version)
    return old, new


def test_a_device_gains_a_state_of_its_own_and_goes_back_as_long_as_that_has_its_defaults(
    site: Site, gained: tuple[Path, Path]
) -> None:
    old, new = gained
    with found(old):
        daemon = site.source(*site.objects(), *rng_at(site))
    with Driver(f"{site.folder}/rng0.sock", ring_count=1) as driver:
        driver.attach()
        for folder in (new, old, new):
            daemon = moved(site, daemon, folder)
        assert driver.request(0, room=32) == b"1"
        destination = hand_over(site, daemon, folders=(old,))
        info = daemon.wait_migration()
        assert (info["status"], destination.wait()) == ("failed", 1)
        assert 'tells of a section "rng0/virtio-rng"' in info["error-desc"]
        assert "hand over to a release that knows this state" in info["error-desc"]
        assert driver.request(0, room=32) == b"2"
        daemon = moved(site, daemon, new)
        assert driver.request(0, room=32) == b"3"


@pytest.mark.parametrize("is_known", [True, False], ids=["to-one-that-knows-it", "to-one-that-does-not"])
def test_a_state_that_begins_to_matter_during_a_handover_travels_or_ends_it(
    site: Site, gained: tuple[Path, Path], is_known: bool
) -> None:
    old, new = gained
    with found(new):
        daemon = site.source(*site.objects(), *rng_at(site))
    pause = {"capability": "pause-before-switchover", "state": True}
    daemon.execute("migrate-set-capabilities", capabilities=[pause])
    with Driver(f"{site.folder}/rng0.sock", ring_count=1) as driver:
        driver.attach()
        destination = hand_over(site, daemon, folders=(new if is_known else old,))
        daemon.wait_migration_status("pre-switchover")
        assert driver.request(0, room=32) == b"1"
        daemon.execute("migrate-continue", state="pre-switchover")
        info = daemon.wait_migration()
        if is_known:
            assert info["status"] == "completed"
            assert daemon.quit() == 0
            destination.wait_migration()
        else:
            assert (info["status"], destination.wait()) == ("failed", 1)
            assert 'tells of a section "rng0/virtio-rng"' in info["error-desc"]
        assert driver.request(0, room=32) == b"2"


def test_a_source_that_dies_before_it_has_sent_a_newer_state_is_outlived_with_the_older_one(
    site: Site, gained: tuple[Path, Path]
) -> None:
    _, new = gained
    with found(new):
        daemon = site.source(*site.objects(), *rng_at(site), fault="after-send:DESCRIPTION#2=kill")
    daemon.execute("migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}])
    with Driver(f"{site.folder}/rng0.sock", ring_count=1) as driver:
        driver.attach()
        assert driver.request(0, room=32) == b"1"
        destination = hand_over(site, daemon, folders=(new,))
        daemon.wait_migration_status("pre-switchover")
        assert driver.request(0, room=32) == b"2"
        daemon.execute("migrate-continue", state="pre-switchover")
        daemon.wait()
        serves_again(destination)
        assert driver.request(0, room=32) == b"2"


def test_a_destination_without_the_package_refuses_and_names_it(site: Site, examples: Path, tmp_path: Path) -> None:
    with found(examples):
        daemon = site.source(*site.objects(), *rng_at(site))
    site.attach()
    with Driver(f"{site.folder}/rng0.sock", ring_count=1) as driver:
        driver.attach()
        destination = hand_over(site, daemon, folders=(tmp_path,))
        info = daemon.wait_migration()
        assert info["status"] == "failed"
        assert "virtio-rng" in info["error-desc"]
        assert "localmig-virtio-rng 1.0" in info["error-desc"], info
        assert destination.wait() == 1
        assert len(driver.request(0, room=32)) == 32
        assert site.ping().lost == 0


@pytest.mark.parametrize(
    ("side", "fault", "survivor"),
    [
        ("source", "before-send:SWITCHOVER=kill", "destination"),
        ("source", "before-send:COMMIT=kill", "destination"),
        ("source", "after-send:COMMIT=kill", "destination"),
        ("destination", "after-receive:SETUP=kill", "source"),
        ("destination", "after-receive:SWITCHOVER=kill", "source"),
        ("destination", "after-receive:COMMIT=kill", "source"),
        ("destination", "after:*.resume=kill", "source"),
    ],
)
def test_kept_chains_are_neither_lost_nor_taken_twice_when_a_side_dies(
    site: Site, examples: Path, side: str, fault: str, survivor: str
) -> None:
    with found(examples):
        daemon = site.source(*site.objects(), *console_at(site), fault=fault if side == "source" else None)
    with console_of(site) as console:
        for number in range(3):  # so that the ring has been around, and heads are out of order
            console.types(b"before %d" % number)
        destination = hand_over(site, daemon, folders=(examples,), fault=fault if side == "destination" else None)
        ended, serving = (daemon, destination) if survivor == "destination" else (destination, daemon)
        ended.wait()
        serves_again(serving)
        console.prints(b"printed after")
        for number in range(3 * BUFFERS):
            console.types(b"after %d" % number)


def serves_again(daemon: DaemonProcess) -> None:
    """Waits until this daemon has the guest for good."""
    assert daemon.wait_migration()["status"] in ("completed", "failed")
    assert daemon.execute("query-status")["status"] == "running"


def test_a_vmm_that_pauses_gets_kept_chains_back_and_goes_on(site: Site, examples: Path) -> None:
    with found(examples):
        daemon = site.source(*site.objects(), *console_at(site))
    with console_of(site) as console:
        driver = console.driver
        # Rings take turns: once so much was printed, all buffers of the other ring have been taken.
        for _ in range(BUFFERS + 1):
            console.prints(b"x")
        assert driver.stop() == [BUFFERS, BUFFERS + 1]
        returned = [driver.take_used(RECEIVE) for _ in range(BUFFERS)]
        assert [typed for _, typed in returned] == [b""] * BUFFERS
        for _ in returned:
            driver.add(RECEIVE, room=64)
        driver.start()
        console.types(b"again")
        driver.reset()
        for _ in range(BUFFERS):
            driver.add(RECEIVE, room=64)
        driver.start()
        console.types(b"anew")
        driver.disconnect()
        driver.attach()
        for _ in range(BUFFERS):
            assert driver.take_used(RECEIVE)[1] == b""
            driver.add(RECEIVE, room=64)
        console.types(b"another session")
    assert daemon.is_alive
