"""User-Mode Linux as a guest: a real Linux kernel in an ordinary process, and itself a vhost-user frontend.

Owns:        what it boots, its process, what it answers about itself.
Never sees:  the backend beyond its socket.
Read next:   demo.py, which can use it.

It cannot reconnect: when its backend goes away, its NIC is gone for good. That makes it a strict witness.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Final, Self

from localmig.errors import ConfigError, PeerError, PeerLostError

BOOT_SECONDS_MAX: Final = 60.0
"""It boots in about a second; a busy machine may take many times that."""

STOP_SECONDS_MAX: Final = 10.0
"""From SIGTERM to the end of its processes."""

STREAM_PORT: Final = 5001
"""Answers a TCP stream with the SHA-256 of what it got, as `traffic.StreamReceiver` does."""

_CARRIER_PORT: Final = 5002

_MODULES: Final = ("failover", "net_failover", "virtio_net")
"""In load order; virtio and its vhost-user transport are built into the kernel."""

_MODULE_TREES: Final = Path("/usr/lib/uml/modules")

# A TAP keeps 1000 packets and drops the next: with a larger window one TCP stream could fill it all by itself.
_INIT: Final = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in {" ".join(_MODULES)}; do insmod /modules/$module.ko; done
for word in $(cat /proc/cmdline); do
    case $word in guestip=*) address=${{word#guestip=}} ;; esac
done
until [ -e /sys/class/net/eth0 ]; do usleep 10000; done
echo 4096 65536 131072 >/proc/sys/net/ipv4/tcp_rmem
ip link set lo up
ip address add "$address" dev eth0
ip link set eth0 up
nc -ll -p {STREAM_PORT} -e sha256sum &
nc -ll -p {_CARRIER_PORT} -e cat /sys/class/net/eth0/carrier_changes &
until [ "$(netstat -ltn 2>/dev/null | grep -c LISTEN)" = 2 ]; do usleep 10000; done
echo ready
exec sleep 2147483647
"""


def unavailable_reason() -> str | None:
    """What is missing for such a guest, None where nothing is."""
    for program, package in (("linux.uml", "user-mode-linux"), ("busybox", "busybox-static")):
        if shutil.which(program) is None:
            return f"no {program}: on Debian, apt-get install {package}"
    if not any(_MODULE_TREES.glob("*")):
        return f"linux.uml has no modules in {_MODULE_TREES}: on Debian, reinstall user-mode-linux"
    return None


class UmlGuest:
    """A booted guest with one NIC, in the network namespace of the thread that starts it.

    Args:
        nic: the device's vhost-user socket.
        address: the guest's IPv4 address with prefix length.
        folder: where its files may go; they are the caller's to remove.

    Raises:
        ConfigError: this machine has not what it takes.
        PeerError: it did not boot.
    """

    def __init__(self, nic: str, *, address: str, folder: Path) -> None:
        if (reason := unavailable_reason()) is not None:
            raise ConfigError(reason)
        self._address = address.partition("/")[0]
        initramfs = folder / "initramfs"
        initramfs.write_bytes(_initramfs())
        argv = ["linux.uml", "mem=128M", f"initrd={initramfs}", f"uml_dir={folder}/", "con=null", "con0=null,fd:1"]
        argv += [f"virtio_uml.device={nic}:1", "quiet", f"guestip={address}"]  # 1: virtio's id of a NIC
        self._process = subprocess.Popen(
            # Its threads are processes, which outlive a killed parent: end them as one group.
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_ready()
        except PeerError:
            self.close()
            raise

    def carrier_changes(self) -> int:
        """How often its link went up or down since it booted. PeerLostError if it cannot be reached."""
        try:
            with socket.create_connection((self._address, _CARRIER_PORT), timeout=STOP_SECONDS_MAX) as connection:
                return int(connection.makefile().read())
        except (OSError, ValueError) as error:
            raise PeerLostError(f"guest does not answer at {self._address}: {error}") from error

    def close(self) -> None:
        """Ends it with all its processes. Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait_ready(self) -> None:
        assert self._process.stdout is not None
        console = self._process.stdout.fileno()
        said = b""
        deadline = time.monotonic() + BOOT_SECONDS_MAX
        while b"ready" not in said:
            left = deadline - time.monotonic()
            piece = os.read(console, 4096) if left > 0 and select.select([console], [], [], left)[0] else b""
            if not piece:
                tail = said[-500:].decode(errors="replace")
                raise PeerError(f"guest did not boot within {BOOT_SECONDS_MAX} s, it said: {tail}")
            said += piece


def _initramfs() -> bytes:
    """What it boots: busybox, the driver's modules, an init script; an archive of cpio's "newc" format."""
    modules = max(_MODULE_TREES.glob("*"))
    busybox = shutil.which("busybox")
    assert busybox is not None
    archive = b"".join(_entry(folder, stat.S_IFDIR | 0o755) for folder in ("bin", "dev", "modules", "proc", "sys"))
    # Init's standard streams.
    archive += _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive += _entry("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    archive += _entry("init", stat.S_IFREG | 0o755, _INIT.encode())
    for name in _MODULES:
        (module,) = modules.rglob(f"{name}.ko")
        archive += _entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, module.read_bytes())
    return archive + _entry("TRAILER!!!", 0)


def _entry(name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> bytes:
    encoded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device, special device, name size, checksum (unused)
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + encoded
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
