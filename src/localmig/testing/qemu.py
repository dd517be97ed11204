"""QEMU as a VMM: a real Linux guest with one virtio-net, by hardware virtualization or by emulation.

Owns:        its command line, what it takes of the machine, the choice of the kernel's modules.
Never sees:  the process that it becomes, the kernel's download (the Makefile's), the backend beyond its socket.
Read next:   linux_guest.py, which runs it; initramfs.py for what the guest boots.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from localmig.errors import ConfigError
from localmig.testing.initramfs import write_initramfs

PROGRAM: Final = "qemu-system-x86_64"

KVM_SECONDS_MAX: Final = 5.0
"""How long a kernel may take under KVM to come to its panic for want of a root. It takes half a second, and not much
more under emulation: a KVM that needs longer is no gain."""

VERSION_SECONDS_MAX: Final = 20.0
"""For `--version`, which loads a large program and many libraries; a busy machine takes a second."""

_RECONNECT_MS_SINCE: Final = (9, 2)
"""The release whose character devices first took `reconnect-ms`; a later one has forgotten `reconnect`."""

_KVM: Final = Path("/dev/kvm")

MEMORY_BYTES: Final = 256 << 20
"""What a guest has: enough for Linux and its services, and copied in a second."""

MEMFD: Final = "memory-backend-memfd"
"""Memory without a name: see `command`."""

_MODULES: Final = (
    "failover",
    "net_failover",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_net",
    "virtio-rng",
)
"""In load order: each one needs only those before it. A file is called as its makers did, with a dash or without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One QEMU of this machine.

    Attributes:
        path: the program.
        firmware: folders with its firmware, where it does not find that by itself.
    """

    path: str = PROGRAM
    firmware: tuple[str, ...] = ()

    @classmethod
    def unpacked(cls, root: Path) -> Self:
        """A QEMU whose Debian packages were unpacked at `root`, where `make second-qemu` leaves one."""
        share = root / "usr/share"
        return cls(path=str(root / "usr/bin" / PROGRAM), firmware=(str(share / "qemu"), str(share / "seabios")))

    def argv(self) -> list[str]:
        """The words that every command line of it begins with."""
        return [self.path, *(word for folder in self.firmware for word in ("-L", folder))]

    def version(self) -> tuple[int, ...]:
        """Major and minor number; none where it does not tell."""
        argv = [self.path, "--version"]
        said = subprocess.run(argv, capture_output=True, text=True, timeout=VERSION_SECONDS_MAX, check=False).stdout
        numbers = re.search(r"version (\d+)\.(\d+)", said)
        return tuple(map(int, numbers.groups())) if numbers else ()


INSTALLED: Final = Program()


def unavailable_reason(kernel_package: Path, program: Program = INSTALLED) -> str | None:
    """What is missing for a guest of the kernel unpacked at `kernel_package`, None where nothing is."""
    for needed, package in ((program.path, "qemu-system-x86"), ("busybox", "busybox-static")):
        if shutil.which(needed) is None:
            return f"no {needed}: on Debian, apt-get install {package}"
    if not any(kernel_package.glob("boot/vmlinuz-*")):
        return f"no guest kernel in '{kernel_package}': on Debian for amd64, 'make guest-kernel' downloads it"
    return None


def command(
    netdev: Sequence[str],
    *,
    address: str,
    folder: Path,
    kernel_package: Path,
    accelerator: str = "tcg",
    packed: bool = False,
    queue_pairs: int = 1,
    mergeable: bool = True,
    shares_memory: bool = True,
    program: Program = INSTALLED,
    memory: str = MEMFD,
    machine: str = "",
    more: Sequence[str] = (),
) -> list[str]:
    """How to start a guest with one virtio-net, its console on standard output.

    Args:
        netdev: the arguments that define netdev "n0".
        address: the guest's IPv4 address with prefix length.
        folder: where its files may go; they are the caller's to remove.
        kernel_package: where Debian's package of a cloud kernel was unpacked.
        accelerator: "tcg" (emulation, works everywhere) or "kvm".
        packed: whether its NIC offers packed rings; the guest then takes them.
        mergeable: whether the guest may merge its receive buffers; without it each holds the longest packet there is.
        shares_memory: whether its memory is shared with the backend; what QEMU does without share=on.
        queue_pairs: how many the NIC has; with more than one the guest has two processors, and uses two by itself.
        program: which QEMU.
        memory: the type of the object that the guest's memory is, and what it needs besides its size.
        machine: further properties of the machine, each with a comma before it.
        more: further words of the command line.

    Raises:
        ConfigError: this machine has not what it takes.
    """
    if (reason := unavailable_reason(kernel_package, program)) is not None:
        raise ConfigError(reason)
    initramfs = folder / "qemu-initramfs"
    (module_tree,) = kernel_package.glob("lib/modules/*")
    write_initramfs(initramfs, module_tree=module_tree, modules=_MODULES)
    argv = [*program.argv(), "-M", f"q35,accel={accelerator},memory-backend=ram0{machine}", "-cpu", "max"]
    argv += ["-smp", str(min(2, queue_pairs)), "-m", f"{MEMORY_BYTES}B"]
    # vhost-user needs guest memory it can map.
    share = "on" if shares_memory else "off"
    argv += ["-object", f"{memory},id=ram0,size={MEMORY_BYTES},share={share}"]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    argv += ["-kernel", str(_kernel(kernel_package)), "-initrd", str(initramfs)]
    # no_timer_check: on a loaded machine an emulated timer may come too late, and the boot would hang.
    argv += ["-append", f"quiet console=ttyS0 no_timer_check ipv6.disable=1 guestip={address}"]
    argv += netdev
    # vectors=0: QEMU 7.2 under TCG crashes with MSI-X and a vhost-user backend.
    wanted = (",packed=on" if packed else "") + (",mq=on" if queue_pairs > 1 else "")
    wanted += "" if mergeable else ",mrg_rxbuf=off"
    nic = f"virtio-net-pci,id=nic0,netdev=n0,mac=52:54:00:12:34:56,vectors=0,romfile={wanted}"
    return [*argv, "-device", nic, *more]


def vhost_user_netdev(socket: Path | str, *, queue_pairs: int = 1, program: Program = INSTALLED) -> list[str]:
    """A vhost-user backend at `socket`, to which QEMU reconnects every second when it goes away."""
    every_second = "reconnect-ms=1000" if program.version() >= _RECONNECT_MS_SINCE else "reconnect=1"
    return [
        "-chardev",
        f"socket,id=c0,path={socket},{every_second}",
        "-netdev",
        f"vhost-user,id=n0,chardev=c0,queues={queue_pairs}",
    ]


def vhost_user_server(socket: Path | str) -> list[str]:
    """The other way round: QEMU listens at `socket` for its backend, also after one left."""
    chardev = f"socket,id=c0,path={socket},server=on,wait=off"
    return ["-chardev", chardev, "-netdev", "vhost-user,id=n0,chardev=c0"]


def best_accelerator(kernel_package: Path) -> str:
    """KVM where a kernel runs under it, else TCG. There are machines whose /dev/kvm opens, but no guest runs."""
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return "tcg"
    argv = [PROGRAM, "-M", "q35,accel=kvm", "-cpu", "max", "-m", "256", "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-kernel", str(_kernel(kernel_package)), "-append", "panic=-1", "-no-reboot"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=KVM_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired:
        return "tcg"
    return "kvm" if done.returncode == 0 else "tcg"


def _kernel(kernel_package: Path) -> Path:
    return max(kernel_package.glob("boot/vmlinuz-*"))
