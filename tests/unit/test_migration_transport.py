"""Addresses to channels: what each kind accepts, what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from localmig import access
from localmig.access import Access, pid_of
from localmig.errors import ConfigError, KernelError, PeerError
from localmig.fds import OwnedFd
from localmig.migration.channel import Channel, FrameKind
from localmig.migration.transport import Listener, check_local, connect
from localmig.options.address import Address, FdAddress, TcpAddress, UnixAddress
from localmig.unix_socket import ACCEPT_BURST, ACCEPT_INTERVAL_S

PATIENCE_S = 10.0


@pytest.fixture(autouse=True)
def no_descriptor_is_lost() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A UNIX socket's path has 107 bytes.
    return tmp_path_factory.mktemp("t") / "m"


def fd_address(sock: socket.socket) -> FdAddress:
    return FdAddress(name=str(sock.fileno()))


async def exchange(source: Channel, destination: Channel) -> None:
    await source.send(FrameKind.READY, timeout_s=PATIENCE_S)
    assert (await destination.receive(timeout_s=PATIENCE_S)).kind is FrameKind.READY


async def meet(listener: Listener, address: Address, rule: Access | None = None) -> None:
    """A source connects to the listener, and they can talk."""
    with ExitStack() as ends:
        source, destination = await asyncio.gather(connect(address, access=rule), listener.accept())
        ends.callback(source.close)
        ends.callback(destination.close)
        await exchange(source, destination)
        assert source.passes_descriptors == destination.passes_descriptors == isinstance(address, UnixAddress)


# -- unix: ----------------------------------------------------------------------------------------------------


def test_a_unix_path_is_there_while_somebody_listens_and_only_for_this_user(path: Path) -> None:
    address = UnixAddress(path=str(path))
    with closing(Listener(address)) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        asyncio.run(meet(listener, address))
    assert not path.exists()
    listener.close()


def test_a_path_that_somebody_else_took_over_is_left_alone(path: Path) -> None:
    with closing(Listener(UnixAddress(path=str(path)))):
        path.unlink()
        path.write_text("not ours")
    assert path.read_text() == "not ours"


def test_a_path_a_dead_process_left_is_taken(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    address = UnixAddress(path=str(path))
    with closing(Listener(address)) as listener:
        asyncio.run(meet(listener, address))


def test_a_path_of_a_living_process_is_not_taken(path: Path) -> None:
    address = UnixAddress(path=str(path))
    with closing(Listener(address)) as listener:
        with pytest.raises(ConfigError, match="is in use by a living process"):
            Listener(address)
        asyncio.run(meet(listener, address))


def test_a_path_that_is_no_socket_is_not_taken(path: Path) -> None:
    path.write_text("keep")
    with pytest.raises(ConfigError, match="exists and is no socket"):
        Listener(UnixAddress(path=str(path)))
    assert path.read_text() == "keep"


STRANGER = 12345


def test_a_process_of_another_user_is_turned_away_and_the_next_one_may_come(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = UnixAddress(path=str(path))
    uids = iter((STRANGER, STRANGER, os.geteuid()))

    async def try_it() -> None:
        with ExitStack() as ends:
            strangers = [ends.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
            for stranger in strangers:
                stranger.connect(str(path))
            source = socket.socket(socket.AF_UNIX)
            source.connect(str(path))
            source.setblocking(False)
            destination = await listener.accept()
            ends.callback(destination.close)
            assert [stranger.recv(1) for stranger in strangers] == [b"", b""]
            await exchange(ends.enter_context(closing(Channel(source))), destination)

    with closing(Listener(address)) as listener:
        monkeypatch.setattr(access, "peer_credentials", lambda sock: (1, next(uids)))
        asyncio.run(try_it())


def test_a_flood_of_strangers_is_accepted_slowly_and_does_not_end_the_wait(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = UnixAddress(path=str(path))
    uids = iter([STRANGER] * (ACCEPT_BURST + 2) + [os.geteuid()] * 2)

    async def try_it() -> None:
        loop = asyncio.get_running_loop()
        accepting = asyncio.ensure_future(listener.accept())
        began = loop.time()
        for _ in range(ACCEPT_BURST + 2):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.setblocking(False)
                await loop.sock_connect(stranger, str(path))
                assert await loop.sock_recv(stranger, 1) == b""
        assert loop.time() - began >= ACCEPT_INTERVAL_S
        with closing(await connect(address)) as source, closing(await accepting) as destination:
            await exchange(source, destination)

    with closing(Listener(address)) as listener:
        monkeypatch.setattr(access, "peer_credentials", lambda sock: (1, next(uids)))
        asyncio.run(try_it())


def test_a_source_tells_nothing_to_a_listener_of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = UnixAddress(path=str(path))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        monkeypatch.setattr(access, "peer_credentials", lambda sock: (1, STRANGER))
        with pytest.raises(PeerError, match=f"'unix:{path}' is not answered by .*: process 1 has user id {STRANGER}"):
            asyncio.run(connect(address))
        with listening.accept()[0] as accepted:
            assert accepted.recv(1) == b""


@pytest.mark.parametrize("uid", [0, os.geteuid(), STRANGER])
def test_root_the_same_user_and_those_listed_are_let_in_on_both_sides(
    path: Path, monkeypatch: pytest.MonkeyPatch, uid: int
) -> None:
    monkeypatch.setattr(access, "peer_credentials", lambda sock: (1, uid))
    address = UnixAddress(path=str(path))
    rule = Access(users=frozenset({STRANGER}))
    with closing(Listener(address, access=rule)) as listener:
        asyncio.run(meet(listener, address, rule))


def test_a_channel_knows_the_process_at_its_other_end(path: Path) -> None:
    address = UnixAddress(path=str(path))

    async def look() -> None:
        source, destination = await asyncio.gather(connect(address), listener.accept())
        with closing(source), closing(destination):
            for channel in (source, destination):
                assert channel.process is not None
                assert pid_of(channel.process.fileno()) == os.getpid()

    with closing(Listener(address)) as listener:
        asyncio.run(look())


def test_a_migration_socket_gets_the_mode_and_the_group_of_the_operators_choice(path: Path) -> None:
    group = os.getgroups()[-1] if os.geteuid() else 12345
    with closing(Listener(UnixAddress(path=str(path)), access=Access(mode=0o660, group=str(group)))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_gid == group


def test_nobody_at_the_path_is_an_error_that_says_what_to_look_at(path: Path) -> None:
    with pytest.raises(KernelError, match=f"cannot connect to 'unix:{path}': .*; is a daemon with --incoming unix:"):
        asyncio.run(connect(UnixAddress(path=str(path))))


# -- tcp: -----------------------------------------------------------------------------------------------------


def port_of(listener: Listener) -> int:
    """Which port the kernel chose for a listener at port 0."""
    assert listener._sock is not None
    return int(listener._sock.getsockname()[1])


@pytest.mark.parametrize(("listens", "connects"), [("127.0.0.1", "127.0.0.1"), ("", "127.0.0.1"), ("localhost", "")])
def test_tcp_carries_frames_but_no_descriptors(listens: str, connects: str) -> None:
    with closing(Listener(TcpAddress(host=listens, port=0))) as listener:
        asyncio.run(meet(listener, TcpAddress(host=connects, port=port_of(listener))))


def test_tcp_frames_leave_at_once() -> None:
    async def look() -> None:
        address = TcpAddress(host="127.0.0.1", port=port_of(listener))
        source, destination = await asyncio.gather(connect(address), listener.accept())
        for channel in (source, destination):
            assert channel._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            channel.close()

    with closing(Listener(TcpAddress(host="127.0.0.1", port=0))) as listener:
        asyncio.run(look())


def test_a_port_in_use_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(KernelError, match=f"cannot listen at 'tcp:127.0.0.1:{port}'"):
            Listener(TcpAddress(host="127.0.0.1", port=port))


def test_nobody_at_the_port_is_an_error() -> None:
    with socket.socket() as deaf:  # which keeps the port and does not listen at it
        deaf.bind(("127.0.0.1", 0))
        with pytest.raises(KernelError, match="cannot connect to"):
            asyncio.run(connect(TcpAddress(host="127.0.0.1", port=deaf.getsockname()[1])))


# -- fd: ------------------------------------------------------------------------------------------------------


def test_inherited_sockets_are_taken_over_on_both_sides() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    os.set_inheritable(near.fileno(), True)
    number = near.fileno()
    addresses = fd_address(near), fd_address(far)
    listener = Listener(addresses[1])
    near.detach()
    far.detach()

    async def talk() -> None:
        with closing(await connect(addresses[0])) as source, closing(await listener.accept()) as destination:
            assert not os.get_inheritable(number)
            assert not os.get_blocking(number)
            assert source.passes_descriptors
            await exchange(source, destination)

    asyncio.run(talk())
    listener.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_what_fd_names_must_be_a_stream_socket_and_is_left_alone_where_it_is_none() -> None:
    with ExitStack() as ends:
        datagrams = ends.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        file = os.memfd_create("file")
        ends.callback(os.close, file)
        for address, complaint in (
            (FdAddress(name=str(file)), f"'fd:{file}' is no socket: pass a connected stream socket"),
            (fd_address(datagrams), f"'fd:{datagrams.fileno()}' is no stream socket"),
            (FdAddress(name="9999"), "'fd:9999' is no open descriptor"),
            (FdAddress(name="migration"), "no descriptor has this name, getfd gives it one"),
        ):
            with pytest.raises(ConfigError, match=complaint):
                Listener(address)
            with pytest.raises(ConfigError, match=complaint):
                asyncio.run(connect(address))
            if address != FdAddress(name=str(file)):
                with pytest.raises(ConfigError, match=complaint):
                    check_local(address, local=True)
        os.fstat(file)
        os.fstat(datagrams.fileno())


# -- local ----------------------------------------------------------------------------------------------------


def test_local_wants_a_socket_that_can_pass_descriptors() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reader, writer = map(OwnedFd, os.pipe())
    with near, far, reader, writer, socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        check_local(UnixAddress(path="/run/m"), local=True)
        check_local(fd_address(near), local=True)
        others = (TcpAddress(host="127.0.0.1", port=1), fd_address(tcp), FdAddress(name=str(writer.fileno())))
        for address in others:
            check_local(address, local=False)
            with pytest.raises(ConfigError, match=r"^local migration requires a UNIX domain socket channel$"):
                check_local(address, local=True)
        # Looked at, not taken.
        near.send(b"x")
        assert far.recv(1) == b"x"
