"""A site: one NIC on a real TAP in a namespace, daemons that serve it in turn, a guest with real kernel TCP/IP.

Owns:        the NIC's options and its guest, pings.
Never sees:  what goes wrong.
Read next:   daemons.py for the daemons; tests/faults/, where most of it is used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.kit.daemons import Daemons
from tests.kit.processes import DaemonProcess, GuestProcess

from localmig.testing.guest import GuestSettings
from localmig.testing.namespace import NetworkNamespace, ip, unavailable_reason
from localmig.testing.process import Start
from localmig.testing.traffic import Pinger, PingReport

HOST = "10.9.0.1"
GUEST = "10.9.0.2"


class Site(Daemons):
    """Where daemons serve a NIC.

    Attributes:
        guest: behind the NIC, None until `attach`.
        host_address: of the TAP.
        guest_address: of the guest.
    """

    host_address = HOST
    guest_address = GUEST

    def __init__(self, folder: Path, namespace: NetworkNamespace, ends: ExitStack) -> None:
        super().__init__(folder, ends, namespace)
        self.namespace = namespace
        self.guest: GuestProcess | None = None
        self.socket = folder / "nic0.sock"
        self.began_ns = 0
        """When the guest was attached and its rings had settled."""

    def objects(self, *, device: str = "", netdev: str = "") -> list[str]:
        """The options of the NIC; the arguments are appended to its options."""
        return [
            *("--netdev", f"tap,id=net0,ifname=tap0{netdev}"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,socket={self.socket}{device}"),
        ]

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
        self, *arguments: str, local: bool = True, fault: str | None = None, start: Start | None = None
    ) -> DaemonProcess:
        """A daemon that serves the NIC."""
        daemon = self.daemon(*(arguments or self.objects()), fault=fault, start=start)
        daemon.execute("migrate-set-parameters", local=local)
        self.address_tap()
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
