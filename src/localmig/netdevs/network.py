"""A network namespace as netdevs see it: a netlink socket that asks about interfaces, sets them, and hears of changes.

Owns:        the sockets; who is to look at its interface, and when.
Never sees:  a TAP; a message's bytes.
Read next:   tap.py, whose `look` is called; rtnetlink.py for the messages.

An event may be late, may be lost, or may be one of an interface that has the same name as ours. So nothing is taken
from it but the hint: the netdev asks the kernel by its descriptor and the interface's number, and what it hears then
counts.

The socket belongs to the namespace in which it was made, and moves with the TAPs whose interfaces it tells of. So they
are seen also by a daemon that takes over from another network namespace. Before COMMIT it is the source's alone: one
that asks reads what the other was told.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Final, Protocol

from localmig.errors import KernelError
from localmig.fds import OwnedFd
from localmig.netdevs import rtnetlink
from localmig.netdevs.rtnetlink import DATAGRAM_SIZE_MAX, RTM_DELLINK, RTM_NEWLINK, Link, Message

_logger = logging.getLogger(__name__)

_RTMGRP_LINK: Final = 1
"""The group of events about interfaces (linux/rtnetlink.h)."""

_RECEIVE_BUFFER_SIZE: Final = 1 << 20
"""Bytes of events that may wait: those of some five hundred interfaces, which a host with that many guests makes at
once. Where it is too small, every netdev looks."""

DATAGRAMS_AT_ONCE: Final = 64
"""Events read before the event loop goes on to others: a host that makes interfaces by the thousand delays nobody."""

ATTEMPTS_MAX: Final = 2
"""How often a question is asked: where the socket was full of events the answer is lost, and reading them made room."""

LOOKS_AT_ONCE: Final = 16
"""Netdevs that look before the event loop goes on: each asks the kernel two or three times, some 0.1 ms together."""

LOOK_AGAIN_S: Final = 1.0
"""How soon a netdev looks again that is in want of something nobody tells of: another process closing the TAP."""


class Watcher(Protocol):
    """A netdev whose interface is in a network, or was, or may come there."""

    @property
    def ifindexes(self) -> tuple[int, ...]:
        """Numbers of the interfaces whose changes matter to it."""

    @property
    def awaited_name(self) -> str | None:
        """What the interface is called that would be this netdev's if it came up here, None where none would."""

    @property
    def moves(self) -> bool:
        """Whether its descriptors move in a local migration, and with those of the first one the network's socket."""

    def look(self) -> bool:
        """Asks the kernel what became of the interface. True: this is to be called again in a while."""


class Network:
    """One network namespace. All its methods belong to the event loop's thread.

    Attributes:
        namespace: what tells it from other network namespaces that exist.
        fd: its netlink socket, lent.
        is_the_sources: whether another process has the socket too, and only that one may use it. So it is from arrival
            until somebody watches here.
        users: the netdevs that need it, in the order in which they came.
    """

    def __init__(self, fd: OwnedFd, namespace: int, *, is_the_sources: bool) -> None:
        self.namespace = namespace
        self.fd = fd
        self.is_the_sources = is_the_sources
        # Nothing is set or asked by that.
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE, fileno=fd.fileno())
        self.users: dict[Watcher, None] = {}
        self._watching: dict[Watcher, None] = {}
        self._due: dict[Watcher, None] = {}
        self._later: dict[Watcher, asyncio.TimerHandle] = {}
        self._next_look: asyncio.Handle | None = None
        self._changed_indexes: set[int] = set()
        self._changed_names: set[str] = set()
        # Another process may have died between a question and its answer, which waits still.
        self._sequence = secrets.randbelow(1 << 31)

    # -- asking and setting --------------------------------------------------------------------------------

    def link(self, *, ifindex: int = 0, name: str = "") -> Link | None:
        """The interface of that number, or of that name where no number is given; None where there is none.

        Raises:
            OSError: the kernel does not say.
        """
        try:
            answer = self._exchange(rtnetlink.ask_link(self._next_sequence(), ifindex=ifindex, name=name))
            return rtnetlink.decode_link(answer.payload)
        except ValueError as error:
            raise OSError(errno.EBADMSG, f"the kernel describes an interface that cannot be: {error}") from error
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    def set_mtu(self, ifindex: int, mtu: int) -> None:
        """Gives an interface an MTU of `mtu` bytes. OSError where the kernel refuses, as for all that follows."""
        self._exchange(rtnetlink.set_mtu(self._next_sequence(), ifindex, mtu))

    def bring_up(self, ifindex: int) -> None:
        """Brings an interface up."""
        self._exchange(rtnetlink.bring_up(self._next_sequence(), ifindex))

    def bring_down(self, ifindex: int) -> None:
        """Brings an interface down."""
        self._exchange(rtnetlink.bring_down(self._next_sequence(), ifindex))

    def set_master(self, ifindex: int, master: int) -> None:
        """Makes an interface a port of the bridge `master`, and of no other."""
        self._exchange(rtnetlink.set_master(self._next_sequence(), ifindex, master))

    def take_all_multicast(self, ifindex: int) -> None:
        """Has an interface take in frames to every group."""
        self._exchange(rtnetlink.take_all_multicast(self._next_sequence(), ifindex))

    def add_macvtap(self, name: str, lower: int, mode: str) -> None:
        """Makes a macvtap on the device `lower`, in one of `rtnetlink.MACVTAP_MODES`."""
        self._exchange(rtnetlink.add_macvtap(self._next_sequence(), name, lower, mode))

    def remove(self, ifindex: int) -> None:
        """Deletes an interface."""
        self._exchange(rtnetlink.remove(self._next_sequence(), ifindex))

    def _next_sequence(self) -> int:
        self._sequence = self._sequence % 0xFFFFFFFF + 1  # 0 is an event's
        return self._sequence

    def _exchange(self, request: bytes) -> Message:
        """Sends a request; its answer. Raises OSError, also as the kernel answers one."""
        assert not self.is_the_sources, self.namespace
        for _ in range(ATTEMPTS_MAX):
            self._socket.send(request, socket.MSG_DONTWAIT)
            # The kernel has answered when send(2) returns: nothing is waited for.
            while (datagram := self._receive()) is not None:
                for message in rtnetlink.messages(datagram):
                    if message.sequence == self._sequence:
                        if message.error:
                            raise OSError(message.error, os.strerror(message.error))
                        return message
                self._hear(datagram)
        raise OSError(errno.ENOBUFS, "the kernel does not answer")

    def _receive(self) -> bytes | None:
        """The next datagram, None where there is none."""
        try:
            # One that arrived may be set to block.
            return self._socket.recv(DATAGRAM_SIZE_MAX, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            # Events were lost, and the socket goes on.
            for watcher in self._watching:
                self.look_soon(watcher)
            return b""

    # -- changes -------------------------------------------------------------------------------------------

    def watch(self, watcher: Watcher) -> None:
        """Has `watcher` look soon, and at each change, until it unwatches. Idempotent."""
        self.is_the_sources = False
        if not self._watching:
            asyncio.get_running_loop().add_reader(self.fd.fileno(), self._read)
        if watcher not in self._watching:
            self._watching[watcher] = None
            self.look_soon(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Leaves `watcher` alone from now on. Idempotent."""
        if watcher not in self._watching:
            return
        del self._watching[watcher]
        self._due.pop(watcher, None)
        if (timer := self._later.pop(watcher, None)) is not None:
            timer.cancel()
        if not self._watching:
            asyncio.get_running_loop().remove_reader(self.fd.fileno())

    def look_soon(self, watcher: Watcher) -> None:
        """Has `watcher` look in the event loop's next round. Nothing where it does not watch."""
        if watcher not in self._watching:
            return
        self._due[watcher] = None
        self._schedule()

    def leave(self, user: Watcher) -> None:
        """A netdev needs it no more; the last one closes this process's socket."""
        self.unwatch(user)
        self.users.pop(user, None)
        if not self.users:
            self._socket.detach()
            self.fd.close()

    def _schedule(self) -> None:
        if self._watching and self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        for watcher in self._watching if self._changed_indexes else ():
            if not self._changed_indexes.isdisjoint(watcher.ifindexes) or watcher.awaited_name in self._changed_names:
                self._due[watcher] = None
        self._changed_indexes.clear()
        self._changed_names.clear()
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        if len(self._due) > LOOKS_AT_ONCE:
            self._schedule()
        for watcher in list(self._due)[:LOOKS_AT_ONCE]:
            if watcher not in self._due:
                continue  # it left because of what another one saw
            del self._due[watcher]
            if (timer := self._later.pop(watcher, None)) is not None:
                timer.cancel()
            if watcher.look() and watcher in self._watching:
                later = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self.look_soon, watcher)
                self._later[watcher] = later

    def _read(self) -> None:
        try:
            for _ in range(DATAGRAMS_AT_ONCE):
                if (datagram := self._receive()) is None:
                    break
                self._hear(datagram)
        except OSError as error:
            _logger.warning("cannot read what became of interfaces: %s", error.strerror)
        # At once, for a frontend may ask in this very round what an operator has just set.
        self._look()

    def _hear(self, datagram: bytes) -> None:
        """Notes which interfaces the events in `datagram` are about: who is to look is found out for many at once."""
        for message in rtnetlink.messages(datagram):
            if message.kind in (RTM_NEWLINK, RTM_DELLINK):
                ifindex, name = rtnetlink.changed_link(message.payload)
                self._changed_indexes.add(ifindex)
                self._changed_names.add(name)
        self._schedule()


class Networks:
    """The network namespaces that a daemon's netdevs are in: one `Network` for each.

    Where one of several TAPs stays home in a handover there are two from then on: the first socket was the source's.
    """

    def __init__(self) -> None:
        self._known: list[Network] = []

    def here(self, user: Watcher) -> Network:
        """This thread's own, for a netdev that leaves it in the end.

        Raises:
            KernelError: the kernel gives no socket.
        """
        try:
            namespace = namespace_here()
            ours = (network for network in self._all_of(namespace) if not network.is_the_sources)
            network = next(ours, None) or Network(_open_socket(), namespace, is_the_sources=False)
        except OSError as error:
            raise KernelError(f"cannot watch interfaces: {error.strerror}", errno=error.errno or 0) from error
        return self._use(network, user)

    def adopt(self, fd: OwnedFd | None, namespace: int, user: Watcher) -> Network | None:
        """The one that an arrived socket, or one that arrived before, tells of. It is not touched; `fd` is empty after.

        None where there is neither.
        """
        network = next(iter(self._all_of(namespace)), None)
        if network is None and fd is not None:
            network = Network(fd.take(), namespace, is_the_sources=True)
        elif fd is not None:
            fd.close()
        return None if network is None else self._use(network, user)

    def _all_of(self, namespace: int) -> list[Network]:
        self._known = [network for network in self._known if network.fd.is_open]
        return [network for network in self._known if network.namespace == namespace]

    def _use(self, network: Network, user: Watcher) -> Network:
        if network not in self._known:
            self._known.append(network)
        network.users[user] = None
        return network


def namespace_here() -> int:
    """The number of this thread's network namespace. OSError where /proc does not say."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


def _open_socket() -> OwnedFd:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_SIZE)
        sock.bind((0, _RTMGRP_LINK))
        return OwnedFd(sock.detach())
