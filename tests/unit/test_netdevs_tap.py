"""The netdev tap without a TAP: it is a Part, and it refuses state that is none."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
from tests.kit.cases import each_case

from localmig.device_api import Part
from localmig.errors import PeerError, StateError
from localmig.fds import OwnedFd
from localmig.netdevs.state import TAP, TapDescriptors, TapState
from localmig.netdevs.tap import Tap
from localmig.vmstate import Blob, Reader, close_descriptors, load, save

STATE = TapState(ifname="tap0", mtu=1500, vnet_header_length=12, offloads=0, has_uso=False, descriptors=None)


class TapPart(Tap, Part):
    """mypy compares each signature with the contract's here; constructing it finds a method that is missing."""


def test_a_tap_is_a_part() -> None:
    part: Part = TapPart(id="net0")
    part.recover()
    assert (part.id, part.setup.name, part.switchover) == ("net0", "tap", None)


def test_a_tap_that_stays_home_says_why() -> None:
    tap = Tap(id="net0", stays_home=lambda: "device 'nic0' has local-migration=off")
    assert tap.local_migration_blocker() == "device 'nic0' has local-migration=off"


def test_a_closed_tap_says_so_and_ends_quietly() -> None:
    tap = Tap(id="net0")
    assert not tap.is_open
    assert tap.local_migration_blocker() == "its TAP is not open"
    with pytest.raises(StateError, match="netdev 'net0': its TAP is not open"):
        tap.fileno()
    with pytest.raises(StateError, match="netdev 'net0': its TAP is not open"):
        tap.save_setup(with_descriptors=True)
    for end in (tap.stop, tap.release, tap.discard, tap.close, tap.source_released):
        end()


@each_case(
    ("spoiled", "error"),
    [
        ({"ifname": ""}, "netdev 'net0': '' is no interface name"),
        ({"ifname": "a\0b"}, "netdev 'net0': 'a\\x00b' is no interface name"),
        ({"vnet_header_length": 11}, "netdev 'net0': vnet header has 11 bytes, possible are 10 and 12"),
        ({"offloads": 0x11, "has_uso": True}, "netdev 'net0': no TAP has offloads 0x11 (USO: True)"),
        ({"offloads": 0x81, "has_uso": True}, "netdev 'net0': no TAP has offloads 0x81 (USO: True)"),
        ({"offloads": 0x02}, "netdev 'net0': no TAP has offloads 0x2 (USO: False)"),
        ({"offloads": 0x61}, "netdev 'net0': no TAP has offloads 0x61 (USO: False)"),
        ({"mtu": 67}, "netdev 'net0': MTU of 67 bytes, possible are 68 to 65521"),
        ({"mtu": 65535}, "netdev 'net0': MTU of 65535 bytes, possible are 68 to 65521"),
    ],
)
def test_state_that_is_no_tap_is_refused(spoiled: dict[str, object], error: str) -> None:
    tap = Tap(id="net0")
    tap.check_setup(STATE)
    with pytest.raises(PeerError) as caught:
        tap.check_setup(dataclasses.replace(STATE, **spoiled))  # type: ignore[arg-type]
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("tap", "error"),
    [
        (Tap(id="net0", ifname="tap1"), "netdev 'net0' has ifname=tap1 here and tap0 there"),
        (Tap(id="net0", mtu=9000), "netdev 'net0' has mtu=9000 here and 1500 there"),
    ],
)
def test_a_tap_that_arrives_must_be_the_one_that_was_asked_for(tap: Tap, error: str) -> None:
    with OwnedFd(os.open("/dev/null", os.O_RDWR)) as queue:
        state = dataclasses.replace(STATE, descriptors=descriptors_of(queue))
        Tap(id="net0", ifname="tap0", mtu=1500).check_setup(state)
        with pytest.raises(PeerError) as caught:
            tap.check_setup(state)
        assert str(caught.value) == error
        # Without descriptors the destination opens its own.
        tap.check_setup(STATE)


def test_what_the_host_did_to_a_tap_since_it_was_opened_refuses_no_handover() -> None:
    tap = Tap(id="net0", ifname="tap0", mtu=1500)
    with OwnedFd(os.open("/dev/null", os.O_RDWR)) as queue:
        tap.check_setup(dataclasses.replace(STATE, ifname="tap9", mtu=9000, descriptors=descriptors_of(queue)))


def descriptors_of(
    *queues: OwnedFd, attached: tuple[bool, ...] | None = None, downscript: str = "no", **changed: Any
) -> TapDescriptors:
    told = (True,) * len(queues) if attached is None else attached
    descriptors = TapDescriptors(
        queues=queues,
        attached=told,
        downscript=downscript,
        ifname_opened="tap0",
        mtu_opened=1500,
        netlink=None,
        namespace=1,
        ifindex=2,
        bridge="",
        is_up=True,
        is_gone=False,
        has_carrier=True,
    )
    return dataclasses.replace(descriptors, **changed)


def test_descriptors_that_do_not_fit_the_netdev_are_refused() -> None:
    tap = Tap(id="net0")
    with OwnedFd(os.open("/dev/null", os.O_RDWR)) as device:
        for descriptors, error in (
            (descriptors_of(), "netdev 'net0' has queues=1 here and 0 there"),
            (descriptors_of(device, device), "netdev 'net0' has queues=1 here and 2 there"),
            (descriptors_of(device, attached=()), "its 1 queues cannot be attached as told"),
            (descriptors_of(device, attached=(False,)), "its 1 queues cannot be attached as told"),
            (descriptors_of(device, downscript="down"), "downscript 'down' is no absolute path"),
            (descriptors_of(device, ifname_opened="a\0b"), "'a.x00b' is no interface name"),
            (descriptors_of(device, ifindex=2**31), "2147483648 is no interface's number"),
        ):
            with pytest.raises(PeerError, match=error):
                tap.check_setup(dataclasses.replace(STATE, descriptors=descriptors))


def test_state_survives_the_stream() -> None:
    with OwnedFd(os.open("/dev/null", os.O_RDWR)) as queue:
        for state in (
            STATE,
            dataclasses.replace(STATE, descriptors=descriptors_of(queue, downscript="/x")),
        ):
            blob = Blob()
            save(TAP, state, into=blob)
            fds = [(offset, OwnedFd(os.dup(number))) for offset, number in blob.fds]
            loaded = load(TAP, TAP.version, Reader(bytes(blob.data), fds))
            assert dataclasses.replace(loaded, descriptors=None) == STATE
            assert (loaded.descriptors is None) == (state.descriptors is None)
            close_descriptors(TAP, loaded)
