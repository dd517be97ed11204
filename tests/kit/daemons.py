"""Daemons in a folder, one after another: each with a QMP socket and a log of its own.

Owns:        their names, where a destination waits, a handover in order.
Never sees:  what they serve.
Read next:   processes.py for how they are started; site.py for a NIC that they serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from tests.kit.processes import DaemonProcess

from localmig.testing.faults import Fault
from localmig.testing.namespace import NetworkNamespace
from localmig.testing.process import Start


class Daemons:
    """Where daemons come and go.

    Args:
        folder: of all sockets and logs; its path is short, because a UNIX socket's has 107 bytes at most.
        ends: ends every daemon.
        namespace: where they run; None: in that of the thread which starts them.

    Attributes:
        address: where the destination that was started last waits for a source.
    """

    def __init__(self, folder: Path, ends: ExitStack, namespace: NetworkNamespace | None = None) -> None:
        self.folder = folder
        self.address = ""
        self._ends = ends
        self._namespace = namespace
        self._logs: dict[int, Path] = {}

    def daemon(
        self, *arguments: str, fault: str | None = None, inherited: Sequence[int] = (), start: Start | None = None
    ) -> DaemonProcess:
        """A daemon, started as `start` says."""
        name = f"d{len(self._logs) + 1}"
        with self._namespace.entered() if self._namespace is not None else nullcontext():
            daemon = DaemonProcess(
                arguments,
                qmp=self.folder / f"{name}.qmp",
                fault=Fault.parse(fault) if fault else None,
                log=self.folder / f"{name}.log",
                inherited=inherited,
                start=start,
            )
        self._logs[daemon.pid] = self.folder / f"{name}.log"
        return self._ends.enter_context(daemon)

    def destination(
        self, *arguments: str, local: bool = True, fault: str | None = None, start: Start | None = None
    ) -> DaemonProcess:
        """A daemon that waits for a source at `address`."""
        path = self.folder / f"m{len(self._logs) + 1}"
        parameter = f"local={'on' if local else 'off'}"
        daemon = self.daemon(
            *(*arguments, "--incoming", f"unix:{path}", "--migration-parameter", parameter), fault=fault, start=start
        )
        self.address = f"unix:{path}"
        return daemon

    def hand_over(self, source: DaemonProcess) -> DaemonProcess:
        """Hands over in order; returns the daemon that serves from then on."""
        destination = self.destination()
        source.execute("migrate", uri=self.address)
        info = source.wait_migration()
        assert info["status"] == "completed", (info, self.log_of(destination))
        destination.wait_event("MigrationStatusChanged", status="completed")
        assert source.quit() == 0
        return destination

    def log_of(self, daemon: DaemonProcess) -> str:
        """What a daemon logged."""
        return self._logs[daemon.pid].read_text()

    def log(self) -> str:
        """What all of them logged, one daemon after another."""
        return "".join(path.read_text() for path in self._logs.values())
