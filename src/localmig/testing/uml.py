"""User-Mode Linux as a guest: a real Linux kernel in an ordinary process, and itself a vhost-user frontend.

Owns:        its command line, what it takes of the machine.
Never sees:  the process that it becomes; the backend beyond its socket.
Read next:   linux_guest.py, which runs it; initramfs.py for what it boots.

It cannot reconnect: when its backend goes away, its NIC is gone for good. That makes it a strict witness.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from localmig.errors import ConfigError
from localmig.testing.initramfs import write_initramfs

_MODULES: Final = ("failover", "net_failover", "virtio_net")
"""virtio and its vhost-user transport are built into the kernel."""

_DRIVERS: Final = {3: "virtio_console"}
"""By virtio's id of a kind of device: the module that drives it, of those that Debian's kernel has."""

_MODULE_TREES: Final = Path("/usr/lib/uml/modules")


def unavailable_reason() -> str | None:
    """What is missing for such a guest, None where nothing is."""
    for program, package in (("linux.uml", "user-mode-linux"), ("busybox", "busybox-static")):
        if shutil.which(program) is None:
            return f"no {program}: on Debian, apt-get install {package}"
    if not any(_MODULE_TREES.glob("*")):
        return f"linux.uml has no modules in {_MODULE_TREES}: on Debian, reinstall user-mode-linux"
    return None


def boot_failure_reason(console: str) -> str | None:
    """Why such a guest cannot run on this machine, by what it said; None where it said nothing of that."""
    if "ptrace set fp regs failed" not in console:
        return None
    # It hands each of its processes a register area of a fixed size; a processor with wider vectors has a larger one.
    return "User-Mode Linux does not run on this processor, which has more state than it knows: use QEMU"


def command(nic: str, *, address: str, folder: Path, others: Mapping[int, str] = MappingProxyType({})) -> list[str]:
    """How to start such a guest, its console on standard output.

    Args:
        nic: its device's vhost-user socket.
        address: its IPv4 address with prefix length.
        folder: where its files may go, what it boots among them; they are the caller's to remove.
        others: the vhost-user sockets of further devices, by virtio's id of their kind; 3 is a console.

    Raises:
        ConfigError: this machine has not what it takes, or the guest has no driver for a device.
    """
    if unknown := others.keys() - _DRIVERS.keys():
        raise ConfigError(f"the guest has no driver for virtio id {min(unknown)}, it has for {sorted(_DRIVERS)}")
    if (reason := unavailable_reason()) is not None:
        raise ConfigError(reason)
    initramfs = folder / "uml-initramfs"
    modules = (*_MODULES, *(_DRIVERS[kind] for kind in others))
    write_initramfs(initramfs, module_tree=max(_MODULE_TREES.glob("*")), modules=modules)
    argv = ["linux.uml", "mem=128M", f"initrd={initramfs}", f"uml_dir={folder}/", "con=null", "con0=null,fd:1"]
    devices = {1: nic, **others}  # 1: virtio's id of a NIC
    argv += [f"virtio_uml.device={socket}:{kind}" for kind, socket in devices.items()]
    return [*argv, "quiet", f"guestip={address}"]
