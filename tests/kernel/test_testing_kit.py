"""The kit's tools on a real kernel: namespaces, traffic, the proxy."""

from __future__ import annotations

import array
import hashlib
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.kit.proxy import StrippingProxy

from localmig.errors import PeerLostError
from localmig.testing.namespace import CommandError, NetworkNamespace, configure, create_tap, ip, link
from localmig.testing.traffic import Flood, Pinger, StreamReceiver, StreamSender

PATIENCE_SECONDS = 20.0


pytestmark = pytest.mark.usefixtures("no_descriptor_is_lost")


# -- namespaces --


def test_a_fresh_namespace_has_a_loopback_and_nothing_else() -> None:
    assert [line.split()[1] for line in ip("-oneline", "link").splitlines()] == ["lo:"]
    assert "UP" in link("lo")["flags"]


def test_what_is_made_inside_is_not_seen_outside(namespace: NetworkNamespace) -> None:
    create_tap("tap0")
    configure(
        "tap0", address="10.9.0.1/24", mac="52:54:00:00:00:01", mtu=1400, neighbors={"10.9.0.2": "52:54:00:00:00:02"}
    )
    facts = link("tap0")
    assert (facts["mtu"], facts["address"]) == (1400, "52:54:00:00:00:01")
    assert "52:54:00:00:00:02" in ip("neighbor", "show", "dev", "tap0")
    with NetworkNamespace.create() as other, other.entered(), pytest.raises(CommandError, match="does not exist"):
        link("tap0")
    assert link("tap0") == facts


def test_a_program_started_inside_finds_its_namespace_by_its_pid(namespace: NetworkNamespace) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        create_tap("tap0")
        with (
            NetworkNamespace.create() as other,
            other.entered(),
            NetworkNamespace.of_process(process.pid) as same,
            same.entered(),
        ):
            assert link("tap0")["ifname"] == "tap0"
    finally:
        process.communicate(timeout=PATIENCE_SECONDS)


def test_a_command_runs_in_namespaces_of_its_own() -> None:
    create_tap("tap0")
    argv = [sys.executable, "-m", "localmig.testing.namespace", "ip", "-oneline", "link"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    assert "lo:" in done.stdout
    assert "tap0" not in done.stdout


# -- traffic --


def test_a_pinger_counts_every_answer() -> None:
    pinger = Pinger("127.0.0.1", interval_ns=100_000, count_max=500).start()
    assert pinger.wait(PATIENCE_SECONDS)
    report = pinger.stop()
    assert (report.sent, report.received, report.lost, report.duplicates) == (500, 500, 0, 0)


def test_two_pingers_do_not_take_each_others_answers() -> None:
    pingers = [Pinger("127.0.0.1", interval_ns=100_000, count_max=200).start() for _ in range(2)]
    assert all(pinger.wait(PATIENCE_SECONDS) for pinger in pingers)
    assert [pinger.stop().received for pinger in pingers] == [200, 200]


def test_pings_that_nobody_answers_are_lost_wherever_they_end() -> None:
    ip("route", "add", "10.9.9.0/24", "dev", "lo")
    for address in ("10.9.9.9", "10.8.8.8"):  # nobody there; no route there
        pinger = Pinger(address, count_max=5).start()
        assert pinger.wait(PATIENCE_SECONDS)
        report = pinger.stop()
        assert (report.sent, report.lost) == (5, 5)


def test_a_stream_arrives_as_it_was_sent() -> None:
    with StreamReceiver("127.0.0.1") as receiver:
        sender = StreamSender("127.0.0.1", receiver.port, bytes_max=3_000_001)
        assert sender.wait(PATIENCE_SECONDS)
        report = sender.stop()
    assert report.intact
    assert report.bytes_sent == report.bytes_received == receiver.bytes_received == 3_000_001


def test_a_stream_without_an_end_ends_when_told() -> None:
    with StreamReceiver("127.0.0.1") as receiver:
        sender = StreamSender("127.0.0.1", receiver.port, bytes_per_second=50_000_000)
        assert sender.wait_progress(1_000_000, PATIENCE_SECONDS)
        report = sender.stop()
    assert report.intact
    assert report.bytes_sent >= 1_000_000


def answer(listener: socket.socket, line: bytes) -> None:
    """What a receiver of few words does: reads all, answers one line."""
    connection, _ = listener.accept()
    with connection:
        digest = hashlib.sha256()
        while data := connection.recv(65536):
            digest.update(data)
        connection.sendall(line.replace(b"DIGEST", digest.hexdigest().encode()))


@pytest.mark.parametrize(
    ("line", "intact"), [(b"DIGEST  -\n", True), (b"0" * 64 + b"  -\n", False), (b"DIGEST  7\n", False)]
)
def test_a_receiver_may_be_sha256sum(line: bytes, *, intact: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener, line))
        thread.start()
        sender = StreamSender("127.0.0.1", listener.getsockname()[1], bytes_max=100_000)
        assert sender.wait(PATIENCE_SECONDS)
        assert sender.stop().intact is intact
        thread.join()


def test_a_stream_whose_receiver_leaves_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = StreamSender("127.0.0.1", listener.getsockname()[1])
        listener.accept()[0].close()
        assert sender.wait(PATIENCE_SECONDS)
        with pytest.raises(PeerLostError, match="stream broke"):
            sender.stop()


def test_a_receiver_that_stops_takes_its_streams_with_it() -> None:
    with StreamReceiver("127.0.0.1") as receiver:
        sender = StreamSender("127.0.0.1", receiver.port)
        assert sender.wait_progress(100_000, PATIENCE_SECONDS)
    assert sender.wait(PATIENCE_SECONDS)
    with pytest.raises(PeerLostError, match="stream broke"):
        sender.stop()


def test_a_flood_counts_what_it_sent() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(PATIENCE_SECONDS)
        flood = Flood("127.0.0.1", receiver.getsockname()[1], size=100)
        assert len(receiver.recv(2048)) == 100
        assert flood.stop().sent >= 1


def test_each_kind_of_traffic_is_a_command() -> None:
    def command(*words: str) -> list[str]:
        return [sys.executable, "-m", "localmig.testing.traffic", *words]

    receiver = subprocess.Popen(command("receive"), stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    with receiver.stdout:
        port = receiver.stdout.readline().partition(": ")[2].strip(" }\n")
        for words in (
            ["send", "127.0.0.1", port, "--bytes", "100000"],
            ["ping", "127.0.0.1", "--count", "5"],
            ["flood", "127.0.0.1", "--seconds", "0.01"],
        ):
            done = subprocess.run(command(*words), capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
            assert done.stdout.splitlines()[-1].startswith("{")
        receiver.terminate()
        assert receiver.stdout.readline() == '{"bytes_received": 100000}\n'
    assert receiver.wait(PATIENCE_SECONDS) == 0


# -- the proxy --


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE_SECONDS)
    sock.connect(str(path))
    return sock


def listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE_SECONDS)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_a_proxy_passes_bytes_both_ways_and_loses_descriptors(tmp_path: Path) -> None:
    with (
        listen(tmp_path / "target") as target,
        StrippingProxy(str(tmp_path / "proxy"), str(tmp_path / "target")) as proxy,
        connect(tmp_path / "proxy") as near,
    ):
        far, _ = target.accept()
        with far:
            far.settimeout(PATIENCE_SECONDS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
            near.sendmsg([b"with a descriptor"], rights)
            data, ancillary, _, _ = far.recvmsg(100, socket.CMSG_SPACE(4))
            assert (data, ancillary) == (b"with a descriptor", [])
            far.sendall(b"answer")
            assert near.recv(100) == b"answer"
            assert proxy.bytes_carried == len(b"with a descriptor" + b"answer")
        assert near.recv(100) == b""
    assert not (tmp_path / "proxy").exists()


def test_a_proxy_without_a_target_hangs_up(tmp_path: Path) -> None:
    with StrippingProxy(str(tmp_path / "proxy"), str(tmp_path / "nobody")), connect(tmp_path / "proxy") as near:
        assert near.recv(100) == b""


def test_a_proxy_that_stops_closes_what_it_carried(tmp_path: Path) -> None:
    with listen(tmp_path / "target") as target:
        proxy = StrippingProxy(str(tmp_path / "proxy"), str(tmp_path / "target"))
        with connect(tmp_path / "proxy") as near:
            far, _ = target.accept()
            with far:
                proxy.stop()
                proxy.stop()
                assert near.recv(100) == far.recv(100) == b""
