"""A site: one NIC on a real TAP in a namespace, daemons that serve it in turn, a guest with real kernel TCP/IP."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.kit.processes import DaemonProcess, GuestProcess, start_as
from tests.kit.shortage import Shortage

from localmig.testing.faults import Fault
from localmig.testing.guest import GuestSettings
from localmig.testing.namespace import NetworkNamespace, ip, unavailable_reason
from localmig.testing.traffic import Pinger, PingReport

HOST = "10.9.0.1"
GUEST = "10.9.0.2"


class Site:
    """Where daemons come and go.

    Attributes:
        folder: of all sockets.
        guest: behind the NIC, None until `attach`.
        host_address: of the TAP.
        guest_address: of the guest.
    """

    host_address = HOST
    guest_address = GUEST

    def __init__(self, folder: Path, namespace: NetworkNamespace, ends: ExitStack) -> None:
        self.folder = folder
        self.namespace = namespace
        self.guest: GuestProcess | None = None
        self.socket = folder / "nic0.sock"
        self._ends = ends
        self._count = 0
        self._logs: dict[int, Path] = {}
        self.began_ns = 0
        """When the guest was attached and its rings had settled."""

    def objects(self, *, device: str = "", netdev: str = "") -> list[str]:
        """The options of the NIC; the arguments are appended to its options."""
        return [
            *("--netdev", f"tap,id=net0,ifname=tap0{netdev}"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,socket={self.socket}{device}"),
        ]

    def daemon(
        self,
        *arguments: str,
        fault: str | None = None,
        inherited: Sequence[int] = (),
        user: int | None = None,
        shortage: Shortage | None = None,
    ) -> DaemonProcess:
        """A daemon with a QMP socket of its own, as `user` where one is given, and short of what is told."""
        assert user is None or shortage is None, (user, shortage)
        start = shortage.start if shortage is not None else start_as(user) if user is not None else None
        self._count += 1
        name = f"d{self._count}"
        with self.namespace.entered():
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

    def log_of(self, daemon: DaemonProcess) -> str:
        """What a daemon logged."""
        return self._logs[daemon.pid].read_text()

    def descriptors(self, daemon: DaemonProcess) -> list[str]:
        """What a daemon has open. It may close one meanwhile: the conversation that has just ended."""
        targets = []
        for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                targets.append(str(link.readlink()))
        return targets

    def address_tap(self, ifname: str = "tap0") -> None:
        """Gives a TAP the host's address: one that was made anew has none."""
        with self.namespace.entered():
            ip("addr", "replace", f"{HOST}/24", "dev", ifname)

    def source(
        self, *arguments: str, local: bool = True, fault: str | None = None, user: int | None = None
    ) -> DaemonProcess:
        """A daemon that serves the NIC."""
        daemon = self.daemon(*(arguments or self.objects()), fault=fault, user=user)
        daemon.execute("migrate-set-parameters", local=local)
        self.address_tap()
        return daemon

    def destination(
        self, *arguments: str, local: bool = True, fault: str | None = None, user: int | None = None
    ) -> DaemonProcess:
        """A daemon that waits for a source at `address_of` it."""
        self._count += 1
        path = self.folder / f"m{self._count}"
        daemon = self.daemon(
            *(*arguments, "--incoming", f"unix:{path}", "--migration-parameter", f"local={'on' if local else 'off'}"),
            fault=fault,
            user=user,
        )
        self.address = f"unix:{path}"
        return daemon

    def attach(self, **settings: Any) -> GuestProcess:
        """Lets the guest come up, with more of `GuestSettings`."""
        guest = self.attach_unseen(**settings)
        assert self.ping(10).lost == 0
        self.began_ns = time.monotonic_ns()
        return guest

    def attach_unseen(self, **settings: Any) -> GuestProcess:
        """As `attach`, of a guest that is behind something else than the host's TAP: nobody can ping it."""
        with self.namespace.entered():
            self.guest = self._ends.enter_context(
                GuestProcess(GuestSettings(socket=str(self.socket), address=f"{GUEST}/24", **settings))
            )
        return self.guest

    def ping(self, count: int = 100) -> PingReport:
        """Pings the guest, a millisecond apart."""
        with self.namespace.entered():
            pinger = Pinger(GUEST, count_max=count).start()
        assert pinger.wait(20)
        return pinger.stop()

    def pinger(self) -> Pinger:
        """A pinger that runs on."""
        with self.namespace.entered():
            return Pinger(GUEST).start()


@contextmanager
def new_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site of its own, for as long as the block lasts."""
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(f"needs network namespaces: {reason}")
    # A short path: a UNIX socket's has 107 bytes.
    folder = tmp_path_factory.mktemp("s")
    with ExitStack() as ends:
        namespace = ends.enter_context(NetworkNamespace.create())
        yield Site(folder, namespace, ends)


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with new_site(tmp_path_factory) as made:
        yield made
