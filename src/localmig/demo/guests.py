"""The guests that can play in the demonstration.

Owns:        which kinds there are, how each is booted and asked.
Never sees:  daemons, traffic.
Read next:   localmig/testing/guest.py and linux_guest.py for what a guest is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from localmig.demo.report import GuestCounters
from localmig.demo.service import STEP_SECONDS_MAX
from localmig.errors import ConfigError
from localmig.testing import qemu, uml
from localmig.testing.guest import GuestProcess, GuestSettings
from localmig.testing.initramfs import STREAM_PORT
from localmig.testing.linux_guest import LinuxGuest, discarded_replies
from localmig.testing.traffic import StreamReceiver

GUEST_ADDRESS: Final = "10.9.0.2/24"

GUESTS: Final = ("builtin", "qemu", "uml")

RECONNECT_MS: Final = 100
"""How often the guest of the second round looks for its backend. QEMU's own choices are whole seconds up to 9.1."""


class DemoGuest(ABC):
    """What the rounds want of a guest."""

    port: int
    """Where its TCP receiver listens."""

    name: str
    """What it is."""

    reconnects: str
    """How it looks for a backend that is gone."""

    @abstractmethod
    def carrier_changes(self) -> int:
        """How often its link went up or down. PeerLostError if it cannot be asked any more, as below."""

    @abstractmethod
    def discarded_replies(self) -> int:
        """How many ping replies its own network stack has discarded so far."""

    def counters(self) -> GuestCounters:
        """Both."""
        return GuestCounters(carrier_changes=self.carrier_changes(), discarded_replies=self.discarded_replies())

    @abstractmethod
    def wait_reconnected(self) -> None:
        """Waits until it has found its backend again, where it tells."""


class BuiltinGuest(DemoGuest):
    """The kit's own guest: a namespace behind a driver of ours."""

    name = "the built-in guest"
    reconnects = f"the guest looks for it every {RECONNECT_MS} ms"

    def __init__(self, nic: str, resources: ExitStack) -> None:
        settings = GuestSettings(socket=nic, address=GUEST_ADDRESS, reconnect_ms=RECONNECT_MS)
        self._process = resources.enter_context(GuestProcess(settings))
        with self._process.namespace.entered():
            self.port = resources.enter_context(StreamReceiver()).port

    def carrier_changes(self) -> int:
        """As its kernel saw it."""
        return self._process.carrier_changes()

    def discarded_replies(self) -> int:
        """As its kernel counts them."""
        with self._process.namespace.entered():
            return discarded_replies(Path("/proc/thread-self/net/snmp").read_text())

    def wait_reconnected(self) -> None:
        """As it tells."""
        self._process.wait_for("reconnected", STEP_SECONDS_MAX)


class RealGuest(DemoGuest):
    """Linux in a VMM."""

    port = STREAM_PORT

    def __init__(self, guest: LinuxGuest, *, name: str, reconnects: str) -> None:
        self._guest = guest
        self.name = name
        self.reconnects = reconnects

    def carrier_changes(self) -> int:
        """As its kernel saw it."""
        return self._guest.carrier_changes()

    def discarded_replies(self) -> int:
        """As its kernel counts them."""
        return self._guest.discarded_replies()

    def wait_reconnected(self) -> None:
        """It does not tell."""


Boot = Callable[[str, Path, ExitStack], DemoGuest]
"""Boots a guest with its NIC at a socket and its files in a folder; the stack ends it."""


def choose_guest(kind: str, kernel_package: Path) -> Boot:
    """How to boot the kind of guest that was asked for.

    Args:
        kind: one of `GUESTS`.
        kernel_package: what "qemu" boots: see `qemu.command`.

    Raises:
        ConfigError: this machine has not what it takes; the text says what is missing.
    """
    match kind:
        case "qemu":
            if (reason := qemu.unavailable_reason(kernel_package)) is not None:
                raise ConfigError(reason)
            return partial(_boot_qemu, kernel_package, qemu.best_accelerator(kernel_package))
        case "uml":
            if (reason := uml.unavailable_reason()) is not None:
                raise ConfigError(reason)
            return _boot_uml
        case _:
            return _boot_builtin


def _boot_builtin(nic: str, _folder: Path, resources: ExitStack) -> DemoGuest:
    return BuiltinGuest(nic, resources)


def _boot_qemu(kernel_package: Path, accelerator: str, nic: str, folder: Path, resources: ExitStack) -> DemoGuest:
    argv = qemu.command(
        qemu.vhost_user_netdev(nic),
        address=GUEST_ADDRESS,
        folder=folder,
        kernel_package=kernel_package,
        accelerator=accelerator,
    )
    guest = resources.enter_context(LinuxGuest(argv, address=GUEST_ADDRESS))
    name = f"Linux under QEMU ({accelerator.upper()})"
    return RealGuest(guest, name=name, reconnects="QEMU looks for it every second")


def _boot_uml(nic: str, folder: Path, resources: ExitStack) -> DemoGuest:
    argv = uml.command(nic, address=GUEST_ADDRESS, folder=folder)
    guest = LinuxGuest(argv, address=GUEST_ADDRESS, boot_failure_reason=uml.boot_failure_reason)
    resources.enter_context(guest)
    return RealGuest(guest, name="User-Mode Linux", reconnects="User-Mode Linux cannot reconnect")
