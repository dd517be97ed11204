"""A guest moves to another QEMU on the same machine, at the same NIC: no frame is lost, and the TAP never changes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import pytest
from tests.guest.lab import Lab
from tests.guest.test_live_migration import CRAWL_BYTES, Host, Vm, begin, bridged, reached

from localmig.testing.traffic import Pinger

__all__ = ["bridged"]

STEADY_BYTES: Final = 32 << 20
"""A second: a migration that takes some seconds."""

GUEST_ADDRESS: Final = "10.9.0.2"

INTERVAL_NS: Final = 20_000_000
"""Between pings. A TAP has room for 500 frames at least, and a QEMU on a loaded machine is silent for seconds."""


def roles(host: Host) -> list[str]:
    return [session["role"] for session in host.service.nic()["sessions"]]


def waiting_vmm(lab: Lab, host: Host, uri: str, **nic: Any) -> Vm:
    """A QEMU that waits for the guest. Its monitor answers, because the NIC's daemon has answered it."""
    vmm = host.boot("-incoming", uri, **nic)

    async def answers() -> None:
        client = await vmm.client()
        assert await client.execute("query-status") is not None
        await client.disconnect()

    asyncio.run(answers())
    return vmm


@pytest.mark.parametrize(
    ("device", "nic"),
    [pytest.param("", {}, id="split"), pytest.param(",packed=on", {"packed": True}, id="packed")],
)
def test_a_guest_moves_from_one_qemu_to_the_next_at_one_nic(bridged: Lab, device: str, nic: dict[str, Any]) -> None:
    host = Host(bridged, 0, device)
    vm = host.boot(**nic)
    vm.guest.wait_ready()
    with bridged.namespace.entered():
        pinger = Pinger(GUEST_ADDRESS, interval_ns=INTERVAL_NS).start()
    for number in range(2):
        uri = f"unix:{bridged.folder / f'vm{number}.sock'}"
        other = waiting_vmm(bridged, host, uri, **nic)
        assert sorted(roles(host)) == ["idle", "owns"]

        async def conversation(source: Vm = vm, uri: str = uri) -> None:
            here = await source.client()
            await begin(here, uri, bytes_a_second=STEADY_BYTES)
            assert await reached(here, "completed", "failed") == "completed"
            await here.execute("quit")
            with contextlib.suppress(EOFError):
                await here.disconnect()

        asyncio.run(conversation())
        vm.guest.process.wait(seconds_max=30)
        vm = other
        assert roles(host) == ["owns"]
    report = pinger.stop()
    assert (report.lost, report.duplicates) == (0, 0), report


def test_a_move_that_is_cancelled_or_whose_destination_dies_leaves_the_guest_where_it_was(bridged: Lab) -> None:
    host = Host(bridged, 0, "")
    vm = host.boot()
    vm.guest.wait_ready()
    with bridged.namespace.entered():
        pinger = Pinger(GUEST_ADDRESS, interval_ns=INTERVAL_NS).start()
    uri = f"unix:{bridged.folder / 'vm.sock'}"
    other = waiting_vmm(bridged, host, uri)

    async def conversation() -> None:
        here = await vm.client()
        await begin(here, uri, bytes_a_second=CRAWL_BYTES)
        assert await reached(here, "active", "failed") == "active"
        other.guest.process.kill()
        assert await reached(here, "completed", "failed") == "failed"
        await here.disconnect()

    asyncio.run(conversation())
    assert roles(host) == ["owns"]
    report = pinger.stop()
    assert (report.lost, report.duplicates) == (0, 0), report


def test_localmig_is_replaced_before_while_and_after_a_guest_moves(bridged: Lab) -> None:
    host = Host(bridged, 0, "")
    vm = host.boot()
    vm.guest.wait_ready()
    with bridged.namespace.entered():
        pinger = Pinger(GUEST_ADDRESS, interval_ns=INTERVAL_NS).start()
    uri = f"unix:{bridged.folder / 'vm.sock'}"
    waiting_vmm(bridged, host, uri)
    host.service.upgrade()
    assert sorted(roles(host)) == ["idle", "owns"]

    async def conversation() -> None:
        here = await vm.client()
        await begin(here, uri, bytes_a_second=CRAWL_BYTES)
        await reached(here, "active")
        # The log is on, and the other VMM waits.
        await asyncio.to_thread(host.service.upgrade)
        await here.execute("migrate-set-parameters", {"max-bandwidth": STEADY_BYTES})
        assert await reached(here, "completed", "failed") == "completed"
        await asyncio.to_thread(host.service.upgrade)
        await here.execute("quit")
        with contextlib.suppress(EOFError):
            await here.disconnect()

    asyncio.run(conversation())
    vm.guest.process.wait(seconds_max=30)
    assert roles(host) == ["owns"]
    host.service.upgrade()
    report = pinger.stop()
    assert (report.lost, report.duplicates) == (0, 0), report
