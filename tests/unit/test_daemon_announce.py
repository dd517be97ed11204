"""Announcements: their pauses, and one in place of another."""

from __future__ import annotations

import asyncio

import pytest
from tests.kit.cases import each_case

from localmig.daemon import announce
from localmig.daemon.announce import Announcer
from localmig.device_api import Announces
from localmig.errors import KernelError, StateError
from localmig.migration.parameters import Announcement


class Nic(Announces):
    """Counts how often it was announced; the first time fails."""

    def __init__(self, rounds: int) -> None:
        self.id = "nic0"
        self.count = 0
        self.done = asyncio.Event()
        self._rounds = rounds

    def needs_announcement(self) -> bool:
        return True

    def announcement_blocker(self) -> str | None:
        return None

    def announce(self) -> None:
        self.count += 1
        if self.count == self._rounds:
            self.done.set()
        if self.count == 1:
            raise KernelError("the interface is down", errno=5)


@each_case(
    ("announcement", "pauses"),
    [
        (Announcement(), [50, 150, 250, 350]),
        (Announcement(max_ms=200), [50, 150, 200, 200]),
        (Announcement(rounds=1), []),
        (Announcement(rounds=0), []),
        (Announcement(initial_ms=0, rounds=3, step_ms=1), [0, 1]),
    ],
)
def test_pauses_grow_by_a_step_up_to_the_longest(announcement: Announcement, pauses: list[int]) -> None:
    assert list(announcement.pauses_ms()) == pauses


def test_every_round_is_announced_also_after_one_that_failed() -> None:
    async def scenario() -> None:
        nic, announcer = Nic(3), Announcer()
        announcer.start([nic], Announcement(initial_ms=0, rounds=3, step_ms=1), key="a")
        await asyncio.wait_for(nic.done.wait(), timeout=10)
        announcer.stop()
        assert nic.count == 3

    asyncio.run(scenario())


def test_no_rounds_end_what_is_under_way_by_that_name() -> None:
    async def scenario() -> None:
        ended, other, announcer = Nic(1), Nic(2), Announcer()
        soon = Announcement(initial_ms=0, rounds=2, step_ms=1)
        announcer.start([ended], soon, key="a")
        announcer.start([other], soon, key="b")
        announcer.start([], Announcement(rounds=0), key="a")
        await asyncio.wait_for(other.done.wait(), timeout=10)
        assert ended.count == 0

    asyncio.run(scenario())


def test_names_have_a_limit_and_a_handovers_announcements_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "NAMED_COUNT_MAX", 1)

    async def scenario() -> None:
        announcer = Announcer()
        announcer.start([], Announcement(), key="a")
        announcer.start([], Announcement(), key="a")
        with pytest.raises(StateError, match="1 announcements are under way, limit is 1"):
            announcer.start([], Announcement(), key="b")
        announcer.start([], Announcement(), key=("nic0",))
        announcer.stop()

    asyncio.run(scenario())
