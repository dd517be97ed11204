"""A real TAP: opened, configured, handed over, in a network namespace of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localmig.errors import ConfigError, KernelError
from localmig.fds import OwnedFd
from localmig.netdevs import script, tun
from localmig.netdevs.state import TAP, TapState
from localmig.netdevs.tap import Tap
from localmig.testing.namespace import NetworkNamespace, ip, link
from localmig.vmstate import Blob, Reader, load, save

ETHERTYPE_RARP = 0x8035
FRAME = b"\xff" * 6 + b"\x52\x54\x00\x12\x34\x56" + ETHERTYPE_RARP.to_bytes(2, "big") + bytes(46)
ETH_P_ALL = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23


pytestmark = pytest.mark.usefixtures("no_descriptor_is_lost")


@contextlib.contextmanager
def opened(**options: Any) -> Iterator[Tap]:
    tap = Tap(**{"id": "net0", "ifname": "tap0", **options})
    tap.open()
    try:
        yield tap
    finally:
        tap.close()


@contextlib.contextmanager
def packet_socket(ifname: str) -> Iterator[socket.socket]:
    """What the machine's side of the interface sees and sends."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sock:
        sock.bind((ifname, ETH_P_ALL))
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        sock.settimeout(5)
        yield sock


def exists(ifname: str) -> bool:
    return ifname in [name for _, name in socket.if_nameindex()]


def travel(state: TapState) -> TapState:
    """What the destination gets of a source's state; its descriptors are copies, as after SCM_RIGHTS."""
    blob = Blob()
    save(TAP, state, into=blob)
    fds = [(offset, OwnedFd(os.dup(number))) for offset, number in blob.fds]
    return load(TAP, TAP.version, Reader(bytes(blob.data), fds))


@contextlib.contextmanager
def no_ioctls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*arguments: object) -> None:
        pytest.fail(f"ioctl on a descriptor the source shares: {arguments}")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "ioctl", refuse)
        patch.setattr(os, "set_blocking", refuse)
        yield


def handed_over(source: Tap, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tap:
    """The destination's tap after `adopt_setup`."""
    destination = Tap(**{"id": "net0", **options})
    state = travel(source.save_setup(with_descriptors=True))
    with no_ioctls(monkeypatch):
        destination.check_setup(state)
        destination.adopt_setup(state)
    return destination


# -- opening --------------------------------------------------------------------------------------------------


def test_a_tap_that_does_not_exist_is_created_up_and_gone_when_closed() -> None:
    with opened() as tap:
        assert tap.is_open
        assert tap.ifname == "tap0"
        assert "UP" in link("tap0")["flags"]
        assert not os.get_blocking(tap.fileno())
        assert not os.get_inheritable(tap.fileno())
        assert (tap.mtu, tap.frame_length_max, tap.vnet_header_length) == (1500, 1518, 12)
        assert tap.local_migration_blocker() is None
    assert not tap.is_open
    assert not exists("tap0")


def test_without_a_name_the_kernel_chooses_one() -> None:
    ip("tuntap", "add", "tap0", "mode", "tap")
    with opened(ifname=None) as tap:
        assert tap.ifname == "tap1"


def test_a_tap_made_beforehand_is_taken_as_it_is_and_stays() -> None:
    # Without vnet_hdr, down, with another MTU: `ip tuntap` and former users leave them in all shapes.
    ip("tuntap", "add", "tap0", "mode", "tap")
    ip("link", "set", "tap0", "mtu", "2000")
    with opened() as tap:
        assert tap.mtu == 2000
        assert "UP" in link("tap0")["flags"]
        assert receive_frame(tap)[:12] == bytes(12)
    assert exists("tap0")


def test_the_mtu_is_set_where_it_is_asked_for() -> None:
    with opened(mtu=9000) as tap:
        assert link("tap0")["mtu"] == tap.mtu == 9000
        assert tap.frame_length_max == 9018


def test_a_busy_name_says_so_and_disturbs_nobody() -> None:
    with opened() as tap:
        tap.set_vnet_header_length(10)
        with pytest.raises(KernelError, match="another process has it open; stop that process") as caught:
            Tap(id="net1", ifname="tap0", mtu=9000).open()
        assert caught.value.errno == 16
        assert str(caught.value).startswith("netdev 'net1': cannot open TAP 'tap0': Device or resource busy; ")
        assert link("tap0")["mtu"] == 1500
        assert len(receive_frame(tap)) == 10 + len(FRAME)


@pytest.mark.parametrize(
    "arguments",
    [
        ("link", "set", "lo", "name", "tap0"),
        ("tuntap", "add", "tap0", "mode", "tun"),
    ],
)
def test_an_interface_that_is_no_tap_is_refused(arguments: tuple[str, ...]) -> None:
    ip(*arguments)
    with pytest.raises(KernelError, match="an interface of that name exists and is no TAP; look at it"):
        Tap(id="net0", ifname="tap0").open()


def test_a_tap_made_for_several_queues_serves_one() -> None:
    ip("tuntap", "add", "tap0", "mode", "tap", "multi_queue")
    with opened() as tap:
        assert queues_in_use() == (1, 0)
        assert len(receive_frame(tap)) == 12 + len(FRAME)
        with pytest.raises(KernelError, match="another process has it open; stop that process"):
            Tap(id="net1", ifname="tap0").open()
        assert queues_in_use() == (1, 0)
    # More of them later, after a restart.
    with opened(queues=2):
        assert queues_in_use() == (1, 1)


def test_one_made_for_one_queue_does_not_get_several() -> None:
    ip("tuntap", "add", "tap0", "mode", "tap")
    with pytest.raises(KernelError, match="is no TAP, or one made without multi_queue, which queues=2 and more need"):
        Tap(id="net0", ifname="tap0", queues=2).open()


def test_a_machine_without_tun_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tun, "DEVICE", str(tmp_path / "tun"))
    with pytest.raises(KernelError, match="No such file or directory; load the kernel module: modprobe tun"):
        Tap(id="net0", ifname="tap0").open()


def test_missing_permission_says_what_to_do() -> None:
    program = """
from localmig.errors import KernelError
from localmig.netdevs.tap import Tap
for ifname in ("tap0", "tap1"):
    try:
        Tap(id="net0", ifname=ifname).open()
    except KernelError as error:
        print(error)
"""
    ip("tuntap", "add", "tap1", "mode", "tap")
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    new, old = done.stdout.splitlines()
    assert new == (
        "netdev 'net0': cannot open TAP 'tap0': Operation not permitted; run with CAP_NET_ADMIN, or have it "
        f"made beforehand: ip tuntap add dev tap0 mode tap vnet_hdr user {os.geteuid()}"
    )
    # Anyone may open a TAP without an owner; bringing it up is another matter.
    assert (
        old
        == "netdev 'net0': cannot bring 'tap1' up: Operation not permitted; bring it up beforehand: ip link set tap1 up"
    )


def test_an_interface_that_is_ready_needs_no_privilege() -> None:
    program = """
from localmig.netdevs.tap import Tap
tap = Tap(id="net0", ifname="tap0", mtu=1400)
tap.open()
print(tap.frame_length_max)
tap.close()
"""
    ip("tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
    ip("link", "set", "tap0", "mtu", "1400", "up")
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "1418\n"


# -- fd= ------------------------------------------------------------------------------------------------------


def inherited_tap() -> int:
    """A descriptor as a parent process would leave it: blocking, inheritable."""
    with opened() as tap:
        return os.dup(tap.fileno())


def test_an_inherited_tap_is_configured_and_used() -> None:
    number = inherited_tap()
    os.set_blocking(number, True)
    os.set_inheritable(number, True)
    ip("link", "set", "tap0", "down", "mtu", "1300")
    with opened(ifname=None, fds=[number]) as tap:
        assert (tap.fileno(), tap.ifname, tap.mtu) == (number, "tap0", 1300)
        assert not os.get_blocking(number)
        assert not os.get_inheritable(number)
        assert "UP" in link("tap0")["flags"]
        assert len(receive_frame(tap)) == 12 + len(FRAME)


def test_an_inherited_tap_of_another_namespace_needs_its_mtu_said() -> None:
    with NetworkNamespace.create() as elsewhere:
        with elsewhere.entered():
            number = inherited_tap()
            copy = os.dup(number)
        # An interface of the same name here is another one.
        with opened():
            with pytest.raises(ConfigError, match="is in another network namespace, so its MTU cannot be read; say it"):
                Tap(id="net1", fds=[number]).open()
            os.close(number)  # it was left alone
            with opened(ifname=None, fds=[copy], mtu=2000) as tap:
                assert (tap.ifname, tap.frame_length_max) == ("tap0", 2018)
            assert link("tap0")["mtu"] == 1500


def test_a_descriptor_that_is_no_tap_of_ours_is_refused_and_left_alone() -> None:
    plain = os.open("/dev/net/tun", os.O_RDWR)
    request = b"tap9".ljust(16, b"\0") + (0x1002).to_bytes(2, sys.byteorder) + bytes(22)
    fcntl.ioctl(plain, tun._TUNSETIFF, request)
    null = os.open("/dev/null", os.O_RDWR)
    try:
        for number, error in (
            (plain, f"netdev 'net0': fd={plain} ('tap9') was opened without IFF_VNET_HDR"),
            (null, f"netdev 'net0': fd={null} is no TAP"),
            (1000, "netdev 'net0': fd=1000 is not open"),
        ):
            with pytest.raises(ConfigError) as caught:
                Tap(id="net0", fds=[number]).open()
            assert str(caught.value) == error
    finally:
        os.close(plain)
        os.close(null)


# -- several queues -------------------------------------------------------------------------------------------


def queues_in_use(ifname: str = "tap0") -> tuple[int, int]:
    """(attached, detached) queues of a TAP, as the kernel counts them."""
    (facts,) = json.loads(ip("-details", "-json", "link", "show", "dev", ifname))
    info = facts["linkinfo"]["info_data"]
    return info.get("numqueues", 0), info.get("numdisabled", 0)


def spread(tap: Tap) -> list[int]:
    """How many of some flows' frames the kernel steers into each queue."""
    with packet_socket(tap.ifname) as sock:
        for flow in range(64):
            # An IPv4 header with an address of its own: the kernel steers by flow.
            header = bytes.fromhex("4500 0014 0000 0000 4011 0000 0a090001 0a0902") + bytes([flow])
            sock.send(b"\xff" * 6 + b"\x52\x54\x00\x12\x34\x56" + b"\x08\x00" + header + bytes(26))
    counts = []
    for queue in range(tap.queue_count):
        count = 0
        with contextlib.suppress(BlockingIOError):
            while os.read(tap.fileno(queue), 4096):
                count += 1
        counts.append(count)
    return counts


def test_of_several_queues_the_first_is_attached_and_the_others_on_demand() -> None:
    with opened(queues=4) as tap:
        assert queues_in_use() == (1, 3)
        assert spread(tap) == [64, 0, 0, 0]
        tap.attach(2)
        tap.attach(2)
        assert queues_in_use() == (2, 2)
        first, second, third, fourth = spread(tap)
        assert (second, fourth) == (0, 0)
        assert first + third == 64
        assert min(first, third) > 0
        tap.detach(2)
        tap.detach(2)
        assert queues_in_use() == (1, 3)
        assert spread(tap) == [64, 0, 0, 0]
    assert not exists("tap0")


def test_as_many_queues_as_the_kernel_has_can_be_had() -> None:
    with opened(queues=256) as tap:
        assert queues_in_use() == (1, 255)
        assert len({tap.fileno(queue) for queue in range(256)}) == 256


def test_a_tap_of_several_queues_that_is_open_elsewhere_is_busy_and_left_alone() -> None:
    with opened(queues=2) as tap:
        tap.attach(1)
        with pytest.raises(KernelError, match="another process has it open; stop that process") as caught:
            Tap(id="net1", ifname="tap0", queues=2).open()
        assert caught.value.errno == 16
        assert queues_in_use() == (2, 0)


def test_a_persistent_tap_of_several_queues_is_taken_again() -> None:
    ip("tuntap", "add", "tap0", "mode", "tap", "multi_queue")
    for _ in range(2):
        with opened(queues=3) as tap:
            assert spread(tap) == [64, 0, 0]
    assert exists("tap0")


def test_inherited_queues_are_taken_in_their_order() -> None:
    with opened(queues=3) as parent:
        # As a parent may leave them: this one detached, and all of them blocking.
        numbers = [os.dup(parent.fileno(queue)) for queue in (2, 0, 1)]
    os.set_blocking(numbers[0], True)
    with opened(ifname=None, fds=numbers, queues=3) as tap:
        assert [tap.fileno(queue) for queue in range(3)] == numbers
        assert not os.get_blocking(numbers[0])
        assert queues_in_use() == (1, 2)
        assert spread(tap) == [64, 0, 0]


def test_inherited_descriptors_that_are_not_the_queues_of_one_tap_are_refused() -> None:
    with opened(queues=2) as tap, opened(id="net1", ifname="tap1", queues=2) as other, opened(ifname="tap2") as single:
        numbers = [os.dup(fd) for fd in (tap.fileno(0), other.fileno(0), single.fileno())]
        try:
            first, second, third = numbers
            for pair, error in (
                ([first, second], f"fd={first} ('tap0') and fd={second} ('tap1') are queues of two interfaces"),
                ([first, third], f"fd={third} ('tap2') was opened without IFF_MULTI_QUEUE"),
            ):
                with pytest.raises(ConfigError) as caught:
                    Tap(id="net2", fds=pair, queues=2).open()
                assert str(caught.value) == f"netdev 'net2': {error}"
        finally:
            for number in numbers:
                os.close(number)
        twice = [os.dup(tap.fileno(0)), os.dup(tap.fileno(0))]
        with pytest.raises(ConfigError, match=f"fd={twice[0]} and fd={twice[1]} are one queue of 'tap0'"):
            Tap(id="net2", fds=twice, queues=2).open()
        for number in twice:
            os.close(number)


def test_several_queues_move_attached_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(queues=3) as source:
        source.attach(2)
        destination = handed_over(source, monkeypatch, queues=3)
        with no_ioctls(monkeypatch):
            destination.attach(2)
            destination.detach(1)
            source.release()
        assert queues_in_use() == (2, 1)
        destination.detach(2)
        destination.attach(1)
        first, second, third = spread(destination)
        assert (first + second, third) == (64, 0)
        destination.close()
    assert not exists("tap0")


def test_who_takes_back_finds_the_queues_as_it_had_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(queues=3) as source:
        source.attach(2)
        destination = handed_over(source, monkeypatch, queues=3)
        # It serves, and dies before it says so.
        destination.attach(1)
        destination.detach(2)
        destination.set_vnet_header_length(10)
        destination.release()
        source.recover()
        assert queues_in_use() == (2, 1)
        first, second, third = spread(source)
        assert (first + third, second) == (64, 0)
        source.detach(2)
        assert len(receive_frame(source)) == 12 + len(FRAME)


def test_without_descriptors_a_tap_of_several_queues_is_opened_once_the_source_let_go() -> None:
    source = Tap(id="net0", ifname="tap0", queues=2)
    source.open()
    destination = Tap(id="net0", queues=2)
    destination.adopt_setup(travel(source.save_setup(with_descriptors=False)))
    assert not destination.is_open
    assert queues_in_use() == (1, 1)
    source.release()
    destination.source_released()
    assert spread(destination) == [64, 0]
    destination.close()


def test_a_tap_that_could_not_be_opened_yet_is_no_reason_that_nothing_moves_any_more() -> None:
    with opened() as holder:
        waiting, successor = Tap(id="net0"), Tap(id="net0")
        waiting.adopt_setup(travel(holder.save_setup(with_descriptors=False)))
        assert waiting.local_migration_blocker() == "its TAP is not open"
        successor.adopt_setup(travel(waiting.save_setup(with_descriptors=False)))
        waiting.release()
        assert not successor.is_open
    successor.source_released()
    assert successor.ifname == "tap0"
    assert len(receive_frame(successor)) == 12 + len(FRAME)
    successor.close()


@pytest.mark.parametrize(("sndbuf", "expected"), [(0, 2**31 - 1), (65536, 65536)])
def test_the_send_buffer_is_that_of_every_queue(sndbuf: int, expected: int) -> None:
    tungetsndbuf = 0x800454D3
    with opened(queues=3, sndbuf=sndbuf) as tap:
        for queue in range(3):
            answer = fcntl.ioctl(tap.fileno(queue), tungetsndbuf, bytes(4))
            assert int.from_bytes(answer, sys.byteorder) == expected


# -- frames ---------------------------------------------------------------------------------------------------


def receive_frame(tap: Tap) -> bytes:
    """One frame from the machine's side, as the TAP gives it."""
    with packet_socket(tap.ifname) as sock:
        sock.send(FRAME)
        return os.read(tap.fileno(), 4096)


def test_each_frame_comes_behind_a_vnet_header_of_the_length_that_was_set() -> None:
    with opened() as tap:
        for length in (12, 10, 10, 12):
            tap.set_vnet_header_length(length)
            assert tap.vnet_header_length == length
            data = receive_frame(tap)
            assert (data[length:], data[:length]) == (FRAME, bytes(length))


def test_an_injected_frame_arrives_on_the_interface() -> None:
    with opened() as tap, packet_socket("tap0") as sock:
        for length in (12, 10):
            tap.set_vnet_header_length(length)
            tap.inject(FRAME)
            assert sock.recv(4096) == FRAME


def test_injecting_into_an_interface_that_is_down_fails() -> None:
    with opened() as tap:
        ip("link", "set", "tap0", "down")
        with pytest.raises(KernelError, match="netdev 'net0': cannot send a frame into TAP 'tap0': Input/output error"):
            tap.inject(FRAME)


# -- scripts --------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def write_script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def scripts(tmp_path: Path, log: Path) -> dict[str, str]:
    return {
        "script": write_script(tmp_path / "up", f'echo "up $*" >> {log}'),
        "downscript": write_script(tmp_path / "down", f'echo "down $*" >> {log}; [ -e /sys/class/net ]'),
    }


def test_scripts_run_with_the_name_of_the_interface(scripts: dict[str, str], log: Path) -> None:
    with opened(**scripts):
        assert log.read_text() == "up tap0\n"
    assert log.read_text() == "up tap0\ndown tap0\n"


def test_a_script_that_fails_leaves_no_tap(tmp_path: Path) -> None:
    path = write_script(tmp_path / "up", "exit 3")
    with pytest.raises(ConfigError, match=r"network script .*/up failed with status 3 for 'tap0'"):
        Tap(id="net0", ifname="tap0", script=path).open()
    with pytest.raises(KernelError, match=r"could not launch network script /nonexistent: No such file"):
        Tap(id="net0", ifname="tap0", script="/nonexistent").open()
    assert not exists("tap0")


def test_a_script_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SCRIPT_SECONDS_MAX", 0.1)
    path = write_script(tmp_path / "up", "exec sleep 60")
    with pytest.raises(ConfigError, match=r"did not end within 0\.1 s"):
        Tap(id="net0", ifname="tap0", script=path).open()


def test_a_downscript_that_fails_does_not_keep_the_tap_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(downscript=write_script(tmp_path / "down", "exit 1")):
        pass
    assert not exists("tap0")
    assert "netdev 'net0': network script" in caplog.text


# -- handover with descriptors --------------------------------------------------------------------------------


def test_a_tap_moves_with_its_frames_and_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(mtu=2000) as source, packet_socket("tap0") as sock:
        source.set_vnet_header_length(10)
        destination = handed_over(source, monkeypatch)
        sock.send(FRAME)
        with no_ioctls(monkeypatch):
            destination.resume()
            source.release()
            destination.source_released()
        assert os.read(destination.fileno(), 4096) == bytes(10) + FRAME
        assert (destination.ifname, destination.mtu, destination.vnet_header_length) == ("tap0", 2000, 10)
        destination.set_vnet_header_length(12)
        destination.inject(FRAME)
        assert sock.recv(4096) == FRAME
        destination.close()
    assert not exists("tap0")


def test_a_tap_moves_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tap = Tap(id="net0", ifname="tap0")
    tap.open()
    index = link("tap0")["ifindex"]
    for _ in range(5):
        destination = handed_over(tap, monkeypatch)
        tap.release()
        tap = destination
    assert link("tap0")["ifindex"] == index
    assert len(receive_frame(tap)) == 12 + len(FRAME)
    tap.close()


def test_discarding_what_arrived_leaves_the_source_as_it_was(
    monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str], log: Path
) -> None:
    with opened(**scripts) as source:
        destination = handed_over(source, monkeypatch)
        with no_ioctls(monkeypatch):
            destination.discard()
        assert not destination.is_open
        assert log.read_text() == "up tap0\n"
        assert len(receive_frame(source)) == 12 + len(FRAME)


def test_the_process_that_serves_last_runs_the_downscript(
    monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str], log: Path
) -> None:
    source = Tap(id="net0", ifname="tap0", script=scripts["script"], downscript=scripts["downscript"])
    source.open()
    destination = handed_over(source, monkeypatch)
    source.release()
    assert log.read_text() == "up tap0\n"
    destination.close()
    assert log.read_text() == "up tap0\ndown tap0\n"


# -- handover without descriptors -----------------------------------------------------------------------------


def test_without_descriptors_the_name_is_opened_once_the_source_let_go() -> None:
    source = Tap(id="net0", ifname="tap0")
    source.open()
    destination = Tap(id="net0")
    destination.adopt_setup(travel(source.save_setup(with_descriptors=False)))
    destination.resume()
    assert not destination.is_open
    assert len(receive_frame(source)) == 12 + len(FRAME)
    with pytest.raises(KernelError, match="busy"):
        destination.source_released()
    source.release()
    destination.source_released()
    assert destination.ifname == "tap0"
    assert len(receive_frame(destination)) == 12 + len(FRAME)
    destination.close()


def test_without_descriptors_another_name_is_opened_at_once_and_discarded_with_its_downscript(
    scripts: dict[str, str], log: Path
) -> None:
    with opened() as source:
        destination = Tap(id="net0", ifname="tap1", script=scripts["script"], downscript=scripts["downscript"])
        destination.adopt_setup(travel(source.save_setup(with_descriptors=False)))
        assert destination.ifname == "tap1"
        destination.discard()
        assert log.read_text() == "up tap1\ndown tap1\n"
        assert not exists("tap1")
        assert exists("tap0")


def test_without_descriptors_a_tap_that_cannot_be_opened_fails_setup() -> None:
    ip("tuntap", "add", "tap1", "mode", "tun")
    with opened() as source:
        destination = Tap(id="net0", ifname="tap1")
        with pytest.raises(KernelError, match="is no TAP"):
            destination.adopt_setup(travel(source.save_setup(with_descriptors=False)))
        destination.discard()
