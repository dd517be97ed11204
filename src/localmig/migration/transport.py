"""From a migration address to a channel.

Owns:        connecting, listening for the one source, the path it listens on; who may connect.
Never sees:  frames.
Read next:   channel.py for what travels then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any, Final

from localmig.errors import ConfigError, KernelError, PeerError
from localmig.migration.channel import Channel
from localmig.options.address import Address, FdAddress, TcpAddress, UnixAddress

CONNECT_TIMEOUT_S: Final = 10.0
"""A destination on this machine accepts at once; over TCP this covers three lost SYNs."""

_UCRED: Final = struct.Struct("3i")


def check_local(address: Address, *, local: bool) -> None:
    """Raises ConfigError where `local` is on and the address cannot carry descriptors."""
    if not local:
        return
    if isinstance(address, TcpAddress):
        raise ConfigError(
            f"parameter 'local' is on, but '{address}' cannot carry descriptors: use unix:PATH, or set local to false"
        )
    if isinstance(address, FdAddress):
        with _borrow(address) as sock:
            if sock.family != socket.AF_UNIX:
                raise ConfigError(
                    f"parameter 'local' is on, but '{address}' is no UNIX socket and cannot carry descriptors: "
                    "pass a UNIX stream socket, or set local to false"
                )


async def connect(address: Address) -> Channel:
    """Connects to a destination.

    Raises:
        ConfigError: `fd:` names no connected stream socket.
        KernelError: the connection failed; the text says what to look at.
    """
    if isinstance(address, FdAddress):
        return Channel(_inherited(address))
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
                await loop.sock_connect(sock, target)
                if isinstance(address, TcpAddress):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except BaseException:
                sock.close()
                raise
    except TimeoutError as error:
        raise KernelError(f"cannot connect to '{address}': no answer in {CONNECT_TIMEOUT_S:g} s", errno=110) from error
    except OSError as error:
        raise KernelError(
            f"cannot connect to '{address}': {error.strerror}; is a daemon with --incoming {address} running?",
            errno=error.errno or 0,
        ) from error
    return Channel(sock)


class Listener:
    """Waits for one source. A UNIX path is made with mode 0600 and removed by `close`, if it is still ours."""

    def __init__(self, address: Address) -> None:
        """Listens at once.

        Raises:
            ConfigError: the path is in use by a living process, or `fd:` names no socket.
            KernelError: the kernel refused the address.
        """
        self._address = address
        self._sock: socket.socket | None = None
        self._inode: tuple[int, int] | None = None
        if isinstance(address, FdAddress):
            with _borrow(address):
                return
        try:
            if isinstance(address, UnixAddress):
                self._sock, self._inode = _listen_unix(address.path)
            else:
                self._sock = socket.create_server((address.host or "0.0.0.0", address.port), backlog=1)
        except OSError as error:
            raise KernelError(f"cannot listen on '{address}': {error.strerror}", errno=error.errno or 0) from error
        self._sock.setblocking(False)

    async def accept(self) -> Channel:
        """The channel to the first source that may connect. Waits as long as the operator does.

        Raises:
            PeerError: a process of another user connected; it was turned away.
        """
        if self._sock is None:
            assert isinstance(self._address, FdAddress)
            return Channel(_inherited(self._address))
        sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        if sock.family == socket.AF_UNIX:
            _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if uid not in (0, os.geteuid()):
                sock.close()
                raise PeerError(
                    f"a process of uid {uid} connected, this daemon serves uid {os.geteuid()} and root only"
                )
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Channel(sock)

    def close(self) -> None:
        """Stops listening. Idempotent."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._inode is not None and isinstance(self._address, UnixAddress):
            path = Path(self._address.path)
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if (found.st_dev, found.st_ino) == self._inode:
                    path.unlink()
            self._inode = None


def _listen_unix(path: str) -> tuple[socket.socket, tuple[int, int]]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket():
            _remove_stale(path)
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(1)
        status = Path(path).stat()
    except BaseException:
        sock.close()
        raise
    return sock, (status.st_dev, status.st_ino)


def _remove_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass
    raise ConfigError(f"'{path}' is in use by a living process: choose another path, or end that process")


def _borrow(address: FdAddress) -> socket.socket:
    """A copy of the inherited socket, to look at."""
    if address.number is None:
        raise ConfigError(f"'{address}': descriptors have no names here, give the number of an inherited socket")
    try:
        if not stat.S_ISSOCK(os.fstat(address.number).st_mode):
            raise ConfigError(f"'{address}' is no socket: pass a connected stream socket")
        sock = socket.socket(fileno=os.dup(address.number))
    except OSError as error:
        raise ConfigError(f"'{address}' is no open descriptor: pass it to this process when it starts") from error
    if sock.type != socket.SOCK_STREAM:
        sock.close()
        raise ConfigError(f"'{address}' is no stream socket")
    return sock


def _inherited(address: FdAddress) -> socket.socket:
    """The inherited socket itself; its number is free afterwards."""
    with _borrow(address):
        pass
    assert address.number is not None
    sock = socket.socket(fileno=address.number)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock
