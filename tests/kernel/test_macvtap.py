"""Macvtaps by name, on one end of a veth: which node leads to one, what it lets in, what becomes of it."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from tests.kit.processes import DaemonProcess

from localmig.errors import ConfigError, KernelError
from localmig.fds import OwnedFd
from localmig.netdevs import macvtap
from localmig.netdevs.macvtap import Macvtap
from localmig.netdevs.state import TAP, TapState
from localmig.testing.frontend import NetGuest
from localmig.testing.namespace import CommandError, NetworkNamespace, ip, link
from localmig.testing.process import start_program
from localmig.vmstate import Blob, Reader, load, save

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("no_descriptor_is_lost", "lower"),
    pytest.mark.xdist_group("macvtap"),  # two network namespaces may mean the same /dev/tapN
]

PATIENCE_S: Final = 10.0
ETH_P_ALL: Final = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
HEADER: Final = 12
GUEST_MAC: Final = "52:54:00:12:34:56"


def frame(to: str, number: int = 0) -> bytes:
    """An Ethernet frame of a type nobody knows."""
    return (
        bytes.fromhex(to.replace(":", "")) + bytes.fromhex("020000000001 88b5") + number.to_bytes(4, "big") + bytes(42)
    )


@pytest.fixture
def lower(namespace: NetworkNamespace) -> Iterator[None]:
    """The device v0, which a macvtap can be on; what it sends arrives at v1."""
    del namespace
    make_lower()
    yield
    # With all that is on it, now: the kernel ends a namespace later, and the next one's macvtap has the same /dev/tapN.
    with suppress(CommandError):
        ip("link", "del", "v0")


def make_lower() -> None:
    try:
        ip("link", "add", "v0", "up", "type", "veth", "peer", "name", "v1")
        ip("link", "add", "link", "v0", "name", "probe", "type", "macvtap")
        os.close(os.open(f"/dev/tap{link('probe')['ifindex']}", os.O_RDWR | os.O_CLOEXEC))
        ip("link", "del", "probe")
    except (CommandError, OSError) as error:
        pytest.skip(f"no macvtap here: {error}")
    ip("link", "set", "v1", "up")


@pytest.fixture(autouse=True)
def sysfs(lower: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A sysfs of the test's namespace; the one at /sys is of the namespace in which it was mounted."""
    with mounted_sysfs(tmp_path / "sys") as place:
        monkeypatch.setattr(macvtap, "SYSFS", place)
        yield place


@contextmanager
def mounted_sysfs(place: Path) -> Iterator[Path]:
    """The sysfs of the namespace that this thread is in."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "sysfs", "sysfs", place], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no sysfs of another namespace can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


class SeenMacvtap(Macvtap):
    """A macvtap that tells when it has looked at its interface."""

    def __init__(self, *, ifname: str = "mt0", **options: Any) -> None:
        super().__init__(id="net0", ifname=ifname, **options)
        self._looked = asyncio.Event()

    def look(self) -> bool:
        again = super().look()
        self._looked.set()
        return again

    async def until(self, is_so: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                self._looked.clear()
                await self._looked.wait()


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[SeenMacvtap]:
    tap = SeenMacvtap(**options)
    tap.open()
    try:
        tap.thaw()
        await tap.until(lambda: True)
        yield tap
    finally:
        tap.close()


def travelled(source: Macvtap, *, with_descriptors: bool = True) -> TapState:
    """What the next process gets."""
    blob = Blob()
    save(TAP, source.save_setup(with_descriptors=with_descriptors), into=blob)
    return load(TAP, TAP.version, Reader(bytes(blob.data), [(at, OwnedFd(os.dup(fd))) for at, fd in blob.fds]))


def machine() -> socket.socket:
    """The far end of the lower device."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.bind(("v1", ETH_P_ALL))
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    sock.settimeout(PATIENCE_S)
    return sock


def receive(tap: Macvtap) -> bytes:
    """The next frame of the tests' own type that the macvtap delivers."""
    while True:
        readable, _, _ = select.select([tap.fileno()], [], [], PATIENCE_S)
        assert readable, "nothing came"
        got = os.read(tap.fileno(), 4096)[HEADER:]
        if got[12:14] == b"\x88\xb5":
            return got


def exists(ifname: str) -> bool:
    return ifname in [name for _, name in socket.if_nameindex()]


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(scenario())


def test_one_is_made_on_its_device_and_stays() -> None:
    async def scenario() -> None:
        async with serving(link="v0", mode="vepa", mtu=1400) as tap:
            made = link("mt0")
            assert (made["link"], made["mtu"], "UP" in made["flags"], "ALLMULTI" in made["flags"]) == (
                "v0",
                1400,
                True,
                True,
            )
            assert (tap.link_is_up, tap.info().ifname, tap.info().notes) == (True, "mt0", ())
        assert exists("mt0")
        async with serving(link="v0"):
            assert link("mt0")["ifindex"] == made["ifindex"]

    run(scenario)


def test_frames_go_both_ways_and_multicast_comes_in() -> None:
    ip("link", "add", "link", "v0", "name", "mt0", "type", "macvtap", "mode", "bridge")

    async def scenario() -> None:
        with machine() as far:
            async with serving() as tap:
                for number, to in enumerate((link("mt0")["address"], "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:42")):
                    far.send(frame(to, number))
                    assert receive(tap) == frame(to, number)
                tap.inject(frame("02:00:00:00:00:09", 7))
                while (got := far.recv(4096))[12:14] != b"\x88\xb5":
                    pass
                assert got == frame("02:00:00:00:00:09", 7)

    run(scenario)


def test_what_keeps_a_guest_from_being_reached_is_a_note() -> None:
    ip("link", "add", "link", "v0", "name", "mt0", "type", "macvtap")

    async def scenario() -> None:
        async with serving() as tap:
            assert tap.info().notes == ()
            tap.mac_told = bytes.fromhex(GUEST_MAC.replace(":", ""))
            address = link("mt0")["address"]
            (note,) = tap.info().notes
            assert note == (
                f"'mt0' has the address {address}, and the guest {GUEST_MAC}: what is sent to the guest does not "
                f"arrive; ip link set mt0 address {GUEST_MAC}"
            )
            ip("link", "set", "mt0", "address", GUEST_MAC)
            await tap.until(lambda: not tap.info().notes)
            ip("link", "set", "mt0", "allmulticast", "off")
            await tap.until(lambda: tap.info().notes)
            assert tap.info().notes == (
                "'mt0' takes in no multicast, IPv6 for one needs it: ip link set mt0 allmulticast on",
            )

    run(scenario)


def test_one_that_moved_is_seen_to_go_and_to_come_again() -> None:
    async def scenario() -> None:
        async with serving(link="v0") as source:
            source.freeze()
            state = travelled(source)
            async with asyncio.timeout(PATIENCE_S):
                successor = SeenMacvtap(link="v0")
                successor.check_setup(state)
                successor.adopt_setup(state)
                source.release()
                successor.thaw()
                ip("link", "del", "mt0")
                await successor.until(lambda: successor.is_gone)
                assert not successor.link_is_up
                (note,) = successor.info().notes
                assert "ip link add link v0 name mt0 type macvtap mode bridge && ip link set mt0 up" in note
                ip("link", "add", "link", "v0", "name", "mt0", "type", "macvtap")
                ip("link", "set", "mt0", "up")
                await successor.until(lambda: successor.link_is_up)
                with machine() as far:
                    far.send(frame("ff:ff:ff:ff:ff:ff", 3))
                    assert receive(successor) == frame("ff:ff:ff:ff:ff:ff", 3)
                successor.close()

    run(scenario)


def test_one_that_stays_home_is_opened_when_the_source_has_released_it() -> None:
    async def scenario() -> None:
        async with serving(link="v0") as source:
            successor = SeenMacvtap()
            state = travelled(source, with_descriptors=False)
            successor.check_setup(state)
            successor.adopt_setup(state)
            assert not successor.is_open
            source.release()
            successor.source_released()
            assert successor.is_open
            with machine() as far:
                far.send(frame("ff:ff:ff:ff:ff:ff", 3))
                assert receive(successor) == frame("ff:ff:ff:ff:ff:ff", 3)
            successor.close()

    run(scenario)


def test_a_node_of_another_namespaces_macvtap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ip("link", "add", "link", "v0", "name", "mt0", "type", "macvtap")
    number = link("mt0")["ifindex"]
    with NetworkNamespace.create() as other, other.entered():
        make_lower()
        ip("link", "add", "link", "v0", "name", "mt0", "index", str(number), "type", "macvtap")
        # Of the first one's namespace still: it says nothing of this interface.
        with pytest.raises(ConfigError, match=r"does not show 'mt0': it is of another network namespace; mount this"):
            SeenMacvtap().open()
        with mounted_sysfs(tmp_path / "there") as place:
            monkeypatch.setattr(macvtap, "SYSFS", place)
            with pytest.raises(ConfigError, match=rf"/dev/tap{number} is not 'mt0': .* mknod /dev/tap{number} c \d+ "):
                SeenMacvtap().open()
            major, minor = (place / f"class/net/mt0/tap{number}/dev").read_text().split(":")
            os.mknod(tmp_path / f"tap{number}", 0o600 | 0o020000, os.makedev(int(major), int(minor)))
            monkeypatch.setattr(macvtap, "DEVICES", tmp_path)
            tap = SeenMacvtap()
            tap.open()
            assert tap.info().ifindex == number
            tap.close()


def test_what_cannot_be_is_refused_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for options, reason in (
        ({}, "there is no interface 'mt0': ip link add link DEVICE name mt0 type macvtap mode bridge, or say link="),
        ({"link": "v7"}, "cannot make macvtap 'mt0': there is no interface 'v7', which link= names"),
        ({"ifname": "v1"}, "cannot open TAP 'v1': it is no macvtap; look at it: ip -d link show v1"),
    ):
        with pytest.raises(ConfigError, match=reason):
            SeenMacvtap(**options).open()
    ip("link", "add", "link", "v1", "name", "mt1", "type", "macvtap")
    with pytest.raises(ConfigError, match="'mt1' is there already and is not on 'v0': name another one, or ip link"):
        SeenMacvtap(ifname="mt1", link="v0").open()
    monkeypatch.setattr(macvtap, "DEVICES", tmp_path)
    with pytest.raises(KernelError, match=r"cannot open .*/tap\d+ of 'mt0': No such file or directory; mknod"):
        SeenMacvtap(link="v0").open()
    assert not exists("mt0")


def test_a_guest_on_a_macvtap_is_handed_over(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("m")
    # In a mount namespace of its own, whose sysfs is the network namespace's.
    launcher = ["unshare", "-m", "sh", "-c", 'mount -t sysfs sysfs /sys && exec "$@"', "sh"]
    aside = partial(start_program, launcher=launcher)
    with ExitStack() as ends:
        objects = [
            *("--netdev", "macvtap,id=net0,ifname=mt0,link=v0"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,socket={folder}/n,mac={GUEST_MAC}"),
        ]
        local = ["--migration-parameter", "local=on"]
        daemon = ends.enter_context(DaemonProcess([*local, *objects], qmp=folder / "q", start=aside))
        (netdev,) = daemon.execute("query-netdevs")
        assert (netdev["type"], netdev["ifname"], netdev["up"]) == ("macvtap", "mt0", True)
        assert "does not arrive; ip link set mt0 address" in netdev["notes"][0]
        ip("link", "set", "mt0", "address", GUEST_MAC)
        near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.enter_context(near)
        ends.enter_context(tap)
        near.settimeout(PATIENCE_S)
        tap.setblocking(False)
        ends.enter_context(NetGuest(f"{folder}/n", tap_fds=[tap.fileno()])).attach()
        far = ends.enter_context(machine())
        for number in range(4):
            far.send(frame(GUEST_MAC, number))
            while (got := near.recv(4096)[HEADER:])[12:14] != b"\x88\xb5":
                pass
            assert got == frame(GUEST_MAC, number)
            near.send(bytes(HEADER) + frame("02:00:00:00:00:09", number))
            while (got := far.recv(4096))[12:14] != b"\x88\xb5":
                pass
            assert got == frame("02:00:00:00:00:09", number)
            address = f"unix:{folder}/m{number}"
            successor = ends.enter_context(DaemonProcess([*local, "--incoming", address], qmp=folder / f"q{number}"))
            daemon.execute("migrate", uri=address)
            assert daemon.wait_migration()["status"] == "completed"
            assert daemon.quit() == 0
            daemon = successor
        assert daemon.execute("query-netdevs")[0]["notes"] == []
