"""Facts of the virtio specification about split virtqueues (virtio 1.2, section 2.7).

Owns:        how each part of a ring is aligned, how large it is, where a ring begins.
Never sees:  a ring.
Read next:   rust/dataplane/src/split.rs, which walks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PARTS: Final[Mapping[str, int]] = {"descriptor table": 16, "avail ring": 2, "used ring": 4}
"""The descriptor area, the driver area and the device area, and the alignment of each in bytes."""

TOUCHED: Final = (1, 2)
"""Where two bytes stand that are 0 until a driver uses the ring, as (area, offset): the avail index."""

START: Final = 0
"""The position of a ring that nobody used yet."""


def part_sizes(size: int) -> tuple[int, int, int]:
    """Bytes of (descriptor table, avail ring, used ring) of a ring of `size` entries.

    Both rings have their event field at the end, which is there whether it was negotiated or not.
    """
    return 16 * size, 6 + 2 * size, 6 + 8 * size
