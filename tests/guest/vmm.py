"""A guest whose QEMU is replaced by another QEMU of the same machine, as an operator does it.

Owns:        the kinds of QEMU and of memory that are tried, `localmig vm-upgrade`, what a move must leave untouched.
Never sees:  how the NIC is served.
Read next:   test_vmm_moves.py; cli/vm_upgrade/ for the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from qemu.qmp import QMPClient
from tests.guest.lab import UNPACKED_KERNEL, EchoTransfer, Guest, Lab, Process, finish_pings
from tests.guest.service import LOCALMIG, Service
from tests.kit.processes import localmig

from localmig.testing import qemu
from localmig.testing.namespace import ip, link
from localmig.unix_socket import is_listening

UNPACKED_QEMU: Final = UNPACKED_KERNEL.parent / "qemu"
"""The newer QEMU, as `make second-qemu` unpacked it."""

OLDER: Final = qemu.INSTALLED
NEWER: Final = qemu.Program.unpacked(UNPACKED_QEMU)

MOVE_SECONDS_MAX: Final = 150
"""For `localmig vm-upgrade` whole, which gives up by itself before."""

STEP_SECONDS: Final = 0.02
"""How often a starting QEMU is looked at."""

DOWNTIME_MS_MAX: Final = 60_000
"""QEMU's emulation now and then misses a write of its own processor to a page that it copies meanwhile, whatever the
NIC: the guest finds old memory, and crashes. So most of the copy is made while the guest is stopped. What a NIC writes
meanwhile is compared page by page in test_live_migration.py."""

TAP_QUEUE_PACKETS: Final = 10_000
"""What the TAP keeps while no QEMU runs the guest: with a ping a millisecond, ten seconds of an overloaded machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A QEMU and the memory that it gives its guest.

    Attributes:
        program: which QEMU.
        way: the way that a move must find by itself.
        named: whether the memory is a named file.
        machine: further properties of the machine.
    """

    program: qemu.Program
    way: str
    named: bool = False
    machine: str = ""


KINDS: Final = {
    "copy-older": Kind(program=OLDER, way="copy"),
    "copy-newer": Kind(program=NEWER, way="copy"),
    "shared-older": Kind(program=OLDER, way="shared", named=True),
    "shared-newer": Kind(program=NEWER, way="shared", named=True),
    "cpr-newer": Kind(program=NEWER, way="cpr-transfer", machine=",aux-ram-share=on"),
}


class Vmm:
    """The QEMU of one guest, one after another.

    Attributes:
        qmp: where the one that runs the guest answers.
        memory: the file that the guest's memory is, where it has a name.
    """

    def __init__(self, lab: Lab, kind: Kind) -> None:
        if (reason := qemu.unavailable_reason(UNPACKED_KERNEL, kind.program)) is not None:
            pytest.skip(f"{reason}; 'make second-qemu' unpacks a newer QEMU")
        self._lab = lab
        self._kind = kind
        self._move_count = 0
        self.qmp: Path = lab.folder / "qemu.sock"
        self.memory: Path = lab.folder / "memory"

    def boot(self, service: Service, *, queue_pairs: int = 1, **nic: Any) -> Guest:
        """Boot the guest, its NIC served by `service`."""
        netdev = qemu.vhost_user_netdev(service.socket, queue_pairs=queue_pairs, program=self._kind.program)
        return self.boot_on(netdev, queue_pairs=queue_pairs, **nic)

    def boot_on(self, netdev: Sequence[str], *, more: Sequence[str] = (), **nic: Any) -> Guest:
        """Boot the guest on another netdev."""
        memory = f"memory-backend-file,mem-path={self.memory}" if self._kind.named else qemu.MEMFD
        return self._lab.boot_qemu(
            netdev,
            program=self._kind.program,
            memory=memory,
            machine=self._kind.machine,
            more=["-qmp", f"unix:{self.qmp},server=on,wait=off", *more],
            **nic,
        )

    def move(self, *options: str) -> dict[str, Any]:
        """Replace the QEMU; what `localmig vm-upgrade --json` reports."""
        process = self.start_move(*options)
        status = process.wait(seconds_max=MOVE_SECONDS_MAX)
        process.stop()
        text = process.log.read_text()
        assert status == 0, f"vm-upgrade ended with {status}: {text}"
        return report_in(text)

    def start_move(self, *options: str) -> Process:
        """Begin to replace the QEMU."""
        self._move_count += 1
        self._allow_downtime()
        command = [*LOCALMIG, "vm-upgrade", str(self.qmp), "--json", *options]
        return self._lab.start(command, name=f"move{self._move_count}")

    def _allow_downtime(self) -> None:
        """Let QEMU stop the guest soon; see `DOWNTIME_MS_MAX`."""
        localmig("qmp", str(self.qmp), "migrate-set-parameters", f"downtime-limit={DOWNTIME_MS_MAX}")


def report_in(text: str) -> dict[str, Any]:
    """The report in what the command printed, between lines for people."""
    report: dict[str, Any] = json.JSONDecoder().raw_decode(text, text.index("{\n"))[0]
    return report


@contextlib.contextmanager
def undisturbed(lab: Lab, service: Service, guest: Guest) -> Iterator[EchoTransfer]:
    """Ping the guest each millisecond and stream through it meanwhile; it must not notice anything."""
    carrier_changes = guest.carrier_changes()
    with lab.namespace.entered():
        ip("link", "set", "tap0", "txqueuelen", str(TAP_QUEUE_PACKETS))
        before = link("tap0")
    pinger = lab.start_pinger()
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(500_000)
        yield transfer
        transfer.wait_progress(500_000)
        stream = transfer.finish()
    pings = finish_pings(pinger)
    with lab.namespace.entered():
        after = link("tap0")
    assert stream.intact
    assert after["ifindex"] == before["ifindex"]
    assert after["stats64"]["tx"]["dropped"] == before["stats64"]["tx"]["dropped"]
    discarded = guest.discarded_replies()  # on a machine that is not overloaded: 0
    assert pings.lost == discarded, (
        discarded,
        pings,
        before["stats64"],
        after["stats64"],
        service.nic()["queue-pairs"],
    )
    assert pings.duplicates == 0, pings
    assert guest.carrier_changes() == carrier_changes


# -- a migration by hand ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def monitor(path: Path) -> AsyncIterator[QMPClient]:
    """The QMP of a QEMU that may still be starting; the caller bounds the wait."""
    client = QMPClient(path.name)
    while not is_listening(str(path)):  # noqa: ASYNC110 - no event tells that another process listens
        await asyncio.sleep(STEP_SECONDS)
    await client.connect(str(path))
    try:
        yield client
    finally:
        with contextlib.suppress(EOFError, OSError):  # how it is told that the process is gone
            await client.disconnect()


async def begin_migration(source: QMPClient, uri: str) -> None:
    """Let a QEMU migrate, which believes only what the other one answers."""
    states = [{"capability": name, "state": True} for name in ("events", "return-path")]
    await source.execute("migrate-set-capabilities", {"capabilities": states})
    await source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40, "downtime-limit": DOWNTIME_MS_MAX})
    await source.execute("migrate", {"uri": uri})


async def migration_ended(listener: AsyncIterable[Mapping[str, Any]]) -> str:
    """How a migration ends: `completed`, `failed` or `cancelled`."""
    async for event in listener:
        status = str(event["data"]["status"])
        if status in ("completed", "failed", "cancelled"):
            return status
    raise AssertionError("no event tells how the migration ends")
