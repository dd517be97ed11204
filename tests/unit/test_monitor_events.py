"""From facts to QMP's events."""

from __future__ import annotations

from localmig import trace
from localmig.daemon import RunState
from localmig.monitor.events import EventSource
from localmig.monitor.protocol import Event


def told(first: RunState, *facts: trace.Event, migration_events: bool = True) -> list[Event]:
    source = EventSource(first)
    events = [source.translate(fact, at_s=1.0, migration_events=migration_events) for fact in facts]
    return [event for event in events if event is not None]


def test_stop_and_resume_tell_of_changes_only() -> None:
    states = [RunState.RUNNING, RunState.PAUSED, RunState.POSTMIGRATE, RunState.RUNNING]
    facts = [trace.RunStateChanged(state=state) for state in states]
    assert [event.name for event in told(RunState.INMIGRATE, *facts)] == ["RESUME", "STOP", "RESUME"]


def test_migration_is_told_with_its_status_where_the_capability_is_on() -> None:
    fact = trace.MigrationStatusChanged(status="device")
    assert told(RunState.RUNNING, fact) == [Event(name="MIGRATION", data={"status": "device"}, at_s=1.0)]
    assert told(RunState.RUNNING, fact, migration_events=False) == []


def test_a_device_that_is_deleted_is_told_with_its_path_and_no_other_object() -> None:
    facts = [trace.ObjectDeleted(kind="device", id="nic0"), trace.ObjectDeleted(kind="netdev", id="net0")]
    data = {"device": "nic0", "path": "/machine/peripheral/nic0"}
    assert told(RunState.RUNNING, *facts) == [Event(name="DEVICE_DELETED", data=data, at_s=1.0)]


def test_sessions_are_told_of_with_what_is_known_of_their_processes() -> None:
    facts = [
        trace.SessionOpened(device="nic0", session=2, pid=77),
        trace.SessionOpened(device="nic0", session=3, pid=0),
        trace.OwnerChanged(device="nic0", session=2, pid=77, former_session=1, former_pid=66),
        trace.OwnerChanged(device="nic0", session=2, pid=0, former_session=None, former_pid=0),
        trace.SessionClosed(device="nic0", session=2, reason="ended by the operator"),
        trace.SessionClosed(device="nic0", session=3, reason=None),
    ]
    assert [(event.name, event.data) for event in told(RunState.RUNNING, *facts)] == [
        ("SESSION_OPENED", {"device": "nic0", "session": 2, "pid": 77}),
        ("SESSION_OPENED", {"device": "nic0", "session": 3}),
        (
            "SESSION_OWNER_CHANGED",
            {"device": "nic0", "session": 2, "pid": 77, "former-session": 1, "former-pid": 66},
        ),
        ("SESSION_OWNER_CHANGED", {"device": "nic0", "session": 2}),
        ("SESSION_CLOSED", {"device": "nic0", "session": 2, "reason": "ended by the operator"}),
        ("SESSION_CLOSED", {"device": "nic0", "session": 3}),
    ]


def test_what_qemu_has_no_event_for_is_not_told() -> None:
    facts = [
        trace.RingsStopped(device="nic0", queue_pair=0),
        trace.RingsStarted(device="nic0", queue_pair=0),
        trace.PhaseEnded(role="source", name="setup", duration_ns=1),
    ]
    assert told(RunState.RUNNING, *facts) == []
