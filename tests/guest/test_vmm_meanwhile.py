"""A real VMM whose guest reconfigures its NIC while a handover waits for its operator: nobody keeps the VMM waiting."""

from __future__ import annotations

import asyncio
from typing import Final

import pytest
from qemu.qmp import QMPClient
from tests.guest.lab import EchoTransfer, Lab
from tests.guest.service import Service

from localmig.testing.qemu import vhost_user_netdev

QUEUE_PAIRS: Final = 4

CHANGED: Final = "guest: changed"
"""What its console says once the guest's administrator is through."""

CHANGE_SECONDS_MAX: Final = 60
"""A busy machine emulates slowly."""

REBIND: Final = """
    cd /sys/bus/virtio/drivers/virtio_net; nic=$(echo virtio*)
    echo $nic >unbind; echo $nic >bind
    until [ -e /sys/class/net/eth0 ]; do usleep 10000; done
    ip address add 10.9.0.2/24 dev eth0; ip link set eth0 up"""

COMMANDS: Final = {
    "fewer-pairs": "ethtool -L eth0 combined 1",
    "more-pairs": "ethtool -L eth0 combined 4",
    "driver-bound-again": REBIND,
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_vmm_is_answered_while_a_handover_waits_and_the_handover_then_completes(lab: Lab, command: str) -> None:
    service = Service(lab)
    service.start(*service.objects(netdev=f",queues={QUEUE_PAIRS}"))
    lab.set_up("tap0")
    vmm_qmp = lab.folder / "qemu.sock"
    netdev = vhost_user_netdev(service.socket, queue_pairs=QUEUE_PAIRS)
    guest = lab.boot_qemu([*netdev, "-qmp", f"unix:{vmm_qmp},server=on,wait=off"], queue_pairs=QUEUE_PAIRS)
    guest.wait_ready()
    destination_qmp = lab.folder / "destination.sock"
    uri = f"unix:{lab.folder / 'migrate.sock'}"
    service.start("--incoming", uri, "--migration-parameter", "local=on", qmp=destination_qmp)

    async def conversation() -> None:
        source, destination, vmm = QMPClient("source"), QMPClient("destination"), QMPClient("vmm")
        clients = {source: service.qmp, destination: destination_qmp, vmm: vmm_qmp}
        for client, path in clients.items():
            await client.connect(str(path))
        try:
            await source.execute("migrate-set-parameters", {"local": True})
            capabilities = [{"capability": name, "state": True} for name in ("events", "pause-before-switchover")]
            await source.execute("migrate-set-capabilities", {"capabilities": capabilities})
            with source.listener("MIGRATION") as events:
                await source.execute("migrate", {"uri": uri})
                async for event in events:
                    if event["data"]["status"] == "pre-switchover":  # type: ignore[index]
                        break
                # Its NIC may go away under the shell that says this, so it works on without it.
                script = f"({command}; echo {CHANGED} >/dev/console) </dev/null >/dev/null 2>&1 &"
                await asyncio.to_thread(guest.run, script)
                waiting = asyncio.create_task(
                    asyncio.to_thread(guest.process.wait_for, CHANGED, seconds_max=CHANGE_SECONDS_MAX)
                )
                while not waiting.done():
                    await vmm.execute("query-status")
                await waiting
                info = await source.execute("query-migrate")
                assert info["status"] == "pre-switchover", info  # type: ignore[index]
                await source.execute("migrate-continue", {"state": "pre-switchover"})
                async for event in events:
                    if event["data"]["status"] in ("completed", "failed"):  # type: ignore[index]
                        break
            info = await source.execute("query-migrate")
            assert info["status"] == "completed", info  # type: ignore[index]
            await vmm.execute("query-status")
        finally:
            for client in clients:
                await client.disconnect()

    asyncio.run(asyncio.wait_for(conversation(), 2 * CHANGE_SECONDS_MAX))
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(500_000)
        assert transfer.finish().intact
