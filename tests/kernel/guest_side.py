"""The guest's side of a queue pair under test: a driver over memory of its own, its rings, its eventfds.

Owns:        all that a frontend would give a device, and the frames the guest sends and receives.
Never sees:  the device and its TAP.
Read next:   test_frontend.py and test_queue_pair.py, which put a queue pair behind it.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import Final

from localmig.dataplane import DriverPair, Ledger, Ring
from localmig.testing.frontend import DRIVER_FEATURES, SharedMemory
from localmig.virtio import Feature, packed_ring

PATIENCE_SECONDS: Final = 10.0
"""For a frame to come: it takes microseconds, a machine under load gets much more."""


def socket_pair(undo: ExitStack) -> tuple[socket.socket, socket.socket]:
    """The test's end, and one that stands in for a TAP."""
    near, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    undo.callback(near.close)
    undo.callback(tap.close)
    near.settimeout(PATIENCE_SECONDS)
    tap.setblocking(False)
    return near, tap


class GuestSide:
    """A driver that has laid out its rings and not started yet. `undo` ends it.

    Attributes:
        guest: takes and gives the guest's frames, with their headers.
        rx: a ring as the device gets to know it; so is `tx`.
        event_fd: for the queue pair to tell of ring errors.
        is_packed: the rings' format, as `features` has it.
        ledger_fd: the file behind the ledger of both rings.
        tx_kick_fd: an eventfd that is rung when the driver has sent.
    """

    def __init__(self, undo: ExitStack, *, queue_size: int = 256, features: int = DRIVER_FEATURES) -> None:
        self.guest, guest_tap = socket_pair(undo)
        eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(5)]
        for fd in eventfds:
            undo.callback(os.close, fd)
        rx_kick, rx_call, tx_kick, tx_call, self.event_fd = eventfds
        self.tx_kick_fd = tx_kick
        self.memory = SharedMemory(DriverPair.layout_size(queue_size))
        undo.callback(self.memory.close)
        self.driver = DriverPair(
            name="driver",
            memory=self.memory.mapping,
            guest_address=self.memory.region.guest_address,
            queue_size=queue_size,
            features=features,
            rx_kick_fd=rx_kick,
            rx_call_fd=rx_call,
            tx_kick_fd=tx_kick,
            tx_call_fd=tx_call,
            tap_fd=guest_tap.fileno(),
        )
        undo.callback(self.driver.stop)
        self.is_packed = bool(features & Feature.RING_PACKED)
        self.ledger_fd = Ledger.create(2)
        undo.callback(os.close, self.ledger_fd)
        self.ledger = Ledger(self.ledger_fd, 2)
        for index in range(2):
            self.ledger.settle(index, packed_ring.START)
        self.rx, self.tx = (
            Ring(
                size=queue_size,
                descriptor_area=table,
                driver_area=avail,
                device_area=used,
                kick_fd=kick,
                call_fd=call,
                error_fd=None,
                next_avail=None,
                ledger=(self.ledger, index),
            )
            for index, ((table, avail, used), kick, call) in enumerate(
                zip(self.driver.ring_addresses(), (rx_kick, tx_kick), (rx_call, tx_call), strict=True)
            )
        )
