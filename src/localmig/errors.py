"""The exceptions localmig raises: the class says whose fault it is.

    LocalmigError
    ├── ConfigError      you wrote it wrong: an option, an address, a parameter
    ├── StateError       not now: the call is right, the state is not
    ├── PeerError        the other side: a frontend, a guest, the other daemon
    │   └── PeerLostError   the other side is gone, or the channel to it
    └── KernelError      the operating system said no (its error is `__cause__`)

Texts are lower case without a full stop, quote object ids, write addresses in hexadecimal and name both values
where two disagree. Facts a caller may act on are attributes; nobody parses a text.
"""

from __future__ import annotations


class LocalmigError(Exception):
    """Base of every error localmig raises on purpose."""


class ConfigError(LocalmigError):
    """What the user wrote cannot be: nothing was changed."""


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
