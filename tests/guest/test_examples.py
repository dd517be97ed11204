"""Real guests use the example devices, installed by pip, while daemons replace each other.

Neither VMM here would connect again: a device that is let go of once is gone for good.
"""

from __future__ import annotations

import os
import re
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest
from tests.examples.conftest import EXAMPLES, found, install
from tests.guest.lab import Guest, Lab
from tests.guest.service import Service

from localmig.fds import OwnedFd
from localmig.testing.qemu import vhost_user_netdev

pytestmark = pytest.mark.xdist_group(
    "examples-guest"
)  # they share the packages of examples/, which takes long to install

HANDOVERS: Final = 10

CONSOLE_ID: Final = 3
"""virtio's number of a console."""

GREETING: Final = b"ready\n"
"""What the guest says on the console once it echoes."""

ECHO_SECONDS_MAX: Final = 30
"""For a line to come back from the guest; a busy machine takes long to let a daemon, and then a guest, run."""

UNANSWERED_BYTES_MAX: Final = 1024
"""Typed and not shown yet. A terminal keeps 4095 bytes for its reader, and a console does not wait for readers."""


@pytest.fixture(scope="module", autouse=True)
def _examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All daemons here find the packages of examples/."""
    folder = tmp_path_factory.mktemp("examples")
    install(folder, EXAMPLES / "virtio-rng", EXAMPLES / "virtio-console")
    with found(folder):
        yield


def test_a_guest_reads_entropy_without_end_through_ten_handovers(lab: Lab) -> None:
    service = Service(lab)
    socket = lab.folder / "rng0.sock"
    service.start(*service.objects(), "--device", f"virtio-rng,id=rng0,socket={socket}")
    lab.set_up("tap0")
    entropy = ["-chardev", f"socket,id=c1,path={socket}", "-device", "vhost-user-rng-pci,chardev=c1,vectors=0"]
    guest = lab.boot_qemu([*vhost_user_netdev(service.socket), *entropy])
    guest.wait_ready()
    assert guest.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"

    reader = guest.run("dd if=/dev/hwrng of=/dev/null bs=64 </dev/null >/dev/null 2>&1 & echo $!").strip()
    read, pieces = [0], set()
    for _ in range(HANDOVERS):
        service.upgrade()
        # What comes in answer to this is the new daemon's; the endless reader goes on beside it.
        before, piece, after = entropy_read(guest, reader)
        assert read[-1] < before < after
        read.append(after)
        pieces.add(piece)
    assert len(pieces) == HANDOVERS

    served = service.device("rng0")
    assert served["notes"] == []
    assert served["rings"][0]["counters"]["bytes-written"] >= read[-1]  # by all daemons together


def entropy_read(guest: Guest, reader: str) -> tuple[int, str, int]:
    """How much process `reader` has read; the checksum of 4096 bytes that are read then; how much it has read now."""
    count = f"grep rchar /proc/{reader}/io"
    said = guest.run(f"{count}; head -c 4096 /dev/hwrng | tee /tmp/piece | wc -c; sha256sum </tmp/piece; {count}")
    told = re.fullmatch(r"rchar: (\d+)\n4096\n(\w+)  -\nrchar: (\d+)\n", said)
    assert told is not None, said
    return int(told[1]), told[2], int(told[3])


def test_a_console_says_what_is_typed_once_and_in_order_through_ten_handovers(lab: Lab) -> None:
    service = Service(lab)
    socket, terminal = lab.folder / "con0.sock", lab.folder / "console"
    console = f"virtio-console,id=con0,socket={socket},link={terminal}"
    service.start(*service.objects(), "--device", console)
    lab.set_up("tap0")
    guest = lab.boot_uml(service.socket, others={CONSOLE_ID: str(socket)})
    guest.wait_ready()
    # What is typed comes back as it is: the last one to close the console would make it cook lines again.
    guest.run(f"(stty raw -echo; echo {GREETING.decode().strip()}; exec cat) <>/dev/hvc0 >&0 2>/dev/null &")

    with Typist(OwnedFd(os.open(terminal, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))) as typist:
        for _ in range(HANDOVERS):
            typist.wait_progress()
            service.upgrade()
            typist.wait_progress()
        typed, shown = typist.finish()
        assert typist.is_at(terminal)
    assert shown == typed
    assert service.device("con0")["notes"] == []


class Typist:
    """Somebody at a terminal of a guest that echoes: types numbered lines without end, and reads what is shown."""

    def __init__(self, terminal: OwnedFd) -> None:
        self._terminal = terminal
        self._typed = GREETING  # not by us, but what is shown begins with it
        self._shown = b""
        self._ended = False
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="typist")
        self._thread.start()

    def _work(self) -> None:
        number = 0
        try:
            self._catch_up()
            while not self._stopping.is_set():
                while len(self._typed) - len(self._shown) < UNANSWERED_BYTES_MAX:
                    line = b"line %d of the console\n" % number
                    self._typed += line
                    os.write(self._terminal.fileno(), line)
                    number += 1
                self._take()
            self._catch_up()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _catch_up(self) -> None:
        while len(self._shown) < len(self._typed) and self._take():
            pass

    def _take(self) -> bool:
        """Takes what is shown next; whether something was. Where nothing is for too long, nothing is typed any more."""
        if not select.select([self._terminal.fileno()], [], [], ECHO_SECONDS_MAX)[0]:
            self._stopping.set()
            return False
        shown = os.read(self._terminal.fileno(), 4096)
        with self._changed:
            self._shown += shown
            self._changed.notify_all()
        return bool(shown)

    def wait_progress(self) -> None:
        """Waits until all that may be on its way now has been shown, and as much that was typed after it.

        Raises:
            AssertionError: The guest shows nothing any more.
        """
        with self._changed:
            goal = len(self._shown) + 2 * UNANSWERED_BYTES_MAX
            self._changed.wait_for(lambda: self._ended or len(self._shown) >= goal, timeout=ECHO_SECONDS_MAX)
            assert len(self._shown) >= goal, f"{len(self._typed)} bytes typed, {self._shown[-100:]!r} shown last"

    def is_at(self, link: Path) -> bool:
        """Whether who follows the link comes to this terminal."""
        return os.path.samestat(link.stat(), os.fstat(self._terminal.fileno()))

    def finish(self) -> tuple[bytes, bytes]:
        """Types no more, waits for what is on its way; all that was typed, and all that was shown."""
        self._stopping.set()
        self._thread.join()
        return self._typed, self._shown

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()
        self._terminal.close()
