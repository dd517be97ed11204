"""Facts of the virtio and vhost-user specifications about packed virtqueues (virtio 1.2, section 2.8).

Owns:        how each part of a ring is aligned, how large it is, where a ring begins; the base of SET_VRING_BASE.
Never sees:  a ring.
Read next:   rust/dataplane/src/packed.rs, which walks them.

A position is 16 bits: the index of a descriptor, and the wrap counter in bit 15.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PARTS: Final[Mapping[str, int]] = {
    "descriptor ring": 16,
    "driver event suppression": 4,
    "device event suppression": 4,
}
"""The descriptor area, the driver area and the device area, and the alignment of each in bytes (section 2.8.10)."""

TOUCHED: Final = (0, 14)
"""Where two bytes stand that are 0 until a driver uses the ring, as (area, offset): the first descriptor's flags."""

_WRAP_COUNTER: Final = 1 << 15

START: Final = _WRAP_COUNTER
"""The position of a ring that nobody used yet: wrap counters begin at 1 (section 2.8.1)."""


def part_sizes(size: int) -> tuple[int, int, int]:
    """Bytes of (descriptor ring, driver event suppression, device event suppression) of a ring of `size` entries."""
    return 16 * size, 4, 4


def index_of(position: int) -> int:
    """The descriptor that a position names."""
    return position & ~_WRAP_COUNTER


def base_of(position: int) -> int:
    """What GET_VRING_BASE answers: the available and the used position, which are the same where nothing is in flight.

    vhost-user, "Vring descriptor indices for packed virtqueues": available in bits 0 to 15, used in bits 16 to 31.
    """
    return position | position << 16


def position_of(base: int) -> int:
    """The available position of a base."""
    return base & 0xFFFF
