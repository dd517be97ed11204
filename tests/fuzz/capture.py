"""Writes the vhost-user seeds: what the kit's frontend really sends, as `targets.vhost_user` takes it.

    python -m tests.fuzz.capture

Owns:        the session that is captured.
Never sees:  what the bytes mean.
Read next:   targets.py.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path
from typing import Final

from tests.fuzz.targets import CONFIG, OFFER, SEEDS

from localmig.fds import receive
from localmig.testing.frontend import DRIVER_FEATURES, NetGuest
from localmig.vhost_user.protocol import Backend
from localmig.virtio import Feature

FORMATS: Final = {"split": DRIVER_FEATURES, "packed": DRIVER_FEATURES | Feature.RING_PACKED}


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


def capture(features: int) -> bytes:
    """A guest's life: it comes, pauses, goes on, its driver begins anew."""
    captured = bytearray()
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/nic.sock"
        listener.bind(path)
        listener.listen(1)
        server = threading.Thread(target=serve, args=(listener, captured))
        server.start()
        with NetGuest(path, queue_pairs=2, features=features) as guest:
            guest.attach()
            guest.detach()
            guest.attach()
            guest.reset_driver()
            guest.frontend.set_mtu(1500)
            guest.frontend.send_rarp(bytes(6))
            guest.detach()
        server.join()
    return bytes(captured)


def main() -> None:
    """Writes them."""
    folder = SEEDS / "vhost-user"
    folder.mkdir(exist_ok=True)
    for name, features in FORMATS.items():
        Path(folder / name).write_bytes(capture(features))


if __name__ == "__main__":
    main()
