"""What a frontend leaves out is told once it lasts; one that waits for its guest, or pauses, is left alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from tests.kit.cases import each_case

from localmig.device_api import notes
from localmig.device_api.notes import Notes, set_up_notes
from localmig.devices.virtio_net.device import excess_note
from localmig.fds import OwnedFd
from localmig.vhost_user.memory import MemoryRegion
from localmig.vhost_user.protocol import SessionState, VringState


@pytest.fixture
def region() -> Iterator[MemoryRegion]:
    with OwnedFd(os.memfd_create("guest")) as fd:
        yield MemoryRegion(guest_address=0, size=4096, user_address=0, mmap_offset=0, fd=fd)


def vring(*, size: int = 256, area: int = 4096, started: bool = True, enabled: bool = True) -> VringState:
    return VringState(
        size=size, descriptor_area=area, driver_area=area, device_area=area, started=started, enabled=enabled
    )


def session(region: MemoryRegion | None, *vrings: VringState, was_served: bool = False) -> SessionState:
    return SessionState(
        features_acked=1 << 32,
        regions=[] if region is None else [region],
        vrings=list(vrings or (VringState(), VringState())),
        was_served=was_served,
    )


def found(state: SessionState) -> list[str]:
    return list(set_up_notes(state, (0, 1), has_spoken=True))


def test_a_frontend_that_waits_for_its_guest_is_no_matter() -> None:
    assert found(SessionState(vrings=[VringState(), VringState()])) == []
    # QEMU enables rings before its guest has a driver.
    assert found(SessionState(vrings=[VringState(enabled=True), VringState(enabled=True)])) == []


def test_a_nic_that_works_pauses_or_was_reset_is_no_matter(region: MemoryRegion) -> None:
    assert found(session(region, vring(), vring(), was_served=True)) == []
    stopped, disabled = vring(started=False), vring(enabled=False)
    assert found(session(region, stopped, stopped, was_served=True)) == []
    assert found(session(region, disabled, disabled, was_served=True)) == []


@each_case(
    ("rings", "missing"),
    [
        ((VringState(), VringState()), "SET_VRING_NUM for vring 0 and 1"),
        ((vring(area=0, started=False), vring(area=0, started=False)), "SET_VRING_ADDR for vring 0 and 1"),
        ((vring(started=False), vring(started=False)), "SET_VRING_KICK for vring 0 and 1"),
        ((vring(enabled=False), vring(enabled=False)), "SET_VRING_ENABLE for vring 0 and 1"),
        ((vring(), VringState()), "SET_VRING_NUM for vring 1"),
    ],
)
def test_a_frontend_that_stopped_half_way_is_told_of(
    region: MemoryRegion, rings: tuple[VringState, VringState], missing: str
) -> None:
    (note,) = found(session(region, *rings))
    assert f"there was no {missing}" in note


def test_one_ring_without_the_other_is_told_of_also_later(region: MemoryRegion) -> None:
    (note,) = found(session(region, vring(), vring(started=False), was_served=True))
    assert "SET_VRING_KICK for vring 1" in note


def test_rings_without_memory_are_told_of() -> None:
    (note,) = found(session(None, vring(), vring(), was_served=True))
    assert "share=on" in note


def test_a_frontend_that_says_nothing_or_half_a_message_is_told_of() -> None:
    fresh = SessionState(vrings=[VringState(), VringState()])
    (note,) = set_up_notes(fresh, (0, 1), has_spoken=False)
    assert "says nothing" in note
    fresh.unparsed = b"\1\0\0"
    (note,) = set_up_notes(fresh, (0, 1), has_spoken=True)
    assert "in the middle of a message" in note


def test_too_many_queue_pairs_are_told_of_with_both_numbers() -> None:
    note = excess_note("nic0", "net0", asked=4, there=2)
    assert note.startswith("QEMU asks for 4 pairs, nic0 has 2: ")
    assert "queues=2" in note
    assert "'net0' queues=4" in note


# -- when ---------------------------------------------------------------------------------------------------------


@dataclass
class Matter:
    """What is the matter at each look, one after the other; the last one goes on."""

    looks: list[list[str]]
    may_appear: bool = False
    told: list[str] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def find(self) -> list[str]:
        if len(self.looks) == 1:
            self.done.set()
            return self.looks[0]
        return self.looks.pop(0)

    def notes(self) -> Notes:
        return Notes(self.find, lambda: self.may_appear, self.told.append)


@pytest.mark.parametrize(
    ("looks", "told"),
    [
        ([["a"], []], []),
        ([["a"], ["b"], []], []),
        ([["a"], ["a"], []], ["a"]),
        ([["a"], ["a"], [], ["a"], ["a"], ["b", "a"], ["b"], []], ["a", "b"]),
    ],
)
def test_what_two_looks_in_a_row_find_is_told_once(
    monkeypatch: pytest.MonkeyPatch, looks: list[list[str]], told: list[str]
) -> None:
    monkeypatch.setattr(notes, "LOOK_SECONDS", 0.0)

    async def scenario() -> None:
        matter = Matter(looks=looks, may_appear=True)
        made = matter.notes()
        made.expect()
        async with asyncio.timeout(10):
            await matter.done.wait()
        made.stop()
        assert matter.told == told

    asyncio.run(scenario())


def test_what_is_over_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "LOOK_SECONDS", 0.0)

    async def scenario() -> None:
        matter = Matter(looks=[["a"], ["a"]])
        made = matter.notes()
        made.expect()
        async with asyncio.timeout(10):
            await matter.done.wait()
        assert made.get() == ("a",)
        matter.looks = [["b"]]
        assert made.get() == ()
        made.stop()

    asyncio.run(scenario())
