"""A file system whose server never answers: whoever asks it waits, and a signal does not end that.

Owns:        SilentFuse.
Never sees:  a daemon.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

PAGE: Final = 4096

MNT_FORCE, MNT_DETACH = 1, 2
"""linux/fs.h."""


class SilentFuse:
    """A FUSE file system of one file, whose server answers until that is open and then never again."""

    INIT, LOOKUP, GETATTR, OPEN, FLUSH, FORGET = 26, 1, 3, 14, 25, 2
    MODES: Final = {1: 0o40755, 2: 0o100644}

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_mounted = True
        self.device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.unanswered: list[int] = []
        self._is_silent = False
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        self._libc = ctypes.CDLL(None, use_errno=True)
        if self._libc.mount(b"silent", str(folder).encode(), b"fuse", 0, options) != 0:
            os.close(self.device)
            pytest.skip(f"no FUSE mount: {os.strerror(ctypes.get_errno())}")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.file = os.open(folder / "file", os.O_RDWR | os.O_CLOEXEC)
        self._is_silent = True

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self.device, 1 << 17)
            except OSError:
                return  # it is unmounted
            _, opcode, unique, node = struct.unpack_from("=IIQQ", request)
            if self._is_silent:
                self.unanswered.append(opcode)
            elif opcode != self.FORGET:
                error, answer = self._answer(opcode, node)
                os.write(self.device, struct.pack("=IiQ", 16 + len(answer), error, unique) + answer)

    def _answer(self, opcode: int, node: int) -> tuple[int, bytes]:
        match opcode:
            case self.INIT:
                return 0, struct.pack("=IIIIHHII", 7, 31, 0, 0, 1, 1, 4096, 1).ljust(64, b"\0")
            case self.LOOKUP:
                return 0, struct.pack("=QQQQII", 2, 0, 0, 0, 0, 0) + self._attributes(2)
            case self.GETATTR:
                return 0, struct.pack("=QII", 0, 0, 0) + self._attributes(node)
            case self.OPEN:
                return 0, struct.pack("=QIi", 0, 0, 0)
        return -38, b""  # ENOSYS

    def _attributes(self, node: int) -> bytes:
        numbers = (0, 0, 0, self.MODES[node], 1, 0, 0, 0, PAGE, 0)
        return struct.pack("=6Q10I", node, PAGE, 8, 0, 0, 0, *numbers)

    def close(self) -> None:
        """Aborts what waits for the server. Not by a program: a process that is forked would wait too. Idempotent."""
        if not self._is_mounted:
            return
        self._is_mounted = False
        assert self._libc.umount2(str(self._folder).encode(), MNT_FORCE | MNT_DETACH) == 0
        with suppress(OSError):  # it is closed all the same
            os.close(self.file)
        self._thread.join(10.0)
        os.close(self.device)
