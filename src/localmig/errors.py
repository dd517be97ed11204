"""The exceptions localmig raises: the class says whose fault it is.

    LocalmigError
    ├── ConfigError      you wrote it wrong: an option, an address, a parameter
    │   └── NotFoundError   there is no object of that name
    ├── StateError       not now: the call is right, the state is not
    ├── PeerError        the other side: a frontend, a guest, the other daemon
    │   └── PeerLostError   the other side is gone, or the channel to it
    └── KernelError      the operating system said no (its error is `__cause__`)

Texts are lower case without a full stop, quote object ids, write addresses in hexadecimal and name both values
where two disagree. Facts a caller may act on are attributes; nobody parses a text.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final


class LocalmigError(Exception):
    """Base of every error localmig raises on purpose."""


class ConfigError(LocalmigError):
    """What the user wrote cannot be: nothing was changed."""


class NotFoundError(ConfigError):
    """There is no object of that name."""


class StateError(LocalmigError):
    """The call does not fit the present state: nothing was changed."""


class PeerError(LocalmigError):
    """The other side sent what it must not send. What is true afterwards stands at the raising function."""


class PeerLostError(PeerError):
    """The other side closed the channel, or died."""


class KernelError(LocalmigError):
    """The operating system refused; `__cause__` is its `OSError`.

    Attributes:
        errno: the error number, as in `OSError.errno`.
    """

    def __init__(self, text: str, *, errno: int) -> None:
        super().__init__(text)
        self.errno = errno


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Around code of a package that adds types: whatever it raises that is no error of ours becomes a ConfigError.

    Args:
        what: whose code it is and what it could not do, for the text.
    """
    try:
        yield
    except LocalmigError:
        raise
    except Exception as error:  # a package's author may get anything wrong
        raise ConfigError(f"{what}: {type(error).__name__}: {error}") from error


_MEMORY_ADVICE: Final = "free memory of the machine, or raise the limit of the control group of process {pid}"

_ADVICE: Final = {
    errno.EMFILE: "raise RLIMIT_NOFILE of process {pid}, which is {descriptors} now",
    errno.ENFILE: "raise sysctl fs.file-max, or close files elsewhere on the machine",
    errno.ENOBUFS: _MEMORY_ADVICE,
    errno.ENOMEM: _MEMORY_ADVICE,
    errno.ENOSPC: "raise sysctl fs.epoll.max_user_watches; or, where a file was written, free space on its disk",
    errno.ETOOMANYREFS: "the other side does not take descriptors in flight, of which process {pid} may have "
    "{descriptors}: raise its RLIMIT_NOFILE",
}
"""What to do where something ran out, wherever it did."""


def is_shortage(error: OSError) -> bool:
    """Whether something ran out, of which nothing else can be concluded."""
    return error.errno in _ADVICE


def reason_of(error: BaseException) -> str:
    """What an error says to people; with what to do, where something ran out."""
    text = str(error)
    number = error.errno if isinstance(error, OSError | KernelError) else None
    if isinstance(error, MemoryError):
        text, number = "out of memory", errno.ENOMEM
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: '{error.filename}'"
    if number not in _ADVICE:
        return text
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = _ADVICE[number].format(pid=os.getpid(), descriptors=descriptors)
    return text if advice in text else f"{text}; {advice}"
