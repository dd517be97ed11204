"""Descriptors are believed for what they are: each of the wrong kind is named, and none is touched or lost."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.compat import nic
from tests.kit.cases import each_case
from tests.protocol.test_stream_descriptors import no_descriptor_is_left

from localmig.device_api.device_state import DEVICE, SocketState
from localmig.errors import PeerError
from localmig.fd_kind import FdKind, describe_fd, is_of_kind
from localmig.fds import OwnedFd, close_all
from localmig.netdevs.state import TAP
from localmig.vmstate import Description, check_descriptors, fd


def new_socket(family: int = socket.AF_UNIX, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> OwnedFd:
    return OwnedFd(socket.socket(family, kind, protocol).detach())


def listening(family: int = socket.AF_UNIX) -> OwnedFd:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        # An empty name: the kernel chooses an abstract one, or a port of loopback.
        sock.bind("" if family == socket.AF_UNIX else ("127.0.0.1", 0))
        sock.listen()
        return OwnedFd(sock.detach())


def new_file() -> OwnedFd:
    number, path = tempfile.mkstemp(dir="/var/tmp")
    Path(path).unlink()
    return OwnedFd(number)


def new_pipe() -> OwnedFd:
    reader, writer = os.pipe()
    os.close(writer)
    return OwnedFd(reader)


NETLINK_KOBJECT_UEVENT: Final = 15
"""linux/netlink.h."""

MAKERS: Final[dict[str, Callable[[], OwnedFd]]] = {
    "tap": lambda: OwnedFd(os.open("/dev/net/tun", os.O_RDWR)),
    "socket": new_socket,
    "listening-socket": listening,
    "netlink": lambda: new_socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE),
    "memory": lambda: OwnedFd(os.memfd_create("guest")),
    "/dev/null": lambda: OwnedFd(os.open("/dev/null", os.O_RDWR)),
    "/": lambda: OwnedFd(os.open("/", os.O_RDONLY)),
    "anon_inode:[eventfd]": lambda: OwnedFd(os.eventfd(0)),
    "anon_inode:[pidfd]": lambda: OwnedFd(os.pidfd_open(os.getpid())),
    "pipe:[": new_pipe,
    "/var/tmp/": new_file,
    "socket:[": lambda: new_socket(kind=socket.SOCK_SEQPACKET),
    "socket:[ ": lambda: new_socket(family=socket.AF_INET),
    "socket:[  ": lambda: listening(socket.AF_INET),
    "socket:[   ": lambda: new_socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT),
}
"""By what each is called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plug:
    cable: OwnedFd


@pytest.fixture(params=MAKERS)
def named(request: pytest.FixtureRequest) -> Iterator[tuple[str, OwnedFd]]:
    if request.param == "tap" and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/net/tun")
    with MAKERS[request.param]() as made:
        yield request.param.strip(), made


@each_case("kind", FdKind)
def test_a_descriptor_is_of_one_kind_or_of_none(named: tuple[str, OwnedFd], kind: FdKind) -> None:
    name, made = named
    plug = Description(name="plug", version=1, oldest_version=1, state=Plug, fields=(fd("cable", kind=kind),))
    with no_descriptor_is_left():
        assert describe_fd(made.fileno()).startswith(name)
        assert is_of_kind(made.fileno(), kind) == (name == kind)
        if name == kind:
            check_descriptors(plug, Plug(cable=made))
        else:
            with pytest.raises(PeerError) as refusal:
                check_descriptors(plug, Plug(cable=made), section="here/plug")
            assert str(refusal.value) == (
                f'section "here/plug": field "cable" is a descriptor of kind \'{kind}\', '
                f"what came is '{describe_fd(made.fileno())}'"
            )


def test_a_descriptor_is_looked_at_and_not_changed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"still here")
        ours.setblocking(False)
        assert is_of_kind(ours.fileno(), FdKind.SOCKET)
        assert not os.get_blocking(ours.fileno())
        assert ours.recv(100) == b"still here"


def test_each_field_of_a_nic_is_named_where_another_kind_came() -> None:
    with ExitStack() as ends:
        fds = [ends.enter_context(MAKERS["/dev/null"]()) for _ in range(nic.PACKED.descriptor_count)]
        daemon = nic.PACKED.daemon(fds)
        with pytest.raises(PeerError, match=r'field "descriptors\.queues\[0\]" is a descriptor of kind \'tap\''):
            check_descriptors(TAP, daemon.tap)
        state = daemon.device.socket
        assert isinstance(state, SocketState)
        assert state.listener is not None
        (connection,) = state.connections
        fields = (
            (state.listener.fd, "socket.listener.fd", "listening-socket"),
            (connection.connection, "socket.connections[0].connection", "socket"),
            (connection.ledger, "socket.connections[0].ledger", "memory"),
        )
        for held, path, kind in fields:
            with pytest.raises(
                PeerError, match=f"field \"{re.escape(path)}\" is a descriptor of kind '{kind}', .* '/dev/null'"
            ):
                check_descriptors(DEVICE, daemon.device)
            assert held is not None
            with MAKERS[kind]() as right:
                os.dup2(right.fileno(), held.fileno(), inheritable=False)
        check_descriptors(DEVICE, daemon.device)
        close_all(fds)
