"""A real guest gets memory and gives it back while it talks; its rings never stop for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Final

from qemu.qmp import QMPClient
from tests.guest.lab import EchoTransfer, Lab
from tests.guest.service import Service

from localmig.testing.qemu import vhost_user_netdev

DIMMS: Final = 3
DIMM_BYTES: Final = 128 << 20
UNPLUG_SECONDS_MAX: Final = 60.0
"""The guest ejects a DIMM when it comes to it, under emulation on a machine under load."""


async def _execute(path: str, *commands: tuple[str, dict[str, Any]], then: str | None = None) -> None:
    client = QMPClient("test")
    await client.connect(path)
    try:
        for command, arguments in commands:
            await client.execute(command, arguments)
        if then is not None:
            async with asyncio.timeout(UNPLUG_SECONDS_MAX):
                while (await client.events.get())["event"] != then:
                    pass
    finally:
        await client.disconnect()


def facts(trace: Path) -> list[dict[str, Any]]:
    """What a daemon traced so far."""
    return [json.loads(line) for line in trace.read_text(encoding="ascii").splitlines()]


def test_memory_is_plugged_and_unplugged_under_traffic_and_moves_with_the_guest(lab: Lab) -> None:
    service = Service(lab)
    trace = lab.folder / "trace"
    service.start(*service.objects(), "--trace", str(trace))
    lab.set_up("tap0")
    monitor = str(lab.folder / "vmm.sock")
    hotplug = ["-m", f"256,slots={DIMMS},maxmem=2G", "-qmp", f"unix:{monitor},server=on,wait=off"]
    guest = lab.boot_qemu([*vhost_user_netdev(service.socket), *hotplug])
    guest.wait_ready()
    guest.run("echo offline >/sys/devices/system/memory/auto_online_blocks")  # so that it can be ejected again
    carrier_changes = guest.carrier_changes()
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(500_000)
        before = len(facts(trace))
        for number in range(DIMMS):
            backend = {"qom-type": "memory-backend-memfd", "id": f"m{number}", "size": DIMM_BYTES, "share": True}
            dimm = {"driver": "pc-dimm", "id": f"d{number}", "memdev": f"m{number}"}
            asyncio.run(_execute(monitor, ("object-add", backend), ("device_add", dimm)))
            transfer.wait_progress(200_000)
        asyncio.run(_execute(monitor, ("device_del", {"id": "d1"}), then="DEVICE_DELETED"))
        transfer.wait_progress(200_000)
        told = facts(trace)
        regions = [fact["regions"] for fact in told if fact["event"] == "MemoryMapped"]
        first = regions[-DIMMS - 2]
        assert regions[-DIMMS - 1 :] == [first + 1, first + 2, first + 3, first + 2], regions
        assert not [fact for fact in told[before:] if fact["event"] in ("RingsStopped", "RingsStarted")]
        service.upgrade()
        transfer.wait_progress(200_000)
        assert transfer.finish().intact
    assert guest.carrier_changes() == carrier_changes
