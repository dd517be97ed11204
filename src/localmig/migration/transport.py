"""From a migration address to a channel.

Owns:        connecting, listening for the one source, the path it listens on; who may be at the other end.
Never sees:  frames.
Read next:   channel.py for what travels then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from errno import EACCES, EIO, ENOTSOCK, EPERM, ETIMEDOUT
from typing import Any, Final

from localmig.access import Access, peer_process
from localmig.errors import ConfigError, KernelError, LocalmigError, PeerError, reason_of
from localmig.fds import OwnedFd, close_all
from localmig.migration.channel import Channel
from localmig.options.address import Address, FdAddress, TcpAddress, UnixAddress
from localmig.unix_socket import AcceptPace, ListeningSocket

_logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 10.0
"""A destination on this machine accepts at once; over TCP this covers three lost SYNs."""

ACCEPT_RETRY_S: Final = 1.0
"""Pause when there is no descriptor left to accept with: long enough not to spin, short for whoever waits."""

_CONNECT_RETRY_S: Final = 0.01
"""A destination takes who waits in its queue at once; it is full where somebody else connects again and again."""


def check_local(address: Address, given: OwnedFd | None = None, *, local: bool) -> None:
    """Raises ConfigError where `local` is on and the address is no UNIX socket, in QEMU's words, or no stream socket.

    Args:
        address: where a migration is to go, or to come from.
        given: the descriptor that `fd:NAME` means, lent.
        local: the parameter.
    """
    if local and not _is_unix_socket(address, given):
        raise ConfigError("local migration requires a UNIX domain socket channel")


def _is_unix_socket(address: Address, given: OwnedFd | None) -> bool:
    match address:
        case UnixAddress():
            return True
        case TcpAddress():
            return False
        case FdAddress():
            sock = _copy(address, given)
            if sock is None:
                return False
            with sock:
                if sock.family == socket.AF_UNIX:
                    _check_stream(address, sock)
                    return True
                return False


async def connect(address: Address, given: OwnedFd | None = None, *, access: Access | None = None) -> Channel:
    """Connects to a destination.

    Args:
        address: where it is.
        given: the descriptor that `fd:NAME` means; it is this function's from now on.
        access: whose process may listen at a UNIX path; None: root's and our own.

    Raises:
        ConfigError: `fd:` names no connected stream socket.
        KernelError: the connection failed; the text says what to look at.
        PeerError: the process that listens there is another user's. It was told nothing.
    """
    if isinstance(address, FdAddress):
        return Channel(_take(address, given))
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if isinstance(address, UnixAddress):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                target: Any = address.path
            else:
                family, kind, protocol, _, target = (
                    await loop.getaddrinfo(address.host or "localhost", address.port, type=socket.SOCK_STREAM)
                )[0]
                sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                if isinstance(address, UnixAddress):
                    await _connect_unix(sock, address.path)
                else:
                    await loop.sock_connect(sock, target)
                if isinstance(address, TcpAddress):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except BaseException:
                sock.close()
                raise
    except TimeoutError as error:
        raise KernelError(
            f"cannot connect to '{address}': no answer in {CONNECT_TIMEOUT_S:g} s", errno=ETIMEDOUT
        ) from error
    except OSError as error:
        advice = f"is a daemon with --incoming {address} running?"
        if error.errno in (EACCES, EPERM):
            advice = "the daemon there lets other users in by --allow-user and --socket-mode"
        raise KernelError(
            f"cannot connect to '{address}': {error.strerror}; {advice}", errno=error.errno or EIO
        ) from error
    if isinstance(address, TcpAddress):
        return Channel(sock)
    try:
        return _checked(sock, access or Access())
    except PeerError as error:
        raise PeerError(f"'{address}' is not answered by whom it should be: {error}") from error


async def _connect_unix(sock: socket.socket, path: str) -> None:
    """Connects as soon as there is room in the queue of whoever listens: the kernel tells nobody when (unix(7))."""
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_CONNECT_RETRY_S)
        else:
            return


class Listener:
    """Waits for one source. A UNIX path is removed by `close`, if it is still ours."""

    def __init__(self, address: Address, given: OwnedFd | None = None, *, access: Access | None = None) -> None:
        """Listens at once.

        Args:
            address: where.
            given: the descriptor that `fd:NAME` means; it is this object's from now on, if nothing is raised.
            access: who may connect to a UNIX path, and its mode and group; None: root and our own user, 0600.

        Raises:
            ConfigError: the path is in use by a living process, or `fd:` names no socket.
            KernelError: the kernel refused the address.
        """
        self._address = address
        self._given = given
        self._access = access or Access()
        self._unix: ListeningSocket | None = None
        self._sock: socket.socket | None = None
        match address:
            case FdAddress():
                _borrow(address, given).close()
            case UnixAddress():
                self._unix = ListeningSocket.bind(address.path, mode=self._access.mode, group=self._access.group)
                self._sock = socket.socket(fileno=os.dup(self._unix.fd.fileno()))
                self._sock.setblocking(False)
            case TcpAddress():
                try:
                    self._sock = socket.create_server((address.host or "0.0.0.0", address.port), backlog=1)
                except OSError as error:
                    raise KernelError(f"cannot listen at '{address}': {error}", errno=error.errno or EIO) from error
                self._sock.setblocking(False)

    def check_local(self, *, local: bool) -> None:
        """As the function: whether `local` may be set so while this waits."""
        check_local(self._address, self._given, local=local)

    async def accept(self) -> Channel:
        """The channel to the first source that may connect; others are turned away. Waits as long as the operator."""
        if self._sock is None:
            assert isinstance(self._address, FdAddress)
            return Channel(_take(self._address, self._given))
        pace = AcceptPace()
        while True:
            await asyncio.sleep(pace.delay_s())
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
            except OSError as error:
                _logger.warning("no source can be accepted at '%s': %s", self._address, reason_of(error))
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            pace.note()
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return Channel(sock)
            try:
                return _checked(sock, self._access)
            except LocalmigError as error:
                _logger.warning("turned away at '%s': %s", self._address, reason_of(error))

    def close(self) -> None:
        """Stops listening. Idempotent."""
        if self._sock is not None:
            self._sock.close()
        if self._unix is not None:
            self._unix.close()
        close_all((self._given,))


def _checked(sock: socket.socket, access: Access) -> Channel:
    """The channel over a UNIX socket.

    Raises:
        PeerError: another user's process is at its other end.
        KernelError: this process has no room to know who is. It is closed then, as above.
    """
    try:
        access.check(sock)
        return Channel(sock, process=peer_process(sock))
    except LocalmigError:
        sock.close()
        raise


def _borrow(address: FdAddress, given: OwnedFd | None) -> socket.socket:
    """A copy of the inherited or given stream socket, to look at."""
    sock = _copy(address, given)
    if sock is None:
        raise ConfigError(f"'{address}' is no socket: pass a connected stream socket")
    try:
        _check_stream(address, sock)
    except ConfigError:
        sock.close()
        raise
    return sock


def _check_stream(address: FdAddress, sock: socket.socket) -> None:
    if sock.type != socket.SOCK_STREAM:
        raise ConfigError(f"'{address}' is no stream socket")


def _copy(address: FdAddress, given: OwnedFd | None) -> socket.socket | None:
    """A copy of the inherited or given socket; None for a descriptor that is none."""
    number = address.number if given is None else given.fileno()
    if number is None:
        raise ConfigError(
            f"'{address}': no descriptor has this name, getfd gives it one; a number is an inherited one's"
        )
    try:
        sock = socket.socket(fileno=number)
        try:
            return sock.dup()
        finally:
            sock.detach()
    except OSError as error:
        if error.errno == ENOTSOCK:
            return None
        raise ConfigError(f"'{address}' is no open descriptor: pass it to this process when it starts") from error


def _take(address: FdAddress, given: OwnedFd | None) -> socket.socket:
    """The inherited or given socket itself; its number is free afterwards."""
    with _borrow(address, given):
        pass
    number = address.number if given is None else given.release()
    assert number is not None, address
    sock = socket.socket(fileno=number)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock
