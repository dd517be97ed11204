"""What feature bits are called, in Linux's and QEMU's words.

Owns:        from bits to names, by a table.
Never sees:  what a bit does.
Read next:   vhost_user/info.py and the info.py of each device and netdev, which have the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntFlag


def named(prefix: str, bits: Iterable[IntFlag]) -> dict[int, str]:
    """A table of bits whose names in the code become those of the field by a prefix."""
    return {bit.value: f"{prefix}{bit.name}" for bit in bits}


def names_of(bits: int, table: Mapping[int, str]) -> list[str]:
    """Lowest bit first; a bit without a name by its number."""
    numbers = (number for number in range(bits.bit_length()) if bits >> number & 1)
    return [table.get(1 << number, f"bit {number}") for number in numbers]
