"""What a real Linux guest boots into: busybox, ethtool, a driver's modules, an init script with a few services.

Owns:        the archive's format, what is in it, the guest's services and their ports.
Never sees:  who boots it: a VMM, a network.
Read next:   qemu.py and uml.py, which boot it.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from localmig.errors import ConfigError

ECHO_PORT: Final = 7
"""Sends back what a TCP connection brings."""

SHELL_PORT: Final = 9
"""Runs what a TCP connection brings, and answers with what that prints."""

STREAM_PORT: Final = 5001
"""Answers a TCP stream with the SHA-256 of what it got, as `traffic.StreamReceiver` does."""

READY_LINE: Final = "guest: ready"
"""What the guest says on its console once its network is up and its services listen."""

# It keeps no loop of its own running, because on one emulated CPU a loop shows in the ping times. TCP's receive window
# is small: a TAP keeps 1000 packets and drops the next, and one stream with a larger window could fill it by itself.
_INIT: Final = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do
    insmod "/modules/$module.ko" || echo "guest: no driver $module"
done
for word in $(cat /proc/cmdline); do
    case $word in guestip=*) address=${{word#guestip=}} ;; esac
done
until [ -e /sys/class/net/eth0 ]; do usleep 10000; done
echo 4096 65536 131072 >/proc/sys/net/ipv4/tcp_rmem
ip link set lo up
ip address add "$address" dev eth0
ip link set eth0 up
nc -ll -p {ECHO_PORT} -e cat &
nc -ll -p {SHELL_PORT} -e sh &
nc -ll -p {STREAM_PORT} -e sha256sum &
until [ "$(netstat -ltn 2>/dev/null | grep -c LISTEN)" = 3 ]; do usleep 10000; done
echo "{READY_LINE}"
exec sleep 2147483647
"""


def write_initramfs(path: Path, *, module_tree: Path, modules: Sequence[str]) -> None:
    """Writes an initramfs for a kernel.

    Its command line must have `guestip=ADDRESS/LENGTH`: the IPv4 address of the guest's only NIC.

    Args:
        path: the file.
        module_tree: the kernel's modules.
        modules: those to load, in load order.

    Raises:
        ConfigError: there is no busybox.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise ConfigError("no busybox: on Debian, apt-get install busybox-static")
    folders = ("bin", "dev", "modules", "proc", "sys", "tmp")
    archive = b"".join(_entry(folder, stat.S_IFDIR | 0o755) for folder in folders)
    # Init's standard streams, until devtmpfs is mounted over it.
    archive += _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive += _entry("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    archive += b"".join(_ethtool())
    archive += _entry("init", stat.S_IFREG | 0o755, _INIT.encode())
    archive += _entry("modules/order", stat.S_IFREG | 0o644, "\n".join(modules).encode())
    for name in modules:
        (module,) = module_tree.rglob(f"{name}.ko")
        archive += _entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, module.read_bytes())
    path.write_bytes(archive + _entry("TRAILER!!!", 0))


def _ethtool() -> Iterator[bytes]:
    """The program ethtool with its libraries, where this machine has it: busybox can do none of it."""
    program = shutil.which("ethtool")
    if program is None:
        return
    yield _entry("bin/ethtool", stat.S_IFREG | 0o755, Path(program).read_bytes())
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    folders: set[str] = set()
    for library in map(Path, re.findall(r"(/\S+) \(0x", told)):
        for folder in (*reversed(library.parents[:-1]),):
            name = str(folder)[1:]
            if name not in folders:
                folders.add(name)
                yield _entry(name, stat.S_IFDIR | 0o755)
        yield _entry(str(library)[1:], stat.S_IFREG | 0o755, library.read_bytes())


def _entry(name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry in cpio's "newc" format, which the kernel unpacks. cpio(5), "New ASCII Format"."""
    encoded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device, special device, name size, checksum (unused)
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + encoded
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
