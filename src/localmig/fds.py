"""File descriptors: who closes what, and how they cross a UNIX socket.

Owns:        OwnedFd, SCM_RIGHTS in both directions.
Never sees:  what a descriptor means.
Read next:   migration/channel.py and vhost_user/session.py, the two places descriptors travel.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Final, Self

from localmig.errors import KernelError, StateError
from localmig.fd_kind import FdKind, is_of_kind, is_tun_queue

FD_COUNT_MAX: Final = 253
"""Descriptors one message may carry: the kernel's SCM_MAX_FD; one more is EINVAL."""

_CLOSE_SECONDS: Final = 0.01
"""For a file of this machine to be closed, which takes microseconds. Whoever calls waits no longer."""

_CLOSING_THREADS_MAX: Final = 16
"""Threads that may wait for silent servers. A frontend can send such a file with every message, and must not use up the
threads that other guests need."""

_closing: list[threading.Thread] = []
_unclosed: list[int] = []
"""Descriptors for which there was no thread. They are closed with the next ones."""

_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(FD_COUNT_MAX * array.array("i").itemsize)


class OwnedFd:
    """A descriptor with exactly one owner, who closes it.

    Pass an `OwnedFd` to give the descriptor away; pass `fileno()` to lend it for the length of a call.
    An `OwnedFd` that is dropped without `close` or `release` closes its descriptor and warns.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError(f"{fd} is not a descriptor")
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, lent.

        Raises:
            StateError: the descriptor was closed or released before.
        """
        if self._fd < 0:
            raise StateError("descriptor was given away or closed before")
        return self._fd

    @property
    def is_open(self) -> bool:
        """Whether this object still owns a descriptor."""
        return self._fd >= 0

    def release(self) -> int:
        """Gives the bare descriptor to the caller, who closes it from now on; this object is empty afterwards."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def take(self) -> OwnedFd:
        """Moves the descriptor into a new owner; this object is empty afterwards."""
        return OwnedFd(self.release())

    def duplicate(self) -> OwnedFd:
        """A second descriptor, close-on-exec, of the same open file description."""
        return OwnedFd(os.dup(self.fileno()))

    def close(self) -> None:
        """Closes the descriptor. Closing again, or after `release`, does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"descriptor {self._fd} was dropped without being closed", ResourceWarning, stacklevel=1)
            self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})" if self._fd >= 0 else "OwnedFd(empty)"


def close_all(fds: Iterable[OwnedFd | None]) -> None:
    """Closes each descriptor that is there."""
    for fd in fds:
        if fd is not None:
            fd.close()


def close_foreign(fds: Iterable[OwnedFd | None]) -> None:
    """Closes descriptors that a stranger sent, which may be of any file, and waits for no file's server.

    close(2) of a file on FUSE or NFS waits until its server has taken note, and a signal does not end that. So files
    are closed in a thread, which is left alone if it takes longer than files of this machine do.
    """
    for fd in fds:
        if fd is None or not fd.is_open:
            continue
        if _is_served_by_kernel(fd.fileno()):
            fd.close()
        else:
            _unclosed.append(fd.release())
    if _unclosed:
        _close_beside()


def _close_beside() -> None:
    """Closes what is unclosed in a thread, unless as many as there may be wait for their servers."""
    _closing[:] = [thread for thread in _closing if thread.is_alive()]
    if len(_closing) == _CLOSING_THREADS_MAX:
        return
    files = _unclosed.copy()
    thread = threading.Thread(target=_close_files, args=(files,), daemon=True)
    try:
        thread.start()
    except RuntimeError:  # this process may have no further thread
        if _closing:
            return  # and perhaps because of these
        _close_files(files)
    else:
        if not _closing:
            thread.join(_CLOSE_SECONDS)  # where one waits already, this one is likely to
        _closing.append(thread)
    del _unclosed[: len(files)]


def _close_files(files: Iterable[int]) -> None:
    for file in files:
        with contextlib.suppress(OSError):  # what its file system has to say; the descriptor is gone all the same
            os.close(file)


def _is_served_by_kernel(fd: int) -> bool:
    """Whether it is an eventfd, a pipe, a socket, memory or a TUN or TAP. Only the kernel is asked."""
    # What has no path has a name that begins with its kind; a path begins with a slash, wherever it was opened.
    try:
        name = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - with each message; a Path takes ten times as long
        return not name.startswith("/") or is_of_kind(fd, FdKind.MEMORY) or is_tun_queue(fd)
    except OSError:
        return False


def send(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int] = ()) -> int:
    """Sends `data` with borrowed `fds` attached to its first byte; returns the number of bytes sent.

    Raises:
        BlockingIOError: the socket is non-blocking and full; nothing was sent.
        OSError: as `sendmsg`; nothing was sent.
    """
    if not fds:
        return sock.send(data, socket.MSG_NOSIGNAL)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    return sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, size: int) -> tuple[bytes, list[OwnedFd]]:
    """Receives at most `size` bytes and the descriptors that came with them (close-on-exec, owned by the caller).

    An empty `bytes` means the other side closed the channel.

    Raises:
        BlockingIOError: the socket is non-blocking and nothing is there.
        KernelError: the kernel had to drop descriptors (MSG_CTRUNC); those that came are closed.
        OSError: as `recvmsg`.
    """
    data, ancillary, flags, _ = sock.recvmsg(size, _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
    fds: list[OwnedFd] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            fds += [OwnedFd(number) for number in numbers]
    if flags & socket.MSG_CTRUNC:
        close_foreign(fds)
        # As for who expects none: what is sent has room in `_ANCILLARY_SIZE`, so it was this process that had none.
        raise KernelError("descriptors were lost on the way: this process has no room for them", errno=errno.EMFILE)
    return data, fds
