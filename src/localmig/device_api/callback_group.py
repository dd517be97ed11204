"""Rings whose chains a device's own Python code answers.

Owns:        CallbackGroup, and Chain as that code sees it.
Never sees:  what a chain is for; which thread takes it.
Read next:   ring_group.py for the contract, callback_device.py for who takes chains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from localmig.dataplane import CallbackCounters, CallbackQueues, DirtyLog, GuestMemory
from localmig.dataplane import Chain as TakenChain
from localmig.device_api.ring_group import Layout, RingGroup
from localmig.virtio import Feature


class Chain:
    """What a driver made available at once: bytes for the device, room for bytes of the device's.

    It is in flight until `complete`, also over a handover: the successor's device gets it again. A device may keep it
    for as long as it likes, and complete it in any order, in any thread.

    Attributes:
        ring: the name of its ring.
        readable: what the driver wrote.
        writable: how many bytes the device may write.
        was_taken: whether another process had taken it and did not complete it.
    """

    __slots__ = ("_group", "_taken", "readable", "ring", "was_taken", "writable")

    def __init__(self, group: CallbackGroup, taken: TakenChain) -> None:
        self._group = group
        self._taken = taken
        self.ring = group.names[taken.ring]
        self.readable = taken.readable
        self.writable = taken.writable
        self.was_taken = taken.was_taken

    def complete(self, data: bytes = b"") -> bool:
        """Gives it back to the driver with `data` in it; whether the driver gets it.

        False where it is not this process's any more: its ring was reset, failed, or is served elsewhere.

        Raises:
            ValueError: `data` is longer than `writable`, or it was completed before. Nothing changed.
        """
        return self._group.engine.complete(self._taken, data)


class CallbackGroup(RingGroup):
    """Rings of a device that its own code serves.

    Args:
        names: of its rings, by their numbers in the device.
        event_fd: signalled where a ring failed.
    """

    engine: CallbackQueues

    def __init__(self, names: Mapping[int, str], event_fd: int) -> None:
        self.vrings = tuple(names)
        self.names = tuple(names.values())
        self.name = f"rings {', '.join(self.names)}" if len(names) > 1 else f"ring {self.names[0]}"
        self.engine = CallbackQueues(len(self.vrings), event_fd)

    def take(self) -> Chain | None:
        """The next chain; None where none is there, or the rings stand still."""
        taken = self.engine.take()
        return None if taken is None else Chain(self, taken)

    def fail(self, reason: str) -> None:
        """Gives all its rings up."""
        for index in range(len(self.vrings)):
            self.engine.fail(index, reason)

    def lay_out(self, layout: Layout) -> None:
        """Tells it where its rings are."""
        self.engine.configure(
            memory=layout.memory,
            rings=list(layout.rings),
            event_index=bool(layout.features & Feature.RING_EVENT_IDX),
            indirect=bool(layout.features & Feature.RING_INDIRECT_DESC),
            packed=layout.packed,
        )

    def start(self) -> int:
        """Lets chains be taken."""
        return self.engine.start()

    def stop(self) -> Sequence[int | None]:
        """Lets none be taken any more. What is completed meanwhile is told to the driver at the next start."""
        return self.engine.stop()

    def give_back(self, vring: int) -> None:
        """Returns the chains in flight of a stopped ring unused, which the frontend knows no word for."""
        self.engine.give_back(self.vrings.index(vring))

    def is_running(self) -> bool:
        """Whether chains can be taken."""
        return self.engine.is_running()

    def positions(self) -> Sequence[int | None]:
        """Where its rings go on."""
        return self.engine.positions()

    def failed(self) -> Sequence[bool]:
        """Which of them were given up."""
        return self.engine.failed()

    def set_notifiers(self, vring: int, *, call_fd: int | None, error_fd: int | None) -> None:
        """Lets a ring call its driver by other descriptors."""
        self.engine.set_notifiers(self.vrings.index(vring), call_fd=call_fd, error_fd=error_fd)

    def set_log(self, vring: int, log: tuple[DirtyLog, int | None] | None) -> None:
        """Lets a ring mark what it writes elsewhere."""
        self.engine.set_log(self.vrings.index(vring), log)

    def swap_memory(self, memory: GuestMemory) -> bool:
        """Goes on with other memory, where its rings are in the same place."""
        return self.engine.swap_memory(memory)

    def take_errors(self) -> Sequence[tuple[int, str]]:
        """What its rings failed for."""
        return [(self.vrings[index], reason) for index, reason in self.engine.take_ring_errors()]

    def take_corrections(self) -> Sequence[tuple[int, int, int]]:
        """Which of its rings began elsewhere than they were told."""
        return [(self.vrings[index], told, begun) for index, told, begun in self.engine.take_corrections()]

    def kicks(self) -> Sequence[int]:
        """How often its rings were kicked."""
        return [CallbackCounters(*counters).kicks for counters in self.engine.counters()]

    def release(self) -> None:
        """Forgets rings, memory and descriptors."""
        self.engine.release()

    def close(self) -> None:
        """Ends it."""
        self.engine.close()


def take_all(group: CallbackGroup, on_chain: Callable[[Chain], None]) -> None:
    """Hands every chain that is there to `on_chain`."""
    while (chain := group.take()) is not None:
        on_chain(chain)
