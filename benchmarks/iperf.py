"""iperf3 between a guest and its host: datagrams as fast as they go, one TCP stream; and passt, also as pasta, for it.

Owns:        the server, one measurement, the processes of passt and pasta and what they want of a namespace.
Never sees:  backends.
Read next:   packet_rates.py, its user.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from benchmarks.cpu import Rate, busy_seconds
from benchmarks.lines import next_line, read_until
from localmig.errors import ConfigError, PeerError, PeerLostError
from localmig.testing.namespace import NetworkNamespace, ip

START_SECONDS_MAX: Final = 20.0
"""Both are ready in a fraction of a second; a loaded machine takes more."""

_LOOK_SECONDS: Final = 0.01
"""How often it is looked whether passt has made its socket."""

END_SECONDS_MAX: Final = 20.0
"""From the end of what was measured to iperf3's report."""

_NOBODY: Final = "65534"

GATEWAY: Final = "10.9.0.254"
"""Where this namespace's loopback is reached from a guest on passt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What iperf3 sends.

    Attributes:
        name: in the tables.
        arguments: of iperf3's client.
        is_bulk: whether bits are counted and not packets.
    """

    name: str
    arguments: tuple[str, ...]
    is_bulk: bool = False


# Ethernet, IP and UDP have 42 bytes of a frame.
SMALL: Final = Load(name="UDP, 64 bytes", arguments=("--udp", "--bitrate", "0", "--length", "22"))
WHOLE: Final = Load(name="UDP, 1500 bytes", arguments=("--udp", "--bitrate", "0", "--length", "1458"))
BULK: Final = Load(name="one TCP stream", arguments=(), is_bulk=True)


class _Server:
    """iperf3's server for one test, in the network namespace of the thread that starts it.

    Not for several: between two it closes its listener for a moment, and who connects then is turned away.
    """

    def __init__(self) -> None:
        if shutil.which("iperf3") is None:
            raise ConfigError("no iperf3: on Debian, apt-get install iperf3")
        self._process = subprocess.Popen(
            ["iperf3", "--server", "--one-off", "--forceflush"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        try:
            read_until(self._process.stdout.fileno(), b"listening", seconds=START_SECONDS_MAX, who="iperf3")
        except PeerError:
            self.close()
            raise
        # What it says of the test is said by the client, too, and nobody reads it here.
        self._process.stdout.close()

    def close(self) -> None:
        """Kills it. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def through(
    load: Load, *, inside: NetworkNamespace, address: str, down: bool, pids: Sequence[int], seconds: float
) -> Rate:
    """What gets through to the other end, which is in the network namespace of this thread.

    Args:
        load: what is sent.
        inside: where the guest is.
        address: of the server, as the guest knows it.
        down: from the server to the guest.
        pids: the backend's processes.
        seconds: how long, at least a second, which is iperf3's unit.

    Raises:
        ConfigError: iperf3 is not installed.
        PeerError: it failed; the text is its own.
    """
    duration = max(1, round(seconds))
    argv = ["iperf3", "--client", address, "--json", "--time", str(duration), *load.arguments]
    with _Server():
        busy = busy_seconds(pids)
        client = inside.start([*argv, "--reverse"] if down else argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            said, _ = client.communicate(timeout=duration + END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            client.kill()
            client.communicate()
            raise PeerError(f"iperf3 did not end within {duration + END_SECONDS_MAX:g} s") from None
        busy_after = busy_seconds(pids)
    moved, measured = _result(load, json.loads(said))
    return Rate(moved=moved, seconds=measured, cores=(busy_after - busy) / measured)


def _result(load: Load, report: dict[str, Any]) -> tuple[int, float]:
    """What arrived, and in which time."""
    if "error" in report:
        raise PeerError(f"iperf3: {report['error']}")
    total = report["end"]["sum_received" if load.is_bulk else "sum"]
    moved = total["bytes"] * 8 if load.is_bulk else total["packets"] - total["lost_packets"]
    return int(moved), float(total["seconds"])


@contextmanager
def pasta() -> Iterator[tuple[int, NetworkNamespace, str]]:
    """Passt between a namespace of its own and this thread's, which gets an interface for it to imitate.

    Gives its process, the namespace, and the address by which this namespace's loopback is reached from there.

    Raises:
        ConfigError: it is not installed.
        PeerError: it does not start; root may start it, and whoever may have user namespaces.
    """
    if shutil.which("pasta") is None:
        raise ConfigError("no pasta: on Debian, apt-get install passt")
    _make_uplink()
    # It does not like to be root, and must not outlive us.
    argv = ["setpriv", "--pdeathsig", "KILL", "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups"]
    argv += ["pasta", "--foreground", "--config-net"]
    for port_list in ("--tcp-ports", "--udp-ports", "--tcp-ns", "--udp-ns"):
        argv += [port_list, "none"]
    argv.append("cat")  # it answers once all is set up; a command with options would lose them to pasta
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        try:
            _await_pasta(process, errors)
            with NetworkNamespace.of_process(_child(process.pid)) as inside:
                yield process.pid, inside, GATEWAY
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=END_SECONDS_MAX)


@contextmanager
def passt(folder: Path, *, address: str) -> Iterator[tuple[int, Path]]:
    """Passt between a stream socket and this thread's namespace, where `GATEWAY` leads to the loopback.

    Args:
        folder: where the socket is made.
        address: of the guest behind the socket, with its prefix length.

    Gives its process and the socket.

    Raises:
        ConfigError: it is not installed.
        PeerError: it does not start.
    """
    if shutil.which("passt") is None:
        raise ConfigError("no passt: on Debian, apt-get install passt")
    _make_uplink()
    socket = folder / "passt.sock"
    guest, _, prefix_length = address.partition("/")
    argv = ["setpriv", "--pdeathsig", "KILL", "passt", "--foreground", "--runas", "0", "--socket", str(socket)]
    argv += ["--address", guest, "--netmask", prefix_length, "--gateway", GATEWAY]
    for port_list in ("--tcp-ports", "--udp-ports"):
        argv += [port_list, "none"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            deadline = time.monotonic() + START_SECONDS_MAX
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    errors.seek(0)
                    raise PeerError(f"passt does not start: {errors.read().strip() or 'it says nothing'}")
                time.sleep(_LOOK_SECONDS)
            yield process.pid, socket
        finally:
            process.kill()
            process.wait(timeout=END_SECONDS_MAX)


def _make_uplink() -> None:
    """The interface with a default route that both imitate to a guest."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "up0", "type", "veth", "peer", "name", "up1")
    for name in ("up0", "up1"):
        ip("link", "set", name, "up")
    ip("address", "add", "10.9.0.1/24", "dev", "up0")
    ip("route", "add", "default", "via", GATEWAY)


def _await_pasta(process: subprocess.Popen[str], errors: IO[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("ready\n")
    try:
        next_line(process.stdout, seconds=START_SECONDS_MAX, who="pasta")
    except PeerLostError as error:
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line and "syslog" not in line]
        raise PeerError(f"pasta does not start: {said[-1] if said else error}") from error


def _child(pid: int) -> int:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        pids = children.read().split()
    if not pids:
        raise PeerError("pasta has no process in its namespace")
    return int(pids[0])
