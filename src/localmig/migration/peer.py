"""The process at the other end of a handover: whether it lives, its end, and what a source says beyond its death.

Owns:        a pidfd; two eventfds, one that revokes an offer and one that counts what the source changed since.
Never sees:  the channel, the tables.
Read next:   outgoing.py (fencing) and incoming.py (taking over).
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from contextlib import ExitStack
from typing import Final, Self

from localmig.access import is_same_process, pid_of
from localmig.errors import PeerError
from localmig.fd_kind import fdinfo
from localmig.fds import OwnedFd, close_foreign
from localmig.migration.channel import resolve


class Peer:
    """Another process, held by a pidfd: its pid cannot be taken by somebody else while we look."""

    def __init__(self, pidfd: OwnedFd) -> None:
        self._pidfd = pidfd

    @classmethod
    def from_descriptor(cls, fd: OwnedFd, *, known: OwnedFd | None = None) -> Self:
        """Takes the descriptor a peer sent as its pidfd.

        Args:
            fd: the descriptor.
            known: a pidfd of the peer that the kernel gave us, lent; None where it gave none.

        Raises:
            PeerError: it is no pidfd, it is our own, or it is of another process than the kernel's: who is killed by it
                must be the peer. The descriptor is closed.
        """
        with ExitStack() as refused:
            refused.callback(close_foreign, (fd,))
            if (wrong := _wrong_about(fd, known)) is not None:
                raise PeerError(f"the descriptor in HELLO {wrong}")
            refused.pop_all()
        return cls(fd)

    @property
    def pid(self) -> int:
        """Its number, 0 where it has none in this process's PID namespace or ended. Raises OSError as `pid_of`."""
        return max(0, pid_of(self._pidfd.fileno()) or 0)

    @property
    def is_dead(self) -> bool:
        """Whether the process ended: every descriptor and thread of it is gone."""
        return _is_readable(self._pidfd)

    async def wait_dead(self, *, timeout_s: float) -> bool:
        """Waits for the process to end; whether it did. Cancelling is safe."""
        if self.is_dead:
            return True
        loop = asyncio.get_running_loop()
        dead: asyncio.Future[None] = loop.create_future()
        fd = self._pidfd.fileno()
        loop.add_reader(fd, resolve, dead)
        try:
            async with asyncio.timeout(timeout_s):
                await dead
        except TimeoutError:
            return self.is_dead
        finally:
            loop.remove_reader(fd)
        return True

    def kill(self) -> bool:
        """Sends SIGKILL; whether the kernel took it (it does not across users)."""
        try:
            signal.pidfd_send_signal(self._pidfd.fileno(), signal.SIGKILL)
        except ProcessLookupError:
            return True
        except OSError:
            # Another user's, or of another pid namespace.
            return False
        return True

    def close(self) -> None:
        """Forgets the process. Idempotent."""
        self._pidfd.close()


_TAKEN_BACK: Final = 1
_LET_GO: Final = 2
"""What a revocation counts to. A source says one of the two, once."""


class _SharedCount:
    """An eventfd that both sides hold. What the source adds to it is there also when the source is dead."""

    def __init__(self, fd: OwnedFd) -> None:
        self._fd = fd

    @classmethod
    def create(cls) -> Self:
        """One that says nothing yet. Raises OSError."""
        return cls(OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)))

    @classmethod
    def from_descriptor(cls, fd: OwnedFd) -> Self:
        """Takes the descriptor that a source sent in HELLO.

        Raises:
            PeerError: it is no eventfd. The descriptor is closed.
        """
        with ExitStack() as refused:
            refused.callback(close_foreign, (fd,))
            if not fdinfo(fd.fileno(), "eventfd-count:"):
                raise PeerError("a descriptor behind the pidfd in HELLO is no eventfd")
            refused.pop_all()
        return cls(fd)

    @property
    def count(self) -> int:
        """What was added so far. Reading the eventfd would take it away from who looks later."""
        return next((int(count, 16) for count in fdinfo(self._fd.fileno(), "eventfd-count:")), 0)

    def add(self, number: int) -> None:
        """Adds to it. It cannot fail: an eventfd counts to 2^64 - 2."""
        os.eventfd_write(self._fd.fileno(), number)

    def fileno(self) -> int:
        """The descriptor, lent."""
        return self._fd.fileno()

    def close(self) -> None:
        """Forgets it; what was said stays so for the other side. Idempotent."""
        self._fd.close()


class Changes(_SharedCount):
    """By which a source counts what its frontends changed, before it takes notice of the change itself.

    SETUP carries the count that it is as new as. A destination whose setup is older than the count of a dead source
    does not take over: the frontend was answered something that the destination knows nothing of.
    """


class Revocation(_SharedCount):
    """By which a source says what it decided: to a destination that does not read, or cannot be reached.

    It works also if the channel ended in the middle of a frame. Before COMMIT it says that the source took the offer
    back: a destination looks here before it takes over from a dead source. Past COMMIT it says that the source released
    everything for good: until then the destination's death would bring the source back, so the destination hands over
    to nobody else.
    """

    @property
    def is_told(self) -> bool:
        """Whether the source took its offer back."""
        return self.count == _TAKEN_BACK

    @property
    def has_let_go(self) -> bool:
        """Whether the source will never serve again, whatever becomes of the destination."""
        return self.count == _LET_GO

    def tell(self) -> None:
        """Takes the offer back."""
        self.add(_TAKEN_BACK)

    def let_go(self) -> None:
        """Says that this process will never serve again."""
        self.add(_LET_GO)


def own_pidfd() -> OwnedFd:
    """A pidfd of this process, to be sent in HELLO."""
    return OwnedFd(os.pidfd_open(os.getpid()))


def _is_readable(fd: OwnedFd) -> bool:
    poll = select.poll()
    poll.register(fd.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _wrong_about(pidfd: OwnedFd, known: OwnedFd | None) -> str | None:
    """What is wrong about the descriptor that a peer sent as its pidfd."""
    pid = pid_of(pidfd.fileno())
    if pid is None or pid == os.getpid():
        return "is no pidfd of another process: " + ("it is no pidfd" if pid is None else "it names this process")
    if known is not None and not is_same_process(pidfd.fileno(), known.fileno()):
        return (
            f"names process {pid}, but process {pid_of(known.fileno())} is at the other end of the socket: "
            "connect source and destination directly"
        )
    return None
