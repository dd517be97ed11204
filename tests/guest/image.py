"""What a guest boots: a kernel from Debian's packages and an initramfs made here.

Owns:        the cache folder .lab/, the choice of kernel modules, the archive format.
Never sees:  running guests, networks.
Read next:   lab.py for who boots it, guest-init for what runs inside.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CACHE: Final = Path(__file__).resolve().parents[2] / ".lab"

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

DOWNLOAD_SECONDS_MAX: Final = 240
"""For 27 MB from a mirror; below pytest's own limit, so that the error is ours."""


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
    """Debian's cloud kernel, downloaded once into `CACHE`, with an initramfs written into the folder `into`.

    Raises:
        LabError: The kernel can be neither found nor downloaded.
    """
    root = _debian_kernel()
    (kernel,) = root.glob("boot/vmlinuz-*")
    (modules,) = root.glob("lib/modules/*")
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
        raise LabError(
            "linux.uml has no modules in /usr/lib/uml/modules: on Debian, reinstall user-mode-linux"
        )
    return Image(
        kernel=Path(kernel), initramfs=_write_initramfs(into / "uml-initramfs", module_trees[-1], UML_MODULES)
    )


def _debian_kernel() -> Path:
    """The unpacked kernel package. A folder there is whole: it is renamed into place last."""
    for unpacked in sorted(CACHE.glob("linux-image-*"), reverse=True):
        return unpacked
    if shutil.which("apt-get") is None:
        raise LabError("no guest kernel: it comes from Debian's packages, and there is no apt-get")
    if _run(["dpkg", "--print-architecture"]).strip() != "amd64":
        raise LabError("no guest kernel: the lab knows only amd64")
    depends = _run(["apt-cache", "depends", "linux-image-cloud-amd64"]).split()
    packages = [
        word for word in depends if word.startswith("linux-image-") and word != "linux-image-cloud-amd64"
    ]
    if not packages:
        raise LabError("apt does not know linux-image-cloud-amd64: run apt-get update first")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="unpack-") as folder:
        _run(["apt-get", "download", packages[0]], folder=folder)
        (package,) = Path(folder).glob("*.deb")
        root = Path(folder, "root")
        _run(["dpkg", "-x", str(package), str(root)])
        return root.rename(CACHE / packages[0])


def _run(argv: list[str], folder: str | None = None) -> str:
    try:
        finished = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, check=True, timeout=DOWNLOAD_SECONDS_MAX
        )
    except subprocess.CalledProcessError as error:
        raise LabError(f"no guest kernel: {' '.join(argv)} said {error.stderr.strip()!r}") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"no guest kernel: {' '.join(argv)} took over {DOWNLOAD_SECONDS_MAX} s") from error
    return finished.stdout


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
