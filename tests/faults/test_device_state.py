"""A NIC's state in the hands of the VMM that moves its guest (DEVICE_STATE), and what a VMM can do wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from localmig.fds import OwnedFd
from localmig.testing.frontend import PROTOCOL_FEATURES, NetGuest
from localmig.vhost_user.message import (
    MOVED_STATE_SIZE_MAX,
    U64,
    ProtocolFeature,
    Request,
    StateDirection,
    StateTransfer,
)

if TYPE_CHECKING:
    from tests.kit.site import Site

MAC: Final = bytes.fromhex("525400123457")
WITHOUT_DESCRIPTOR: Final = 1 << 8
FEATURES: Final = PROTOCOL_FEATURES | ProtocolFeature.DEVICE_STATE


@contextmanager
def pipe() -> Iterator[tuple[OwnedFd, OwnedFd]]:
    reader, writer = (OwnedFd(fd) for fd in os.pipe2(os.O_CLOEXEC))
    with reader, writer:
        yield reader, writer


def transfer(vmm: NetGuest, direction: int, fd: int, *, phase: int = 0) -> int:
    """What the backend answers."""
    answer = vmm.frontend.call(Request.SET_DEVICE_STATE_FD, StateTransfer(direction=direction, phase=phase), [fd])
    assert isinstance(answer, U64)
    return answer.value


def check(vmm: NetGuest) -> int:
    """What became of it: 0 for all is well."""
    answer = vmm.frontend.call(Request.CHECK_DEVICE_STATE)
    assert isinstance(answer, U64)
    return answer.value


def saved(vmm: NetGuest) -> bytes:
    """The device's state, as a VMM takes it whose guest is stopped."""
    with pipe() as (reader, writer):
        assert transfer(vmm, StateDirection.SAVE, writer.fileno()) == WITHOUT_DESCRIPTOR
        writer.close()
        data = os.read(reader.fileno(), 65536)
        assert os.read(reader.fileno(), 1) == b""
    assert check(vmm) == 0
    return data


def send(vmm: NetGuest, data: bytes) -> None:
    """Gives the device a state, and does not ask yet."""
    with pipe() as (reader, writer):
        assert transfer(vmm, StateDirection.LOAD, reader.fileno()) == WITHOUT_DESCRIPTOR
        reader.close()
        os.write(writer.fileno(), data)


def loads(vmm: NetGuest, data: bytes) -> bool:
    """Whether the device takes a state."""
    send(vmm, data)
    return check(vmm) == 0


@pytest.fixture
def vmm(site: Site) -> Iterator[NetGuest]:
    """A VMM that runs a guest at a NIC whose state it may take along."""
    site.source(*site.objects(device=",device-state=on"))
    with NetGuest(str(site.socket), protocol_features=FEATURES) as vmm:
        vmm.attach()
        yield vmm


def test_it_is_offered_where_the_operator_asks_for_it(site: Site) -> None:
    site.source()
    with NetGuest(str(site.socket), protocol_features=FEATURES) as vmm:
        vmm.connect()
        assert ProtocolFeature.DEVICE_STATE not in vmm.frontend.get_protocol_features()


def test_what_one_nic_saved_another_one_goes_on_with(site: Site, vmm: NetGuest) -> None:
    vmm.frontend.send_rarp(MAC)
    vmm.detach()
    state = saved(vmm)
    assert len(state) <= MOVED_STATE_SIZE_MAX
    # Nothing was released by that: the guest may go on where it is.
    vmm.attach()
    vmm.detach()
    assert saved(vmm) == state
    there = str(site.folder / "there.sock")
    site.daemon(
        *("--netdev", "tap,id=net0,ifname=tap9"),
        *("--device", f"virtio-net,id=nic0,netdev=net0,socket={there},device-state=on"),
    )
    with NetGuest(there, protocol_features=FEATURES) as other:
        other.connect()
        before = saved(other)
        assert MAC in state
        assert MAC not in before
        # As many bytes, and no state of this device: its driver would use 256 queue pairs.
        assert not loads(other, state[:-11] + b"\1\0" + state[-9:])
        assert loads(other, state)
        # It is the device's once this VMM's rings are: another one may own it until then.
        assert saved(other) == before
        other.attach()
        other.detach()
        assert saved(other) == state


def test_a_state_that_is_on_its_way_survives_a_handover(site: Site, vmm: NetGuest) -> None:
    vmm.frontend.send_rarp(MAC)
    vmm.detach()
    state = saved(vmm)
    there = str(site.folder / "there.sock")
    objects = (
        *("--netdev", "tap,id=net0,ifname=tap9"),
        *("--device", f"virtio-net,id=nic0,netdev=net0,socket={there},device-state=on"),
    )
    source = site.daemon(*objects)
    source.execute("migrate-set-parameters", local=True)
    with NetGuest(there, protocol_features=FEATURES) as other:
        other.connect()
        send(other, state)
        for moment in ("sent", "taken"):
            destination = site.destination()
            source.execute("migrate", uri=site.address)
            assert source.wait_migration()["status"] == "completed", moment
            source.quit()
            source = destination
            source.execute("migrate-set-parameters", local=True)
            if moment == "sent":
                assert check(other) == 0
        other.attach()
        other.detach()
        assert saved(other) == state


def test_nonsense_is_refused_and_costs_nothing(site: Site, vmm: NetGuest, tmp_path: Path) -> None:
    with pipe() as (_, writer):
        # A device's state is saved while its rings stand.
        assert transfer(vmm, StateDirection.SAVE, writer.fileno()) == WITHOUT_DESCRIPTOR | 1
    vmm.detach()
    state = saved(vmm)
    for end in range(len(state)):
        assert not loads(vmm, state[:end]), end
    for wrong in (
        state + b"\0",
        b"x" + state[1:],
        state.replace(b"virtio-net", b"virtio-tea"),
        state.replace(b"virtio-net\0\0\0\1", b"virtio-net\0\0\0\x63"),
        bytes(MOVED_STATE_SIZE_MAX + 1),
    ):
        assert not loads(vmm, wrong), wrong[:40]
    for byte in range(len(state)):
        loads(vmm, state[:byte] + bytes((state[byte] ^ 0xFF,)) + state[byte + 1 :])  # whatever it says, it goes on
    assert loads(vmm, state)
    with pipe() as (reader, writer):
        for direction, phase in ((2, 0), (0, 1), (1, 0xFFFFFFFF)):
            assert transfer(vmm, direction, writer.fileno(), phase=phase) == WITHOUT_DESCRIPTOR | 1
        # One that is not closed yet, and one that nobody reads.
        assert transfer(vmm, StateDirection.LOAD, reader.fileno()) == WITHOUT_DESCRIPTOR
        assert check(vmm) == 1
        reader.close()
        assert transfer(vmm, StateDirection.SAVE, writer.fileno()) == WITHOUT_DESCRIPTOR | 1
    with pipe() as (_, writer):
        os.set_blocking(writer.fileno(), False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer.fileno(), bytes(4096))
        os.set_blocking(writer.fileno(), True)
        assert transfer(vmm, StateDirection.SAVE, writer.fileno()) == WITHOUT_DESCRIPTOR | 1
    file = tmp_path / "state"
    with file.open("w+b") as opened:
        assert transfer(vmm, StateDirection.SAVE, opened.fileno()) == WITHOUT_DESCRIPTOR | 1
        assert transfer(vmm, StateDirection.LOAD, opened.fileno()) == WITHOUT_DESCRIPTOR
        assert check(vmm) == 1
    assert file.read_bytes() == b""
    vmm.attach()
    vmm.detach()
    assert saved(vmm) == state
