"""Writes the seeds that are real: a session of the kit's frontend, and the rings of its driver.

    python -m tests.fuzz.capture

Owns:        the session and the rings that are captured.
Never sees:  what the bytes mean to a session; a ring is written as its target reads it.
Read next:   targets.py; rust/dataplane/tests/common/bytes.rs for the targets that are rings.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.fuzz.targets import CONFIG, OFFER, SEEDS
from tests.kernel.guest_side import GuestSide, socket_pair

from localmig.dataplane import QueuePair
from localmig.fds import receive
from localmig.testing.frontend import (
    CLOUD_HYPERVISOR,
    DRIVER_FEATURES,
    PROTOCOL_FEATURES,
    QEMU,
    USER_MODE_LINUX,
    DirtyBitmap,
    Habits,
    NetGuest,
)
from localmig.vhost_user.message import ProtocolFeature
from localmig.vhost_user.protocol import Backend
from localmig.virtio import Feature

FORMATS: Final = {"split": DRIVER_FEATURES, "packed": DRIVER_FEATURES | Feature.RING_PACKED}

SESSIONS: Final = {
    **{name: (features, QEMU) for name, features in FORMATS.items()},
    "cloud-hypervisor": (DRIVER_FEATURES, CLOUD_HYPERVISOR),
    "user-mode-linux": (DRIVER_FEATURES, USER_MODE_LINUX),
}


def serve(listener: socket.socket, captured: bytearray) -> None:
    """Answers one frontend as a daemon would, and keeps each message behind the number of its descriptors."""
    backend = Backend(OFFER, config=CONFIG)
    connection, _ = listener.accept()
    with connection:
        message, fd_count = b"", 0
        while True:
            data, fds = receive(connection, backend.bytes_wanted)
            if not data:
                break
            message, fd_count = message + data, fd_count + len(fds)
            if backend.receive(data, fds) is not None:
                backend.complete()
            if not backend.state.unparsed:
                captured += bytes([fd_count]) + message
                message, fd_count = b"", 0
            connection.sendall(backend.data_to_send())
            backend.data_sent(len(backend.data_to_send()))
    backend.close()


def capture(features: int, habits: Habits) -> bytes:
    """A guest's life: it comes, logs, pauses, goes on, its driver begins anew; at last it asks for a pair too many."""
    captured = bytearray()
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/nic.sock"
        listener.bind(path)
        listener.listen(1)
        server = threading.Thread(target=serve, args=(listener, captured))
        server.start()
        protocol_features = PROTOCOL_FEATURES | ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ
        with (
            contextlib.closing(DirtyBitmap(1 << 30)) as log,
            NetGuest(
                path, queue_pairs=2, features=features, protocol_features=protocol_features, habits=habits
            ) as guest,
        ):
            guest.attach()
            guest.frontend.set_backend_request_fd(guest.memory.fd.fileno())
            guest.start_logging(log)
            guest.detach()
            guest.attach()
            guest.stop_logging()
            guest.frontend.set_log_fd(log.fd.fileno())
            guest.set_queue_pairs(1)
            guest.reset_driver()
            guest.frontend.get_config(0, 60)
            guest.frontend.set_mtu(1500)
            guest.frontend.send_rarp(bytes(6))
            guest.frontend.set_vring_call(5, None)
            guest.detach()
        server.join()
    return bytes(captured)


# -- rings ----------------------------------------------------------------------------------------------------------

ENTRIES: Final = 16
FRAMES: Final = 5

# As bytes.rs reads them.
EVENT_INDEX, INDIRECT, FROM_GUEST, RECOVERS = 1, 2, 4, 8
TAKE, COMPLETE, PUBLISH, CALL, ARM, DISARM, WRITE = 0, 6, 8, 9, 10, 11, 12
RING_OF: Final = {"rx": 0x0000, "tx": 0x4000}
PARTS_AT: Final = (0x0000, 0x1000, 0x2000)
BUFFERS_AT: Final = 0x2_0000
BUFFERS_SIZE: Final = 0x8000
LEDGER_SLOT_SIZE: Final = 8 * 1024
LEDGER_COUNT_MAX: Final = 8


def write_step(place: int, data: bytes) -> bytes:
    """The guest writes `data`."""
    pieces = [data[start : start + 255] for start in range(0, len(data), 255)]
    steps = (
        struct.pack("<BHB", WRITE, place + 255 * number, len(piece)) + piece for number, piece in enumerate(pieces)
    )
    return b"".join(steps)


def moved(table: bytes) -> bytes:
    """Descriptors with their buffers where the target has some."""
    descriptors = (
        (BUFFERS_AT + address % BUFFERS_SIZE, *rest) for address, *rest in struct.iter_unpack("<QIHH", table)
    )
    return b"".join(struct.pack("<QIHH", *each) for each in descriptors)


def ring_input(side: GuestSide, index: int, position: int, *, recovers: bool) -> bytes:
    """A ring as it stands in memory, then what a device does with it."""
    name = ("rx", "tx")[index]
    entries = ENTRIES if side.is_packed else ENTRIES.bit_length() - 1
    sizes = (16 * ENTRIES, *((4, 4) if side.is_packed else (6 + 2 * ENTRIES, 6 + 8 * ENTRIES)))
    table, driver, device = (
        side.memory.mapping.read(address, size)
        for address, size in zip(side.driver.ring_addresses()[index], sizes, strict=True)
    )
    slot = os.pread(side.ledger_fd, LEDGER_SLOT_SIZE, index * LEDGER_SLOT_SIZE)
    intent = int.from_bytes(slot[:8], "little")
    count = min(intent >> 32 & 0xFFFF, LEDGER_COUNT_MAX) + 1 if recovers and side.is_packed else 0
    flags = EVENT_INDEX | INDIRECT | (FROM_GUEST if name == "tx" else 0) | (RECOVERS if recovers else 0)
    header = struct.pack("<BBHB", flags, entries - 1 if side.is_packed else entries, position, count)
    writes = b"".join(
        write_step(RING_OF[name] + at, data) for at, data in zip(PARTS_AT, (moved(table), driver, device), strict=True)
    )
    completions = struct.pack("<BI", COMPLETE, 100) * FRAMES
    serve = bytes([TAKE]) * FRAMES + completions + bytes([PUBLISH, CALL, ARM, DISARM])
    return header + slot[: 8 * count] + writes + serve


def capture_rings(features: int) -> Iterator[tuple[str, bytes]]:
    """The rings of a driver before a device looked, and once one has moved frames each way: (name, input)."""
    with ExitStack() as undo:
        side = GuestSide(undo, queue_size=ENTRIES, features=features)
        near, tap = socket_pair(undo)
        pair = QueuePair("captured", side.event_fd)
        undo.callback(pair.close)
        pair.configure(
            memory=side.memory.mapping,
            host=tap.fileno(),
            header_length=12,
            frame_length_max=1514,
            offloads=0x6F,
            event_index=True,
            indirect=True,
            mergeable=True,
            rx=side.rx,
            tx=side.tx,
            packed=side.is_packed,
        )
        side.driver.start()
        for _ in range(FRAMES):
            side.guest.send(bytes(12) + bytes(60))
        # The driver kicks once it has put the first of them into its ring.
        assert select.select([side.tx_kick_fd], [], [], 10)[0]
        start = 0x8000 if side.is_packed else 0
        for index, name in enumerate(("rx", "tx")):
            yield f"{name}-new", ring_input(side, index, start, recovers=False)
        pair.start()
        for _ in range(FRAMES):
            near.recv(2048)
            near.send(bytes(12) + bytes(60))
            side.guest.recv(2048)
        positions = pair.stop()
        side.driver.stop()
        for index, name in enumerate(("rx", "tx")):
            position = positions[index]
            assert position is not None
            yield f"{name}-used", ring_input(side, index, position, recovers=False)
            yield f"{name}-recovered", ring_input(side, index, position, recovers=True)


def main() -> None:
    """Writes them."""
    folder = SEEDS / "vhost-user"
    folder.mkdir(exist_ok=True)
    for name, (features, habits) in SESSIONS.items():
        Path(folder / name).write_bytes(capture(features, habits))
    for name, features in FORMATS.items():
        rings = SEEDS / name
        rings.mkdir(exist_ok=True)
        for ring, data in capture_rings(features):
            Path(rings / ring).write_bytes(data)


if __name__ == "__main__":
    main()
