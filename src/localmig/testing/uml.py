"""User-Mode Linux as a guest: a real Linux kernel in an ordinary process, and itself a vhost-user frontend.

Owns:        its command line, its process, what it answers about itself.
Never sees:  the backend beyond its socket.
Read next:   initramfs.py for what it boots; demo.py, which can use it.

It cannot reconnect: when its backend goes away, its NIC is gone for good. That makes it a strict witness.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Final, Self

from localmig.errors import ConfigError, PeerError, PeerLostError
from localmig.testing.initramfs import READY_LINE, SHELL_PORT, write_initramfs

BOOT_SECONDS_MAX: Final = 60.0
"""It boots in about a second; a busy machine may take many times that."""

ANSWER_SECONDS_MAX: Final = 10.0
"""It answers in milliseconds; by now its NIC is gone."""

STOP_SECONDS_MAX: Final = 10.0
"""From SIGTERM to the end of its processes."""

_MODULES: Final = ("failover", "net_failover", "virtio_net")
"""virtio and its vhost-user transport are built into the kernel."""

_MODULE_TREES: Final = Path("/usr/lib/uml/modules")


def unavailable_reason() -> str | None:
    """What is missing for such a guest, None where nothing is."""
    for program, package in (("linux.uml", "user-mode-linux"), ("busybox", "busybox-static")):
        if shutil.which(program) is None:
            return f"no {program}: on Debian, apt-get install {package}"
    if not any(_MODULE_TREES.glob("*")):
        return f"linux.uml has no modules in {_MODULE_TREES}: on Debian, reinstall user-mode-linux"
    return None


def command(nic: str, *, address: str, folder: Path) -> list[str]:
    """How to start such a guest, its console on standard output.

    Args:
        nic: its device's vhost-user socket.
        address: its IPv4 address with prefix length.
        folder: where its files may go, what it boots among them; they are the caller's to remove.

    Raises:
        ConfigError: this machine has not what it takes.
    """
    if (reason := unavailable_reason()) is not None:
        raise ConfigError(reason)
    initramfs = folder / "uml-initramfs"
    write_initramfs(initramfs, module_tree=max(_MODULE_TREES.glob("*")), modules=_MODULES)
    argv = ["linux.uml", "mem=128M", f"initrd={initramfs}", f"uml_dir={folder}/", "con=null", "con0=null,fd:1"]
    return [*argv, f"virtio_uml.device={nic}:1", "quiet", f"guestip={address}"]  # 1: virtio's id of a NIC


class UmlGuest:
    """A booted guest with one NIC, in the network namespace of the thread that starts it.

    Args:
        nic: its device's vhost-user socket.
        address: its IPv4 address with prefix length.
        folder: where its files may go; they are the caller's to remove.

    Raises:
        ConfigError: this machine has not what it takes.
        PeerError: it did not boot.
    """

    def __init__(self, nic: str, *, address: str, folder: Path) -> None:
        self._address = address.partition("/")[0]
        self._process = subprocess.Popen(
            # Its threads are processes, which outlive a killed parent: end them as one group.
            command(nic, address=address, folder=folder),
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
            with socket.create_connection((self._address, SHELL_PORT), timeout=ANSWER_SECONDS_MAX) as connection:
                connection.sendall(b"cat /sys/class/net/eth0/carrier_changes")
                connection.shutdown(socket.SHUT_WR)
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
        while READY_LINE.encode() not in said:
            left = deadline - time.monotonic()
            piece = os.read(console, 4096) if left > 0 and select.select([console], [], [], left)[0] else b""
            if not piece:
                tail = said[-500:].decode(errors="replace")
                raise PeerError(f"guest did not boot within {BOOT_SECONDS_MAX} s, it said: {tail}")
            said += piece
