"""Sockets of a device with real frontends on them: who is served, what freezes, what moves, what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
from tests.kit.cases import each_case

from localmig.contact import ConnectTo, ListenAt, Listener, ListenerState
from localmig.errors import KernelError, PeerError
from localmig.fds import OwnedFd
from localmig.unix_socket import ACCEPT_BURST, ACCEPT_INTERVAL_S, ListeningSocket
from localmig.vhost_user.memory import MemoryRegion
from localmig.vhost_user.message import (
    HEADER_SIZE,
    U64,
    ConfigSpace,
    Header,
    MemoryTable,
    Payload,
    ProtocolFeature,
    RegionDescription,
    Request,
    decode_reply,
    encode_request,
)
from localmig.vhost_user.ownership import SESSION_COUNT_MAX
from localmig.vhost_user.protocol import (
    PROTOCOL_FEATURES_OFFERED,
    Backend,
    Event,
    MemoryChanged,
    MtuSet,
    Offer,
    SessionState,
)
from localmig.vhost_user.session import Endpoint, Session

OFFER = Offer(features=1, vring_count=2)
REGION = RegionDescription(guest_address=0, size=0x1000, user_address=0x10000, mmap_offset=0)


class Device:
    """A handler that tells what it is told, and does `on_event` with every event."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[object] = asyncio.Queue()
        self.on_event: Callable[[], None] = lambda: None

    def session_opened(self, session: Session) -> None:
        self.told.put_nowait("opened")

    def handle(self, session: Session, event: Event) -> None:
        self.told.put_nowait(event)
        self.on_event()

    def session_closed(self, session: Session, reason: str | None) -> None:
        self.told.put_nowait(("closed", reason))


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


class Frontend:
    """A frontend on a non-blocking socket of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.setblocking(False)

    @classmethod
    def to(cls, path: str) -> Self:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        return cls(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        assert socket.send_fds(self.socket, [data], fds or []) == len(data)

    async def reply(self) -> Payload | None:
        header = Header.decode(await self._receive(HEADER_SIZE))
        return decode_reply(header, await self._receive(header.size))

    async def ask(
        self, request: Request, payload: Payload | None = None, fds: list[int] | None = None
    ) -> Payload | None:
        self.send(encode_request(request, payload, needs_reply=True), fds)
        return await self.reply()

    async def negotiate(self) -> None:
        features = U64(value=PROTOCOL_FEATURES_OFFERED)
        assert await self.ask(Request.SET_PROTOCOL_FEATURES, features) == U64(value=0)

    async def sees_the_end(self) -> bool:
        return await asyncio.get_running_loop().sock_recv(self.socket, 1) == b""

    async def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = await asyncio.get_running_loop().sock_recv(self.socket, size - len(data))
            assert part, f"connection ended after {len(data)} of {size} bytes"
            data += part
        return data


def drained(queue: asyncio.Queue[object]) -> list[object]:
    """All that is in it."""
    return [queue.get_nowait() for _ in range(queue.qsize())]


async def turns() -> None:
    """Lets the event loop do all that it could do now."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(bounded())


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = {entry.name for entry in Path("/proc/self/fd").iterdir()}
    yield
    assert {entry.name for entry in Path("/proc/self/fd").iterdir()} == before


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "nic0.sock")


def new_endpoint(path: str, device: Device) -> Endpoint:
    return Endpoint({path: Listener(ListeningSocket.bind(path))}, device, OFFER)


def only(endpoint: Endpoint) -> Session:
    """The one session that there is."""
    (session,) = endpoint.sessions.values()
    return session


def test_a_flood_of_frontends_is_accepted_slowly(path: str) -> None:
    async def scenario() -> None:
        endpoint = new_endpoint(path, Device())
        endpoint.thaw()
        began_s = time.monotonic()
        for _ in range(ACCEPT_BURST + 2):
            with Frontend.to(path) as frontend:
                frontend.send(bytes(12))
                assert await frontend.sees_the_end()
        assert time.monotonic() - began_s >= ACCEPT_INTERVAL_S
        endpoint.close()

    run(scenario())


def null_fd() -> OwnedFd:
    return OwnedFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))


def region() -> MemoryRegion:
    return MemoryRegion(guest_address=0, size=4096, user_address=0, mmap_offset=0, fd=null_fd())


def new_session(connection: OwnedFd) -> Session:
    return Session(
        connection,
        Backend(OFFER),
        Device(),
        number=1,
        path="unused",
        changing=lambda: None,
        on_closed=lambda: None,
    )


def test_adoption_changes_nothing_of_a_socket(path: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"unread")
        copies = [OwnedFd(os.dup(ours.fileno())) for _ in range(2)]
        listener = Listener.from_state(ListenerState(path=path, device=1, inode=2, fd=copies[0]))
        session = new_session(copies[1])
        assert os.get_blocking(ours.fileno())
        session.release()
        listener.release()
        assert ours.recv(6) == b"unread"
        theirs.send(b"alive")


def test_a_descriptor_that_is_no_socket_is_refused_and_stays_the_callers(path: str) -> None:
    with null_fd() as fd:
        with pytest.raises(PeerError, match="is none: Socket operation on non-socket"):
            Listener.from_state(ListenerState(path=path, device=1, inode=2, fd=fd.duplicate()))
        with pytest.raises(PeerError, match="is none"):
            new_session(fd)
        assert fd.is_open


# -- one frontend after the other -------------------------------------------------------------------------------


def test_a_frontend_is_served_and_one_that_comes_back_too(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        for _ in range(3):
            with Frontend.to(path) as frontend:
                assert await frontend.ask(Request.GET_FEATURES) == U64(value=OFFER.all_features)
                assert only(endpoint).backend.has_spoken
            assert await device.told.get() == "opened"
            assert await device.told.get() == ("closed", None)
            assert not endpoint.sessions
        endpoint.close()

    run(scenario())


def test_a_second_frontend_is_answered_at_once(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        with Frontend.to(path) as first, Frontend.to(path) as second:
            assert await second.ask(Request.GET_QUEUE_NUM) == U64(value=2)
            assert await first.ask(Request.GET_FEATURES) == U64(value=OFFER.all_features)
            assert list(endpoint.sessions) == [1, 2]
            assert [await device.told.get() for _ in range(2)] == ["opened", "opened"]
            peers = {session.peer for session in endpoint.sessions.values()}
            assert peers == {(os.getpid(), os.getuid())}
            first.socket.close()
            assert await device.told.get() == ("closed", None)
            assert await second.ask(Request.GET_QUEUE_NUM) == U64(value=2)
        endpoint.close()

    run(scenario())


def test_one_frontend_too_many_costs_the_oldest_that_has_nothing(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        with ExitStack() as ends:
            silent = []
            for _ in range(SESSION_COUNT_MAX):
                silent.append(ends.enter_context(Frontend.to(path)))
                assert await device.told.get() == "opened"
            # The oldest has memory, so it is the next one.
            endpoint.sessions[1].backend.state.regions = [region()]
            with Frontend.to(path) as last:
                assert await last.ask(Request.GET_FEATURES) == U64(value=OFFER.all_features)
                assert await silent[1].sees_the_end()
                assert list(endpoint.sessions) == [1, 3, 4, 5, 6, 7, 8, 9]
                reasons = [told for told in drained(device.told) if told != "opened"]
                assert len(reasons) == 1
                assert "9 frontends are connected, limit is 8" in str(reasons[0])
        endpoint.close()

    run(scenario())


def test_one_too_many_is_itself_the_one_if_all_others_have_memory(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        with ExitStack() as ends:
            for number in range(SESSION_COUNT_MAX):
                ends.enter_context(Frontend.to(path))
                assert await device.told.get() == "opened"
                endpoint.sessions[number + 1].backend.state.regions = [region()]
            with Frontend.to(path) as last:
                assert await last.sees_the_end()
            assert len(endpoint.sessions) == SESSION_COUNT_MAX
        endpoint.close()

    run(scenario())


def test_a_wrong_message_ends_that_session_and_nothing_else(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        with Frontend.to(path) as wrong, Frontend.to(path) as right:
            wrong.send(b"GET / HTTP/1")
            assert await wrong.sees_the_end()
            assert await right.ask(Request.GET_FEATURES) == U64(value=OFFER.all_features)
        assert [await device.told.get() for _ in range(2)] == ["opened", "opened"]
        assert await device.told.get() == ("closed", "request 542393671 is unknown, the highest known is 45")
        endpoint.close()

    run(scenario())


def test_a_frontend_that_leaves_inside_a_message_is_told_apart(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        with Frontend.to(path) as frontend, null_fd() as fd:
            frontend.send(encode_request(Request.SET_BACKEND_REQ_FD)[:7], [fd.fileno()])
        assert await device.told.get() == "opened"
        assert await device.told.get() == ("closed", "frontend left 7 bytes into a message")
        endpoint.close()

    run(scenario())


def test_what_the_device_cannot_do_ends_the_session_with_its_reason(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        with Frontend.to(path) as frontend, null_fd() as fd:
            await frontend.negotiate()
            device.on_event = failing(PeerError("no such memory"))
            frontend.send(encode_request(Request.SET_MEM_TABLE, MemoryTable(regions=(REGION,))), [fd.fileno()])
            assert await frontend.sees_the_end()
        assert [await device.told.get() for _ in range(3)] == ["opened", MemoryChanged(), ("closed", "no such memory")]
        endpoint.close()

    run(scenario())


def test_what_the_device_may_refuse_is_refused_and_the_session_goes_on(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        with Frontend.to(path) as frontend:
            await frontend.negotiate()
            device.on_event = failing(PeerError("too large for this interface"))
            assert await frontend.ask(Request.NET_SET_MTU, U64(value=9000)) == U64(value=1)
            device.on_event = lambda: None
            assert await frontend.ask(Request.NET_SET_MTU, U64(value=1400)) == U64(value=0)
        assert [await device.told.get() for _ in range(3)] == ["opened", MtuSet(mtu=9000), MtuSet(mtu=1400)]
        endpoint.close()

    run(scenario())


def test_a_bug_in_the_device_ends_the_session_and_is_reported(path: str) -> None:
    async def scenario() -> None:
        bug = ZeroDivisionError()
        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        with Frontend.to(path) as frontend:
            await frontend.negotiate()
            device.on_event = failing(bug)
            frontend.send(encode_request(Request.NET_SET_MTU, U64(value=9000)))
            assert await frontend.sees_the_end()
        assert reported == [bug]
        assert not endpoint.sessions
        endpoint.close()

    run(scenario())


def test_the_device_may_end_the_session_while_it_handles_an_event(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        device.on_event = lambda: only(endpoint).close("enough")
        endpoint.thaw()
        with Frontend.to(path) as frontend:
            await frontend.negotiate()
            frontend.send(encode_request(Request.NET_SET_MTU, U64(value=9000), needs_reply=True))
            assert await frontend.sees_the_end()
        endpoint.close()

    run(scenario())


def test_closing_the_endpoint_tells_the_device_and_the_frontend(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        endpoint.thaw()
        with Frontend.to(path) as frontend:
            await frontend.ask(Request.GET_FEATURES)
            endpoint.close()
            endpoint.close()
            assert await frontend.sees_the_end()
        assert await device.told.get() == "opened"
        assert await device.told.get() == ("closed", "the device was closed")
        assert device.told.empty()

    run(scenario())


# -- the configuration space changes ----------------------------------------------------------------------------

CONFIG_CHANGE = struct.pack("<III", 2, 1, 0)
"""VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, which wants no answer."""

DEAF = PROTOCOL_FEATURES_OFFERED & ~ProtocolFeature.CONFIG
"""What QEMU acknowledges for a NIC."""


@contextmanager
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far:
        near.setblocking(False)
        yield near, far


@pytest.mark.parametrize(("acknowledged", "told"), [(PROTOCOL_FEATURES_OFFERED, CONFIG_CHANGE * 2), (DEAF, b"")])
def test_a_frontend_that_can_hear_is_told_of_each_change(path: str, acknowledged: int, told: bytes) -> None:
    async def scenario() -> None:
        endpoint = new_endpoint(path, Device())
        endpoint.thaw()
        with Frontend.to(path) as frontend, channel() as (near, far):
            await frontend.ask(Request.SET_PROTOCOL_FEATURES, U64(value=acknowledged))
            endpoint.change_config(b"before the channel is there")
            await frontend.ask(Request.SET_BACKEND_REQ_FD, None, [far.fileno()])
            far.close()
            for config in (b"first", b"first", b"second"):
                endpoint.change_config(config)
            if acknowledged & ProtocolFeature.CONFIG:
                answer = await frontend.ask(Request.GET_CONFIG, ConfigSpace(offset=0, data=bytes(8)))
                assert answer == ConfigSpace(offset=0, data=b"second\0\0")
            endpoint.close()
            assert near.recv(4096) == told

    run(scenario())


def test_a_channel_that_is_full_or_dead_or_none_costs_nobody_anything(path: str) -> None:
    async def scenario() -> None:
        endpoint = new_endpoint(path, Device())
        endpoint.thaw()
        with Frontend.to(path) as frontend, channel() as (near, far), null_fd() as odd:
            await frontend.negotiate()
            await frontend.ask(Request.SET_BACKEND_REQ_FD, None, [far.fileno()])
            # Blocking, as the frontend made it.
            assert far.getblocking()
            with contextlib.suppress(BlockingIOError):
                while True:
                    far.send(bytes(4096), socket.MSG_DONTWAIT)
            endpoint.change_config(b"full")
            near.close()
            endpoint.change_config(b"dead")
            await frontend.ask(Request.SET_BACKEND_REQ_FD, None, [odd.fileno()])
            endpoint.change_config(b"none")
            assert await frontend.ask(Request.GET_FEATURES) == U64(value=OFFER.all_features)
        endpoint.close()

    run(scenario())


def test_a_change_during_a_handover_is_told_by_who_serves_then(path: str) -> None:
    async def scenario() -> None:
        source, destination = Device(), Device()
        endpoint = new_endpoint(path, source)
        endpoint.change_config(b"old")
        endpoint.thaw()
        with Frontend.to(path) as frontend, channel() as (near, far):
            await frontend.negotiate()
            await frontend.ask(Request.SET_BACKEND_REQ_FD, None, [far.fileno()])
            far.close()
            taker = hand_over(endpoint, destination)
            endpoint.change_config(b"unheard")
            taker.change_config(b"new")
            with pytest.raises(BlockingIOError):
                near.recv(4096)
            endpoint.release()
            taker.thaw()
            assert near.recv(4096) == CONFIG_CHANGE
            answer = await frontend.ask(Request.GET_CONFIG, ConfigSpace(offset=0, data=bytes(3)))
            assert answer == ConfigSpace(offset=0, data=b"new")
        taker.close()

    run(scenario())


# -- frozen, and moved ------------------------------------------------------------------------------------------


def travelled(state: SessionState) -> SessionState:
    """The state as another process gets it: every descriptor a copy."""

    def copy(fd: OwnedFd | None) -> OwnedFd | None:
        return fd.duplicate() if fd is not None else None

    return replace(
        state,
        regions=[replace(region, fd=region.fd.duplicate()) for region in state.regions],
        vrings=[replace(v, kick=copy(v.kick), call=copy(v.call), error=copy(v.error)) for v in state.vrings],
        backend_request_fd=copy(state.backend_request_fd),
        unparsed_fds=[fd.duplicate() for fd in state.unparsed_fds],
    )


def hand_over(endpoint: Endpoint, device: Device, *, plan: ListenAt | ConnectTo | None = None) -> Endpoint:
    """Freezes `endpoint` and gives copies of all it has to a new one, which does nothing yet."""
    endpoint.freeze()
    ((path, contact),) = endpoint.contacts.items()
    listener = contact.save()
    if listener is not None:
        listener = replace(listener, fd=listener.fd.duplicate())
    taker = Endpoint({path: (plan or ListenAt(path="unused")).adopt(listener)}, device, OFFER)
    for session in endpoint.sessions.values():
        taker.adopt_session(
            session.connection.duplicate(),
            travelled(session.backend.state),
            number=session.number,
            path=session.path,
            config=session.backend.config,
        )
    return taker


def test_a_frozen_endpoint_accepts_and_reads_nothing_and_thaws(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = new_endpoint(path, device)
        with Frontend.to(path) as frontend:
            await turns()
            assert device.told.empty()
            endpoint.thaw()
            await frontend.negotiate()
            endpoint.freeze()
            frontend.send(encode_request(Request.NET_SET_MTU, U64(value=1400), needs_reply=True))
            await turns()
            assert await device.told.get() == "opened"
            assert device.told.empty()
            endpoint.thaw()
            assert await frontend.reply() == U64(value=0)
        endpoint.close()

    run(scenario())


def test_a_session_moves_with_a_message_unread_in_the_kernel(path: str) -> None:
    async def scenario() -> None:
        source, destination = Device(), Device()
        endpoint = new_endpoint(path, source)
        endpoint.thaw()
        with Frontend.to(path) as frontend, null_fd() as fd:
            await frontend.negotiate()
            taker = hand_over(endpoint, destination)
            table = MemoryTable(regions=(REGION,))
            frontend.send(encode_request(Request.SET_MEM_TABLE, table, needs_reply=True), [fd.fileno()])
            await turns()
            endpoint.release()
            taker.thaw()
            assert await frontend.reply() == U64(value=0)
            assert await destination.told.get() == MemoryChanged()
        assert await source.told.get() == "opened"
        assert source.told.empty(), "the source lets go without a word"
        assert await destination.told.get() == ("closed", None)
        with Frontend.to(path) as another:
            assert await another.ask(Request.GET_FEATURES) == U64(value=OFFER.all_features)
        taker.close()

    run(scenario())
    assert not Path(path).exists()


@each_case("cut", range(1, HEADER_SIZE + 40))
def test_a_session_moves_inside_a_message_and_comes_back(path: str, cut: int) -> None:
    async def scenario() -> None:
        source, destination = Device(), Device()
        endpoint = new_endpoint(path, source)
        endpoint.thaw()
        with Frontend.to(path) as frontend, null_fd() as fd:
            await frontend.negotiate()
            message = encode_request(Request.SET_MEM_TABLE, MemoryTable(regions=(REGION,)), needs_reply=True)
            frontend.send(message[:cut], [fd.fileno()])
            await turns()
            assert endpoint.sessions
            assert len(only(endpoint).backend.state.unparsed) == cut
            discarded = hand_over(endpoint, destination)
            discarded.release()
            endpoint.thaw()
            await turns()
            taker = hand_over(endpoint, destination)
            endpoint.release()
            taker.thaw()
            frontend.send(message[cut:])
            assert await frontend.reply() == U64(value=0)
            assert await destination.told.get() == MemoryChanged()
        taker.close()

    run(scenario())


def test_a_reply_that_found_no_room_moves_and_arrives_whole(path: str) -> None:
    async def scenario() -> None:
        source, destination = Device(), Device()
        endpoint = new_endpoint(path, source)
        endpoint.thaw()
        with Frontend.to(path) as frontend:
            await frontend.negotiate()
            count = 0
            question = encode_request(Request.GET_FEATURES)
            while not only(endpoint).backend.data_to_send():
                frontend.send(question)
                count += 1
                await turns()
            frontend.send(question)
            await turns()
            assert only(endpoint).backend.bytes_wanted == HEADER_SIZE, "nothing is read before the reply is sent"
            taker = hand_over(endpoint, destination)
            endpoint.release()
            taker.thaw()
            for _ in range(count + 1):
                assert await frontend.reply() == U64(value=OFFER.all_features)
        taker.close()

    run(scenario())


def test_a_state_that_cannot_be_served_leaves_its_descriptors_with_the_caller(path: str) -> None:
    endpoint = new_endpoint(path, Device())
    with null_fd() as connection, null_fd() as waiting:
        state = SessionState(unparsed=b"\0" * HEADER_SIZE, unparsed_fds=[waiting])
        with pytest.raises(PeerError):
            endpoint.adopt_session(connection, state, number=1, path="unused", config=b"")
        assert connection.is_open
        assert waiting.is_open
    endpoint.close()


def test_closing_ends_the_connection_though_another_process_has_a_copy(path: str) -> None:
    async def scenario() -> None:
        endpoint = new_endpoint(path, Device())
        endpoint.thaw()
        with Frontend.to(path) as frontend:
            await frontend.negotiate()
            with only(endpoint).connection.duplicate():
                only(endpoint).close("wrong")
                assert await frontend.sees_the_end()
        endpoint.close()

    run(scenario())


def test_no_event_loop_is_needed_to_let_go_of_what_never_ran(path: str) -> None:
    letting_go: tuple[Callable[[Endpoint], None], ...] = (Endpoint.freeze, Endpoint.release)
    endpoint = new_endpoint(path, Device())
    for step in letting_go:
        step(endpoint)
    assert Path(path).exists()


# -- server=off: the frontend listens, we connect -----------------------------------------------------------


class Vmm:
    """A VMM's listening socket; what connects becomes a frontend."""

    def __init__(self, path: str, *, backlog: int = 1) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.bind(path)
        self.socket.listen(backlog)

    async def frontend(self) -> Frontend:
        """The next one, once the device connected."""
        connection, _ = await asyncio.get_running_loop().sock_accept(self.socket)
        return Frontend(connection)

    def is_left_alone(self) -> bool:
        """Whether nobody waits to be accepted."""
        try:
            connection, _ = self.socket.accept()
        except BlockingIOError:
            return True
        connection.close()
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()
        Path(self.path).unlink()


def connecting(path: str, device: Device, *, reconnect_ms: int = 1) -> Endpoint:
    return Endpoint({path: ConnectTo(path=path, reconnect_ms=reconnect_ms).open()}, device, OFFER)


async def is_served(frontend: Frontend) -> bool:
    return await frontend.ask(Request.GET_FEATURES) == U64(value=OFFER.all_features)


def test_a_device_connects_where_the_vmm_listens_and_again_when_it_left(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        with Vmm(path) as vmm:
            endpoint = connecting(path, device)
            assert vmm.is_left_alone(), "it connected before it was to serve"
            endpoint.thaw()
            for _ in range(3):
                with await vmm.frontend() as frontend:
                    assert await is_served(frontend)
                    assert vmm.is_left_alone(), "a device serves one frontend at a time"
                assert await device.told.get() == "opened"
                assert await device.told.get() == ("closed", None)
            endpoint.close()
        assert not endpoint.sessions

    run(scenario())


def test_a_vmm_that_is_not_there_yet_or_restarts_is_found(path: str) -> None:
    async def scenario() -> None:
        device = Device()
        endpoint = connecting(path, device)
        endpoint.thaw()
        await turns()
        for _ in range(2):
            with Vmm(path) as vmm, await vmm.frontend() as frontend:
                assert await is_served(frontend)
            assert await device.told.get() == "opened"
            assert await device.told.get() == ("closed", None)
        endpoint.close()

    run(scenario())
    assert not Path(path).exists()


def test_a_vmm_whose_queue_is_full_is_tried_again(path: str) -> None:
    async def scenario() -> None:
        with Vmm(path, backlog=0) as vmm, socket.socket(socket.AF_UNIX) as other:
            other.connect(path)
            endpoint = connecting(path, Device())
            endpoint.thaw()
            assert not endpoint.sessions
            (await vmm.frontend()).socket.close()
            with await vmm.frontend() as frontend:
                assert await is_served(frontend)
            endpoint.close()

    run(scenario())


def test_without_reconnecting_a_vmm_must_be_there_and_is_served_once(path: str) -> None:
    async def scenario() -> None:
        with pytest.raises(KernelError, match="let the frontend listen there first, or wait for it with reconnect-ms="):
            connecting(path, Device(), reconnect_ms=0)
        device = Device()
        with Vmm(path) as vmm:
            endpoint = connecting(path, device, reconnect_ms=0)
            endpoint.thaw()
            with await vmm.frontend() as frontend:
                assert await is_served(frontend)
                taker = hand_over(endpoint, device, plan=ConnectTo(path=path, reconnect_ms=0))
                endpoint.release()
                taker.thaw()
                assert await is_served(frontend)
            assert await device.told.get() == "opened"
            assert await device.told.get() == ("closed", None)
            successor = hand_over(taker, device, plan=ConnectTo(path=path, reconnect_ms=0))
            taker.release()
            successor.thaw()
            await turns()
            assert vmm.is_left_alone()
            successor.close()

    run(scenario())


def test_a_connected_session_moves_and_only_its_new_owner_connects_again(path: str) -> None:
    async def scenario() -> None:
        source, destination = Device(), Device()
        with Vmm(path) as vmm:
            endpoint = connecting(path, source)
            endpoint.thaw()
            with await vmm.frontend() as frontend:
                assert await is_served(frontend)
                taker = hand_over(endpoint, destination, plan=ConnectTo(path=path, reconnect_ms=1))
                await turns()
                assert vmm.is_left_alone()
                endpoint.release()
                taker.thaw()
                assert await is_served(frontend)
            assert await destination.told.get() == ("closed", None)
            with await vmm.frontend() as frontend:
                assert await is_served(frontend)
                assert await destination.told.get() == "opened"
                assert vmm.is_left_alone()
            assert await source.told.get() == "opened"
            assert source.told.empty()
            taker.close()

    run(scenario())


def test_a_device_without_a_frontend_moves_and_only_its_new_owner_connects(path: str) -> None:
    async def scenario() -> None:
        source, destination = Device(), Device()
        endpoint = connecting(path, source)
        endpoint.thaw()
        await turns()
        taker = hand_over(endpoint, destination, plan=ConnectTo(path=path, reconnect_ms=1))
        with Vmm(path) as vmm:
            await turns()
            assert vmm.is_left_alone(), "neither side may connect during a handover"
            endpoint.release()
            taker.thaw()
            with await vmm.frontend() as frontend:
                assert await is_served(frontend)
                assert vmm.is_left_alone()
            assert source.told.empty()
            taker.close()

    run(scenario())


def test_a_handover_that_is_given_up_lets_the_source_connect_on(path: str) -> None:
    async def scenario() -> None:
        endpoint = connecting(path, Device())
        endpoint.thaw()
        await turns()
        taker = hand_over(endpoint, Device(), plan=ConnectTo(path=path, reconnect_ms=1))
        taker.discard()
        endpoint.thaw()
        with Vmm(path) as vmm, await vmm.frontend() as frontend:
            assert await is_served(frontend)
            endpoint.close()

    run(scenario())


def test_a_side_that_listens_and_one_that_connects_do_not_fit(path: str) -> None:
    with null_fd() as fd:
        came = ListenerState(path=path, device=1, inode=2, fd=fd)
        with pytest.raises(PeerError, match=f"server=off, and the source listens at '{path}'"):
            ConnectTo(path=path, reconnect_ms=0).check(came)
    with pytest.raises(PeerError, match="server=on, and the source has no listening socket"):
        ListenAt(path=path).check(None)
