"""What both sides of a handover do alike: how long they wait for each other, how HELLO carries descriptors.

Owns:        the waits and the count of rounds that both know; HELLO's payload with its descriptors; who is blamed.
Never sees:  a state of a side, what a part is inside.
Read next:   outgoing.py and incoming.py, its two users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from localmig.device_api import Part
from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.migration.channel import Channel, Frame
from localmig.migration.hello import Hello

Blaming = Callable[[Part, str], AbstractContextManager[None]]
"""Around what a part's code does ("save", "take over"): whatever the code of a package raises becomes a ConfigError,
which names the package."""


def blaming_nobody(part: Part, what: str) -> AbstractContextManager[None]:
    """For parts that are all of this program: what they raise is a bug of its own."""
    del part, what
    return nullcontext()


HELLO_TIMEOUT_S: Final = 10.0
"""A destination answers HELLO after it looked at its options; it opens nothing slow."""

SETUP_TIMEOUT_S: Final = 30.0
"""The destination maps and populates guest memory: about a second per hundred gigabytes."""

CATCH_UP_ROUNDS_MAX: Final = 3
"""How often what frontends changed is sent again. The last time they are frozen, so nothing can change after that; the
times before make the last one short."""


def hello_payload(channel: Channel, hello: Hello, descriptors: Sequence[int]) -> tuple[bytes, list[tuple[int, int]]]:
    """HELLO's payload, with lent descriptors at its last bytes where the channel can carry them."""
    data = hello.encode()
    if not channel.passes_descriptors:
        descriptors = ()
    places = list(enumerate(descriptors, len(data)))
    return data + b" " * len(places), places


def hello_descriptors(frame: Frame, count: int, *, required: bool) -> list[OwnedFd]:
    """The `count` descriptors at the last bytes of HELLO, to be taken; none where the channel carries none.

    Raises:
        PeerError: `required`, and no descriptor arrived with a HELLO that came over a channel meant to carry them; or
            another number, or elsewhere.
    """
    if not frame.fds:
        if required:
            raise PeerError(
                "parameter 'local' is on, but the descriptor sent with HELLO did not arrive: something between source "
                "and destination (a proxy?) does not pass descriptors; connect them directly, or set local to false"
            )
        return []
    size = len(frame.data)
    if [offset for offset, _ in frame.fds] != list(range(size - count, size)):
        raise PeerError(f"HELLO came with {len(frame.fds)} descriptors, expected {count} at its end")
    return [fd for _, fd in frame.fds]


def on_off(value: bool) -> str:  # noqa: FBT001 - a value to be shown
    """How a switch is written."""
    return "on" if value else "off"
