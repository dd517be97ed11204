"""Every traceable fact as a typed event. query-migrate, benchmarks and tests read the same ones.

Owns:        the list of events, the tracer that hands them out, their form as JSON lines.
Never sees:  who listens.
Read next:   daemon/ for the subscribers.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One fact. `at_ns` is CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share."""

    at_ns: int = field(default_factory=time.monotonic_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class RingsStarted(Event):
    """A queue pair runs: from `at_ns` this process serves the guest's rings."""

    device: str
    queue_pair: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RingsStopped(Event):
    """A queue pair stands still: after `at_ns` this process touches no ring of it."""

    device: str
    queue_pair: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RingFailed(Event):
    """A ring was stopped because what the guest wrote into it cannot be."""

    device: str
    vring: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InterfaceChanged(Event):
    """The host did something to a NIC's interface that its guest may notice."""

    device: str
    mtu: int
    link_is_up: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RingCorrected(Event):
    """A split ring began at `begun`, where the used index in guest memory stands; it was told to begin at `told`."""

    device: str
    vring: int
    told: int
    begun: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRefused(Event):
    """A frontend asked for what cannot be, and was told so by its reply. Its session goes on."""

    device: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryMapped(Event):
    """The device goes on with another table of guest memory.

    Attributes:
        regions: how many it has.
        populated_bytes: pages of new regions that were mapped before.
        undisturbed_queue_pairs: those that did not stop for it.
    """

    device: str
    regions: int
    populated_bytes: int
    undisturbed_queue_pairs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionOpened(Event):
    """A frontend connected to the device's socket; `pid` is its process, 0 where that has no number here."""

    device: str
    session: int
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionClosed(Event):
    """The frontend's connection ended; `reason` is None where the frontend simply left."""

    device: str
    session: int
    reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnerChanged(Event):
    """The rings of another session of the device run from now on.

    Attributes:
        session: whose.
        pid: its frontend's process, 0 where that has no number here.
        former_session: whose ran before, None where none did since a session that owned has left.
        former_pid: likewise.
    """

    device: str
    session: int
    pid: int
    former_session: int | None
    former_pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceNoted(Event):
    """Something keeps a device from working, and lasts; each such sentence once."""

    device: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestAnnounced(Event):
    """The network was told where a device's guest is."""

    device: str
    mac: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectAdded(Event):
    """An object was added at run time, and is served."""

    kind: str
    id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectDeleted(Event):
    """An object was deleted at run time, with all it had."""

    kind: str
    id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationStatusChanged(Event):
    """The migration's status, in QEMU's words."""

    status: str
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseEnded(Event):
    """A step of the handover ended, well or with an error."""

    role: str
    name: str
    duration_ns: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStateChanged(Event):
    """The daemon's run state, in QEMU's words."""

    state: str


class Tracer:
    """Hands each event to every subscriber, in order, on the caller's thread."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Event], None]] = []
        self._held: list[Event | Callable[[], Iterable[Event]]] | None = None
        self._on_release: list[Callable[[], None]] = []

    @property
    def is_held(self) -> bool:
        """Whether events are held back: the guest waits, and nothing else is to happen."""
        return self._held is not None

    def on_release(self, callback: Callable[[], None]) -> None:
        """Calls back once, when the events that are held now have been handed out. A callback must not raise."""
        assert self._held is not None, "no events are held"
        self._on_release.append(callback)

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Adds a subscriber; the returned function removes it again."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def emit(self, event: Event) -> None:
        """Hands `event` out. A subscriber must not raise."""
        if self._held is not None:
            self._held.append(event)
            return
        for subscriber in tuple(self._subscribers):
            subscriber(event)

    def emit_made(self, make: Callable[[], Iterable[Event]]) -> None:
        """As `emit` for each event that `make` gives. While events are held back it is called at the release only.

        A guest waits until then, and each event takes a microsecond to make.
        """
        if self._held is not None:
            self._held.append(make)
            return
        for event in make():
            self.emit(event)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds events back until the end of the block, which hands them out in order. Not to be nested."""
        assert self._held is None, "events are held already"
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            for each in held:
                if isinstance(each, Event):
                    self.emit(each)
                else:
                    self.emit_made(each)
            callbacks, self._on_release = self._on_release, []
            for callback in callbacks:
                callback()


def to_json(event: Event) -> str:
    """One event as one line of JSON: its class name as `event`, then its fields."""
    return json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)})
