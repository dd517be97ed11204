"""Telling the network where guests are: rounds of frames with growing pauses, as QEMU announces.

Owns:        which announcements are under way, their pauses.
Never sees:  a frame; why something is announced.
Read next:   daemon.py, which starts them; device_api/ for what a device does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Final

from localmig.device_api import Announces
from localmig.errors import LocalmigError, StateError
from localmig.migration.parameters import Announcement

_logger = logging.getLogger(__name__)

NAMED_COUNT_MAX: Final = 64
"""Announcements with a name of their own: as many networks as one daemon can sensibly tell apart."""


class Announcer:
    """The announcements under way. It belongs to the event loop's thread; frames go out from timers."""

    def __init__(self) -> None:
        self._timers: dict[Hashable, asyncio.Handle] = {}

    def start(self, parts: Sequence[Announces], announcement: Announcement, *, key: Hashable) -> None:
        """Begins to announce `parts`, in place of what is under way by the same key. No rounds: only ends that.

        Raises:
            StateError: there are as many announcements as there may be.
        """
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        if announcement.rounds:
            named = sum(isinstance(each, str) for each in self._timers)
            if isinstance(key, str) and named >= NAMED_COUNT_MAX:
                raise StateError(f"{named} announcements are under way, limit is {NAMED_COUNT_MAX}")
            loop = asyncio.get_running_loop()
            self._timers[key] = loop.call_soon(self._announce, key, parts, announcement.pauses_ms())

    def stop(self) -> None:
        """Ends all of them: the guest is another daemon's, or this one ends."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _announce(self, key: Hashable, parts: Sequence[Announces], pauses_ms: Iterator[int]) -> None:
        for part in parts:
            try:
                part.announce()
            except LocalmigError as error:
                # As on any network: the next round may get through.
                _logger.warning("%s", error)
        pause_ms = next(pauses_ms, None)
        if pause_ms is None:
            del self._timers[key]
            return
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(pause_ms / 1000, self._announce, key, parts, pauses_ms)
