"""What a guest boots: a kernel from Debian's packages and an initramfs made here.

Owns:        the choice of kernel modules, the archive format.
Never sees:  running guests, downloads (the Makefile's), networks.
Read next:   lab.py for who boots it, guest-init for what runs inside.
"""

from __future__ import annotations

import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

UNPACKED_KERNEL: Final = Path(__file__).resolve().parents[2] / ".lab/kernel"

# In load order: each one needs only those before it.
PCI_MODULES: Final = (
    "failover",
    "net_failover",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_net",
)
UML_MODULES: Final = ("failover", "net_failover", "virtio_net")  # virtio itself is built in


class LabError(Exception):
    """This machine cannot provide a guest; the text says what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A kernel and the initramfs with its modules."""

    kernel: Path
    initramfs: Path


def busybox() -> Path:
    """The statically linked busybox that is the guest's userland.

    Raises:
        LabError: There is none.
    """
    found = shutil.which("busybox")
    if found is None:
        raise LabError("no busybox: on Debian, apt-get install busybox-static")
    return Path(found)


def qemu_image(into: Path) -> Image:
    """Debian's cloud kernel, as `make guest-kernel` unpacked it, with an initramfs written into the folder `into`.

    Raises:
        LabError: The kernel is not there.
    """
    if not UNPACKED_KERNEL.exists():
        raise LabError("no guest kernel: on Debian for amd64, 'make guest-kernel' downloads it")
    (kernel,) = UNPACKED_KERNEL.glob("boot/vmlinuz-*")
    (modules,) = UNPACKED_KERNEL.glob("lib/modules/*")
    return Image(kernel=kernel, initramfs=_write_initramfs(into / "qemu-initramfs", modules, PCI_MODULES))


def uml_image(into: Path) -> Image:
    """User-Mode Linux from Debian's package, with an initramfs written into the folder `into`.

    Raises:
        LabError: The package is not installed.
    """
    kernel = shutil.which("linux.uml")
    if kernel is None:
        raise LabError("no linux.uml: on Debian, apt-get install user-mode-linux")
    module_trees = sorted(Path("/usr/lib/uml/modules").glob("*"))
    if not module_trees:
        raise LabError("linux.uml has no modules in /usr/lib/uml/modules: on Debian, reinstall user-mode-linux")
    return Image(kernel=Path(kernel), initramfs=_write_initramfs(into / "uml-initramfs", module_trees[-1], UML_MODULES))


def _write_initramfs(path: Path, modules: Path, order: tuple[str, ...]) -> Path:
    archive = bytearray()
    for folder in ("bin", "dev", "modules", "proc", "sys", "tmp"):
        archive += _cpio_entry(folder, stat.S_IFDIR | 0o755, b"")
    # Init's standard streams, until devtmpfs is mounted over it.
    archive += _cpio_entry("dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1))
    archive += _cpio_entry("bin/busybox", stat.S_IFREG | 0o755, busybox().read_bytes())
    archive += _cpio_entry("init", stat.S_IFREG | 0o755, Path(__file__).with_name("guest-init").read_bytes())
    archive += _cpio_entry("modules/order", stat.S_IFREG | 0o644, "\n".join(order).encode())
    for name in order:
        (module,) = modules.rglob(f"{name}.ko")
        archive += _cpio_entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, module.read_bytes())
    archive += _cpio_entry("TRAILER!!!", 0, b"")
    path.write_bytes(archive)
    return path


def _cpio_entry(name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry in cpio's "newc" format, which the kernel unpacks. cpio(5), "New ASCII Format"."""
    encoded_name = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device, special device, name size, checksum (unused)
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded_name), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + encoded_name
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
