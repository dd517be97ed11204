"""Many guests in one process: virtio-net drivers whose network is a socket each, cheap enough for hundreds.

Owns:        the process, attaching and ending its guests; a handle on it.
Never sees:  TAPs, daemons beyond their sockets.
Read next:   localmig/testing/frontend.py for one guest; site.py, which starts this.

    flood ─ socket ─ driver ═ vhost-user ═ daemon ─ TAP ─ flood

The socket is a UNIX SOCK_SEQPACKET: it keeps frames whole as a TAP does, and makes its sender wait where a TAP drops.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from benchmarks.lines import next_line
from localmig.errors import LocalmigError, PeerError
from localmig.testing.frontend import DRIVER_FEATURES, DirtyBitmap, NetGuest
from localmig.virtio import Feature

START_SECONDS_MAX: Final = 120.0
"""Five hundred guests ask five hundred times thirty questions; a loaded machine answers each in a millisecond."""

END_SECONDS_MAX: Final = 30.0
"""Five hundred threads are joined and as many mappings given back."""

LOG: Final = "log"
FORGET: Final = "forget"
"""Lines that they obey."""

_LOOK_SECONDS: Final = 0.2
"""How often the drivers are asked whether they still run."""

_SOCKET_BUFFER_BYTES: Final = 1 << 20
"""Room for a thousand small frames in the kernel's accounting: as many as a TAP keeps."""


# -- the process ------------------------------------------------------------------------------------------------


def _run(socket_paths: Sequence[str], ends: Sequence[int], queue_size: int, features: int) -> str | None:
    """Lives as these guests until the end of stdin, and obeys its lines; gives what went wrong."""
    with contextlib.ExitStack() as resources:
        guests = []
        for path, end in zip(socket_paths, ends, strict=True):
            guest = resources.enter_context(NetGuest(path, tap_fds=[end], queue_size=queue_size, features=features))
            guest.attach()
            guests.append(guest)
        _say({"event": "ready"})
        watched = [sys.stdin.fileno(), *(guest.frontend.fileno() for guest in guests)]
        poll = select.poll()
        for fd in watched:
            poll.register(fd, select.POLLIN)
        while True:
            readable = {fd for fd, _ in poll.poll(_LOOK_SECONDS * 1000)}
            counters = [guest.counters() for guest in guests]
            if sys.stdin.fileno() in readable:
                line = sys.stdin.readline()
                if not line:
                    break
                _switch_logging(guests, resources, on=line.strip() == LOG)
                _say({"event": "switched"})
            elif readable:
                return "the backend closed a connection"
        totals = {name: sum(getattr(each, name) for each in counters) for name in ("rx_packets", "tx_packets")}
        _say({"event": "counted", **totals})
    return None


def _switch_logging(guests: Sequence[NetGuest], resources: contextlib.ExitStack, *, on: bool) -> None:
    for guest in guests:
        if on:
            region = guest.memory.region
            log = resources.enter_context(contextlib.closing(DirtyBitmap(region.guest_address + region.size)))
            guest.start_logging(log)
        else:
            guest.stop_logging()


def _say(facts: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Reads what to be from the first line of stdin."""
    settings = json.loads(sys.stdin.readline())
    try:
        reason = _run(**settings)
    except LocalmigError as error:
        reason = str(error)
    _say({"event": "ended", "reason": reason})
    return 0 if reason is None else 1


# -- a handle on it ---------------------------------------------------------------------------------------------


class Guests:
    """Guests in a process of their own, attached to these devices.

    Args:
        nics: the vhost-user socket of each NIC, by the name of its TAP.
        queue_size: entries of each ring.
        packed: whether they ask for packed rings.

    Raises:
        PeerError: they could not attach; the text is theirs.
    """

    def __init__(self, nics: Mapping[str, Path], *, queue_size: int, packed: bool = False) -> None:
        self._outer: dict[str, socket.socket] = {}
        inner: list[socket.socket] = []
        self._process: subprocess.Popen[str] | None = None
        try:
            for name in nics:
                self._outer[name], near = _frame_pair()
                inner.append(near)
            numbers = [near.fileno() for near in inner]
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=numbers,
                text=True,
            )
            settings = {
                "socket_paths": [*map(str, nics.values())],
                "ends": numbers,
                "queue_size": queue_size,
                "features": int(DRIVER_FEATURES | (Feature.RING_PACKED if packed else 0)),
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(settings) + "\n")
            self._process.stdin.flush()
            self._wait_for("ready", START_SECONDS_MAX)
        except (LocalmigError, OSError):
            self.close()
            raise
        finally:
            for near in inner:
                near.close()

    @property
    def ends(self) -> dict[str, int]:
        """The outer end of each guest's network, lent, by the name of its TAP."""
        return {name: outer.fileno() for name, outer in self._outer.items()}

    @property
    def pid(self) -> int:
        """Their process."""
        assert self._process is not None
        return self._process.pid

    def switch_logging(self, *, on: bool) -> None:
        """Lets the daemon mark each page that it writes, or no longer. PeerError if they went wrong."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{LOG if on else FORGET}\n")
        self._process.stdin.flush()
        self._wait_for("switched", END_SECONDS_MAX)

    def stop(self) -> dict[str, Any]:
        """Ends them; what they counted. PeerError if they went wrong before."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._wait_for("counted", END_SECONDS_MAX)
        finally:
            self.close()

    def close(self) -> None:
        """Kills what is left of them. Idempotent."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        for outer in self._outer.values():
            outer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait_for(self, event: str, seconds: float) -> dict[str, Any]:
        assert self._process is not None
        output = self._process.stdout
        assert output is not None
        facts: dict[str, Any] = json.loads(next_line(output, seconds=seconds, who="the guests' process"))
        if facts["event"] != event:
            raise PeerError(f"guests ended: {facts.get('reason')}")
        return facts


def _frame_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    return pair


if __name__ == "__main__":
    sys.exit(main())
