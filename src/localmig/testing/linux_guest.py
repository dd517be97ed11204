"""A real Linux guest: a VMM's process, and what the Linux in it can be asked over its network.

Owns:        the process from its start to its end, the conversation with the guest's shell.
Never sees:  which VMM it is; the backend.
Read next:   qemu.py and uml.py, which give the command; initramfs.py for what the guest runs.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, Self

from localmig.errors import ConfigError, LocalmigError, PeerError, PeerLostError
from localmig.testing.initramfs import READY_LINE, SHELL_PORT

BOOT_SECONDS_MAX: Final = 60.0
"""It boots in one to three seconds; a busy machine without KVM may take ten times that."""

ANSWER_SECONDS_MAX: Final = 10.0
"""It answers in milliseconds; by now its NIC is gone."""

STOP_SECONDS_MAX: Final = 10.0
"""From SIGTERM to the end of its processes."""


class GuestShell(ABC):
    """What a booted guest tells about itself."""

    @abstractmethod
    def connect(self, port: int) -> socket.socket:
        """A TCP connection to one of its services (initramfs.py has their ports)."""

    def run(self, command: str) -> str:
        """What shell `command`, run in the guest, prints. OSError if the guest cannot be reached."""
        with self.connect(SHELL_PORT) as connection:
            connection.sendall(command.encode())
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def carrier_changes(self) -> int:
        """How often it saw its link change since boot: a reconnect of the backend shows here."""
        return int(self.run("cat /sys/class/net/eth0/carrier_changes"))

    def discarded_replies(self) -> int:
        """How many ping replies its own network stack discarded since boot: see `discarded_replies`."""
        return discarded_replies(self.run("cat /proc/net/snmp"))


def discarded_replies(snmp: str) -> int:
    """How many ping replies a kernel discarded before they reached its NIC, by what its /proc/net/snmp says.

    A sender that has no room left for an ICMP message counts it as OutErrors. There is room for about 170 replies.
    Where a busy machine keeps a guest from running for a sixth of a second, as many requests wait for it, and it
    answers them all at once.
    """
    names, values = (line.split() for line in snmp.splitlines() if line.startswith("Icmp:"))
    return int(dict(zip(names, values, strict=True))["OutErrors"])


class LinuxGuest(GuestShell):
    """A booted guest with one NIC, in the network namespace of the thread that starts it.

    Args:
        argv: starts its VMM, the guest's console on standard output.
        address: its IPv4 address with prefix length.
        boot_failure_reason: why it did not boot, by what its console said; None where that does not tell.

    Raises:
        ConfigError: it cannot boot on this machine. Nothing is left of it, as below.
        PeerError: it did not boot. Nothing is left of it.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        address: str,
        boot_failure_reason: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self._address = address.partition("/")[0]
        self._process = subprocess.Popen(
            # UML's threads are processes, which outlive a killed parent: end them as one group.
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_ready(boot_failure_reason)
        except LocalmigError:
            self.close()
            raise

    def connect(self, port: int) -> socket.socket:
        """A TCP connection to one of its services. PeerLostError if it cannot be reached."""
        try:
            return socket.create_connection((self._address, port), timeout=ANSWER_SECONDS_MAX)
        except OSError as error:
            raise PeerLostError(f"guest does not answer at {self._address}: {error}") from error

    def run(self, command: str) -> str:
        """What shell `command`, run in the guest, prints. PeerLostError if it cannot be reached."""
        try:
            return super().run(command)
        except OSError as error:
            raise PeerLostError(f"guest does not answer at {self._address}: {error}") from error

    def close(self) -> None:
        """Ends it with all its processes. Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait_ready(self, boot_failure_reason: Callable[[str], str | None]) -> None:
        assert self._process.stdout is not None
        console = self._process.stdout.fileno()
        said = b""
        deadline = time.monotonic() + BOOT_SECONDS_MAX
        while READY_LINE.encode() not in said:
            left = deadline - time.monotonic()
            piece = os.read(console, 4096) if left > 0 and select.select([console], [], [], left)[0] else b""
            if not piece:
                text = said.decode(errors="replace")
                if (reason := boot_failure_reason(text)) is not None:
                    raise ConfigError(reason)
                tail = text[-500:]
                raise PeerError(f"guest did not boot within {BOOT_SECONDS_MAX:g} s, it said: {tail}")
            said += piece
