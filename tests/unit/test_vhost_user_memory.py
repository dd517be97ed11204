"""Which tables of guest memory can be, and where addresses lie in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.vhost_user.memory import MEMORY_SIZE_MAX, MemoryRegion, borrowed, check_regions, to_guest_address

MakeRegion = Callable[[int, int, int], MemoryRegion]


@pytest.fixture
def region() -> Iterator[MakeRegion]:
    with OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        yield lambda guest, size, user: MemoryRegion(
            guest_address=guest, size=size, user_address=user, mmap_offset=0, fd=fd
        )


def test_regions_that_touch_are_no_overlap(region: MakeRegion) -> None:
    check_regions([region(0x2000, 0x1000, 0), region(0x1000, 0x1000, 0x1000)], count_max=2)


def test_regions_that_share_guest_addresses_are_refused(region: MakeRegion) -> None:
    with pytest.raises(PeerError, match="overlap: 0x1001 bytes at 0x1000 and 0x1000 bytes at 0x2000"):
        check_regions([region(0x2000, 0x1000, 0), region(0x1000, 0x1001, 0x5000)], count_max=2)


def test_regions_that_share_user_addresses_are_refused(region: MakeRegion) -> None:
    # A ring's address would have two meanings.
    text = "overlap: 0x1000 bytes at 0x9000 and 0x1000 bytes at 0x9fff in user addresses"
    with pytest.raises(PeerError, match=text):
        check_regions([region(0x2000, 0x1000, 0x9FFF), region(0x1000, 0x1000, 0x9000)], count_max=2)
    check_regions([region(0x2000, 0x1000, 0xA000), region(0x1000, 0x1000, 0x9000)], count_max=2)


def test_more_regions_than_the_limit_are_refused(region: MakeRegion) -> None:
    with pytest.raises(PeerError, match="2 regions, limit is 1"):
        check_regions([region(0x2000, 0x1000, 0), region(0x1000, 0x1000, 0x1000)], count_max=1)


def test_more_memory_than_the_limit_is_refused_however_it_is_cut(region: MakeRegion) -> None:
    half = MEMORY_SIZE_MAX // 2
    check_regions([region(0, half, 0), region(half, half, half)], count_max=2)
    with pytest.raises(PeerError, match="guest memory has 0x80000000001 bytes, limit is 0x80000000000"):
        check_regions([region(0, half, 0), region(half, half + 1, half)], count_max=2)


def test_a_region_may_end_where_addresses_end_and_not_behind(region: MakeRegion) -> None:
    last = (1 << 64) - 0x1000
    check_regions([region(last, 0x1000, last)], count_max=1)
    for spoiled in (region(last, 0x1001, 0), region(0, 0x1001, last)):
        with pytest.raises(PeerError, match="ends behind 0xffffffffffffffff"):
            check_regions([spoiled], count_max=1)


def test_a_region_of_no_bytes_is_refused(region: MakeRegion) -> None:
    with pytest.raises(PeerError, match="at 0x1000 is empty"):
        check_regions([region(0x1000, 0, 0)], count_max=1)


def test_a_region_behind_the_greatest_file_offset_is_refused(region: MakeRegion) -> None:
    good = replace(region(0, 0x1000, 0), mmap_offset=(1 << 63) - 0x1000)
    check_regions([good], count_max=1)
    with pytest.raises(PeerError, match="mmap offset"):
        check_regions([replace(good, mmap_offset=good.mmap_offset + 1)], count_max=1)


def test_user_addresses_map_into_the_region_that_holds_them_whole(region: MakeRegion) -> None:
    regions = [region(0x1000, 0x1000, 0x70000), region(0x8000, 0x1000, 0x71000)]
    assert to_guest_address(regions, 0x70010, 0x10) == 0x1010
    assert to_guest_address(regions, 0x71000, 0x1000) == 0x8000
    for user_address, size in ((0x6FFFF, 1), (0x70FFF, 2), (0x72000, 1)):
        with pytest.raises(PeerError, match=f"{user_address:#x} are not inside"):
            to_guest_address(regions, user_address, size)


def test_a_borrowed_table_has_the_fields_in_the_order_of_the_data_plane(region: MakeRegion) -> None:
    one = region(1, 2, 3)
    assert borrowed([one]) == [(1, 2, 3, 0, one.fd.fileno())]
