"""Numbered frames both ways through each NIC: each must arrive, once, in order.

Owns:        the frames, the thread that sends and checks them.
Never sees:  daemons.
Read next:   chain.py.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from localmig.testing.frontend import NetGuest
from localmig.virtio.net import header_length

WINDOW: Final = 64
"""Frames on their way at most, each way: a fraction of what a TAP keeps (500), so that none is lost for lack of room
however long a machine under load lets a daemon wait."""

BURST: Final = 2
"""Frames sent each way at every tick."""

TICK_SECONDS: Final = 0.002
"""Short beside a handover, so that frames are on their way in each of its steps, and no load to speak of."""

PATIENCE_S: Final = 30.0
"""For frames on their way to arrive, on a machine under load."""

ETH_P_ALL: Final = 3
SOL_PACKET: Final = 263
PACKET_IGNORE_OUTGOING: Final = 23

_HEAD: Final = b"\xff" * 6 + bytes.fromhex("525400123456 88b5")
_NUMBER: Final = slice(len(_HEAD), len(_HEAD) + 8)


def frame(number: int) -> bytes:
    """An Ethernet frame to everybody, of a type for experiments."""
    return _HEAD + number.to_bytes(8, "big") + bytes(42)


class Way:
    """One direction of a NIC: a socket to send to, one where it arrives."""

    def __init__(self, name: str, sender: socket.socket, receiver: socket.socket) -> None:
        self.name = name
        self.sender, self.receiver = sender, receiver
        self.send_header = self.receive_header = 0
        self.sent = self.received = 0

    def send(self) -> None:
        """Sends some frames, unless many are on their way."""
        for _ in range(min(BURST, WINDOW - (self.sent - self.received))):
            self.sender.send(bytes(self.send_header) + frame(self.sent))
            self.sent += 1

    def receive(self) -> None:
        """Takes what has arrived. AssertionError where it is not what comes next."""
        while True:
            try:
                data = self.receiver.recv(4096)
            except BlockingIOError:
                return
            data = data[self.receive_header :]
            if not data.startswith(_HEAD):
                continue  # the machine's own kernel says something
            number = int.from_bytes(data[_NUMBER], "big")
            assert number == self.received, f"{self.name}: frame {number} came where {self.received} was to come"
            assert data == frame(number), f"{self.name}: frame {number} came changed"
            self.received += 1


class Nic:
    """A guest with one NIC, whose own network is a socket, and the machine's side of its TAP."""

    def __init__(self, path: Path, tap: str, *, features: int) -> None:
        self._resources = ExitStack()
        near, guest_tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        machine = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        for sock in (near, guest_tap, machine):
            self._resources.enter_context(sock)
            sock.setblocking(False)
        machine.bind((tap, ETH_P_ALL))
        machine.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.guest = self._resources.enter_context(NetGuest(str(path), tap_fds=[guest_tap.fileno()], features=features))
        self.guest.attach()
        to_guest, from_guest = Way(f"{tap} to guest", machine, near), Way(f"{tap} from guest", near, machine)
        to_guest.receive_header = from_guest.send_header = header_length(self.guest.features)
        self.ways: Final = (to_guest, from_guest)

    def close(self) -> None:
        """The guest ends."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Traffic:
    """A thread that keeps frames on their way through NICs. A context manager: in the end all have arrived."""

    def __init__(self, nics: Sequence[Nic]) -> None:
        self._ways = [way for nic in nics for way in nic.ways]
        self._flowing = threading.Event()
        self._flowing.set()
        self._still = threading.Event()
        """Set by a round in which nothing was to be sent, once everything has arrived."""
        self._ending = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="traffic")
        self._thread.start()

    @property
    def received(self) -> int:
        """Frames that arrived, both ways."""
        return sum(way.received for way in self._ways)

    def check(self) -> None:
        """Raises what the thread found wrong."""
        if self._failure is not None:
            raise self._failure

    def pause(self) -> None:
        """Sends no more and waits until everything has arrived. AssertionError where something does not."""
        self._still.clear()
        self._flowing.clear()
        arrived = self._still.wait(PATIENCE_S)
        self.check()
        lost = {way.name: way.sent - way.received for way in self._ways if way.sent != way.received}
        assert arrived, f"frames did not arrive in {PATIENCE_S:g} s: {lost}"

    def go_on(self) -> None:
        """Sends again."""
        self._flowing.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self.pause()
        finally:
            self._ending.set()
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ending.wait(TICK_SECONDS):
                flowing = self._flowing.is_set()
                for way in self._ways:
                    if flowing:
                        way.send()
                    way.receive()
                if not flowing and all(way.sent == way.received for way in self._ways):
                    self._still.set()
        except BaseException as error:  # noqa: BLE001 - told by `check`
            self._failure = error
            self._still.set()
