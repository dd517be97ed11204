"""A device's own state in the hands of its frontend, which moves it where the guest goes (vhost-user, "Migrating
back-end state").

Owns:        its bytes, and reading and writing them through the frontend's pipe.
Never sees:  what the state is; when it is saved.
Read next:   vhost_user_device.py, which says so; own_state.py for the same state in a handover.

The bytes are a name, a version and the fields of the device's `own_state`, as they stand in a section of a stream. So
another release reads them by the same rules. What arrives is a stranger's, and so is the pipe.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from localmig.errors import LocalmigError, PeerError
from localmig.vhost_user.message import MOVED_STATE_SIZE_MAX
from localmig.vmstate import Blob, Description, Reader, load, save

_MAGIC: Final = b"localmig"
_HEADER: Final = struct.Struct(">8sB")
_VERSION: Final = struct.Struct(">I")


def encode(name: str, description: Description[Any] | None, state: Any) -> bytes:
    """The bytes of a state; of a device without one, of its name alone. LocalmigError where they are too many."""
    blob = Blob()
    blob.data += _HEADER.pack(_MAGIC, len(name.encode())) + name.encode()
    if description is not None:
        blob.data += _VERSION.pack(description.version)
        save(description, state, blob)
    if blob.fds:
        raise LocalmigError("a descriptor cannot be moved by a frontend")
    if len(blob.data) > MOVED_STATE_SIZE_MAX:
        raise LocalmigError(f"the device's state has {len(blob.data)} bytes, limit is {MOVED_STATE_SIZE_MAX}")
    return bytes(blob.data)


def decode(name: str, description: Description[Any] | None, data: bytes) -> Any:
    """The state in the bytes, None for a device without one.

    Raises:
        PeerError: they are no state, another device's, or of a version that cannot be read.
    """
    reader = Reader(data)
    magic, length = _HEADER.unpack(reader.take(_HEADER.size))
    if magic != _MAGIC:
        raise PeerError(f"the device's state begins with {magic!r}, expected {_MAGIC!r}")
    told = reader.take(length)
    if told != name.encode():
        raise PeerError(f"the device's state is of {told.decode(errors='replace')!r}, this device is '{name}'")
    state = None
    if description is not None:
        (version,) = reader.unpack(_VERSION)
        state = load(description, version, reader)
    reader.finish()
    return state


def write(pipe: int, data: bytes) -> None:
    """Writes all of `data`, at most `MOVED_STATE_SIZE_MAX` bytes, into a frontend's pipe, without waiting.

    Raises:
        PeerError: it is no pipe, has no room, or nobody reads it.
    """
    _check_pipe(pipe)
    try:
        if _unwaited(pipe, lambda flags: os.pwritev(pipe, (data,), -1, flags), lambda: os.write(pipe, data)) < len(
            data
        ):
            raise PeerError("the pipe for the device's state has no room for all of it")
    except OSError as error:
        raise PeerError(f"the device's state cannot be written: {error.strerror}") from error


def read_all(pipe: int) -> bytes:
    """All that a frontend wrote into its pipe and closed, without waiting.

    Raises:
        PeerError: it is no pipe, it is open still, or more came than a state may have.
    """
    _check_pipe(pipe)
    data = b""
    room = bytearray(MOVED_STATE_SIZE_MAX + 1)
    while True:
        try:
            size = _unwaited(pipe, lambda flags: os.preadv(pipe, (room,), -1, flags), lambda: os.readv(pipe, (room,)))
        except BlockingIOError:
            raise PeerError("the device's state is asked for, and the frontend has not closed its pipe") from None
        except OSError as error:
            raise PeerError(f"the device's state cannot be read: {error.strerror}") from error
        if size == 0:
            return data
        data += room[:size]
        if len(data) > MOVED_STATE_SIZE_MAX:
            raise PeerError(f"the device's state has more than {MOVED_STATE_SIZE_MAX} bytes, the limit")


def _unwaited(pipe: int, call: Callable[[int], int], older: Callable[[], int]) -> int:
    """A call on a pipe that does not wait, whoever else reads or writes it meanwhile.

    Pipes know RWF_NOWAIT since Linux 6.5. Before, their flag does, which a frontend that keeps its end might take away.
    """
    try:
        return call(os.RWF_NOWAIT)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    os.set_blocking(pipe, False)
    return older()


def _check_pipe(fd: int) -> None:
    """By its name in /proc: whatever else it is, its file system may be a program that does not answer."""
    try:
        name = str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError as error:
        raise PeerError(f"the descriptor for the device's state cannot be looked at: {error.strerror}") from error
    if not name.startswith("pipe:["):
        raise PeerError(f"the descriptor for the device's state is no pipe but '{name}'")
