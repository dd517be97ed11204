"""The service manager that watches this daemon's process: what it is told, so that it follows the guest to another one.

Owns:        sd_notify(3)'s datagrams and its barrier.
Never sees:  which process serves.
Read next:   daemon/daemon.py, which tells; docs/systemd.md.

A daemon that a service manager started has the manager's address in its environment. One that takes over has it from
its source, in HELLO: its own environment is that of whoever started it, and may name another manager or none. So the
address is taken out of the environment at once, and no program that a daemon starts speaks in its name.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Final, Self

from localmig.errors import PeerError
from localmig.fds import OwnedFd, send

_logger = logging.getLogger(__name__)

BARRIER_SECONDS_MAX: Final = 5.0
"""For the manager to have read what it was told: it does in microseconds, a busy machine may let it wait. Later the
daemon ends all the same, and the manager may believe that the service ended with it."""

ADDRESS_LENGTH_MAX: Final = 107
"""Bytes of a UNIX socket's address besides the NUL behind it, unix(7)."""

STATUS_LENGTH_MAX: Final = 512
"""Characters of a status: one line for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceManager:
    """Where a service manager listens.

    Attributes:
        address: its socket: a path, or a name behind '@' (NOTIFY_SOCKET of sd_notify(3)).
    """

    address: str

    @classmethod
    def take_from(cls, environment: MutableMapping[str, str]) -> Self | None:
        """The manager that `environment` tells of, which tells of none any more; None where it told of none.

        One that cannot be spoken to (a vsock address) is none: the log says so.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        if not address:
            return None
        try:
            return cls.checked(address)
        except PeerError as error:
            _logger.warning("NOTIFY_SOCKET: %s: nobody is told which process serves", error)
            return None

    @classmethod
    def checked(cls, address: object) -> Self:
        """The manager at an address that another process told. PeerError where it can be none."""
        if not isinstance(address, str) or address[:1] not in ("/", "@") or "\0" in address:
            raise PeerError(f"a service manager's address is a path or a name behind '@', not {str(address)[:64]!r}")
        if len(os.fsencode(address)) > ADDRESS_LENGTH_MAX:
            raise PeerError(
                f"a service manager's address has {len(os.fsencode(address))} bytes, limit is {ADDRESS_LENGTH_MAX}"
            )
        return cls(address=address)

    def tell_ready(self, status: str) -> None:
        """This process serves, or waits for what it was started for."""
        self._tell(f"READY=1\nSTATUS={_line(status)}")

    def tell_status(self, status: str) -> None:
        """What people are shown of the service."""
        self._tell(f"STATUS={_line(status)}")

    def tell_main_process(self, pid: int) -> None:
        """The process that serves is `pid` from now on. What it does, it tells itself."""
        self._tell(f"MAINPID={pid}")

    def tell_stopping(self) -> None:
        """This process ends, and the service with it."""
        self._tell("STOPPING=1")

    async def wait_heard(self) -> bool:
        """Waits until the manager has read all that this process told it; whether it did in time.

        It closes the pipe that comes with BARRIER=1 once it has read all that was told before.
        """
        reader, writer = (OwnedFd(fd) for fd in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        with reader:
            with writer:
                if not self._tell("BARRIER=1", writer.fileno()):
                    return False
            loop = asyncio.get_running_loop()
            closed: asyncio.Future[None] = loop.create_future()
            loop.add_reader(reader.fileno(), lambda: None if closed.done() else closed.set_result(None))
            try:
                async with asyncio.timeout(BARRIER_SECONDS_MAX):
                    await closed
            except TimeoutError:
                _logger.warning("the service manager did not answer in %g s", BARRIER_SECONDS_MAX)
                return False
            finally:
                loop.remove_reader(reader.fileno())
        return True

    def _tell(self, text: str, *fds: int) -> bool:
        """Sends one datagram; whether that was possible. The guest is served whatever a service manager does."""
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
                sock.connect(address)
                send(sock, text.encode(errors="replace"), fds)
        except OSError as error:
            # A full queue of a manager that hangs is no reason to wait for it.
            _logger.warning(
                "the service manager at '%s' is not told %s: %s",
                self.address,
                text.partition("\n")[0],
                error.strerror or errno.errorcode.get(error.errno or 0, error),
            )
            return False
        return True


def _line(text: str) -> str:
    return " ".join(text.split())[:STATUS_LENGTH_MAX]
