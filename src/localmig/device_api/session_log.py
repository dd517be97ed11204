"""The dirty log of a session: which pages of the guest's memory this process writes, for a VMM that moves the guest.

Owns:        SessionLog: the mapping of what SET_LOG_BASE announced, which ring marks what there.
Never sees:  a mark; whether a ring runs.
Read next:   vhost_user/protocol.py for what a frontend says of it, rust/dataplane/src/log.rs for the marks.
"""

from __future__ import annotations

import errno
import os

from localmig.dataplane import DirtyLog
from localmig.errors import KernelError
from localmig.vhost_user.protocol import LogState, SessionState


class SessionLog:
    """A session's log as this process has it. A log that cannot be used is one that stops each ring that needs it."""

    def __init__(self) -> None:
        self._announced: LogState | None = None
        self._mapped: DirtyLog | None = None

    def renew(self, state: SessionState) -> str | None:
        """Maps the log that the session has now. Why no ring can run with it, None if one can.

        The former one is unmapped when no ring has it any more.
        """
        assert state.log is not None
        self._announced = state.log
        self._mapped = DirtyLog(state.log.size, state.log.mmap_offset, state.log.fd.fileno())
        return self._mapped.reason()

    def adopt(self, state: SessionState) -> None:
        """Maps the log of a session that another process served, if it has one.

        Raises:
            KernelError: this process has no room for it; the other one had better go on.
        """
        if state.log is None:
            return
        try:
            self._mapped = DirtyLog.adopt(state.log.size, state.log.mmap_offset, state.log.fd.fileno())
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise KernelError(f"cannot map the dirty log: {reason}", errno=error.errno or errno.EIO) from error
        self._announced = state.log

    def of(self, state: SessionState, vring: int) -> tuple[DirtyLog, int | None] | None:
        """Where a ring marks what it writes, and where the ring itself is logged; None where nothing is logged."""
        if not state.logs or state.log is None:
            return None
        assert self._mapped is not None
        assert self._announced is state.log, vring
        ring = state.vrings[vring]
        return self._mapped, ring.log_address if ring.is_logged else None

    def forget(self) -> None:
        """The session is over, or another process serves it."""
        self._announced = self._mapped = None
