"""A daemon whose system calls fail as a test says, at the border to the kernel: for Python and Rust alike.

Owns:        the seccomp filter, the thread that answers for the kernel, which calls can run short of what.
Never sees:  which outcome is right; tests/faults/ does.
Read next:   tests/faults/test_shortage.py; faults.py, which does things to the daemon's own steps.

The calls in `CALLS` are held by a filter of the kind that asks a supervisor (seccomp_unotify(2)). The supervisor lets
the kernel go on, in some microseconds, or answers in its place with an error. So nothing of the daemon is replaced, a
call without libc is no exception, and the fault can be set anew while the daemon runs.

    python -m tests.kit.shortage TELL HEAR MODULE ARGUMENTS…    how `Shortage.start` starts a daemon
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import runpy
import select
import struct
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from tests.kit.fork_server import fork_server

from localmig.fds import OwnedFd, close_all
from localmig.testing.process import Process

_NUMBERS: Final = {
    "x86_64": {
        "accept4": 288,
        "clone": 56,
        "clone3": 435,
        "connect": 42,
        "dup": 32,
        "epoll_create1": 291,
        "epoll_ctl": 233,
        "eventfd2": 290,
        "fcntl": 72,
        "getsockopt": 55,
        "ioctl": 16,
        "madvise": 28,
        "memfd_create": 319,
        "mmap": 9,
        "openat": 257,
        "pidfd_open": 434,
        "recvmsg": 47,
        "sendmsg": 46,
        "sendto": 44,
        "socket": 41,
        "socketpair": 53,
    },
    "aarch64": {
        "accept4": 242,
        "clone": 220,
        "clone3": 435,
        "connect": 203,
        "dup": 23,
        "epoll_create1": 20,
        "epoll_ctl": 21,
        "eventfd2": 19,
        "fcntl": 25,
        "getsockopt": 209,
        "ioctl": 29,
        "madvise": 233,
        "memfd_create": 279,
        "mmap": 222,
        "openat": 56,
        "pidfd_open": 434,
        "recvmsg": 212,
        "sendmsg": 211,
        "sendto": 206,
        "socket": 198,
        "socketpair": 199,
    },
}
"""The kernel's numbers (asm/unistd.h), by machine."""

_SAME: Final = {"clone": "clone3"}
"""Under a sandbox that does not let clone3(2) through libc makes its threads by the older call."""

_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

CALLS: Final = {
    "accept4": (*_DESCRIPTORS, errno.ENOBUFS),
    "clone3": (errno.EAGAIN, errno.ENOMEM),
    "connect": (errno.EAGAIN,),
    "dup": (errno.EMFILE,),
    "epoll_create1": _DESCRIPTORS,
    "epoll_ctl": (errno.ENOMEM, errno.ENOSPC),
    "eventfd2": _DESCRIPTORS,
    "fcntl": (errno.EMFILE,),
    "getsockopt": _DESCRIPTORS,
    "ioctl": (errno.ENOMEM,),
    "madvise": (errno.ENOMEM, errno.EAGAIN),
    "memfd_create": _DESCRIPTORS,
    "mmap": (errno.ENOMEM,),
    "openat": _DESCRIPTORS,
    "pidfd_open": _DESCRIPTORS,
    "recvmsg": (errno.ENOMEM,),
    "sendmsg": (errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS),
    "sendto": (errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN),
    "socket": (*_DESCRIPTORS, errno.ENOBUFS),
    "socketpair": _DESCRIPTORS,
}
"""What each call can run out of, by its manual page. poll(2) is not here: for a handful of descriptors it takes no
memory."""

_F_DUPFD_CLOEXEC: Final = 1030
_TUNSETIFF: Final = 0x400454CA
_SO_PEERPIDFD: Final = 77
_EPOLL_CTL_ADD: Final = 1
_ONLY: Final = {
    "epoll_ctl": (1, (_EPOLL_CTL_ADD,)),
    "fcntl": (1, (fcntl.F_DUPFD, _F_DUPFD_CLOEXEC)),
    "getsockopt": (2, (_SO_PEERPIDFD,)),
    "ioctl": (1, (_TUNSETIFF,)),
}
"""Of calls that do many things, which argument tells those that make something."""

# linux/seccomp.h, linux/filter.h, linux/prctl.h
_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_PIDFD_GETFD: Final = 438
_PR_SET_NO_NEW_PRIVS: Final = 38
_SET_MODE_FILTER: Final = 1
_NEW_LISTENER: Final = 8
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ASK, _ALLOW = 0x7FC00000, 0x7FFF0000
_INSTRUCTION: Final = struct.Struct("HBBI")
_RECEIVE: Final = 0xC0502100
_ANSWER: Final = 0xC0182101
_GO_ON: Final = 1
_NOTE: Final = struct.Struct("=QIIiIQ6Q")
_VERDICT: Final = struct.Struct("=QqiI")

_START_SECONDS_MAX: Final = 30.0
"""For Python to start on a loaded machine."""


def calls_here() -> dict[str, int]:
    """The calls of this kind of machine by name; none where nobody wrote them down."""
    return _NUMBERS.get(platform.machine(), {})


@dataclass(kw_only=True, slots=True)
class _Plan:
    """What shall fail.

    Attributes:
        call: by name.
        error: its errno.
        nth: the first one that fails, counted from 1.
        for_good: whether all later ones fail too.
        after: counting begins at the first call of this name, None: at once.
        seen: how many came so far.
        failed: how many failed.
    """

    call: str
    error: int
    nth: int
    for_good: bool
    after: str | None
    seen: int = 0
    failed: int = 0


class Shortage:
    """What one daemon runs out of; a thread that answers its calls. Use it around the daemon."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._lock = threading.Lock()
        hear, tell = (OwnedFd(fd) for fd in os.pipe())
        go, say = (OwnedFd(fd) for fd in os.pipe())
        self._ends = (hear, tell, go, say)
        self._wake, self._waker = (OwnedFd(fd) for fd in os.pipe())
        self._names = {number: _SAME.get(name, name) for name, number in calls_here().items()}
        self._thread = threading.Thread(target=self._run, name="shortage", daemon=True)
        self._thread.start()

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        inherited: Sequence[int] = (),
    ) -> Process:
        """Starts the daemon, its calls held; for `DaemonProcess`."""
        _, tell, go, _ = (end.fileno() for end in self._ends)
        return fork_server().start(
            "tests.kit.shortage",
            [str(tell), str(go), module, *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            inherited=(tell, go, *inherited),
        )

    def plan(self, call: str, error: int, *, nth: int = 1, for_good: bool = False, after: str | None = None) -> None:
        """From now on the `nth` such call fails with `error`, and with `for_good` all later ones too.

        Args:
            call: a name in `CALLS`.
            error: an errno.
            nth: counted from 1.
            for_good: whether it stays so until `end`.
            after: counting begins at the next call of this name.
        """
        with self._lock:
            self._plan = _Plan(call=call, error=error, nth=nth, for_good=for_good, after=after)

    def end(self) -> tuple[int, int]:
        """From now on nothing fails; how many calls of the kind came, and how many failed."""
        with self._lock:
            plan, self._plan = self._plan, None
        return (0, 0) if plan is None else (plan.seen, plan.failed)

    def close(self) -> None:
        """Answers no more. The daemon must have ended."""
        self._waker.close()
        self._thread.join()
        close_all((*self._ends, self._wake))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the supervisor ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        hear, _, _, say = self._ends
        if not self._is_readable(hear):
            return
        pid, number = struct.unpack("ii", os.read(hear.fileno(), 8))
        with OwnedFd(os.pidfd_open(pid)) as pidfd, OwnedFd(_pidfd_getfd(pidfd, number)) as listener:
            os.write(say.fileno(), b"\n")
            while self._is_readable(listener):
                self._serve(listener)

    def _is_readable(self, fd: OwnedFd) -> bool:
        """Waits for something to read; False at the end."""
        poll = select.poll()
        poll.register(fd.fileno(), select.POLLIN)
        poll.register(self._wake.fileno(), select.POLLIN)
        return poll.poll() == [(fd.fileno(), select.POLLIN)]

    def _serve(self, listener: OwnedFd) -> None:
        note = bytearray(_NOTE.size)
        try:
            fcntl.ioctl(listener.fileno(), _RECEIVE, note)
            key, _, _, number, _, _, *arguments = _NOTE.unpack(note)
            error = self._error_for(self._names.get(number, ""), arguments)
            verdict = _VERDICT.pack(key, 0, -error, 0 if error else _GO_ON)
            fcntl.ioctl(listener.fileno(), _ANSWER, verdict)
        except OSError as gone:
            if gone.errno != errno.ENOENT:  # who asked was killed meanwhile, or a signal took its call back
                raise

    def _error_for(self, call: str, arguments: Sequence[int]) -> int:
        """What the call fails with; 0: it goes on."""
        with self._lock:
            plan = self._plan
            if plan is None:
                return 0
            if plan.after is not None:
                if call != plan.after:
                    return 0
                plan.after = None
            if call != plan.call:
                return 0
            if call in _ONLY:
                place, makers = _ONLY[call]
                if arguments[place] not in makers:
                    return 0
            plan.seen += 1
            if plan.seen < plan.nth or (plan.seen > plan.nth and not plan.for_good):
                return 0
            plan.failed += 1
            return plan.error


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _pidfd_getfd(pidfd: OwnedFd, number: int) -> int:
    fd: int = _libc().syscall(_PIDFD_GETFD, pidfd.fileno(), number, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return fd


# -- in the daemon ----------------------------------------------------------------------------------------------------


def _install() -> OwnedFd:
    """From now on this process's calls are asked about; gives where."""
    numbers = sorted(calls_here().values())
    program = _INSTRUCTION.pack(_LOAD, 0, 0, 0)
    for index, number in enumerate(numbers):
        program += _INSTRUCTION.pack(_JUMP_EQUAL, len(numbers) - index, 0, number)
    program += _INSTRUCTION.pack(_RETURN, 0, 0, _ALLOW) + _INSTRUCTION.pack(_RETURN, 0, 0, _ASK)
    code = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(program) // _INSTRUCTION.size, ctypes.addressof(code))
    )
    libc = _libc()
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    fd = libc.syscall(_SECCOMP[platform.machine()], _SET_MODE_FILTER, _NEW_LISTENER, header)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return OwnedFd(fd)


def main(argv: Sequence[str]) -> None:
    """Becomes `python -m MODULE ARGUMENTS`, its calls held."""
    tell, hear = (OwnedFd(int(number)) for number in argv[:2])
    with tell, hear, _install() as listener:
        os.write(tell.fileno(), struct.pack("ii", os.getpid(), listener.fileno()))
        os.read(hear.fileno(), 1)
    sys.argv = list(argv[2:])
    runpy.run_module(argv[2], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
