"""Traffic that tells what it lost: a pinger, a TCP stream hashed at both ends, a UDP flood.

Owns:        what is sent, what is counted, the reports.
Never sees:  daemons, namespaces: it uses the network of whoever runs it.
Read next:   demo.py, which judges handovers by it.

`python -m localmig.testing.traffic ping|receive|send|flood --help`; each prints its report as a last line of JSON, also
when it is ended by SIGINT or SIGTERM. Before that, `ping` tells of the first answer, and `receive` its port.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Final, Self

from localmig.errors import PeerError, PeerLostError, StateError

PING_COUNT_MAX: Final = 1_000_000
"""Pings one pinger sends: sixteen minutes at one a millisecond, in 16 MB of records."""

UNANSWERED: Final = -1
"""In a record, the round trip of a request that nobody answered."""

PING_BUFFER_BYTES: Final = 16 << 20
"""What a pinger's socket keeps of answers that come at once: ten thousand. A guest whose VMM was replaced answers all
that waited for it in a moment, and the kernel's default has room for some 250."""

PING_GRACE_SECONDS: Final = 1.0
"""How long a pinger waits for its last replies: a thousand times the round trip of a healthy local link."""

STALL_SECONDS_MAX: Final = 30.0
"""How long a TCP stream may stand still: a restarted backend costs a few seconds of retransmission back-off."""

STREAM_WINDOW_BYTES: Final = 128 * 1024
"""Receive buffer of a stream's far end. A TAP keeps 1000 packets and drops the next: a larger window of full packets
could fill it all by itself, and losses would be the stream's own."""

STREAM_CONNECTIONS_MAX: Final = 16
"""Streams one receiver serves at once: a thread each, and no test wants more."""

# asm-generic/socket.h; the socket module does not have them.
_SO_RCVBUFFORCE: Final = 33
_SO_TIMESTAMPNS: Final = 35
_SO_MAX_PACING_RATE: Final = 47

_RECORD_HEAD: Final = "sent_ns,rtt_ns\n"

_CHUNK_BYTES: Final = 64 * 1024
_TRANSIENT: Final = (errno.ENOBUFS, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN)


# -- pings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PingReport:
    """What became of the pings.

    Attributes:
        sent: echo requests sent, those included that the kernel refused to send (no carrier, no room).
        received: requests that were answered, each counted once.
        lost: requests without an answer.
        duplicates: answers beyond the first.
        rtt_us_p50: median round trip in microseconds; None where nothing was answered, as the two below.
        rtt_us_p99: round trip that one in a hundred exceeds.
        rtt_us_max: longest round trip.
        silence_us_max: longest time in which requests were waiting and no answer came, by the kernel's stamps of
            their arrival. Never less than `rtt_us_p50`; a time in which the pinger did not ask is no silence.
        send_gap_us_max: longest time between two requests: how late the pinger itself was.
    """

    sent: int
    received: int
    lost: int
    duplicates: int
    rtt_us_p50: int | None
    rtt_us_p99: int | None
    rtt_us_max: int | None
    silence_us_max: int
    send_gap_us_max: int


def percentile(values: Sequence[int], fraction: float) -> int | None:
    """The smallest of `values` that at least `fraction` (0 to 1) of them do not exceed; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -int(-fraction * len(ordered) // 1) - 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PingRecord:
    """Each ping by itself: what a report is the sum of. Times in nanoseconds of CLOCK_MONOTONIC.

    Attributes:
        sent_ns: when each request left, in that order.
        rtt_ns: how long after that its answer came; `UNANSWERED` where none did.
    """

    sent_ns: Sequence[int]
    rtt_ns: Sequence[int]

    def silences(self) -> Iterator[tuple[int, int]]:
        """From when to when requests were waiting and no answer came. One that still lasts ends with the last request.

        After the answer to the newest request nobody waits, whatever was lost before.
        """
        if not self.sent_ns:
            return
        answers = sorted((self.sent_ns[n] + rtt, n) for n, rtt in enumerate(self.rtt_ns) if rtt != UNANSWERED)
        since: int | None = self.sent_ns[0]
        for at_ns, number in answers:
            if since is None or at_ns < since:
                continue  # it was overtaken by the answer to a newer request
            yield since, at_ns
            following = bisect_right(self.sent_ns, at_ns)
            if number < following - 1:
                since = at_ns
            else:
                since = self.sent_ns[following] if following < len(self.sent_ns) else None
        if since is not None:
            yield since, self.sent_ns[-1]

    def write(self, path: Path) -> None:
        """As lines of comma-separated values, an unanswered round trip empty."""
        with path.open("w") as lines:
            lines.write(_RECORD_HEAD)
            for sent, rtt in zip(self.sent_ns, self.rtt_ns, strict=True):
                lines.write(f"{sent},{'' if rtt == UNANSWERED else rtt}\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` has written. PeerError for anything else."""
        sent_ns, rtt_ns = array("q"), array("q")
        with path.open() as lines:
            if (head := lines.readline()) != _RECORD_HEAD:
                raise PeerError(f"'{path}' is no record of pings, it begins with {head!r}")
            try:
                for line in lines:
                    sent, _, rtt = line.rstrip("\n").partition(",")
                    sent_ns.append(int(sent))
                    rtt_ns.append(int(rtt) if rtt else UNANSWERED)
            except ValueError as error:
                raise PeerError(f"'{path}' is no record of pings, it has the line {line!r}") from error
        return cls(sent_ns=sent_ns, rtt_ns=rtt_ns)


class EchoLog:
    """The pinger's memory: which request left when, and which answer came when. Times in nanoseconds."""

    def __init__(self) -> None:
        self._sent_at = array("q")
        self._rtt = array("q")
        self._duplicates = 0
        self._answered = 0

    @property
    def outstanding(self) -> int:
        """Requests without an answer so far."""
        return len(self._rtt) - self._answered

    @property
    def record(self) -> PingRecord:
        """Each ping, lent."""
        return PingRecord(sent_ns=self._sent_at, rtt_ns=self._rtt)

    def sent(self, at_ns: int) -> int:
        """Notes a request; gives its sequence number."""
        self._sent_at.append(at_ns)
        self._rtt.append(UNANSWERED)
        return len(self._rtt) - 1

    def answered(self, sequence: int, at_ns: int) -> None:
        """Notes an answer. PeerError if nothing with that number was sent."""
        if sequence >= len(self._rtt):
            raise PeerError(f"echo reply has sequence number {sequence}, highest sent is {len(self._rtt) - 1}")
        if self._rtt[sequence] != UNANSWERED:
            self._duplicates += 1
            return
        # The stamps are of two clocks, and one of them is set now and then.
        self._rtt[sequence] = max(0, at_ns - self._sent_at[sequence])
        self._answered += 1

    def report(self) -> PingReport:
        """The sum of it."""
        times = sorted(rtt // 1000 for rtt in self._rtt if rtt != UNANSWERED)
        return PingReport(
            sent=len(self._rtt),
            received=self._answered,
            lost=self.outstanding,
            duplicates=self._duplicates,
            rtt_us_p50=percentile(times, 0.5),
            rtt_us_p99=percentile(times, 0.99),
            rtt_us_max=times[-1] if times else None,
            silence_us_max=max((end - since for since, end in self.record.silences()), default=0) // 1000,
            send_gap_us_max=max((later - at for at, later in pairwise(self._sent_at)), default=0) // 1000,
        )


class Pinger:
    """Sends an ICMP echo request every `interval_ns` from a thread of its own. Needs CAP_NET_RAW.

    It belongs to the network namespace of the thread that makes it. A request that is due while the previous ones are
    late is skipped, not sent in a burst.

    Args:
        address: IPv4 address to ping.
        interval_ns: time between requests.
        count_max: it stops sending after so many.
        on_first_answer: called once, from its thread.
    """

    _HEADER: Final = struct.Struct("!BBHHH")
    _PAYLOAD: Final = struct.Struct("!8sQ")
    _STAMP: Final = struct.Struct("@qq")

    def __init__(
        self,
        address: str,
        *,
        interval_ns: int = 1_000_000,
        count_max: int = PING_COUNT_MAX,
        on_first_answer: Callable[[], None] | None = None,
    ) -> None:
        self._on_first_answer = on_first_answer
        self._address = address
        self._interval_ns = interval_ns
        self._count_left = min(count_max, PING_COUNT_MAX)
        self._log = EchoLog()
        self._token = os.urandom(8)  # raw sockets hear every pinger's answers
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        _set_receive_buffer(self._socket, PING_BUFFER_BYTES)
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="pinger", daemon=True)
        self._failure: Exception | None = None

    def start(self) -> Self:
        """Begins to ping."""
        self._thread.start()
        return self

    def finish(self) -> None:
        """Sends no more; safe in a signal handler. `stop` collects the report."""
        with contextlib.suppress(OSError):  # full or closed: it was told before
            self._waker.send(b".", socket.MSG_DONTWAIT)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until all is sent and answered, or the grace is over; False after `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> PingReport:
        """Sends no more, waits for the last answers and reports.

        Raises:
            PeerError: an answer came to what was never asked.
        """
        self.finish()
        self._thread.join()
        for sock in (self._socket, self._wake, self._waker):
            sock.close()
        if self._failure is not None:
            raise self._failure
        return self._log.report()

    @property
    def record(self) -> PingRecord:
        """Each ping by itself, once `stop` has returned."""
        return self._log.record

    def _run(self) -> None:
        try:
            self._send_and_listen()
            self._listen_until(time.monotonic_ns() + int(PING_GRACE_SECONDS * 1e9))
        except (PeerError, OSError) as error:
            self._failure = error

    def _send_and_listen(self) -> None:
        due = time.monotonic_ns()
        while self._count_left:
            now = time.monotonic_ns()
            if now >= due:
                self._send(now)
                self._count_left -= 1
                due = max(due + self._interval_ns, now)
            readable, _, _ = select.select([self._socket, self._wake], [], [], max(0, due - now) / 1e9)
            if self._wake in readable:
                return
            if self._socket in readable:
                self._listen()

    def _listen_until(self, deadline: int) -> None:
        while self._log.outstanding and (left := deadline - time.monotonic_ns()) > 0:
            if select.select([self._socket], [], [], left / 1e9)[0]:
                self._listen()

    def _send(self, now: int) -> None:
        payload = self._PAYLOAD.pack(self._token, self._log.sent(now))
        header = self._HEADER.pack(8, 0, 0, 0, 0)
        packet = self._HEADER.pack(8, 0, _checksum(header + payload), 0, 0) + payload
        try:
            self._socket.sendto(packet, (self._address, 0))
        except OSError as error:  # no carrier, no room: a lost ping, which is what we count
            if error.errno not in (*_TRANSIENT, errno.EAGAIN):
                raise

    def _listen(self) -> None:
        while True:
            try:
                packet, ancillary, _, _ = self._socket.recvmsg(2048, socket.CMSG_SPACE(self._STAMP.size))
            except BlockingIOError:
                return
            at_ns = self._arrival(ancillary)
            icmp = packet[(packet[0] & 0xF) * 4 :]
            if len(icmp) != self._HEADER.size + self._PAYLOAD.size or icmp[0] != 0:
                continue
            token, sequence = self._PAYLOAD.unpack_from(icmp, self._HEADER.size)
            if token == self._token:
                self._log.answered(sequence, at_ns)
                if self._on_first_answer is not None:
                    self._on_first_answer()
                    self._on_first_answer = None

    def _arrival(self, ancillary: Sequence[tuple[int, int, bytes]]) -> int:
        """When the kernel received the packet: this thread may have been kept waiting since. CLOCK_MONOTONIC."""
        now = time.monotonic_ns()
        for level, kind, stamp in ancillary:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = self._STAMP.unpack(stamp)
                age = time.time_ns() - (int(seconds) * 1_000_000_000 + int(nanoseconds))
                return now - max(0, age)
        return now


def _set_receive_buffer(sock: socket.socket, size: int) -> None:
    """Gives a socket so much room, or as much as the machine lets an ordinary user have."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


# -- a TCP stream -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamReport:
    """A stream as its two ends saw it.

    Attributes:
        bytes_sent: what the sender gave to its kernel.
        bytes_received: what the receiver hashed; None where it did not say.
        sha256_sent: hexadecimal, as the one below.
        sha256_received: equal to `sha256_sent` if every byte came, once and in order.
        seconds: from connecting to the receiver's answer.
    """

    bytes_sent: int
    bytes_received: int | None
    sha256_sent: str
    sha256_received: str
    seconds: float

    @property
    def intact(self) -> bool:
        """Whether both ends saw the same bytes."""
        return self.sha256_sent == self.sha256_received and self.bytes_received in (None, self.bytes_sent)


_VERDICT_BYTES_MAX: Final = 256
"""What the receiver answers at the end of the stream: a line as sha256sum(1) prints it, with the number of bytes for a
name. So `nc -l -p PORT -e sha256sum` is a receiver, too, in a guest that has no more than busybox."""


class StreamReceiver:
    """The far end of streams: hashes what comes and tells the sender. Threads of its own, until `stop`.

    Args:
        address: IPv4 address to listen on.
        port: TCP port, 0 for one the kernel chooses (then `port` tells).
        window_bytes: receive buffer, which bounds what is in flight.
    """

    def __init__(self, address: str = "0.0.0.0", port: int = 0, *, window_bytes: int = STREAM_WINDOW_BYTES) -> None:
        self._listener = socket.socket()
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Before listening: the window is agreed on when a connection opens.
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
            self._listener.bind((address, port))
            self._listener.listen(STREAM_CONNECTIONS_MAX)
        except OSError:
            self._listener.close()
            raise
        self.port: int = self._listener.getsockname()[1]
        self.bytes_received = 0
        """Of all streams together, while they run."""
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._accept, name="stream-receiver", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Closes the listener and every stream still open. Idempotent."""
        with self._lock:
            self._stopping = True
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which close alone does not
        self._thread.join()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _accept(self) -> None:
        threads: list[threading.Thread] = []
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            with self._lock:
                if self._stopping or len(self._connections) >= STREAM_CONNECTIONS_MAX:
                    connection.close()
                    continue
                self._connections.add(connection)
            thread = threading.Thread(target=self._receive, args=(connection,), name="stream", daemon=True)
            thread.start()
            threads = [*(other for other in threads if other.is_alive()), thread]
        for thread in threads:
            thread.join()

    def _receive(self, connection: socket.socket) -> None:
        connection.settimeout(STALL_SECONDS_MAX)
        digest, count, buffer = hashlib.sha256(), 0, bytearray(4 * _CHUNK_BYTES)
        try:
            while size := connection.recv_into(buffer):
                digest.update(memoryview(buffer)[:size])
                count += size
                with self._lock:
                    self.bytes_received += size
            connection.sendall(f"{digest.hexdigest()}  {count}\n".encode())
        except OSError:
            pass  # the sender is gone or stalled: it knows, it waits for the verdict that does not come
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()


class StreamSender:
    """Sends pseudo-random bytes to a `StreamReceiver` from a thread of its own, until told to stop.

    Args:
        address: the receiver's IPv4 address.
        port: its TCP port.
        bytes_max: stop by itself after so many; None for no end.
        bytes_per_second: how fast to send at most; None for no limit.
        seed: of the bytes, so that a run can be repeated.

    Raises:
        OSError: it cannot connect.
    """

    def __init__(
        self,
        address: str,
        port: int,
        *,
        bytes_max: int | None = None,
        bytes_per_second: int | None = None,
        seed: int = 0,
    ) -> None:
        self._started = time.monotonic()
        self._socket = socket.create_connection((address, port), timeout=STALL_SECONDS_MAX)
        # So that `bytes_sent` is never far ahead of what has arrived.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_WINDOW_BYTES)
        if bytes_per_second is not None:
            # The kernel spaces the packets, so that a chunk does not leave as one burst.
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, bytes_per_second)
        self._block = random.Random(seed).randbytes(_CHUNK_BYTES)
        self._bytes_max = bytes_max
        self.bytes_sent = 0
        """So far; grows while it runs."""
        self._stopping = threading.Event()
        self._progressed = threading.Condition()
        self._report: StreamReport | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="stream-sender", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Sends no more; safe in a signal handler. `stop` collects the report."""
        self._stopping.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until all is sent and the receiver has answered; False after `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def wait_progress(self, size: int, timeout: float) -> bool:
        """Waits until `size` more bytes were sent; False if they were not within `timeout` seconds."""
        with self._progressed:
            goal = self.bytes_sent + size
            return self._progressed.wait_for(lambda: self.bytes_sent >= goal, timeout)

    def abort(self) -> None:
        """Breaks the stream off at once, where nobody can be there to end it; `stop` raises then."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def stop(self) -> StreamReport:
        """Ends the stream, waits for the receiver's verdict and reports.

        Raises:
            PeerLostError: the stream broke, or stood still for `STALL_SECONDS_MAX`, or its receiver did.
        """
        self.finish()
        self._thread.join()
        if self._failure is not None:
            raise PeerLostError(f"stream broke after {self.bytes_sent} bytes: {self._failure}") from self._failure
        if self._report is None:
            raise StateError("stream ended without a report")
        return self._report

    def _run(self) -> None:
        digest = hashlib.sha256()
        try:
            with self._socket:
                number = 0
                while not self._stopping.is_set() and (chunk := self._chunk(number)):
                    digest.update(chunk)
                    self._socket.sendall(chunk)
                    number += 1
                    with self._progressed:
                        self.bytes_sent += len(chunk)
                        self._progressed.notify_all()
                self._socket.shutdown(socket.SHUT_WR)
                received, count = _receive_verdict(self._socket)
        except (OSError, PeerError) as error:
            self._failure = error
            return
        self._report = StreamReport(
            bytes_sent=self.bytes_sent,
            bytes_received=count,
            sha256_sent=digest.hexdigest(),
            sha256_received=received,
            seconds=time.monotonic() - self._started,
        )

    def _chunk(self, number: int) -> bytes:
        """The next piece; each differs, so that one left out or sent twice changes the hash."""
        chunk = number.to_bytes(8, "big") + self._block[8:]
        return chunk if self._bytes_max is None else chunk[: max(0, self._bytes_max - self.bytes_sent)]


def _receive_verdict(sock: socket.socket) -> tuple[str, int | None]:
    line = b""
    while not line.endswith(b"\n"):
        piece = sock.recv(_VERDICT_BYTES_MAX)
        if not piece:
            raise PeerLostError(f"receiver closed after {len(line)} bytes of its verdict")
        line += piece
        if len(line) > _VERDICT_BYTES_MAX:
            raise PeerError(f"receiver's verdict has {len(line)} bytes, limit is {_VERDICT_BYTES_MAX}")
    digest, _, name = line.decode(errors="replace").strip().partition("  ")
    return digest, int(name) if name.isdecimal() else None


# -- a UDP flood ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class FloodReport:
    """What a flood sent.

    Attributes:
        sent: datagrams the kernel took.
        refused: datagrams it had no room for.
        seconds: how long it lasted.
    """

    sent: int
    refused: int
    seconds: float


class Flood:
    """Sends UDP datagrams as fast as one thread can, until told to stop.

    Args:
        address: IPv4 address to flood.
        port: UDP port; nobody needs to listen, and where nobody does the answers (ICMP) are ignored.
        size: bytes of each datagram's payload.
    """

    _BATCH: Final = 64

    def __init__(self, address: str, port: int = 9, *, size: int = 64) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._target = (address, port)
        self._payload = bytes(size)
        self._stopping = threading.Event()
        self._started = time.monotonic()
        self._failure: OSError | None = None
        self.sent = 0
        self._refused = 0
        self._thread = threading.Thread(target=self._run, name="flood", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Sends no more; safe in a signal handler. `stop` collects the report."""
        self._stopping.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the end, which only `finish` or an error brings; False after `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> FloodReport:
        """Ends the flood and reports. OSError if the kernel refused for another reason than lack of room."""
        self.finish()
        self._thread.join()
        self._socket.close()
        if self._failure is not None:
            raise self._failure
        return FloodReport(sent=self.sent, refused=self._refused, seconds=time.monotonic() - self._started)

    def _run(self) -> None:
        while not self._stopping.is_set():
            for _ in range(self._BATCH):
                try:
                    self._socket.sendto(self._payload, self._target)
                    self.sent += 1
                except OSError as error:
                    if error.errno not in _TRANSIENT:
                        self._failure = error
                        return
                    self._refused += 1


# -- command line -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m localmig.testing.traffic", description=(__doc__ or "").split("\n")[0]
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    ping = kinds.add_parser("ping", help="ICMP echo requests at a fixed interval")
    ping.add_argument("address")
    ping.add_argument("--interval-ms", type=float, default=1.0, help="time between requests (default: %(default)s)")
    ping.add_argument("--count", type=int, default=PING_COUNT_MAX, help="requests to send (default: %(default)s)")
    ping.add_argument(
        "--record", type=Path, metavar="FILE", help="write each ping's time and round trip here at the end"
    )
    receive = kinds.add_parser("receive", help="far end of TCP streams; prints its port first")
    receive.add_argument("--address", default="0.0.0.0")
    receive.add_argument("--port", type=int, default=0, help="0 lets the kernel choose (default)")
    send = kinds.add_parser("send", help="TCP stream to a receiver, hashed at both ends")
    send.add_argument("address")
    send.add_argument("port", type=int)
    send.add_argument("--bytes", type=int, help="how much to send (default: until it is ended)")
    send.add_argument("--bytes-per-second", type=int, help="how fast to send at most (default: no limit)")
    send.add_argument("--seed", type=int, default=0)
    flood = kinds.add_parser("flood", help="UDP datagrams as fast as possible")
    flood.add_argument("address")
    flood.add_argument("--port", type=int, default=9)
    flood.add_argument("--size", type=int, default=64, help="payload bytes (default: %(default)s)")
    for kind in (ping, receive, send, flood):
        kind.add_argument("--seconds", type=float, help="how long to run (default: until it is ended)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs one kind of traffic until it ends, `--seconds` are over or a signal comes; prints its report."""
    options = _parser().parse_args(argv)
    if options.kind == "receive":
        with StreamReceiver(options.address, options.port) as receiver:
            _print({"port": receiver.port})
            _wait_for_signal(options.seconds)
            _print({"bytes_received": receiver.bytes_received})
        return 0
    traffic: Pinger | StreamSender | Flood
    match options.kind:
        case "ping":
            interval_ns = int(options.interval_ms * 1e6)
            traffic = Pinger(
                options.address,
                interval_ns=interval_ns,
                count_max=options.count,
                on_first_answer=lambda: _write(f"{options.address} answers"),
            ).start()
        case "send":
            traffic = StreamSender(
                options.address,
                options.port,
                bytes_max=options.bytes,
                bytes_per_second=options.bytes_per_second,
                seed=options.seed,
            )
        case _:
            traffic = Flood(options.address, options.port, size=options.size)
    _on_signal(traffic.finish)
    traffic.wait(options.seconds)
    report = traffic.stop()
    if isinstance(traffic, Pinger) and options.record is not None:
        traffic.record.write(options.record)
    _print(dataclasses.asdict(report))
    return 0 if not isinstance(report, StreamReport) or report.intact else 1


def _on_signal(do: Callable[[], None]) -> None:
    def handle(_number: int, _frame: FrameType | None) -> None:
        do()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def _wait_for_signal(seconds: float | None) -> None:
    ended = threading.Event()
    _on_signal(ended.set)
    ended.wait(seconds)


def _print(facts: dict[str, object]) -> None:
    _write(json.dumps(facts))


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
