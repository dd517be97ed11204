"""The handover as two tables: who may do what next, on each side. No I/O, no clock.

Owns:        the states, the events, the transitions; which states allow rings to run; QEMU's status for each.
Never sees:  sockets, parts, time.
Read next:   outgoing.py and incoming.py, which fire the events and do what a state asks for.

The promise: at every instant at most one side may run rings, and as long as one side lives, one of them will.
The source runs them in every state before SWITCHING, and again once it went back. The destination may run them only
once it read COMMIT, or once the source is known dead. A lost channel alone never changes the owner.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Generic, TypeVar

from localmig.errors import StateError


class SourceState(StrEnum):
    """Where the source stands."""

    IDLE = "idle"
    CONNECTING = "connecting"
    GREETING = "greeting"
    """HELLO is out."""
    SETTING_UP = "setting-up"
    """The setup sections are on their way; rings run, frontends are answered."""
    PREPARED = "prepared"
    """The destination has everything in hand; rings run. Control planes are frozen at its end."""
    SWITCHING = "switching"
    """Rings stand still; the destination has not said READY."""
    COMMITTING = "committing"
    """READY was heard; the next act is to send COMMIT."""
    COMMITTED = "committed"
    """COMMIT is out: the destination owns the guest, unless it is known dead."""
    FENCING = "fencing"
    """The destination was silent, or talked nonsense, past COMMIT and gets SIGKILL; its death is awaited."""
    IN_DOUBT = "in-doubt"
    """The channel broke past COMMIT. The destination owns the guest as long as it lives."""
    COMPLETED = "completed"
    TAKEN_BACK = "taken-back"
    """The destination died past COMMIT; the source serves again."""
    FAILED = "failed"
    CANCELLED = "cancelled"


class SourceEvent(StrEnum):
    """What happens to the source."""

    START = "start"
    CONNECTED = "connected"
    HELLO_ACCEPTED = "hello-accepted"
    SETUP_ACKED = "setup-acked"
    SETUP_OUTDATED = "setup-outdated"
    """A frontend changed what was sent: it is sent again."""
    CONTINUED = "continued"
    READY_RECEIVED = "ready-received"
    COMMIT_SENT = "commit-sent"
    DONE_RECEIVED = "done-received"
    REFUSED = "refused"
    """The destination said no, or said something that cannot be."""
    CHANNEL_LOST = "channel-lost"
    PEER_DIED = "peer-died"
    TIMED_OUT = "timed-out"
    FAILED_HERE = "failed-here"
    """The source itself could not do its part."""
    CANCEL = "cancel"


class DestinationState(StrEnum):
    """Where the destination stands."""

    WAITING = "waiting"
    GREETING = "greeting"
    """A source connected; its HELLO is awaited."""
    SETTING_UP = "setting-up"
    PREPARED = "prepared"
    """Everything is built and parked; SETUP-ACK is out."""
    READY = "ready"
    """The switchover sections are applied; READY is out."""
    OWNER = "owner"
    """COMMIT was read: rings run. The source lets go of what only one process can have open."""
    RECOVERING = "recovering"
    """The source died: rings may run from the positions in guest memory."""
    COMPLETED = "completed"
    FAILED = "failed"


class DestinationEvent(StrEnum):
    """What happens to the destination."""

    CONNECTED = "connected"
    HELLO_ACCEPTED = "hello-accepted"
    SETUP_ADOPTED = "setup-adopted"
    SETUP_OUTDATED = "setup-outdated"
    """A part of the setup comes once more: a frontend changed it."""
    SWITCHOVER_ADOPTED = "switchover-adopted"
    COMMIT_RECEIVED = "commit-received"
    SETTLED = "settled"
    """Everything is served, and the source let go of the rest."""
    CANCELLED = "cancelled"
    """The source took its offer back."""
    CHANNEL_LOST = "channel-lost"
    """The channel ended although the source lives."""
    SOURCE_DIED = "source-died"
    """The source's pidfd is readable, and the channel was read to its end before."""
    TIMED_OUT = "timed-out"
    FAILED_HERE = "failed-here"
    """What the source sent cannot be served here."""


S, E = SourceState, SourceEvent

_SOURCE_ALWAYS_UNDONE: Final = (E.REFUSED, E.CHANNEL_LOST, E.PEER_DIED, E.TIMED_OUT, E.FAILED_HERE)

SOURCE: Final[Mapping[tuple[SourceState, SourceEvent], SourceState]] = {
    (S.IDLE, E.START): S.CONNECTING,
    (S.CONNECTING, E.CONNECTED): S.GREETING,
    (S.GREETING, E.HELLO_ACCEPTED): S.SETTING_UP,
    (S.SETTING_UP, E.SETUP_ACKED): S.PREPARED,
    (S.PREPARED, E.SETUP_OUTDATED): S.SETTING_UP,
    (S.PREPARED, E.CONTINUED): S.SWITCHING,
    (S.SWITCHING, E.READY_RECEIVED): S.COMMITTING,
    (S.COMMITTING, E.COMMIT_SENT): S.COMMITTED,
    (S.COMMITTED, E.DONE_RECEIVED): S.COMPLETED,
    # Before COMMIT every failure leads back: the source serves on.
    **{
        (state, event): S.FAILED
        for state in (S.CONNECTING, S.GREETING, S.SETTING_UP, S.PREPARED, S.SWITCHING)
        for event in _SOURCE_ALWAYS_UNDONE
    },
    **{(state, E.CANCEL): S.CANCELLED for state in (S.CONNECTING, S.GREETING, S.SETTING_UP, S.PREPARED, S.SWITCHING)},
    # COMMIT is so short that the socket takes it whole or not at all: a send that failed left nothing behind.
    (S.COMMITTING, E.CHANNEL_LOST): S.FAILED,
    (S.COMMITTING, E.FAILED_HERE): S.FAILED,
    # Never FAILED: the destination may have read COMMIT and be serving already.
    (S.COMMITTED, E.CHANNEL_LOST): S.IN_DOUBT,
    (S.COMMITTED, E.PEER_DIED): S.TAKEN_BACK,
    # Silent or talking nonsense, it may serve or not: it must be dead before anything else runs the rings.
    (S.COMMITTED, E.TIMED_OUT): S.FENCING,
    (S.COMMITTED, E.REFUSED): S.FENCING,
    (S.FENCING, E.PEER_DIED): S.TAKEN_BACK,
    # SIGKILL is on its way and cannot be called back: an answer does not help, a lost channel does not hurt.
    (S.FENCING, E.DONE_RECEIVED): S.FENCING,
    (S.FENCING, E.CHANNEL_LOST): S.FENCING,
    # It could not be killed, so it may serve. Two owners would be worse than a silent one.
    (S.FENCING, E.TIMED_OUT): S.IN_DOUBT,
    (S.IN_DOUBT, E.PEER_DIED): S.TAKEN_BACK,
    # It read COMMIT from a channel that delivers what it took, and it lives: it serves.
    (S.IN_DOUBT, E.TIMED_OUT): S.COMPLETED,
}

D, F = DestinationState, DestinationEvent

DESTINATION: Final[Mapping[tuple[DestinationState, DestinationEvent], DestinationState]] = {
    (D.WAITING, F.CONNECTED): D.GREETING,
    (D.GREETING, F.HELLO_ACCEPTED): D.SETTING_UP,
    (D.SETTING_UP, F.SETUP_ADOPTED): D.PREPARED,
    (D.PREPARED, F.SETUP_OUTDATED): D.SETTING_UP,
    (D.PREPARED, F.SWITCHOVER_ADOPTED): D.READY,
    (D.READY, F.COMMIT_RECEIVED): D.OWNER,
    (D.OWNER, F.SETTLED): D.COMPLETED,
    (D.RECOVERING, F.SETTLED): D.COMPLETED,
    (D.WAITING, F.FAILED_HERE): D.FAILED,
    **{
        (state, event): D.FAILED
        for state in (D.GREETING, D.SETTING_UP, D.PREPARED, D.READY)
        for event in (F.CANCELLED, F.CHANNEL_LOST, F.TIMED_OUT, F.FAILED_HERE)
    },
    (D.GREETING, F.SOURCE_DIED): D.FAILED,
    # Half of the setup is of no use: descriptors that never arrived died with the source. A whole one is renewed only
    # once all of what is newer is here.
    (D.SETTING_UP, F.SOURCE_DIED): D.FAILED,
    (D.PREPARED, F.SOURCE_DIED): D.RECOVERING,
    # Not OWNER: the source may have resumed before it died, so the positions it sent may be old.
    (D.READY, F.SOURCE_DIED): D.RECOVERING,
    # Whoever owns does not give up because someone who owns nothing any more went away.
    (D.OWNER, F.CHANNEL_LOST): D.OWNER,
    (D.OWNER, F.SOURCE_DIED): D.OWNER,
    (D.RECOVERING, F.CHANNEL_LOST): D.RECOVERING,
}

SOURCE_SERVES: Final = frozenset(
    {
        S.IDLE,
        S.CONNECTING,
        S.GREETING,
        S.SETTING_UP,
        S.PREPARED,
        S.TAKEN_BACK,
        S.FAILED,
        S.CANCELLED,
    }
)
"""The states in which the source's rings run."""

SOURCE_ENDED: Final = frozenset({S.COMPLETED, S.TAKEN_BACK, S.FAILED, S.CANCELLED})
DESTINATION_SERVES: Final = frozenset({D.OWNER, D.RECOVERING, D.COMPLETED})
"""The states in which the destination's rings may run."""
DESTINATION_ENDED: Final = frozenset({D.COMPLETED, D.FAILED})

SOURCE_STATUS: Final[Mapping[SourceState, str]] = {
    S.IDLE: "none",
    S.CONNECTING: "setup",
    S.GREETING: "setup",
    S.SETTING_UP: "active",
    S.PREPARED: "active",
    S.SWITCHING: "device",
    S.COMMITTING: "device",
    S.COMMITTED: "device",
    S.FENCING: "device",
    S.IN_DOUBT: "device",
    S.COMPLETED: "completed",
    S.TAKEN_BACK: "failed",
    S.FAILED: "failed",
    S.CANCELLED: "cancelled",
}
"""QEMU's MigrationStatus of each state; `pre-switchover` stands for PREPARED while the operator is awaited."""

DESTINATION_STATUS: Final[Mapping[DestinationState, str]] = {
    D.WAITING: "setup",
    D.GREETING: "setup",
    D.SETTING_UP: "active",
    D.PREPARED: "active",
    D.READY: "active",
    D.OWNER: "active",
    D.RECOVERING: "active",
    D.COMPLETED: "completed",
    D.FAILED: "failed",
}

StateT = TypeVar("StateT", bound=StrEnum)
EventT = TypeVar("EventT", bound=StrEnum)


class Machine(Generic[StateT, EventT]):
    """One side's state; `fire` is its only writer."""

    def __init__(self, state: StateT, table: Mapping[tuple[StateT, EventT], StateT]) -> None:
        self._state = state
        self._table = table

    @property
    def state(self) -> StateT:
        """Where this side stands."""
        return self._state

    def allows(self, event: EventT) -> bool:
        """Whether `fire(event)` would succeed."""
        return (self._state, event) in self._table

    def fire(self, event: EventT) -> StateT:
        """Moves on, and gives the new state.

        Raises:
            StateError: the table has no such step; the state is unchanged.
        """
        try:
            self._state = self._table[(self._state, event)]
        except KeyError:
            raise StateError(f"'{event}' cannot happen while '{self._state}'") from None
        return self._state


def source_machine() -> Machine[SourceState, SourceEvent]:
    """A source at rest."""
    return Machine(SourceState.IDLE, SOURCE)


def destination_machine() -> Machine[DestinationState, DestinationEvent]:
    """A destination that waits for a source."""
    return Machine(DestinationState.WAITING, DESTINATION)
