"""The two rounds of `--vmm`: a guest's QEMU is replaced under traffic, its NIC on localmig, then on QEMU's own TAPs.

Owns:        QEMU's command lines, how `localmig vm-upgrade` is asked, the interfaces of both rounds.
Never sees:  how a guest moves.
Read next:   rounds.py, whose traffic it is; cli/vm_upgrade/ for the command.

Two QEMUs cannot open one TAP. So in the second round the old one and the new one have one each, as ports of a bridge,
which learns from the guest where it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import ClassVar, Final

from localmig.demo.guests import GUEST_ADDRESS, DemoGuest, RealGuest
from localmig.demo.report import Round
from localmig.demo.rounds import HOST_ADDRESS, play
from localmig.demo.service import Service
from localmig.errors import ConfigError, PeerError
from localmig.testing import qemu
from localmig.testing.children import adopt_orphans, end_children
from localmig.testing.linux_guest import LinuxGuest
from localmig.testing.namespace import configure, create_tap, ip, isolate

MOVE_SECONDS_MAX: Final = 180
"""For one `localmig vm-upgrade`, which gives up by itself before."""

_TAPS: Final = ("tap0", "tap1")

_QUEUE_PACKETS: Final = 10_000
"""What a TAP keeps while no QEMU runs the guest: 10 s of pings, and the stream's window."""


def check_available(kernel_package: Path) -> None:
    """ConfigError where this machine has not what it takes; the text says what is missing."""
    if (reason := qemu.unavailable_reason(kernel_package)) is not None:
        raise ConfigError(reason)


def run(kernel_package: Path, *, times: int) -> tuple[Round, Round, DemoGuest]:
    """Both rounds, each with a fresh guest; the last of them to tell what it was.

    Args:
        kernel_package: what QEMU boots: see `qemu.command`.
        times: how often QEMU is replaced in each.

    Raises:
        LocalmigError: this machine cannot run it, or it went wrong; the text says what.
    """
    isolate()
    adopt_orphans()
    accelerator = qemu.best_accelerator(kernel_package)
    rounds = []
    subject_types: tuple[type[OnLocalmig | OnOwnTaps], ...] = (OnLocalmig, OnOwnTaps)
    for subject_type in subject_types:
        with ExitStack() as resources:
            resources.callback(end_children)
            folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="localmig-demo-")))
            subject = subject_type(folder, resources)
            argv = qemu.command(
                subject.netdev,
                address=GUEST_ADDRESS,
                folder=folder,
                kernel_package=kernel_package,
                accelerator=accelerator,
                # Both QEMUs map it. A copy, under emulation, may miss what the guest's processor writes meanwhile.
                memory=f"memory-backend-file,mem-path={folder / 'memory'}",
                more=["-qmp", f"unix:{subject.qmp},server=on,wait=off"],
            )
            linux = resources.enter_context(LinuxGuest(argv, address=GUEST_ADDRESS))
            guest = RealGuest(linux, name=f"Linux under QEMU ({accelerator.upper()})", reconnects="")
            rounds.append(play(subject.name, guest, subject, subject.move, times=times))
            subject.remove_interfaces()
    return rounds[0], rounds[1], guest


class Subject(ABC):
    """A guest's QEMU, one after another.

    Attributes:
        name: what the round is called.
        netdev: the options of the first QEMU that define its netdev.
        qmp: where the QEMU that runs the guest answers.
    """

    name: ClassVar[str]
    netdev: list[str]

    def __init__(self, qmp: Path) -> None:
        self.qmp = qmp
        self._moved_ns: tuple[int, int | None] | None = None

    @abstractmethod
    def changes(self) -> list[str]:
        """Options of the next QEMU that differ."""

    @abstractmethod
    def remove_interfaces(self) -> None:
        """Makes room for the next round."""

    def forget(self) -> None:
        """Lets `moved_ns` begin here."""
        self._moved_ns = None

    def moved_ns(self) -> tuple[int, int | None]:
        """When the guest stopped and went on, by CLOCK_MONOTONIC."""
        assert self._moved_ns is not None
        return self._moved_ns

    def move(self) -> None:
        """Replaces QEMU. PeerError where the guest is not in the new one."""
        argv = [sys.executable, "-m", "localmig.cli", "vm-upgrade", "--json", str(self.qmp), "--", *self.changes()]
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=MOVE_SECONDS_MAX, start_new_session=True, check=False
        )
        if done.returncode != 0:
            raise PeerError(f"QEMU was not replaced:\n{done.stderr}")
        report = json.loads(done.stdout)
        # QEMU stamps its events by the clock that people read.
        stopped_ns = report["stopped-at-us"] * 1000 + time.monotonic_ns() - time.time_ns()
        self._moved_ns = stopped_ns, stopped_ns + report["silence-us"] * 1000


class OnLocalmig(Subject):
    """The NIC is a daemon's, on one TAP."""

    name = "localmig"

    def __init__(self, folder: Path, resources: ExitStack) -> None:
        super().__init__(folder / "qemu.sock")
        create_tap("tap0")
        configure("tap0", address=HOST_ADDRESS)
        _deepen("tap0")
        service = Service(folder)
        resources.callback(service.stop)
        service.start()
        self.netdev = qemu.vhost_user_netdev(service.nic)

    def changes(self) -> list[str]:
        """None: the new QEMU connects to the same daemon."""
        return []

    def remove_interfaces(self) -> None:
        """The TAP."""
        ip("link", "del", "tap0")


class OnOwnTaps(Subject):
    """The NIC is QEMU's own, on one of two TAPs."""

    name = "own TAP"

    def __init__(self, folder: Path, _: ExitStack) -> None:
        super().__init__(folder / "qemu.sock")
        ip("link", "add", "br0", "type", "bridge")
        configure("br0", address=HOST_ADDRESS)
        for ifname in _TAPS:
            create_tap(ifname)
            configure(ifname)
            ip("link", "set", ifname, "master", "br0")
            _deepen(ifname)
        self._following = cycle(_TAPS)
        self.netdev = self.changes()

    def changes(self) -> list[str]:
        """The other TAP."""
        return ["-netdev", f"tap,id=n0,ifname={next(self._following)},script=no,downscript=no"]

    def remove_interfaces(self) -> None:
        """The TAPs and the bridge."""
        for ifname in (*_TAPS, "br0"):
            ip("link", "del", ifname)


def _deepen(ifname: str) -> None:
    ip("link", "set", ifname, "txqueuelen", str(_QUEUE_PACKETS))
