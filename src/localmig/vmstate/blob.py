"""Bytes with descriptors at some of them: what saving fills and loading reads.

Owns:        Blob (outgoing, descriptors lent), Reader (incoming, owned), errors that name the field.
Never sees:  what the bytes mean.
Read next:   fields.py, which puts and gets; migration/channel.py, which carries a Blob.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from localmig.errors import PeerError, StateError
from localmig.fds import OwnedFd, close_all

DESCRIPTOR_BYTE: Final = 0x20
"""Stands where a descriptor belongs: a socket carries descriptors only with data. QEMU sends a blank too."""


@dataclass(kw_only=True, slots=True)
class Blob:
    """Saved state on its way out.

    Attributes:
        data: the bytes.
        fds: (offset in `data`, borrowed descriptor) by rising offset; the saved state keeps them open.
        shape: every count, size and presence that was saved. Two saves of one description with equal shapes
            have equal layouts, so one vmdesc explains both.
    """

    data: bytearray = field(default_factory=bytearray)
    fds: list[tuple[int, int]] = field(default_factory=list)
    shape: list[int] = field(default_factory=list)

    def put_fd(self, fd: OwnedFd) -> None:
        """Lends a descriptor to the next byte. StateError if `fd` is empty."""
        self.fds.append((len(self.data), fd.fileno()))
        self.data.append(DESCRIPTOR_BYTE)

    def truncate(self, size: int) -> None:
        """Takes back all after `size` bytes. `shape` is then of no use."""
        del self.data[size:]
        while self.fds and self.fds[-1][0] >= size:
            self.fds.pop()


def joined(outer: str, inner: str) -> str:
    """The path of a field, or an `[index]`, inside another."""
    return f"{outer}{'.' if inner and not inner.startswith('[') else ''}{inner}"


class LocatedError(Exception):
    """A fault that learns on its way up which field it happened in."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = ""

    def add_outer(self, name: str) -> None:
        """Puts the field, or the `[index]`, around what is known so far."""
        self.path = joined(name, self.path)

    def __str__(self) -> str:
        return f'field "{self.path}" {self.problem}' if self.path else self.problem


class MalformedError(LocatedError, PeerError):
    """Incoming bytes are not what was declared."""


class UnfitError(LocatedError, StateError):
    """State to be saved does not fit its declaration."""


class Reader:
    """Incoming bytes and their descriptors, read once from front to back.

    `close` closes every descriptor, also those it gave out: nobody may keep one of a bad state.
    Once all is known to be good, forget the reader; whoever took a descriptor owns it.

    Args:
        data: the bytes.
        fds: (offset in `data`, descriptor) of each descriptor.

    Raises:
        PeerError: two descriptors at one offset, or one outside `data`; all are closed.
    """

    __slots__ = ("_all", "_data", "_unclaimed", "position")

    def __init__(self, data: bytes | bytearray, fds: Iterable[tuple[int, OwnedFd]] = ()) -> None:
        given = list(fds)
        self._data = data
        self._all = [fd for _, fd in given]
        self._unclaimed = dict(given)
        self.position = 0
        for offset in self._unclaimed:
            if not 0 <= offset < len(data):
                self.close()
                raise PeerError(f"a descriptor came at offset {offset} of {len(data)} bytes")
        if len(self._unclaimed) != len(given):
            self.close()
            raise PeerError(f"{len(given)} descriptors came, some at one place")

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self.position

    def peek(self) -> int | None:
        """The next byte, None at the end."""
        return self._data[self.position] if self.position < len(self._data) else None

    def take(self, size: int) -> bytes:
        """The next `size` bytes. PeerError if there are fewer."""
        start, end = self.position, self.position + size
        if end > len(self._data):
            raise MalformedError(f"needs {size} bytes at offset {start}, {self.remaining} are left")
        self.position = end
        return bytes(self._data[start:end])

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """The next bytes as integers. PeerError if there are too few."""
        start, end = self.position, self.position + layout.size
        if end > len(self._data):
            raise MalformedError(f"needs {layout.size} bytes at offset {start}, {self.remaining} are left")
        self.position = end
        return layout.unpack_from(self._data, start)

    def take_fd(self) -> OwnedFd:
        """The descriptor at the next byte. PeerError if there is none."""
        fd = self._unclaimed.get(self.position)
        marker = self.take(1)[0]
        if marker != DESCRIPTOR_BYTE:
            raise MalformedError(f"is byte {marker:#04x}, a descriptor is {DESCRIPTOR_BYTE:#04x}")
        if fd is None:
            raise MalformedError(f"has no descriptor at offset {self.position - 1}")
        del self._unclaimed[self.position - 1]
        return fd

    def finish(self) -> None:
        """Raises PeerError if bytes or descriptors are left over."""
        if self.remaining:
            raise MalformedError(f"{self.remaining} bytes are left over")
        if self._unclaimed:
            raise MalformedError(f"a descriptor came at offset {min(self._unclaimed)}, where none belongs")

    def close(self) -> None:
        """Closes every descriptor that came, given out or not."""
        close_all(self._all)
        self._unclaimed.clear()
