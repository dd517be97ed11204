"""localmig as a test of the guest tier runs it: daemons in the lab, driven as an operator drives them.

Owns:        starting daemons, `localmig upgrade`, a QMP conversation.
Never sees:  guests.
Read next:   test_handover.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from qemu.qmp import QMPClient
from tests.guest.lab import Lab, Process
from tests.kit.processes import localmig

from localmig.fds import OwnedFd
from localmig.testing.process import is_ready

LOCALMIG: Final = (sys.executable, "-m", "localmig.cli")

HANDOVER_SECONDS_MAX: Final = 60
"""For `localmig upgrade` whole: a process started, a handover of milliseconds, a process ended."""

Result = TypeVar("Result")


class Service:
    """One NIC served in a lab by one daemon after another.

    Attributes:
        socket: where the VMM finds the NIC.
        qmp: where whoever serves at the moment answers.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._daemon_count = 0
        self.socket: Path = lab.folder / "nic0.sock"
        self.qmp: Path = lab.folder / "qmp.sock"

    def objects(self, *, device: str = "", netdev: str = "") -> list[str]:
        """The options that make its NIC, on `tap0`; `device` and `netdev` are appended to theirs."""
        device = f"virtio-net,id=nic0,netdev=net0,socket={self.socket}{device}"
        return ["--netdev", f"tap,id=net0,ifname=tap0{netdev}", "--device", device]

    def start(self, *options: str, qmp: Path | None = None) -> Process:
        """Start a daemon and wait until it is ready."""
        self._daemon_count += 1
        reader, writer = (OwnedFd(fd) for fd in os.pipe())
        with reader:
            with writer:
                monitor = ["--qmp", f"unix:{qmp or self.qmp}", "--ready-fd", str(writer.fileno())]
                daemon = self._lab.start(
                    [*LOCALMIG, "run", *monitor, *options],
                    name=f"daemon{self._daemon_count}",
                    pass_fds=(writer.fileno(),),
                )
            assert is_ready(reader), f"daemon did not start: {daemon.log.read_text()}"
        return daemon

    def upgrade(self, *options: str) -> dict[str, Any]:
        """Hand over to a new daemon as an operator does, with more options; what `localmig upgrade --json` reports."""
        self._daemon_count += 1
        command = [*LOCALMIG, "upgrade", str(self.qmp), "--json", "--", *options]
        upgrade = self._lab.start(command, name=f"upgrade{self._daemon_count}")
        status = upgrade.wait(seconds_max=HANDOVER_SECONDS_MAX)
        upgrade.stop()
        text = upgrade.log.read_text()
        assert status == 0, f"upgrade ended with {status}: {text}"
        # After the lines that showed progress, before those that are notes.
        report: dict[str, Any] = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
        return report

    def nic(self) -> dict[str, Any]:
        """What query-devices tells of its NIC."""
        return self.device("nic0")

    def device(self, id: str) -> dict[str, Any]:  # noqa: A002 - the user's word
        """What query-devices tells of a device."""
        told = localmig("qmp", str(self.qmp), "query-devices").stdout
        devices: list[dict[str, Any]] = json.loads(told)
        (device,) = (each for each in devices if each["id"] == id)
        return device


def converse(conversation: Coroutine[Any, Any, Result]) -> Result:
    """Run a conversation with daemons, bounded in time."""
    return asyncio.run(asyncio.wait_for(conversation, timeout=HANDOVER_SECONDS_MAX))


async def migrate(source: QMPClient, uri: str) -> dict[str, Any]:
    """Migrate to `uri` and wait for the end; what query-migrate tells then."""
    capabilities = [{"capability": "events", "state": True}]
    await source.execute("migrate-set-capabilities", {"capabilities": capabilities})
    with source.listener("MIGRATION") as events:
        await source.execute("migrate", {"uri": uri})
        async for event in events:
            data = event["data"]
            assert isinstance(data, dict), event
            if data["status"] in ("completed", "failed", "cancelled"):
                break
    info = await source.execute("query-migrate")
    assert isinstance(info, dict), info
    return info
