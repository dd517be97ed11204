"""The kit's guest: its driver against the packet path, its frontend against any answer, all of it against a daemon."""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.kernel.guest_side import PATIENCE_SECONDS, GuestSide, socket_pair
from tests.kit.processes import DaemonProcess, GuestProcess

from localmig.dataplane import DriverCounters, QueuePair
from localmig.errors import PeerError, PeerLostError
from localmig.netdevs.tap import Tap
from localmig.testing.frontend import DRIVER_FEATURES, RX, TX, Frontend, NetGuest
from localmig.testing.guest import GuestSettings
from localmig.testing.namespace import NetworkNamespace, configure, create_tap
from localmig.testing.traffic import Pinger
from localmig.vhost_user.message import U64, ProtocolFeature, Request, VringNumber, encode_reply
from localmig.virtio import Feature
from localmig.virtio.net import NetFeature, header_length

HEADER = bytes(12)


class Wire(GuestSide):
    """A driver and a queue pair over the same memory, with a socket pair for each one's TAP."""

    def __init__(self, undo: ExitStack, *, queue_size: int = 256, features: int = DRIVER_FEATURES) -> None:
        super().__init__(undo, queue_size=queue_size, features=features)
        self.features = features
        self.host, self.host_tap = socket_pair(undo)
        self.device = self.new_device()
        undo.callback(self.close_device)

    def new_device(self) -> QueuePair:
        device = QueuePair("device", self.event_fd)
        device.configure(
            memory=self.memory.mapping,
            host=self.host_tap.fileno(),
            header_length=header_length(self.features),
            frame_length_max=1518,
            offloads=0,
            event_index=bool(self.features & Feature.RING_EVENT_IDX),
            indirect=False,
            mergeable=bool(self.features & NetFeature.MRG_RXBUF),
            rx=self.rx,
            tx=self.tx,
            packed=self.is_packed,
        )
        return device

    def close_device(self) -> None:
        self.device.close()  # whichever it is by then

    def hand_over(self, *, told: bool) -> None:
        """What a handover does to the rings: one device stops, another goes on where it stood.

        Where it was not told it looks, as after a death.
        """
        rx, tx = self.device.stop()
        device = self.new_device()
        device.set_positions(*((rx, tx) if told else (None, None)))
        assert device.positions() == (rx, tx)
        device.start()
        self.device.close()
        self.device = device


@pytest.fixture(params=[DRIVER_FEATURES, DRIVER_FEATURES | Feature.RING_PACKED], ids=["split", "packed"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    with ExitStack() as undo:
        yield Wire(undo, features=request.param)


def frame(number: int, size: int = 60) -> bytes:
    return HEADER + number.to_bytes(4, "big") + bytes(size - 4)


def payload(data: bytes) -> bytes:
    """A frame without its header, in which the device sets the number of buffers."""
    return data[len(HEADER) :]


def test_frames_pass_both_ways_unchanged(wire: Wire) -> None:
    wire.device.start()
    wire.driver.start()
    for number in range(1000):
        wire.guest.send(frame(number))
        assert wire.host.recv(2048) == frame(number)
        wire.host.send(frame(number, 1514))
        assert payload(wire.guest.recv(2048)) == payload(frame(number, 1514))
    wire.driver.stop()  # a frame is counted once it is through: the last may be a moment later
    counters = DriverCounters(*wire.driver.counters())
    assert (counters.rx_packets, counters.tx_packets) == (1000, 1000)
    assert counters.rx_dropped == counters.tx_dropped == 0


@pytest.mark.parametrize(
    "features",
    [
        DRIVER_FEATURES,
        DRIVER_FEATURES & ~int(Feature.RING_EVENT_IDX),
        DRIVER_FEATURES & ~int(NetFeature.MRG_RXBUF),
        int(Feature.VERSION_1),
    ],
)
@pytest.mark.parametrize("queue_size", [2, 16, 1024])
@pytest.mark.parametrize("ring_format", [0, int(Feature.RING_PACKED)], ids=["split", "packed"])
def test_a_burst_comes_complete_and_in_order_whatever_is_negotiated(
    queue_size: int, features: int, ring_format: int
) -> None:
    with ExitStack() as undo:
        wire = Wire(undo, queue_size=queue_size, features=features | ring_format)
        wire.device.start()
        wire.driver.start()
        exchange(wire, count=5000, handovers=0)


@pytest.mark.parametrize("told", [True, False], ids=["told", "looks"])
def test_a_device_that_takes_over_in_a_burst_loses_and_repeats_nothing(wire: Wire, told: bool) -> None:
    wire.device.start()
    wire.driver.start()
    exchange(wire, count=20_000, handovers=50, told=told)


def exchange(wire: Wire, *, count: int, handovers: int, told: bool = True) -> None:
    """Pushes `count` frames each way as fast as they go and checks that each comes out, once and in order."""
    sent = {wire.guest: 0, wire.host: 0}
    received = {wire.guest: 0, wire.host: 0}
    handover_every = count * 2 // handovers if handovers else 0
    next_handover = handover_every
    while min(received.values()) < count:
        writers = [end for end in sent if sent[end] < count]
        readable, writable, _ = select.select(list(received), writers, [], PATIENCE_SECONDS)
        assert readable or writable, (sent, received, wire.driver.counters(), wire.device.counters())
        for end in writable:
            end.send(frame(sent[end]))
            sent[end] += 1
        for end in readable:
            assert payload(end.recv(2048)) == payload(frame(received[end])), (sent, received)
            received[end] += 1
        if handover_every and sum(received.values()) >= next_handover:
            next_handover += handover_every
            wire.hand_over(told=told)
    wire.driver.stop()  # a frame is counted once it is through: the last may be a moment later
    counters = DriverCounters(*wire.driver.counters())
    assert (counters.rx_packets, counters.tx_packets) == (count, count)


# -- the frontend, against a backend made by hand --


@pytest.fixture
def ends() -> Iterator[tuple[Frontend, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with Frontend(ours, answer_seconds_max=PATIENCE_SECONDS) as frontend, theirs:
        yield frontend, theirs


def number(request: Request, value: int) -> bytes:
    return encode_reply(request, U64(value=value))


def test_a_reply_is_the_answer_and_an_acknowledgement_is_none(ends: tuple[Frontend, socket.socket]) -> None:
    frontend, backend = ends
    backend.sendall(number(Request.GET_FEATURES, 0x1_4000_0000))
    assert frontend.get_features() == 0x1_4000_0000
    frontend.set_protocol_features(ProtocolFeature.REPLY_ACK)
    backend.sendall(number(Request.SET_OWNER, 0))
    frontend.set_owner()


@pytest.mark.parametrize(
    ("answer", "ask", "expected"),
    [
        (number(Request.SET_OWNER, 1), Frontend.set_owner, "backend refused SET_OWNER: it acknowledged with 1"),
        (number(Request.SET_FEATURES, 0), Frontend.set_owner, "backend answered SET_FEATURES to SET_OWNER"),
        (
            encode_reply(Request.GET_VRING_BASE, VringNumber(index=1, number=7)),
            lambda frontend: frontend.get_vring_base(0),
            "backend answered for vring 1, asked was 0",
        ),
        (b"\xff" * 12, Frontend.get_features, "unknown"),
    ],
)
def test_a_wrong_answer_is_the_backends_fault(
    ends: tuple[Frontend, socket.socket], answer: bytes, ask: Callable[[Frontend], object], expected: str
) -> None:
    frontend, backend = ends
    frontend.set_protocol_features(ProtocolFeature.REPLY_ACK)
    backend.sendall(answer)
    with pytest.raises(PeerError, match=expected):
        ask(frontend)


def test_a_backend_that_leaves_or_is_silent_is_lost(ends: tuple[Frontend, socket.socket]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with Frontend(ours, answer_seconds_max=0.01) as frontend, theirs:
        with pytest.raises(PeerLostError, match=r"did not answer GET_FEATURES within 0\.01 s"):
            frontend.get_features()
        assert not frontend.is_lost()
    frontend, backend = ends
    backend.close()
    assert frontend.is_lost(PATIENCE_SECONDS)
    with pytest.raises(PeerLostError, match="closed the connection"):
        frontend.get_features()


def test_nobody_who_listens_is_a_lost_backend(tmp_path: Path) -> None:
    with pytest.raises(PeerLostError, match="no backend listens on"), NetGuest(str(tmp_path / "nobody")) as guest:
        guest.attach()


# -- a guest and a daemon --

HOST, GUEST = "10.9.0.1", "10.9.0.2"


class Daemon:
    """One daemon after another on `tap0`, in this namespace."""

    def __init__(self, folder: Path) -> None:
        self.nic = str(folder / "nic0.sock")
        self._process: DaemonProcess | None = None

    def start(self) -> None:
        device = f"virtio-net,id=nic0,netdev=net0,socket={self.nic}"
        self._process = DaemonProcess(["--netdev", "tap,id=net0,ifname=tap0", "--device", device])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None


@pytest.fixture
def daemon(namespace: NetworkNamespace, tmp_path: Path) -> Iterator[Daemon]:
    create_tap("tap0")
    configure("tap0", address=f"{HOST}/24")
    made = Daemon(tmp_path)
    made.start()
    yield made
    made.stop()


def assert_answers(count: int = 20) -> None:
    """Pings from here reach the guest, and their answers come back."""
    pinger = Pinger(GUEST, count_max=count).start()
    assert pinger.wait(PATIENCE_SECONDS)
    report = pinger.stop()
    assert (report.received, report.duplicates) == (count, 0)


def settings(daemon: Daemon, *, reconnect_ms: float | None = None) -> GuestSettings:
    return GuestSettings(socket=daemon.nic, address=f"{GUEST}/24", reconnect_ms=reconnect_ms)


def test_a_guest_talks_pauses_and_resets_its_driver(daemon: Daemon) -> None:
    with GuestProcess(settings(daemon)) as guest:
        assert_answers()
        for _ in range(3):
            guest.pause()
            assert_answers()
            guest.reset_driver()
            assert_answers()
        report = guest.stop()
    assert (report["reason"], report["pauses"], report["resets"], report["reconnects"]) == (None, 3, 3, 0)
    assert report["carrier_changes"] == report["rx_dropped"] == report["tx_dropped"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_guest_that_may_reconnects_and_its_link_shows_it(daemon: Daemon, number: signal.Signals) -> None:
    with GuestProcess(settings(daemon, reconnect_ms=10)) as guest:
        assert_answers()
        for times in (1, 2):
            daemon.stop(number)
            daemon.start()
            guest.wait_for("reconnected", PATIENCE_SECONDS)
            assert guest.carrier_changes() == 2 * times
            assert_answers()
        assert guest.stop()["reconnects"] == 2


def test_a_guest_that_looks_for_its_backend_ends_when_told(daemon: Daemon) -> None:
    with GuestProcess(settings(daemon, reconnect_ms=1)) as guest:
        daemon.stop()
        guest.wait_for("lost", PATIENCE_SECONDS)
        report = guest.stop()
    assert (report["reason"], report["reconnects"], report["carrier_changes"]) == (None, 0, 1)


def test_a_guest_that_may_not_reconnect_ends_with_its_backend(daemon: Daemon) -> None:
    with GuestProcess(settings(daemon)) as guest:
        daemon.stop()
        ended = guest.wait_for("ended", PATIENCE_SECONDS)
    assert "backend closed the connection" in ended["reason"]


def test_a_guest_without_a_backend_says_so(daemon: Daemon) -> None:
    daemon.stop()
    with pytest.raises(PeerLostError, match="no backend listens on"):
        GuestProcess(settings(daemon))


def test_positions_survive_detaching(daemon: Daemon) -> None:
    with NetworkNamespace.create() as inside, inside.entered():
        tap = Tap(id="guest", ifname="gtap0")
        tap.open()
        with NetGuest(daemon.nic, tap_fds=[tap.fileno()], queue_size=64) as guest:
            guest.attach()
            configure("gtap0", address=f"{GUEST}/24")
            pinger = Pinger(HOST, count_max=100).start()
            assert pinger.wait(PATIENCE_SECONDS)
            assert pinger.stop().lost == 0
            guest.detach()
            assert guest.bases == (guest.used_index(RX), guest.used_index(TX))
            guest.attach()
            pinger = Pinger(HOST, count_max=100).start()
            assert pinger.wait(PATIENCE_SECONDS)
            assert pinger.stop().lost == 0
            assert not guest.ring_error(RX)
            assert not guest.ring_error(TX)
        tap.close()


@pytest.mark.parametrize("protocol_features", [ProtocolFeature(0), ProtocolFeature.REPLY_ACK, ProtocolFeature.STATUS])
def test_a_frontend_that_knows_little_is_served(daemon: Daemon, protocol_features: ProtocolFeature) -> None:
    with NetGuest(daemon.nic, protocol_features=protocol_features, features=int(Feature.VERSION_1)) as guest:
        guest.attach()
        guest.detach()
        guest.reset_driver()
        assert guest.features == Feature.VERSION_1
        assert not guest.frontend.is_lost()
