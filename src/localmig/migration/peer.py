"""The process at the other end of a handover, known by its pidfd: whether it lives, and its end.

Owns:        one pidfd.
Never sees:  the channel, the tables.
Read next:   outgoing.py (fencing) and incoming.py (taking over).
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from typing import Self

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.migration.channel import resolve


class Peer:
    """Another process, held by a pidfd: its pid cannot be taken by somebody else while we look."""

    def __init__(self, pidfd: OwnedFd) -> None:
        self._pidfd = pidfd

    @classmethod
    def from_descriptor(cls, fd: OwnedFd) -> Self:
        """Takes the descriptor a peer sent as its pidfd.

        Raises:
            PeerError: it is no pidfd, or it is our own. The descriptor is closed.
        """
        try:
            with open(f"/proc/self/fdinfo/{fd.fileno()}", encoding="ascii") as info:
                pids = [int(line.split()[1]) for line in info if line.startswith("Pid:")]
        except OSError:
            pids = []
        if not pids or pids[0] == os.getpid():
            fd.close()
            raise PeerError(
                "the descriptor in HELLO is no pidfd of another process: "
                + ("it is no pidfd" if not pids else "it names this process")
            )
        return cls(fd)

    @property
    def is_dead(self) -> bool:
        """Whether the process ended: every descriptor and thread of it is gone."""
        poll = select.poll()
        poll.register(self._pidfd.fileno(), select.POLLIN)
        return bool(poll.poll(0))

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


def own_pidfd() -> OwnedFd:
    """A pidfd of this process, to be sent in HELLO."""
    return OwnedFd(os.pidfd_open(os.getpid()))
