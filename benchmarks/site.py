"""Where daemons are measured: many NICs in a namespace, one daemon after another, guests and a flood on them.

Owns:        the folder with the sockets, the chain of daemons, how one is asked what it takes of the machine.
Never sees:  what is measured.
Read next:   guests.py and flood.py for what is at the NICs' ends; handovers.py, which uses all of it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from localmig.errors import PeerError
from localmig.testing.daemon import DaemonProcess
from localmig.testing.namespace import NetworkNamespace

HANDOVER_SECONDS_MAX: Final = 60.0
"""Five hundred NICs take some seconds to be handed over on a small machine, all but a millisecond of it setup."""

LOCAL: Final = ("--migration-parameter", "local=on")


@contextmanager
def namespace() -> Iterator[NetworkNamespace]:
    """A fresh network namespace that this thread is in until the end of the block. KernelError where there is none."""
    with NetworkNamespace.create() as fresh, fresh.entered():
        ipv6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
        if ipv6.exists():
            # A new interface speaks IPv6 by itself; here every packet is ours.
            ipv6.write_text("1")
        yield fresh


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a process takes of the machine.

    Attributes:
        threads: how many it has.
        descriptors: how many it has open.
        own_bytes: memory that is its own alone, in RAM: without its program's files and without the guests' memory.
    """

    threads: int
    descriptors: int
    own_bytes: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """Of a running process."""
        status = Path(f"/proc/{pid}/status").read_text()

        def number(name: str) -> int:
            found = re.search(rf"^{name}:\s*(\d+)", status, re.MULTILINE)
            assert found is not None, name
            return int(found[1])

        return cls(
            threads=number("Threads"),
            descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
            own_bytes=number("RssAnon") * 1024,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """One handover, as both daemons tell it; microseconds, and milliseconds where the name says so."""

    downtime_us: int
    total_ms: int
    descriptors: int
    source_phases_us: dict[str, int]
    destination_phases_us: dict[str, int]

    @property
    def setup_us(self) -> int:
        """From connecting until the destination had everything: all while the guest ran."""
        return sum(self.source_phases_us[name] for name in ("connect", "hello", "setup", "setup-ack"))


class NicSite:
    """NICs of one daemon, in the namespace of this thread, served by one daemon after another.

    Args:
        count: how many.
        queue_pairs: of each.
        packed: whether packed rings are offered.
    """

    def __init__(self, count: int, *, queue_pairs: int = 1, packed: bool = False) -> None:
        self._netdev_options = f",queues={queue_pairs}" if queue_pairs > 1 else ""
        self._device_options = ",packed=on" if packed else ""
        self._resources = ExitStack()
        self.folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="localmig-bench-")))
        self.nics: Final = {f"tap{number}": self.folder / f"nic{number}.sock" for number in range(count)}
        """The vhost-user socket of each NIC, by the name of its TAP."""
        self._started = 0
        self._daemon: DaemonProcess | None = None
        self._other: DaemonProcess | None = None
        self._uri = ""

    @property
    def daemon(self) -> DaemonProcess:
        """The one that serves."""
        assert self._daemon is not None
        return self._daemon

    def start(self) -> None:
        """Starts the first daemon, or one anew after `stop`. PeerError if it does not start."""
        arguments = [*LOCAL]
        for number, (tap, socket) in enumerate(self.nics.items()):
            arguments += ["--netdev", f"tap,id=net{number},ifname={tap}{self._netdev_options}"]
            device = f"virtio-net,id=nic{number},netdev=net{number},socket={socket}{self._device_options}"
            arguments += ["--device", device]
        self._daemon = self._start(arguments)

    def start_destination(self) -> None:
        """Starts the daemon that `hand_over` hands over to."""
        self._uri = f"unix:{self.folder / f'migrate{self._started}.sock'}"
        self._other = self._start([*LOCAL, "--incoming", self._uri])

    def hand_over(self) -> Handover:
        """Hands over to it. PeerError if that failed: then the old one serves on."""
        source, destination = self.daemon, self._other
        assert destination is not None
        source.execute("migrate", uri=self._uri)
        here = source.wait_migration(seconds=HANDOVER_SECONDS_MAX)
        _check_completed(here)
        there = destination.execute("query-migrate")
        self._daemon, self._other = destination, source
        return Handover(
            downtime_us=here["local"]["downtime-us"],
            total_ms=here["total-time"],
            descriptors=here["local"]["descriptors"],
            source_phases_us=_phases(here),
            destination_phases_us=_phases(there),
        )

    def end_other(self) -> None:
        """Ends the daemon that does not serve: the old one, after a failure the new one. Idempotent."""
        if self._other is not None:
            self._other.quit()
            self._other = None

    def stop(self) -> None:
        """Ends the daemon that serves, in order."""
        self.daemon.quit()
        self._daemon = None

    def close(self) -> None:
        """Kills what is left. Idempotent."""
        for daemon in (self._daemon, self._other):
            if daemon is not None:
                daemon.kill()
        self._daemon = self._other = None
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, arguments: list[str]) -> DaemonProcess:
        self._started += 1
        qmp = self.folder / f"qmp{self._started}.sock"
        return DaemonProcess(arguments, qmp=qmp, log=self.folder / "daemon.log")


def _check_completed(info: dict[str, Any]) -> None:
    if info["status"] != "completed":
        raise PeerError(f"handover {info['status']}: {info.get('error-desc', 'no reason told')}")


def _phases(info: dict[str, Any]) -> dict[str, int]:
    return {phase["name"]: phase["duration-us"] for phase in info["local"]["phases"]}
