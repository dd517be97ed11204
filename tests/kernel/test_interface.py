"""What the host does to an interface, as its netdev sees it: each thing it can do, and a handover after it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from localmig.device_api import Offload
from localmig.errors import ConfigError, KernelError
from localmig.fds import OwnedFd
from localmig.netdevs import network, tun
from localmig.netdevs.info import Whereabouts
from localmig.netdevs.network import Networks
from localmig.netdevs.state import TAP, TapState
from localmig.netdevs.tap import Tap
from localmig.netdevs.tun import Flag
from localmig.testing.namespace import CommandError, NetworkNamespace, carrier_changes, ip, link
from localmig.vmstate import Blob, Reader, load, save

PATIENCE_S: Final = 10.0
TUNSETPERSIST: Final = 0x400454CB

pytestmark = pytest.mark.usefixtures("no_descriptor_is_lost")


class SeenTap(Tap):
    """A TAP that tells when it has looked, and what it told its device."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"id": "net0", "ifname": "tap0", **options})
        self.observer = self
        self.told: list[str] = []
        self._looked = asyncio.Event()

    def look(self) -> bool:
        again = super().look()
        self._looked.set()
        return again

    def interface_changed(self) -> None:
        self.told.append("interface")

    def queues_changed(self) -> None:
        self.told.append("queues")

    async def until(self, is_so: Callable[[], object]) -> None:
        """Waits until something is so after the TAP looked at its interface."""
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                self._looked.clear()
                await self._looked.wait()

    @property
    def note(self) -> str:
        """The only one, "" where there is none."""
        notes = self.info().notes
        assert len(notes) < 2, notes
        return "".join(notes)

    @property
    def whereabouts(self) -> Whereabouts | None:
        return self.info().whereabouts


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[SeenTap]:
    tap = SeenTap(**options)
    tap.open()
    try:
        tap.thaw()
        await tap.until(lambda: True)
        yield tap
    finally:
        tap.close()


def travelled(source: SeenTap) -> TapState:
    """What the next process gets."""
    blob = Blob()
    save(TAP, source.save_setup(with_descriptors=True), into=blob)
    return load(TAP, TAP.version, Reader(bytes(blob.data), [(at, OwnedFd(os.dup(fd))) for at, fd in blob.fds]))


async def handed_over(source: SeenTap, **options: Any) -> SeenTap:
    """The TAP in its next process, which has looked at it once."""
    destination = SeenTap(**options)
    source.freeze()
    state = travelled(source)
    destination.check_setup(state)
    destination.adopt_setup(state)
    before = destination.info()
    source.release()
    destination.thaw()
    looked = len(destination.told)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    after = destination.info()
    assert (before.whereabouts, before.ifname, before.mtu, before.bridge) == (
        after.whereabouts,
        after.ifname,
        after.mtu,
        after.bridge,
    )
    # What the host did before a handover is no news after it.
    assert destination.told[looked:] == []
    return destination


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def descriptor_count() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def exists(ifname: str) -> bool:
    return ifname in [name for _, name in socket.if_nameindex()]


# -- up, down, MTU --------------------------------------------------------------------------------------------


def test_an_interface_that_is_brought_down_and_up_is_seen() -> None:
    async def scenario() -> None:
        async with serving() as tap:
            assert (tap.link_is_up, tap.info().is_up, tap.note) == (True, True, "")
            ip("link", "set", "tap0", "down")
            await tap.until(lambda: not tap.link_is_up)
            assert tap.note == "'tap0' is down: ip link set tap0 up"
            successor = await handed_over(await handed_over(tap))
            assert not successor.link_is_up
            ip("link", "set", "tap0", "up")
            await successor.until(lambda: successor.link_is_up)
            assert (successor.note, successor.told) == ("", ["interface"])
            successor.close()

    run(scenario)


def test_the_mtu_that_counts_is_the_present_one() -> None:
    async def scenario() -> None:
        async with serving(mtu=1400) as tap:
            ip("link", "set", "tap0", "mtu", "9000")
            await tap.until(lambda: tap.mtu == 9000)
            assert (tap.frame_length_max, tap.told) == (9018, ["interface"])
            assert tap.note == "'tap0' has MTU 9000, and mtu= says 1400: ip link set tap0 mtu 1400"
            # The option says what it was opened with, so a handover is none the worse for it.
            successor = await handed_over(await handed_over(tap, mtu=1400), mtu=1400)
            successor.mtu_told = 2000
            ip("link", "set", "tap0", "mtu", "1400")
            await successor.until(lambda: successor.mtu == 1400)
            assert successor.note == "'tap0' has MTU 1400, and the guest uses 2000: ip link set tap0 mtu 2000"
            successor.close()

    run(scenario)


def test_who_looks_sees_the_mtu_before_any_event_is_read() -> None:
    async def scenario() -> None:
        async with serving() as tap:
            ip("link", "set", "tap0", "mtu", "9000")
            tap.look()
            assert tap.mtu == 9000

    run(scenario)


def test_a_carrier_that_somebody_took_is_told() -> None:
    async def scenario() -> None:
        async with serving() as tap:
            ip("link", "set", "tap0", "carrier", "off")
            await tap.until(lambda: tap.note)
            assert tap.note == "'tap0' has no carrier, so nothing reaches the guest: ip link set tap0 carrier on"

    run(scenario)


def test_what_happened_while_nobody_watched_is_seen_by_the_process_that_serves_next() -> None:
    async def scenario() -> None:
        async with serving() as tap:
            tap.freeze()
            ip("link", "set", "tap0", "mtu", "9000")
            ip("link", "set", "tap0", "down")
            tap.thaw()  # the handover came back
            await tap.until(lambda: tap.mtu == 9000 and not tap.link_is_up)
            tap.freeze()
            ip("link", "del", "tap0")
            make_again()
            tap.look()
            assert tap.is_gone
            tap.recover()
            tap.thaw()
            await tap.until(lambda: tap.info().ifindex == link("tap0")["ifindex"])

    run(scenario)


def test_a_source_that_says_that_the_interface_is_gone_is_not_believed() -> None:
    async def scenario() -> None:
        async with serving() as tap:
            tap.freeze()
            state = travelled(tap)
            assert state.descriptors is not None
            lie = dataclasses.replace(state, descriptors=dataclasses.replace(state.descriptors, is_gone=True))
            successor = SeenTap()
            successor.adopt_setup(lie)
            tap.release()
            successor.thaw()
            await successor.until(lambda: successor.whereabouts is Whereabouts.HERE)
            successor.close()

    run(scenario)


# -- other names, other namespaces ----------------------------------------------------------------------------


def test_a_renamed_interface_keeps_its_tap_and_the_downscript_gets_its_present_name(tmp_path: Path) -> None:
    script = tmp_path / "down"
    script.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/name\n')
    script.chmod(0o755)

    async def scenario() -> None:
        async with serving(downscript=str(script)) as tap:
            ip("link", "set", "tap0", "name", "tap9")
            await tap.until(lambda: tap.ifname == "tap9")
            assert tap.note == (
                "'tap0' was renamed to 'tap9': a new daemon would look for 'tap0'; rename it back, or say "
                "ifname=tap9 there"
            )
            successor = await handed_over(await handed_over(tap))
            # Not even seen yet.
            ip("link", "set", "tap9", "name", "tap8")
            successor.close()
        assert (tmp_path / "name").read_text() == "tap8\n"

    run(scenario)


def test_another_interface_that_takes_the_old_name_is_not_ours() -> None:
    async def scenario() -> None:
        async with serving() as tap:
            ip("link", "set", "tap0", "name", "tap9")
            ip("link", "add", "tap0", "mtu", "2000", "type", "bridge")
            await tap.until(lambda: tap.ifname == "tap9")
            ip("link", "set", "tap9", "mtu", "3000")
            await tap.until(lambda: tap.mtu == 3000)

    run(scenario)


def test_an_interface_that_moves_to_another_namespace_is_said_to_be_unknown_and_known_when_it_is_back() -> None:
    async def scenario() -> None:
        with NetworkNamespace.create() as elsewhere:
            async with serving() as tap:
                ip("link", "set", "tap0", "netns", f"/proc/{os.getpid()}/fd/{elsewhere.fileno()}")
                # One of the same name, and of the same address, is another one.
                with elsewhere.entered():
                    address = link("tap0")["address"]
                await tap.until(lambda: tap.whereabouts is Whereabouts.ELSEWHERE)
                ip("link", "add", "tap0", "address", address, "mtu", "2000", "type", "bridge")
                successor = await handed_over(await handed_over(tap))
                assert (successor.link_is_up, successor.mtu, successor.info().is_up) == (True, 1500, None)
                assert successor.note.startswith("'tap0' was moved to another network namespace: its frames flow")
                ip("link", "del", "tap0")
                with NetworkNamespace.here() as here, elsewhere.entered():
                    ip("link", "set", "tap0", "mtu", "3000")
                    ip("link", "set", "tap0", "netns", f"/proc/{os.getpid()}/fd/{here.fileno()}")
                await successor.until(lambda: successor.whereabouts is Whereabouts.HERE)
                assert successor.mtu == 3000
                successor.close()

    run(scenario)


def test_a_successor_in_another_namespace_sees_the_interface_as_its_predecessor_did() -> None:
    async def scenario() -> None:
        with NetworkNamespace.create() as elsewhere:
            ip("link", "add", "br0", "type", "bridge")
            async with serving(bridge="br0") as tap:
                with elsewhere.entered():
                    successor = await handed_over(await handed_over(tap, bridge="br0"), bridge="br0")
                ip("link", "set", "tap0", "mtu", "3000")
                await successor.until(lambda: successor.mtu == 3000)
                assert (successor.whereabouts, successor.info().bridge, successor.note) == (
                    Whereabouts.HERE,
                    "br0",
                    "",
                )
                successor.close()

    run(scenario)


# -- gone, and back -------------------------------------------------------------------------------------------


def make_again(ifname: str = "tap0", *words: str) -> None:
    ip("tuntap", "add", "dev", ifname, "mode", "tap", "vnet_hdr", *words)


def test_an_interface_that_is_deleted_and_made_again_is_attached_again() -> None:
    async def scenario() -> None:
        async with serving(sndbuf=65536) as tap:
            tap.set_offloads(Offload.CSUM)
            ip("link", "del", "tap0")
            await tap.until(lambda: tap.is_gone)
            assert tap.note == (
                "'tap0' was deleted: make it again and it is attached by itself: "
                f"ip tuntap add dev tap0 mode tap vnet_hdr user {os.geteuid()} && ip link set tap0 up"
            )
            assert (tap.link_is_up, tap.info().attached_count, tap.told) == (False, 0, ["interface"])
            # What a guest does meanwhile ends no session of its.
            tap.set_offloads(Offload(0))
            tap.set_vnet_header_length(10)
            tap.inject(bytes(60))
            successor = await handed_over(await handed_over(tap))
            assert successor.is_gone
            assert not exists("tap0")
            make_again()
            await successor.until(lambda: not successor.is_gone)
            assert successor.told == ["queues", "interface"]
            assert (successor.note, successor.link_is_up, successor.vnet_header_length) == ("", True, 12)
            assert successor.info().ifindex == link("tap0")["ifindex"]
            assert "UP" in link("tap0")["flags"]
            successor = await handed_over(successor)
            successor.close()
        assert exists("tap0")

    run(scenario)


def test_of_several_queues_all_are_attached_again() -> None:
    async def scenario() -> None:
        async with serving(queues=3) as tap:
            tap.attach(2)
            ip("link", "del", "tap0")
            await tap.until(lambda: tap.is_gone)
            tap.attach(1)
            tap.detach(2)
            assert " multi_queue user " in tap.note
            make_again("tap0")
            await tap.until(lambda: "without multi_queue, which queues=2 and more need" in tap.note)
            ip("link", "del", "tap0")
            make_again("tap0", "multi_queue")
            await tap.until(lambda: not tap.is_gone)
            assert tap.info().attached_count == 1
            tap.attach(2)

    run(scenario)


def test_one_that_somebody_else_has_open_is_attached_once_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LOOK_AGAIN_S", 0.02)

    async def scenario() -> None:
        async with serving() as tap:
            ip("link", "del", "tap0")
            await tap.until(lambda: tap.is_gone)
            with OwnedFd(tun.open_device()) as other:
                tun.attach_to(other.fileno(), "tap0", Flag.TAP | Flag.NO_PI | Flag.VNET_HDR)
                await tap.until(lambda: "another process has it open" in tap.note)
                fcntl.ioctl(other.fileno(), TUNSETPERSIST, 1)
            await tap.until(lambda: not tap.is_gone)
            assert tap.note == ""

    run(scenario)


def test_an_interface_is_never_made_by_attaching_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attach_to = tun.attach_to

    def deleted_just_before(fd: int, name: str, flags: Flag) -> None:
        if exists("tap0"):
            ip("link", "del", "tap0")
        attach_to(fd, name, flags)

    async def scenario() -> None:
        async with serving() as tap:
            ip("link", "del", "tap0")
            await tap.until(lambda: tap.is_gone)
            with monkeypatch.context() as patch:
                patch.setattr(tun, "attach_to", deleted_just_before)
                make_again()
                await tap.until(lambda: "it was deleted once more" in caplog.text)
                assert not exists("tap0")
            make_again()
            await tap.until(lambda: not tap.is_gone)

    run(scenario)


def test_an_inherited_tap_that_is_gone_is_not_looked_for_by_its_name() -> None:
    async def scenario() -> None:
        with OwnedFd(tun.open_device()) as parents:
            tun.attach_to(parents.fileno(), "tap0", Flag.TAP | Flag.NO_PI | Flag.VNET_HDR)
            async with serving(ifname=None, fds=[os.dup(parents.fileno())]) as tap:
                ip("link", "set", "tap0", "name", "tap1")
                await tap.until(lambda: tap.ifname == "tap1")
                assert tap.note == ""
                ip("link", "del", "tap1")
                make_again("tap1")
                await tap.until(lambda: tap.is_gone)
                assert tap.note.startswith(
                    "'tap1' was deleted, and came as a descriptor: add the netdev again with a new"
                )

    run(scenario)


def test_a_tap_that_was_deleted_before_it_was_inherited_is_refused() -> None:
    with OwnedFd(tun.open_device()) as parents:
        tun.attach_to(parents.fileno(), "tap0", Flag.TAP | Flag.NO_PI | Flag.VNET_HDR)
        ip("link", "del", "tap0")
        with pytest.raises(ConfigError, match=f"fd={parents.fileno()} is a TAP without an interface: it was deleted"):
            Tap(id="net0", fds=[parents.fileno()]).open()


PROGRAM: Final = """
import asyncio, sys
from localmig.netdevs.tap import Tap

async def main():
    tap = Tap(id="net0", ifname="tap0", bridge="br0")
    tap.open()
    tap.thaw()
    print("open", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        tap.look()
        print(tap.is_gone, "; ".join(tap.info().notes), flush=True)

asyncio.run(main())
"""


@contextlib.contextmanager
def unprivileged() -> Iterator[Callable[[], str]]:
    """A process without CAP_NET_ADMIN that has the TAP open; what it gives asks it what it sees."""
    argv = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", PROGRAM]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        assert stdout.readline() == "open\n"

        def ask() -> str:
            stdin.write("\n")
            stdin.flush()
            return stdout.readline().strip()

        try:
            yield ask
        finally:
            stdin.close()


def test_a_user_without_privileges_is_told_who_may_do_what() -> None:
    uid = os.geteuid()
    ip("link", "add", "br0", "type", "bridge")

    def prepare(owner: int) -> None:
        make_again("tap0", "user", str(owner))
        ip("link", "set", "tap0", "master", "br0", "up")

    prepare(uid)
    with unprivileged() as ask:
        assert ask() == "False"
        ip("link", "set", "tap0", "down")
        assert ask() == "False 'tap0' is down: ip link set tap0 up"
        ip("link", "del", "tap0")
        prepare(12345)
        assert ask() == (
            "True 'tap0' was deleted, and the one made again cannot be attached: "
            "netdev 'net0': cannot open TAP 'tap0': Operation not permitted; "
            f"it is for user 12345, and this is user {uid}: ip link del tap0 && "
            f"ip tuntap add dev tap0 mode tap vnet_hdr user {uid}"
        )
        ip("link", "del", "tap0")
        prepare(uid)
        assert ask() == "False"
        # What it may not do is told, and costs it nothing.
        ip("link", "del", "tap0")
        make_again("tap0", "user", str(uid))
        assert ask() == (
            "False 'tap0' is down: ip link set tap0 up; "
            "'tap0' is in no bridge, not in 'br0': ip link set tap0 master br0"
        )


# -- the bridge -----------------------------------------------------------------------------------------------


def test_a_bridge_that_was_asked_for_gets_the_interface_also_when_it_was_made_again() -> None:
    async def scenario() -> None:
        ip("link", "add", "br0", "type", "bridge")
        async with serving(bridge="br0") as tap:
            assert (link("tap0")["master"], tap.info().bridge, tap.note) == ("br0", "br0", "")
            ip("link", "del", "tap0")
            await tap.until(lambda: tap.is_gone)
            make_again()
            await tap.until(lambda: not tap.is_gone)
            assert (link("tap0")["master"], tap.info().bridge) == ("br0", "br0")
            ip("link", "add", "br1", "type", "bridge")
            ip("link", "set", "tap0", "master", "br1")
            await tap.until(lambda: tap.info().bridge == "br1")
            successor = await handed_over(await handed_over(tap, bridge="br0"), bridge="br0")
            assert successor.note == "'tap0' is in 'br1', not in 'br0': ip link set tap0 master br0"
            assert link("tap0")["master"] == "br1"
            ip("link", "set", "br1", "name", "br2")
            await successor.until(lambda: successor.info().bridge == "br2")
            ip("link", "del", "br2")
            await successor.until(lambda: successor.info().bridge is None)
            successor.close()

    run(scenario)


def test_a_bridge_that_is_set_by_others_is_shown_too() -> None:
    async def scenario() -> None:
        ip("link", "add", "br0", "type", "bridge")
        async with serving() as tap:
            ip("link", "set", "tap0", "master", "br0")
            await tap.until(lambda: tap.info().bridge == "br0")
            assert tap.note == ""

    run(scenario)


@pytest.mark.parametrize(
    ("is_there", "error"),
    [
        (False, "there is no such interface; make it: ip link add br0 type bridge && ip link set br0 up"),
        (True, "that is no bridge of the kernel's; for another kind, Open vSwitch for one, name a program with"),
    ],
)
def test_what_is_no_bridge_is_refused_and_no_tap_is_left(is_there: bool, error: str) -> None:
    if is_there:
        ip("link", "set", "lo", "name", "br0")
    with pytest.raises(ConfigError, match=error):
        Tap(id="net0", ifname="tap0", bridge="br0").open()
    assert not exists("tap0")


# -- the carrier ----------------------------------------------------------------------------------------------


def has_carrier() -> bool:
    return "LOWER_UP" in link("tap0")["flags"]


def test_a_carrier_can_follow_the_guest_and_does_not_flap_in_a_handover() -> None:
    async def scenario() -> None:
        async with serving(guest_carrier=True) as tap:
            assert not has_carrier()
            tap.driver_begins()
            assert has_carrier()
            changes = carrier_changes("tap0")
            successor = await handed_over(await handed_over(tap, guest_carrier=True), guest_carrier=True)
            successor.driver_begins()
            assert (successor.note, carrier_changes("tap0")) == ("", changes)
            successor.driver_ends()
            assert (has_carrier(), successor.note, successor.link_is_up) == (False, "", True)
            # One that does not follow it any more gives it back.
            successor = await handed_over(successor)
            successor.driver_ends()
            assert has_carrier()
            successor.close()

    run(scenario)


def test_a_carrier_is_always_there_where_nothing_else_is_asked_for() -> None:
    async def scenario() -> None:
        async with serving() as tap:
            tap.driver_begins()
            tap.driver_ends()
            assert has_carrier()

    run(scenario)


# -- many, much, and little -----------------------------------------------------------------------------------


def test_all_taps_of_a_daemon_share_a_socket_and_each_sees_its_own() -> None:
    async def scenario() -> None:
        networks = Networks()
        before = descriptor_count()
        async with serving(networks=networks) as first, serving(ifname="tap1", networks=networks) as second:
            assert descriptor_count() == before + 3
            ip("link", "set", "tap1", "mtu", "2000")
            await second.until(lambda: second.mtu == 2000)
            assert first.told == []
            state = [each.save_setup(with_descriptors=True).descriptors for each in (first, second)]
            assert [each is not None and each.netlink is not None for each in state] == [True, False]

    run(scenario)


def test_a_tap_that_stays_home_asks_nothing_by_the_socket_that_came_with_another_one() -> None:
    async def scenario() -> None:
        async with serving() as source:
            networks = Networks()
            arrived = SeenTap(networks=networks)
            arrived.adopt_setup(travelled(source))
            # Whoever reads there takes away what the other one is told, and the source serves still.
            with socket.socket(fileno=os.dup(source._opened().network.fd.fileno())) as sock:
                ip("link", "set", "tap0", "mtu", "2000")
                waiting = sock.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                home = [SeenTap(id=name, ifname=name, networks=networks) for name in ("tap1", "tap2")]
                for tap in home:
                    tap.open()
                assert sock.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT) == waiting
            assert len({tap._opened().network for tap in (arrived, *home)}) == 2
            for tap in home:
                tap.close()
            arrived.discard()
            await source.until(lambda: source.mtu == 2000)

    run(scenario)


def test_what_the_host_did_since_it_was_told_is_a_change_of_the_setup() -> None:
    async def scenario() -> None:
        async with serving() as tap:
            changes: list[int] = []
            tap.watch_setup(lambda: changes.append(tap.mtu))
            ip("link", "set", "tap0", "mtu", "2000")
            await tap.until(lambda: tap.mtu == 2000)
            assert changes
            assert tap.save_setup(with_descriptors=True).mtu == 2000
            tap.watch_setup(None)

    run(scenario)


def test_lost_events_are_made_up_for() -> None:
    async def scenario() -> None:
        networks = Networks()
        async with serving(networks=networks) as tap, serving(ifname="tap1", networks=networks) as other:
            netlink = networks.here(tap).fd
            with socket.socket(fileno=os.dup(netlink.fileno())) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            for mtu in range(1000, 1040):
                ip("link", "set", "tap1", "mtu", str(mtu))
            ip("link", "set", "tap0", "mtu", "2000")
            # The answer to a question is lost in a full socket as events are.
            other.look()
            assert other.mtu == 1039
            await tap.until(lambda: tap.mtu == 2000)

    run(scenario)


def test_a_kernel_that_does_not_answer_is_asked_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(network, "LOOK_AGAIN_S", 0.02)

    async def scenario() -> None:
        async with serving() as tap:
            ask = network.Network.link
            refusals = iter([OSError(errno.ENOMEM, "no memory")])

            def refuse_once(self: network.Network, **question: Any) -> Any:
                for refusal in refusals:
                    raise refusal
                return ask(self, **question)

            monkeypatch.setattr(network.Network, "link", refuse_once)
            ip("link", "set", "tap0", "mtu", "2000")
            await tap.until(lambda: tap.mtu == 2000)
            assert "cannot see what became of 'tap0': no memory" in caplog.text

    run(scenario)


def test_a_process_without_descriptors_left_opens_no_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(network, "_open_socket", refuse)
    with pytest.raises(KernelError, match="cannot watch interfaces: Too many open files"):
        Tap(id="net0", ifname="tap0").open()


# -- a macvtap ------------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("macvtap")  # two network namespaces may mean the same /dev/tapN
def test_an_inherited_macvtap_is_seen_as_a_tap_is() -> None:
    ip("link", "add", "v0", "up", "type", "veth", "peer", "name", "v1")
    try:
        ip("link", "add", "link", "v0", "name", "mt0", "type", "macvtap")
        queue = os.open(f"/dev/tap{link('mt0')['ifindex']}", os.O_RDWR | os.O_CLOEXEC)
    except (CommandError, OSError) as error:
        pytest.skip(f"no macvtap here: {error}")

    async def scenario() -> None:
        async with serving(ifname=None, fds=[queue]) as tap:
            ip("link", "set", "mt0", "mtu", "1400")
            await tap.until(lambda: tap.mtu == 1400)
            successor = await handed_over(tap, ifname=None)
            ip("link", "del", "mt0")
            await successor.until(lambda: successor.is_gone)
            successor.close()

    run(scenario)
