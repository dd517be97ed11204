"""Rings of a device that one engine serves together, as the device sees them.

Owns:        RingGroup, what every engine can do; Layout, what an engine is told of its rings.
Never sees:  what a frontend said, a packet.
Read next:   vhost_user_device.py, which decides when; callbacks.py for the engine that is Python.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from localmig.dataplane import CallbackQueues, DirtyLog, GuestMemory, QueuePair, Ring


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a group is laid out with.

    Attributes:
        memory: guest memory.
        rings: one for each of the group's vrings, None for one that is not to run.
        features: virtio feature bits that the driver acknowledged.
        packed: the rings' format.
    """

    memory: GuestMemory
    rings: tuple[Ring | None, ...]
    features: int
    packed: bool


class RingGroup(ABC):
    """Rings that start and stop as one. Every list has a place for each of `vrings`, in their order.

    Attributes:
        name: how errors call it.
        vrings: their numbers in the device.
        engine: what serves them.
    """

    name: str
    vrings: tuple[int, ...]
    engine: QueuePair | CallbackQueues

    @abstractmethod
    def lay_out(self, layout: Layout) -> None:
        """Tells the stopped group where its rings are. ValueError: they cannot be there; nothing changed."""

    @abstractmethod
    def start(self) -> int:
        """Lets the rings run. Gives the CLOCK_MONOTONIC nanoseconds at which they began."""

    @abstractmethod
    def stop(self) -> Sequence[int | None]:
        """Stops the rings and gives their positions, None for one that is not laid out. Idempotent."""

    def give_back(self, vring: int) -> None:
        """Returns what is in flight of a stopped ring, before anybody is told where it stands. Nothing for most."""

    @abstractmethod
    def is_running(self) -> bool:
        """Whether the rings run."""

    @abstractmethod
    def positions(self) -> Sequence[int | None]:
        """Where the rings go on; exact while stopped."""

    @abstractmethod
    def failed(self) -> Sequence[bool]:
        """Whether each ring was given up since it was laid out; exact while stopped."""

    @abstractmethod
    def set_notifiers(self, vring: int, *, call_fd: int | None, error_fd: int | None) -> None:
        """Lets a ring call its driver by other descriptors, while it goes on. ValueError: they cannot be used."""

    @abstractmethod
    def set_log(self, vring: int, log: tuple[DirtyLog, int | None] | None) -> None:
        """Lets a ring mark what it writes elsewhere, or nowhere. It goes on; the former log is written no more."""

    @abstractmethod
    def swap_memory(self, memory: GuestMemory) -> bool:
        """Goes on with `memory` where all rings are in the same place there. Whether that is so."""

    @abstractmethod
    def take_errors(self) -> Sequence[tuple[int, str]]:
        """(vring, why) of each ring that failed since the last call."""

    def take_corrections(self) -> Sequence[tuple[int, int, int]]:
        """(vring, where it was told to begin, where it began) of each such ring since the last call."""
        return ()

    @abstractmethod
    def kicks(self) -> Sequence[int]:
        """How often each ring was kicked."""

    @abstractmethod
    def release(self) -> None:
        """Stops, and forgets rings, memory and descriptors. `lay_out` makes it usable again."""

    @abstractmethod
    def close(self) -> None:
        """Ends it for good. Idempotent."""
