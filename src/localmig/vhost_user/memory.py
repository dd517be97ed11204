"""The table of guest memory a frontend shares: what a region is, which tables can be, addresses in them.

Owns:        MemoryRegion, the rules of the table, user address to guest address.
Never sees:  a mapping; nothing is mapped here.
Read next:   dataplane/ for what maps it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from localmig.errors import PeerError
from localmig.fd_kind import is_cut_short
from localmig.fds import OwnedFd

REGION_COUNT_MAX: Final = 509
"""Regions a frontend may add one by one. KVM on x86 had 509 memory slots to give for years and VMMs size themselves
by it. Each region holds a descriptor, and 509 leave room for the rest under the usual RLIMIT_NOFILE of 1024; each is a
mapping, of which a process has 65530 (vm.max_map_count). One ring's addresses are found as fast among 509 as the packet
path needs: 12 ns, beside 3 ns with one region."""

MEMORY_SIZE_MAX: Final = 1 << 43
"""Bytes that all regions of a frontend have together, 8 TiB. A process has addresses for 128 TiB, and a file without
pages costs a frontend nothing: one must not take the addresses from the others, nor from this process's own needs."""

_ADDRESS_MAX: Final = (1 << 64) - 1
_FILE_OFFSET_MAX: Final = (1 << 63) - 1  # off_t is signed


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRegion:
    """A piece of guest memory, in bytes: `size` bytes of the file `fd`, from `mmap_offset` on."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int
    fd: OwnedFd


def check_regions(regions: Sequence[MemoryRegion], *, count_max: int) -> None:
    """Checks what holds for every table of regions.

    Raises:
        PeerError: too many regions or too much memory; a region that is empty or wraps around, or two that share guest
            addresses or user addresses: rings are told in user addresses, and each must have one meaning.
    """
    if len(regions) > count_max:
        raise PeerError(f"guest memory has {len(regions)} regions, limit is {count_max}")
    if (size := sum(region.size for region in regions)) > MEMORY_SIZE_MAX:
        raise PeerError(f"guest memory has {size:#x} bytes, limit is {MEMORY_SIZE_MAX:#x}")
    for region in regions:
        if region.size == 0:
            raise PeerError(f"memory region at {region.guest_address:#x} is empty")
        for name, start, limit in (
            ("guest address", region.guest_address, _ADDRESS_MAX),
            ("user address", region.user_address, _ADDRESS_MAX),
            ("mmap offset", region.mmap_offset, _FILE_OFFSET_MAX),
        ):
            if start + region.size - 1 > limit:
                raise PeerError(f"memory region of {region.size:#x} bytes at {name} {start:#x} ends behind {limit:#x}")
    _check_apart("guest", [(region.guest_address, region.size) for region in regions])
    _check_apart("user", [(region.user_address, region.size) for region in regions])


def _check_apart(space: str, ranges: Sequence[tuple[int, int]]) -> None:
    for (lower, lower_size), (upper, upper_size) in pairwise(sorted(ranges)):
        if lower + lower_size > upper:
            raise PeerError(
                f"memory regions overlap: {lower_size:#x} bytes at {lower:#x} and {upper_size:#x} bytes at {upper:#x}"
                f" in {space} addresses"
            )


def check_sizes(regions: Sequence[MemoryRegion]) -> None:
    """Raises PeerError where the file of a region is smaller than announced and cannot have been any larger.

    One that a frontend made smaller since costs its own rings and is no reason to stay.
    """
    for region in regions:
        end = region.mmap_offset + region.size
        if is_cut_short(region.fd.fileno(), end):
            raise PeerError(
                f"memory region at {region.guest_address:#x} ends at byte {end:#x} of its file, which has "
                f"{os.fstat(region.fd.fileno()).st_size:#x} and is sealed against shrinking: it is another file"
            )


def to_guest_address(regions: Sequence[MemoryRegion], user_address: int, size: int) -> int:
    """The guest address of `size` bytes at a frontend's user address.

    Raises:
        PeerError: no single region holds all of them.
    """
    for region in regions:
        offset = user_address - region.user_address
        if offset >= 0 and offset + size <= region.size:
            return region.guest_address + offset
    raise PeerError(f"{size:#x} bytes at user address {user_address:#x} are not inside one memory region")


def borrowed(regions: Sequence[MemoryRegion]) -> list[tuple[int, int, int, int, int]]:
    """The table as plain numbers (guest address, size, user address, mmap offset, borrowed descriptor)."""
    return [
        (region.guest_address, region.size, region.user_address, region.mmap_offset, region.fd.fileno())
        for region in regions
    ]
