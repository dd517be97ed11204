"""From traced facts to QMP's events.

Owns:        which facts clients hear of, under which name.
Never sees:  clients, the daemon.
Read next:   trace.py for the facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from localmig import trace
from localmig.daemon import RunState
from localmig.monitor.protocol import Event
from localmig.monitor.schema import MIGRATION_STATUS
from localmig.qapi import Boolean, Enumeration, String, Struct, Uint64, returned

EVENTS: Final[Mapping[str, Struct]] = {
    "DEVICE_DELETED": Struct((returned("device", String()), returned("path", String()))),
    "MIGRATION": Struct((returned("status", MIGRATION_STATUS),)),
    "RESUME": Struct(),
    "SESSION_CLOSED": Struct(
        (
            returned("device", String()),
            returned("session", Uint64()),
            returned("reason", String(), required=False),
        )
    ),
    "SESSION_OPENED": Struct(
        (returned("device", String()), returned("session", Uint64()), returned("pid", Uint64(), required=False))
    ),
    "SESSION_OWNER_CHANGED": Struct(
        (
            returned("device", String()),
            returned("session", Uint64()),
            returned("pid", Uint64(), required=False),
            returned("former-session", Uint64(), required=False),
            returned("former-pid", Uint64(), required=False),
        )
    ),
    "SHUTDOWN": Struct(
        (
            returned("guest", Boolean()),
            returned("reason", Enumeration(("host-error", "host-qmp-quit", "host-signal"))),
        )
    ),
    "STOP": Struct(),
}
"""What each event carries."""


class EventSource:
    """Remembers the run state, for STOP and RESUME tell of changes."""

    def __init__(self, run_state: RunState) -> None:
        self._run_state = run_state

    def translate(self, fact: trace.Event, *, at_s: float, migration_events: bool) -> Event | None:
        """The event that tells of `fact`, None where there is none.

        Args:
            fact: what happened.
            at_s: when, seconds since 1970.
            migration_events: whether the capability `events` is on.
        """
        match fact:
            case trace.RunStateChanged(state=state):
                was_running = self._run_state is RunState.RUNNING
                self._run_state = RunState(state)
                is_running = self._run_state is RunState.RUNNING
                if was_running == is_running:
                    return None
                return Event(name="RESUME" if is_running else "STOP", at_s=at_s)
            case trace.ObjectDeleted(kind="device", id=id_):
                # QEMU tells by its path of a device that has no id. Here each has one.
                return Event(
                    name="DEVICE_DELETED", data={"device": id_, "path": f"/machine/peripheral/{id_}"}, at_s=at_s
                )
            case trace.SessionOpened(device=device, session=number, pid=pid):
                return Event(
                    name="SESSION_OPENED", data=_known(device=device, session=number, pid=pid or None), at_s=at_s
                )
            case trace.SessionClosed(device=device, session=number, reason=reason):
                return Event(
                    name="SESSION_CLOSED", data=_known(device=device, session=number, reason=reason), at_s=at_s
                )
            case trace.OwnerChanged():
                data = _known(
                    device=fact.device,
                    session=fact.session,
                    pid=fact.pid or None,
                    former_session=fact.former_session,
                    former_pid=fact.former_pid or None,
                )
                return Event(name="SESSION_OWNER_CHANGED", data=data, at_s=at_s)
            case trace.MigrationStatusChanged(status=status) if migration_events:
                return Event(name="MIGRATION", data={"status": status}, at_s=at_s)
            case _:
                return None


def _known(**members: object) -> dict[str, object]:
    """An event's members, without those that are not known."""
    return {name.replace("_", "-"): value for name, value in members.items() if value is not None}
