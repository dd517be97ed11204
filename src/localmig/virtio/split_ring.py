"""Facts of the virtio specification about split virtqueues (virtio 1.2, section 2.7).

Owns:        how large each part of a ring is.
Never sees:  a ring.
Read next:   rust/dataplane/src/split.rs, which walks them.
"""

from __future__ import annotations


def part_sizes(size: int) -> tuple[int, int, int]:
    """Bytes of (descriptor table, avail ring, used ring) of a ring of `size` entries.

    Both rings have their event field at the end, which is there whether it was negotiated or not.
    """
    return 16 * size, 6 + 2 * size, 6 + 8 * size
