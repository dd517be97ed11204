"""A daemon as seen through its QMP socket, by the `qemu.qmp` package.

Owns:        one connection, and which process is at its other end.
Never sees:  what commands mean.
Read next:   upgrade.py, its main user.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from qemu.qmp import ExecuteError, QMPClient, QMPError, Runstate

from localmig.access import peer_credentials
from localmig.errors import ConfigError, KernelError, PeerError, PeerLostError
from localmig.unix_socket import check_path

ANSWER_TIMEOUT_S: Final = 10.0
"""For connecting, and for one answer. No command of localmig waits for anything; a loaded machine may."""


class CommandError(PeerError):
    """The daemon answered with an error.

    Attributes:
        error_class: QMP's class of it.
    """

    def __init__(self, text: str, *, error_class: str) -> None:
        super().__init__(text)
        self.error_class = error_class


class Client:
    """One connection to a daemon.

    Attributes:
        name: what errors call it.
        path: where it answered.
        pid: its process.
        uid: its user.
    """

    def __init__(self, path: str, connection: socket.socket, qmp: QMPClient, *, kind: str) -> None:
        self.path = path
        self.pid, self.uid = peer_credentials(connection)
        self.name = f"{kind} {self.pid}"
        self._qmp = qmp

    @property
    def is_connected(self) -> bool:
        """Whether the daemon can be asked."""
        return self._qmp.runstate is Runstate.RUNNING

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What the daemon answers to `command`.

        Raises:
            CommandError: it answers with an error.
            PeerLostError: it does not answer any more.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._qmp.execute(command, arguments)
        except ExecuteError as error:
            raise CommandError(str(error), error_class=error.error_class) from error
        except TimeoutError as error:
            raise PeerLostError(f"{self.name} did not answer '{command}' in {ANSWER_TIMEOUT_S:g} s") from error
        except (QMPError, OSError) as error:
            raise PeerLostError(f"{self.name} does not answer '{command}': connection lost") from error

    async def next_event(self, *, timeout_s: float) -> Mapping[str, Any] | None:
        """The next event, None where none came in time.

        Raises:
            PeerLostError: the connection ended, and no event is left.
        """
        events = self._qmp.events
        if events.empty() and not self.is_connected:
            raise PeerLostError(f"{self.name} closed the connection")
        event = asyncio.ensure_future(events.get())
        ended = asyncio.ensure_future(self._qmp.runstate_changed())
        try:
            await asyncio.wait((event, ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            return event.result() if event.done() else None
        finally:
            event.cancel()
            ended.cancel()

    async def close(self) -> None:
        """Ends the connection. Idempotent."""
        # How it ended before is known by now, or does not matter.
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._qmp.disconnect()


async def connect(path: str, *, kind: str = "daemon") -> Client:
    """Connects to the daemon that answers at `path`.

    Args:
        path: its QMP socket.
        kind: what errors call such a program; a VMM speaks QMP as well.

    Raises:
        ConfigError: there is none.
        KernelError: this user may not connect there.
        PeerError: whatever answers does not speak QMP, or does not answer.
    """
    check_path(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await asyncio.get_running_loop().sock_connect(connection, path)
            qmp = QMPClient()
            await qmp.connect(connection)
        return Client(path, connection, qmp, kind=kind)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        connection.close()
        raise ConfigError(f"no {kind} answers at '{path}': {error.strerror}") from error
    except TimeoutError as error:
        connection.close()
        raise PeerError(f"'{path}' did not answer in {ANSWER_TIMEOUT_S:g} s") from error
    except OSError as error:
        connection.close()
        advice = ""
        if isinstance(error, PermissionError):
            advice = "; be root or the daemon's user, which lets others in by --allow-user and --socket-mode"
        number = error.errno or errno.EIO
        raise KernelError(f"cannot connect to '{path}': {error.strerror}{advice}", errno=number) from error
    except QMPError as error:
        connection.close()
        raise PeerError(f"what answers at '{path}' does not speak QMP: {error}") from error


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[Client]:
    """`connect`, closed at the end."""
    client = await connect(path)
    try:
        yield client
    finally:
        await client.close()
