"""Hears when an interface of this process's network namespace changes, and has its netdev look.

Owns:        one netlink socket for all netdevs of a daemon; who is to look, and when.
Never sees:  what an interface looks like: an event is only a reason to ask the kernel.
Read next:   tap.py, whose `look` is called; rtnetlink.py for the messages.

An event may be late, may be lost, or may be one of an interface that has the same name as ours. So nothing is taken
from it but the hint: the netdev asks the kernel by its descriptor and the interface's number, and what it hears then
counts.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Final, Protocol

from localmig.errors import KernelError
from localmig.netdev.rtnetlink import ANSWER_SIZE_MAX, RTM_DELLINK, RTM_NEWLINK, changed_link, messages

_logger = logging.getLogger(__name__)

_RTMGRP_LINK: Final = 1
"""The group of events about interfaces (linux/rtnetlink.h)."""

_RECEIVE_BUFFER_SIZE: Final = 1 << 20
"""Bytes of events that may wait: those of some five hundred interfaces, which a host with that many guests makes at
once. Where it is too small, every netdev looks."""

DATAGRAMS_AT_ONCE: Final = 64
"""Events read before the event loop goes on to others: a host that makes interfaces by the thousand delays nobody."""

LOOKS_AT_ONCE: Final = 16
"""Netdevs that look before the event loop goes on: each asks the kernel two or three times, some 0.1 ms together."""

LOOK_AGAIN_S: Final = 1.0
"""How soon a netdev looks again that is in want of something nobody tells of: another process closing the TAP."""


class Watcher(Protocol):
    """A netdev whose interface is watched."""

    @property
    def ifindex(self) -> int:
        """Its interface's number, 0 where it has none here."""

    @property
    def awaited_name(self) -> str:
        """What the interface is called that would be this netdev's if it came up here, "" where none would."""

    def look(self) -> bool:
        """Asks the kernel what became of the interface. True: this is to be called again in a while."""


class LinkWatch:
    """The interfaces of this process's network namespace, for those netdevs that have joined.

    A netdev joins when it begins to serve, and leaves before another process does. All belongs to the event loop.
    """

    def __init__(self) -> None:
        self._watchers: dict[Watcher, None] = {}
        self._due: dict[Watcher, None] = {}
        self._later: dict[Watcher, asyncio.TimerHandle] = {}
        self._next_look: asyncio.Handle | None = None
        self._socket: socket.socket | None = None

    def join(self, watcher: Watcher) -> None:
        """Has `watcher` look soon, and at each change until it leaves. Idempotent.

        Raises:
            KernelError: the kernel gives no socket. `watcher` has not joined.
        """
        if self._socket is None:
            self._socket = _open_socket()
            asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read)
        if watcher not in self._watchers:
            self._watchers[watcher] = None
            self.look_soon(watcher)

    def leave(self, watcher: Watcher) -> None:
        """Leaves `watcher` alone from now on. Idempotent."""
        self._watchers.pop(watcher, None)
        self._due.pop(watcher, None)
        if (timer := self._later.pop(watcher, None)) is not None:
            timer.cancel()
        if not self._watchers and self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def look_soon(self, watcher: Watcher) -> None:
        """Has `watcher` look in the event loop's next round. Nothing where it has not joined."""
        if watcher not in self._watchers:
            return
        self._due[watcher] = None
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        for watcher in list(self._due)[:LOOKS_AT_ONCE]:
            if watcher not in self._due:
                continue  # it left because of what another one saw
            del self._due[watcher]
            if (timer := self._later.pop(watcher, None)) is not None:
                timer.cancel()
            if watcher.look() and watcher in self._watchers:
                later = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self.look_soon, watcher)
                self._later[watcher] = later
        if self._due:
            self.look_soon(next(iter(self._due)))

    def _read(self) -> None:
        assert self._socket is not None
        indexes: set[int] = set()
        names: set[str] = set()
        for _ in range(DATAGRAMS_AT_ONCE):
            try:
                data = self._socket.recv(ANSWER_SIZE_MAX)
            except BlockingIOError:
                break
            except OSError as error:
                # ENOBUFS: events were lost, and the socket goes on. Whatever else it is, only looking helps.
                if error.errno != errno.ENOBUFS:
                    _logger.warning("cannot read what became of interfaces: %s", error.strerror)
                for watcher in self._watchers:
                    self.look_soon(watcher)
                return
            for kind, payload in messages(data):
                if kind in (RTM_NEWLINK, RTM_DELLINK):
                    ifindex, name = changed_link(payload)
                    indexes.add(ifindex)
                    names.add(name)
        for watcher in self._watchers:
            if (watcher.ifindex or -1) in indexes or (watcher.awaited_name and watcher.awaited_name in names):
                self.look_soon(watcher)
        # At once, for a frontend may ask in this very round what an operator has just set.
        self._look()


def _open_socket() -> socket.socket:
    try:
        sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_SIZE)
            sock.bind((0, _RTMGRP_LINK))
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise KernelError(f"cannot watch interfaces: {error.strerror}", errno=error.errno or 0) from error
    return sock
