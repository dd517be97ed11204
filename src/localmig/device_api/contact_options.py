"""The options that say who connects to whom on a UNIX socket, the same for devices and netdevs.

Owns:        server= and reconnect-ms=, and that they go together.
Never sees:  a socket; whose options they are.
Read next:   contact.py for what becomes of them; vhost_user_options.py and netdevs/stream_options.py for their users.
"""

from __future__ import annotations

from typing import Any, Final

from localmig.errors import ConfigError
from localmig.options.specs import Fit, option
from localmig.options.values import Number, Switch

RECONNECT_MS_MAX: Final = 60_000
"""Longest pause between two attempts to connect: a peer that came back is not left waiting for longer."""


def server_option(peer: str, *, default: bool) -> Any:
    """The field `server`: whether the daemon listens. `peer` is who is at the other end, for help."""
    return option(
        Switch(),
        f"whether the daemon listens on the socket and the {peer} connects; off: the other way round",
        fit=Fit.WITH_DESCRIPTORS,
        default=default,
    )


def reconnect_option(peer: str) -> Any:
    """The field `reconnect_ms`: how often a daemon that connects tries to. `peer` as `server_option`'s."""
    return option(
        Number(lowest=0, highest=RECONNECT_MS_MAX, reason=f"a {peer} that came back waits a minute at most"),
        f"with server=off, milliseconds between two attempts to connect to the {peer}; 0: one attempt, at the start",
        fit=Fit.OURS,
        default=0,
    )


def check_contact(*, server: bool, reconnect_ms: int) -> None:
    """Raises ConfigError where the two do not go together, in QEMU's words."""
    if server and reconnect_ms:
        raise ConfigError("'reconnect-ms' option is incompatible with socket in server listen mode")
