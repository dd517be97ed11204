"""QEMU's own migration on one machine: a guest moves from one QEMU process to another, and from one TAP to another.

Owns:        the bridge, both processes, what QEMU is told.
Never sees:  localmig.
Read next:   localmig/testing/qemu.py for QEMU's command line; replacements.py, its user.

    host ─ br0 ┬ tap0 ─ QEMU          tap0 ─ (ended)
               └ tap1 ─ (waiting)     tap1 ─ QEMU
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from benchmarks.pinging import await_answer
from localmig.errors import ConfigError, PeerError, PeerLostError
from localmig.testing import qemu
from localmig.testing.linux_guest import LinuxGuest
from localmig.testing.namespace import configure, create_tap, ip

KERNEL_PACKAGE: Final = Path(__file__).parents[1] / ".lab" / "kernel"

HOST_ADDRESS: Final = "10.9.0.1/24"
GUEST_ADDRESS: Final = "10.9.0.2/24"
PING_ADDRESS: Final = "10.9.0.2"

MIGRATION_SECONDS_MAX: Final = 120.0
"""A guest of 256 MiB moves in a second; on a loaded machine in many."""

BANDWIDTH_BYTES_A_SECOND: Final = 10 * 1024**3
"""QEMU's default is meant for a network: here memory is copied through a UNIX socket."""

CPR_TRANSFER_SINCE: Final = (10, 0)
"""The first QEMU with `cpr-transfer`."""

Result = TypeVar("Result")


def version() -> tuple[int, ...]:
    """QEMU's, as numbers. ConfigError if it is not installed or does not tell."""
    try:
        argv = [qemu.PROGRAM, "--version"]
        said = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False).stdout
    except FileNotFoundError:
        raise ConfigError(f"no {qemu.PROGRAM}: on Debian, apt-get install qemu-system-x86") from None
    numbers = re.search(r"version (\d+)\.(\d+)", said)
    if numbers is None:
        raise ConfigError(f"{qemu.PROGRAM} does not tell its version")
    return tuple(map(int, numbers.groups()))


class QemuGuest:
    """A guest that can be migrated, on a bridge in the namespace of this thread.

    Raises:
        ConfigError: this machine has not what it takes.
        PeerError: the guest did not boot.
    """

    def __init__(self, folder: Path, accelerator: str) -> None:
        self._folder = folder
        self._accelerator = accelerator
        self._generation = 0
        self._resources = ExitStack()
        ip("link", "add", "br0", "type", "bridge")
        for tap in ("tap0", "tap1"):
            create_tap(tap)
            ip("link", "set", tap, "master", "br0")
            configure(tap)
        configure("br0", address=HOST_ADDRESS)
        self._resources.enter_context(LinuxGuest(self._argv(), address=GUEST_ADDRESS))
        await_answer(PING_ADDRESS)

    def migrate(self) -> dict[str, Any]:
        """Migrates it to a new process and ends the old one; what query-migrate told in the end.

        Raises:
            PeerError: the migration failed.
        """
        source = self._qmp
        self._generation += 1
        uri = f"unix:{self._folder / f'migrate{self._generation}.sock'}"
        destination = subprocess.Popen(
            [*self._argv(), "-incoming", uri], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        self._resources.callback(_end, destination)
        _converse(_await_monitor(self._qmp))
        info: dict[str, Any] = _converse(_migrate(source, uri))
        if info["status"] != "completed":
            raise PeerError(f"QEMU's migration {info['status']}: {info.get('error-desc', 'no reason told')}")
        return info

    def close(self) -> None:
        """Ends it. Idempotent."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _qmp(self) -> Path:
        return self._folder / f"qemu{self._generation}.sock"

    def _argv(self) -> list[str]:
        tap = f"tap{self._generation % 2}"
        netdev = ["-netdev", f"tap,id=n0,ifname={tap},script=no,downscript=no"]
        return [
            *qemu.command(
                netdev,
                address=GUEST_ADDRESS,
                folder=self._folder,
                kernel_package=KERNEL_PACKAGE,
                accelerator=self._accelerator,
            ),
            *("-qmp", f"unix:{self._qmp},server=on,wait=off"),
        ]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _converse(conversation: Coroutine[Any, Any, Result]) -> Result:
    try:
        return asyncio.run(asyncio.wait_for(conversation, timeout=MIGRATION_SECONDS_MAX))
    except ExecuteError as error:
        raise PeerError(f"QEMU refused: {error}") from error
    except (QMPError, OSError, TimeoutError) as error:
        raise PeerLostError(f"QEMU does not answer: {error!r}") from error


async def _await_monitor(path: Path) -> None:
    """Waits until a QEMU that is starting answers."""
    while True:
        client = QMPClient()
        with contextlib.suppress(QMPError, OSError):
            await client.connect(str(path))
            await client.disconnect()
            return
        await asyncio.sleep(0.05)  # nothing tells when a socket begins to listen


async def _migrate(path: Path, uri: str) -> dict[str, Any]:
    client = QMPClient()
    await client.connect(str(path))
    try:
        capabilities = [{"capability": "events", "state": True}]
        await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
        await client.execute("migrate-set-parameters", {"max-bandwidth": BANDWIDTH_BYTES_A_SECOND})
        with client.listener("MIGRATION") as events:
            await client.execute("migrate", {"uri": uri})
            async for event in events:
                data = event["data"]
                assert isinstance(data, dict), event
                if data["status"] in ("completed", "failed", "cancelled"):
                    break
        info = await client.execute("query-migrate")
        assert isinstance(info, dict), info
        await client.execute("quit")
        return info
    finally:
        with contextlib.suppress(QMPError, OSError, EOFError):  # it may be gone already
            await client.disconnect()
