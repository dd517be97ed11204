"""After a handover to another TAP the network is told where the guest is; one that moved its TAP says nothing."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from tests.faults.test_handover_processes import hand_over

from localmig.errors import PeerError
from localmig.testing.namespace import configure, create_tap

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

ETH_P_RARP = 0x8035
PATIENCE_SECONDS = 20.0
MAC = "52:54:00:12:34:56"
RARP = b"\xff" * 6 + bytes.fromhex(MAC.replace(":", "")) + b"\x80\x35"
ONCE = {"initial": 0, "max": 0, "rounds": 1, "step": 1}
QUICK = [
    argument
    for parameter in ("initial=1", "max=3", "step=1")
    for argument in ("--migration-parameter", f"announce-{parameter}")
]


@contextlib.contextmanager
def network(site: Site, ifname: str) -> Iterator[socket.socket]:
    """What of RARP a TAP's machine side hears."""
    with site.namespace.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_RARP))
    with sock:
        sock.bind((ifname, ETH_P_RARP))
        sock.settimeout(PATIENCE_SECONDS)
        yield sock


def announcements(daemon: DaemonProcess) -> list[str]:
    return [str(fact["mac"]) for fact in daemon.facts if fact["event"] == "GuestAnnounced"]


def note(daemon: DaemonProcess) -> str | None:
    info: dict[str, Any] = daemon.execute("query-migrate")
    told: str | None = info.get("local", {}).get("note")
    return told


def other_tap(site: Site, *, device: str = "") -> list[str]:
    """The NIC's options with another TAP, which exists already."""
    with site.namespace.entered():
        create_tap("tap1")
        configure("tap1")
    objects = site.objects(device=device)
    objects[1] = objects[1].replace("tap0", "tap1")
    return objects


@pytest.mark.parametrize(("local", "device"), [(False, ""), (True, ",local-migration=off")])
def test_a_guest_that_arrives_on_another_tap_is_announced_as_often_as_the_parameters_say(
    site: Site, local: bool, device: str
) -> None:
    device = f",mac={MAC}{device}"
    source = site.source(*site.objects(device=device), local=local)
    destination = site.destination(*other_tap(site, device=device), *QUICK, local=local)
    with network(site, "tap1") as heard:
        assert hand_over(site, source, destination)["status"] == "completed"
        for _ in range(5):
            assert heard.recv(4096).startswith(RARP)
        # One more on demand: nothing came in between.
        destination.execute("announce-self", **ONCE, interfaces=["nic0", "nobody"], id="again")
        assert heard.recv(4096).startswith(RARP)
    assert announcements(destination) == [MAC] * 6
    assert announcements(source) == []
    assert note(destination) is None


def test_a_guest_whose_tap_moved_is_not_announced(site: Site) -> None:
    source = site.source(*site.objects(device=f",mac={MAC}"))
    destination = site.destination(*QUICK)
    with network(site, "tap0") as heard:
        assert hand_over(site, source, destination)["status"] == "completed"
        destination.execute("announce-self", **ONCE)
        assert heard.recv(4096).startswith(RARP)
    assert announcements(destination) == [MAC]


def test_a_tap_that_is_opened_once_the_source_let_go_is_announced_then(site: Site) -> None:
    source = site.source(*site.objects(device=f",mac={MAC}"), local=False)
    destination = site.destination(*site.objects(device=f",mac={MAC}"), *QUICK, local=False)
    assert hand_over(site, source, destination)["status"] == "completed"
    destination.wait_event("GuestAnnounced", mac=MAC)


def test_a_guest_that_is_paused_is_announced_when_it_goes_on(site: Site) -> None:
    source = site.source(*site.objects(device=f",mac={MAC}"), local=False)
    source.execute("stop")
    destination = site.destination(*other_tap(site, device=f",mac={MAC}"), *QUICK, local=False)
    assert hand_over(site, source, destination)["status"] == "completed"
    with pytest.raises(PeerError, match="nothing to announce in run state 'paused'"):
        destination.execute("announce-self", **ONCE)
    assert announcements(destination) == []
    destination.execute("cont")
    destination.wait_event("GuestAnnounced", mac=MAC)


def test_a_guest_whose_address_nobody_knows_is_noted(site: Site) -> None:
    source = site.source(local=False)
    destination = site.destination(*other_tap(site), *QUICK, local=False)
    assert hand_over(site, source, destination)["status"] == "completed"
    told = note(destination)
    assert told == "not announced: device 'nic0': the guest's Ethernet address is not known; say it with mac="
    with pytest.raises(PeerError, match="the guest's Ethernet address is not known; say it with mac="):
        destination.execute("announce-self", **ONCE)
    assert announcements(destination) == []
