"""What a guest under QEMU boots: a kernel from Debian's packages, with the kit's initramfs.

Owns:        the choice of kernel and kernel modules.
Never sees:  running guests, downloads (the Makefile's), networks.
Read next:   lab.py for who boots it, localmig/testing/initramfs.py for what runs inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localmig.errors import ConfigError
from localmig.testing.initramfs import write_initramfs

UNPACKED_KERNEL: Final = Path(__file__).resolve().parents[2] / ".lab/kernel"

# In load order: each one needs only those before it.
MODULES: Final = (
    "failover",
    "net_failover",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_net",
)


class LabError(Exception):
    """This machine cannot provide a guest; the text says what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A kernel and the initramfs with its modules."""

    kernel: Path
    initramfs: Path


def qemu_image(into: Path) -> Image:
    """Debian's cloud kernel, as `make guest-kernel` unpacked it, with an initramfs written into the folder `into`.

    Raises:
        LabError: The kernel is not there, or no busybox.
    """
    if not UNPACKED_KERNEL.exists():
        raise LabError("no guest kernel: on Debian for amd64, 'make guest-kernel' downloads it")
    (kernel,) = UNPACKED_KERNEL.glob("boot/vmlinuz-*")
    (module_tree,) = UNPACKED_KERNEL.glob("lib/modules/*")
    initramfs = into / "qemu-initramfs"
    try:
        write_initramfs(initramfs, module_tree=module_tree, modules=MODULES)
    except ConfigError as error:
        raise LabError(str(error)) from error
    return Image(kernel=kernel, initramfs=initramfs)
