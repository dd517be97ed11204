"""The QMP server: clients on one UNIX socket, each of which can hurt only itself.

Owns:        the clients' connections, who may connect, how much may wait for a slow one.
Never sees:  what a command does, JSON.
Read next:   connection.py for a client's socket, protocol.py for its conversation, unix_socket.py for the socket file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final

from localmig import trace
from localmig.access import peer_credentials
from localmig.daemon import Daemon, RunState
from localmig.errors import KernelError, LocalmigError, PeerError, PeerLostError, StateError, reason_of
from localmig.migration.hello import program_version
from localmig.monitor.commands import COMMANDS
from localmig.monitor.connection import Connection
from localmig.monitor.events import EventSource
from localmig.monitor.protocol import Event, Session, greeting
from localmig.monitor.schema import Command
from localmig.unix_socket import AcceptPace, ListeningSocket, is_listening

__all__ = ["QmpServer"]

CLIENT_COUNT_MAX: Final = 32
"""Clients at once. A management layer uses two or three; descriptors of the daemon are for guests."""

OUTPUT_BYTES_MAX: Final = 8 * 1024 * 1024
"""What may wait for a client that does not read: hours of a busy daemon's events. A client may also be slow, and the
answer about hundreds of NICs with many queues each has some megabytes."""

ACCEPT_RETRY_S: Final = 1.0
"""Pause when there is no descriptor left to accept with: long enough not to spin, short for whoever waits."""

UNDISTURBED_TIMEOUT_S: Final = 0.05
"""How long commands wait while a guest changes hands: that takes a millisecond, and to tell of hundreds of NICs forty.
Where it takes longer something hangs, and the operator must be heard."""

FLUSH_TIMEOUT_S: Final = 1.0
"""How long the end of the daemon waits for clients to read the last answers and SHUTDOWN."""

_log = logging.getLogger(__name__)


class QmpServer:
    """Answers QMP for `daemon` at `path`.

    Constructing it takes the address, and should come before the daemon opens anything; clients may connect from then
    on and are answered after `start`.

    Args:
        daemon: who carries out the commands.
        path: where to answer.
        succeeds: whether the daemon waits for a migration, perhaps from the one that answers at `path` now. Then it
            answers at `path` + INCOMING_SUFFIX, and at `path` as soon as it has the guest.

    Raises:
        ConfigError: somebody else answers at `path`. Nothing changed.
        KernelError: no socket can be made there. Nothing changed.
    """

    def __init__(self, daemon: Daemon, path: str, *, succeeds: bool) -> None:
        self._daemon = daemon
        is_successor = succeeds and is_listening(path)
        bind = ListeningSocket.bind_beside if is_successor else ListeningSocket.bind
        self._listening = bind(path, mode=daemon.access.mode, group=daemon.access.group)
        self._event_source = EventSource(daemon.run_state)
        self._events: list[Event] = []
        self._clients: dict[Connection, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] = daemon.tracer.subscribe(self._on_fact)

    @property
    def path(self) -> str:
        """Where clients reach this daemon now."""
        return self._listening.bound_path

    async def start(self) -> None:
        """Begins to answer."""
        self._accepting = asyncio.create_task(self._accept(), name="qmp")

    async def close(self, *, reason: str) -> None:
        """Tells clients SHUTDOWN, gives them a moment to read it, and removes the socket. Idempotent.

        Args:
            reason: QEMU's ShutdownCause, `host-qmp-quit` for one.
        """
        self._unsubscribe()
        self._unsubscribe = _nothing
        # The event loop lets go of the socket before it is closed.
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait((self._accepting,))
        self._listening.close()
        self._send_events()
        self._broadcast(Event(name="SHUTDOWN", data={"guest": False, "reason": reason}, at_s=time.time()))
        for connection in self._clients:
            connection.close()
        if self._tasks:
            _, slow = await asyncio.wait(self._tasks, timeout=FLUSH_TIMEOUT_S)
            for connection in self._clients:
                connection.abort()
            if slow:
                await asyncio.wait(slow)

    async def _accept(self) -> None:
        """Every client that comes is served by a task of its own."""
        with socket.socket(fileno=os.dup(self._listening.fd.fileno())) as sock:
            pace = AcceptPace()
            while True:
                await asyncio.sleep(pace.delay_s())
                try:
                    client, _ = await asyncio.get_running_loop().sock_accept(sock)
                except OSError as error:
                    _log.warning("no QMP client can be accepted: %s", reason_of(error))
                    await asyncio.sleep(ACCEPT_RETRY_S)
                    continue
                pace.note()
                task = asyncio.create_task(self._serve(Connection(client)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: Connection) -> None:
        """One client, from its connection to its end."""
        try:
            self._admit(connection)
            await self._converse(connection)
        except PeerLostError as error:
            _log.debug("QMP client lost: %s", error)
        except (PeerError, KernelError, OSError) as error:
            _log.warning("QMP client dropped: %s", error)
        finally:
            # What it was told is still written, and until then it counts.
            await connection.finish()
            session = self._clients.pop(connection, None)
            if session is not None:
                session.close()
            self._end_if_unreachable()

    def _admit(self, connection: Connection) -> None:
        """Raises PeerError where this client may not, or one more may not, be served."""
        self._daemon.access.check(connection.socket)
        if len(self._clients) >= CLIENT_COUNT_MAX:
            pid, _ = peer_credentials(connection.socket)
            raise PeerError(f"process {pid} is one too many, limit is {CLIENT_COUNT_MAX} clients")

    async def _converse(self, connection: Connection) -> None:
        session = Session(COMMANDS, self._execute)
        self._clients[connection] = session
        connection.write(greeting(program_version()))
        while True:
            data, fds = await connection.read()
            if not data:
                return
            answers = session.receive(data, fds)
            while not connection.is_closing:
                if self._daemon.tracer.is_held:
                    await self._wait_undisturbed()
                # What happened before a command is not for a client that negotiates by this very command.
                self._send_events()
                answer = next(answers, None)
                if answer is None:
                    break
                # What a command brought about is told before its answer, as QEMU does.
                self._send_events()
                connection.write(answer)
                # Nothing more is done for a client until it takes its answers,
                await connection.drain()
                # and everybody else gets a turn between two of its commands.
                await asyncio.sleep(0)

    def _execute(self, command: Command, arguments: Mapping[str, object]) -> object:
        try:
            return command.run(self._daemon, **arguments)
        except LocalmigError:
            raise
        except Exception as error:  # a bug in one command must not end the daemon, nor this client
            _log.exception("QMP command %s failed", command.name)
            raise StateError(f"internal error in {command.name}: {error!r}") from error

    def _on_fact(self, fact: trace.Event) -> None:
        if isinstance(fact, trace.RunStateChanged) and fact.state in (RunState.RUNNING, RunState.PAUSED):
            # Before anybody hears of it: who hears RESUME finds this daemon at the path.
            self._claim()
        if isinstance(fact, trace.RunStateChanged) and fact.state is RunState.POSTMIGRATE:
            asyncio.get_running_loop().call_soon(self._end_if_unreachable)
        event = self._event_source.translate(fact, at_s=time.time(), migration_events=self._daemon.parameters.events)
        if event is not None:
            if not self._events:
                # Not here: this may be inside the downtime, where every microsecond is the guest's.
                asyncio.get_running_loop().call_soon(self._send_events)
            self._events.append(event)

    async def _wait_undisturbed(self) -> None:
        """Waits until a guest that changes hands runs again, if that is soon."""
        released = asyncio.Event()
        self._daemon.tracer.on_release(released.set)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(UNDISTURBED_TIMEOUT_S):
                await released.wait()

    def _send_events(self) -> None:
        for event in self._events:
            self._broadcast(event)
        self._events.clear()

    def _claim(self) -> None:
        try:
            self._listening.claim()
        except KernelError as error:
            _log.error("QMP stays where it is: %s", error)

    def _end_if_unreachable(self) -> None:
        """Ends a daemon that serves nothing and that nobody can ask any more, because its successor has its path.

        The program that drove the handover may have been killed before it could.
        """
        if self._daemon.has_handed_over and not self._clients and self._listening.is_displaced:
            _log.info("another daemon has the guest and '%s', and the last client left", self._listening.path)
            self._daemon.quit()

    def _broadcast(self, event: Event) -> None:
        for connection, session in list(self._clients.items()):
            if connection.waiting_bytes > OUTPUT_BYTES_MAX:
                _log.warning("QMP client dropped: it does not read, %d bytes wait for it", OUTPUT_BYTES_MAX)
                connection.abort()
            elif not connection.is_closing and (message := session.event(event)):
                connection.write(message)


def _nothing() -> None:
    """What is left to unsubscribe after the end."""
