"""Two rings of a NIC and a queue of its netdev, as an engine of the device.

Owns:        QueuePairRings, what it tells the packet path; the names of threads.
Never sees:  a session, who the frames are for.
Read next:   device_api/ring_group.py for the contract, dataplane/ for what runs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from localmig import dataplane
from localmig.dataplane import Counters, DirtyLog, GuestMemory, QueuePair
from localmig.device_api import Layout, Netdev, RingGroup
from localmig.devices.virtio_net.features import tap_offloads
from localmig.errors import KernelError
from localmig.virtio import Feature
from localmig.virtio.net import OFFLOADS, NetFeature, header_length, receive_queue, transmit_queue

_THREAD_ADVICE: Final = (
    "; each has a thread: raise RLIMIT_NPROC of this user, pids.max of the control group or sysctl kernel.threads-max"
)

THREAD_NAME_LENGTH_MAX: Final = 15
"""TASK_COMM_LEN is 16, and the last byte is NUL (linux/sched.h)."""

_DIRECTIONS: Final = ("rx", "tx")


class QueuePairRings(RingGroup):
    """A queue pair.

    Args:
        device: the id of its device.
        index: its number there.
        netdev: whose queue it reads and writes.
        event_fd: signalled where something is to be taken.

    Attributes:
        engine: what runs.
        is_attached: whether the netdev's queue of this number may be used; the device says it before `lay_out`.

    Raises:
        KernelError: there can be no further thread.
    """

    engine: QueuePair

    def __init__(self, device: str, index: int, netdev: Netdev, event_fd: int) -> None:
        self.index = index
        self.name = f"queue pair {index}"
        self.vrings = (receive_queue(index), transmit_queue(index))
        self.is_attached = index == 0
        self._netdev = netdev
        self._frame_length_max = 0
        try:
            self.engine = QueuePair(thread_name(device, index), event_fd)
        except OSError as error:
            advice = _THREAD_ADVICE if error.errno == errno.EAGAIN else ""
            raise KernelError(
                f"device '{device}': cannot make queue pair {index}: {os.strerror(error.errno or 0)}{advice}",
                errno=error.errno or errno.EIO,
            ) from error

    @property
    def is_too_short(self) -> bool:
        """Whether the netdev delivers longer frames by now than there is room for."""
        return self._netdev.is_open and self._netdev.frame_length_max > self._frame_length_max

    def lay_out(self, layout: Layout) -> None:
        """Tells it where its rings are, and what the driver acknowledged."""
        self._frame_length_max = self._netdev.frame_length_max
        rx, tx = layout.rings
        self.engine.configure(
            memory=layout.memory,
            # A detached queue sends nothing; all of them send into the same interface.
            host=self._netdev.host(self.index if self.is_attached else 0),
            header_length=header_length(layout.features),
            frame_length_max=self._frame_length_max,
            # What waits may come with all that this driver took, also if the options allow less since.
            offloads=int(tap_offloads(layout.features, OFFLOADS)),
            event_index=bool(layout.features & Feature.RING_EVENT_IDX),
            indirect=bool(layout.features & Feature.RING_INDIRECT_DESC),
            mergeable=bool(layout.features & NetFeature.MRG_RXBUF),
            rx=rx,
            tx=tx,
            packed=layout.packed,
        )

    def start(self) -> int:
        """Scans rings and netdev once, and lets the thread go on."""
        return self.engine.start()

    def stop(self) -> Sequence[int | None]:
        """Stops between two packets."""
        return self.engine.stop()

    def is_running(self) -> bool:
        """Whether it runs."""
        return self.engine.is_running()

    def positions(self) -> Sequence[int | None]:
        """Where its rings go on."""
        return self.engine.positions()

    def failed(self) -> Sequence[bool]:
        """Which of its rings were given up."""
        return self.engine.failed()

    def set_notifiers(self, vring: int, *, call_fd: int | None, error_fd: int | None) -> None:
        """Lets a ring call its driver by other descriptors."""
        direction = _DIRECTIONS[self.vrings.index(vring)]
        self.engine.set_notifiers(direction, call_fd=call_fd, error_fd=error_fd)

    def set_log(self, vring: int, log: tuple[DirtyLog, int | None] | None) -> None:
        """Lets a ring mark what it writes elsewhere, between two packets."""
        self.engine.set_log(_DIRECTIONS[self.vrings.index(vring)], log)

    def swap_memory(self, memory: GuestMemory) -> bool:
        """Goes on with other memory, where its rings are in the same place."""
        (swapped,) = dataplane.swap_memory([self.engine], memory)
        return swapped

    def take_errors(self) -> Sequence[tuple[int, str]]:
        """What its rings failed for."""
        return [(self._vring_of(direction), reason) for direction, reason in self.engine.take_ring_errors()]

    def take_corrections(self) -> Sequence[tuple[int, int, int]]:
        """Which of its rings began elsewhere than they were told."""
        corrections = self.engine.take_corrections()
        return [(self._vring_of(direction), told, begun) for direction, told, begun in corrections]

    def kicks(self) -> Sequence[int]:
        """How often its rings were kicked."""
        counters = Counters(*self.engine.counters())
        return counters.rx_kicks, counters.tx_kicks

    def release(self) -> None:
        """Forgets rings, memory and descriptors."""
        self.engine.release()

    def close(self) -> None:
        """Ends its thread."""
        self.engine.close()

    def _vring_of(self, direction: str) -> int:
        return self.vrings[_DIRECTIONS.index(direction)]


def thread_name(device: str, queue_pair: int) -> str:
    """What the thread of a queue pair is called. A long id is cut, never the number."""
    number = f"/{queue_pair}"
    return device[: THREAD_NAME_LENGTH_MAX - len(number)] + number
