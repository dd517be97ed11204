"""A real guest whose driver finds no memory for receive buffers goes on when there is some, also after a handover."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from contextlib import ExitStack, suppress
from typing import Final, Self

from tests.guest.lab import EchoTransfer, Guest, Lab, finish_pings
from tests.guest.service import Service

from localmig.testing.qemu import vhost_user_netdev

HOARD_PORT: Final = 5002
"""Where the guest keeps what comes: its program is stopped and reads nothing for a while."""

HOARDS: Final = 4
HOARD_MIB: Final = 10
"""Of the guest's memory that one connection may take: its receive buffer's size."""

FREE_MIB: Final = 16
"""What the guest has left when the first connection begins: less than two of them take, more than its programs need."""

VICTIMS: Final = 24
VICTIM_MIB: Final = 2
"""Programs that its kernel ends for their memory, one by one. With FREE_MIB that is more than the connections can take,
because a kernel panics when it finds no program to end."""

KILLED_BY_HALF: Final = 1
KILLED_BY_ALL: Final = 8
"""Victims ended at least: the first half of the connections takes 4 MiB more than there are, all of them take 24."""

PRESSURE_SECONDS_MAX: Final = 60.0
"""For 20 MiB into a guest under emulation, which prints a page of text for each program that it ends."""

KILLED: Final = "Out of memory: Killed process"

# All that it runs is safe from the kernel, but for the victims. Little is kept back for whoever must not wait, so that
# the driver's turn in an interrupt fails soon. A shell at the second serial port needs no memory to let programs go on.
_PREPARE: Final = f"""
echo "4096 {HOARD_MIB << 20} {HOARD_MIB << 20}" >/proc/sys/net/ipv4/tcp_rmem
echo "1000000 1000000 1000000" >/proc/sys/net/ipv4/tcp_mem
echo 128 >/proc/sys/vm/min_free_kbytes
dmesg -n 5
nc -ll -p {HOARD_PORT} -e sha256sum </dev/null >/dev/null 2>&1 &
until netstat -ltn 2>/dev/null | grep -q ":{HOARD_PORT} "; do usleep 10000; done
sh </dev/ttyS1 >/dev/ttyS1 2>&1 &
for process in /proc/[0-9]*; do echo -1000 >$process/oom_score_adj; done
(
    echo 1000 >/proc/self/oom_score_adj
    for victim in $(seq {VICTIMS}); do (dd if=/dev/zero bs={VICTIM_MIB}M count=1 | sleep 2147483647) & done
) </dev/null >/dev/null 2>&1
until [ "$(pidof dd | wc -w)" = {VICTIMS} ]; do usleep 10000; done
"""

_STOP_AND_FILL: Final = f"""
until [ "$(pidof sha256sum | wc -w)" = {HOARDS} ]; do usleep 10000; done
kill -STOP $(pidof sha256sum)
mkdir /full
mount -t tmpfs -o size=100% none /full
free=$(awk '/MemFree/ {{ print int($2 / 1024) }}' /proc/meminfo)
dd if=/dev/zero of=/full/file bs=1M count=$((free - {FREE_MIB})) 2>/dev/null
pidof sha256sum
"""


class Hoard:
    """A TCP stream whose bytes stay in the guest's memory until its program there goes on."""

    def __init__(self, guest: Guest, number: int) -> None:
        self._connection = guest.connect(HOARD_PORT)
        self._bytes = random.Random(number)
        self._digest = hashlib.sha256()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send, name=f"hoard {number}")

    def start(self) -> None:
        """Sends as much as there is room for."""
        self._thread.start()

    def finish(self) -> bool:
        """Sends no more; whether the guest got all that was sent, and nothing else."""
        self._stopping.set()
        self._thread.join()
        self._connection.shutdown(socket.SHUT_WR)
        verdict = b"".join(iter(lambda: self._connection.recv(256), b""))
        return verdict.split()[0].decode() == self._digest.hexdigest()

    def _send(self) -> None:
        while not self._stopping.is_set():
            data = self._bytes.randbytes(65536)
            with suppress(OSError):  # a broken connection shows as a wrong digest
                self._connection.sendall(data)
            self._digest.update(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with suppress(OSError):  # the guest may have closed it
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        self._connection.close()


def test_a_driver_without_memory_for_buffers_goes_on_when_there_is_some(lab: Lab) -> None:
    service = Service(lab)
    service.start(*service.objects())
    lab.set_up("tap0")
    console = lab.folder / "console.sock"
    second_port = ["-chardev", f"socket,id=s1,path={console},server=on,wait=off"]
    second_port += ["-device", "isa-serial,chardev=s1,index=1"]
    guest = lab.boot_qemu([*vhost_user_netdev(service.socket), *second_port])
    guest.wait_ready()
    # A frame of 64 KiB takes forty buffers of its driver's.
    assert {"VIRTIO_NET_F_GUEST_TSO4", "VIRTIO_NET_F_MRG_RXBUF"} <= set(service.nic()["session"]["features"])
    carrier_changes = guest.carrier_changes()
    guest.run(_PREPARE)
    with ExitStack() as ends:
        hoards = [ends.enter_context(Hoard(guest, number)) for number in range(HOARDS)]
        programs = guest.run(_STOP_AND_FILL)
        for hoard in hoards[: HOARDS // 2]:
            hoard.start()
        # A page of text about an allocation that failed: in the driver, as it gave buffers to its receive ring.
        guest.process.wait_for("page allocation failure: order:0", seconds_max=PRESSURE_SECONDS_MAX)
        guest.process.wait_for("try_fill_recv", seconds_max=PRESSURE_SECONDS_MAX)
        guest.process.wait_count(KILLED, KILLED_BY_HALF, seconds_max=PRESSURE_SECONDS_MAX)
        for hoard in hoards[HOARDS // 2 :]:
            hoard.start()
        service.upgrade()
        guest.process.wait_count(KILLED, KILLED_BY_ALL, seconds_max=PRESSURE_SECONDS_MAX)
        with socket.socket(socket.AF_UNIX) as shell:
            shell.connect(str(console))
            shell.sendall(f"kill -CONT {programs}\n".encode())
            # The port takes few bytes at a time, and forgets the others when its client leaves.
            assert [hoard.finish() for hoard in hoards] == [True] * HOARDS
    pinger = lab.start_pinger()
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(1_000_000)
        service.upgrade()
        transfer.wait_progress(1_000_000)
        assert transfer.finish().intact
    pings = finish_pings(pinger)
    assert pings.lost == guest.discarded_replies(), pings
    assert guest.carrier_changes() == carrier_changes
