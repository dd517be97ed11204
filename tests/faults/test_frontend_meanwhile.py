"""A frontend that says something while a handover waits: it is answered at once, and whoever serves knows of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest
from tests.faults.matrix import FLOW_SECONDS_MAX, Chain, Daemon, end_of

from localmig.migration.analysis import Field, analyze
from localmig.testing.faults import Fault
from localmig.testing.frontend import CLOUD_HYPERVISOR, QEMU, RX, USER_MODE_LINUX, Habits
from localmig.testing.namespace import unavailable_reason

TRIES_MAX: Final = 10
"""Handovers under a frontend that never rests: on a loaded machine one or two of them may be taken back."""

LONG_MS: Final = 60_000
"""What nothing here waits for: an answer that came was not waiting for this limit."""


@pytest.fixture
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(f"needs network namespaces: {reason}")
    made = Chain(tmp_path_factory.mktemp("m"))
    yield made
    made.close()


def unmask(chain: Chain) -> None:
    """As QEMU does when the guest unmasks an interrupt."""
    chain.guest.send_call_again(RX)


def reset(chain: Chain) -> None:
    chain.reset_driver()


def reconnect(chain: Chain) -> None:
    chain.guest.reconnect()


def set_mtu(chain: Chain) -> None:
    chain.guest.frontend.set_mtu(1400)


def make_tap_again(chain: Chain) -> None:
    chain.make_tap_again()


CHANGES: Final = (unmask, set_mtu, reset, reconnect)


def pause(chain: Chain, *, on: bool) -> None:
    capability = {"capability": "pause-before-switchover", "state": on}
    chain.serving.process.execute("migrate-set-capabilities", capabilities=[capability])


def begin(chain: Chain, *, fault: str | None = None, downtime_limit_ms: int = LONG_MS) -> Daemon:
    """Hands over to a destination, which has `fault`, and does not wait for the end."""
    source, destination = chain.serving, chain.destination()
    chain.prepare()
    source.arm(None)
    destination.arm(Fault.parse(fault) if fault else None)
    source.process.execute("migrate-set-parameters", downtime_limit=downtime_limit_ms, commit_timeout=LONG_MS)
    source.process.execute("migrate", uri=destination.address)
    return destination


def end(chain: Chain, destination: Daemon) -> None:
    """The handover completes, and frames flow as before."""
    source = chain.serving
    assert source.process.wait_migration()["status"] == "completed"
    destination.process.wait_event("MigrationStatusChanged", status="completed")
    assert source.process.quit() == 0
    chain.serving = destination
    assert chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX)


@pytest.mark.parametrize("change", [*CHANGES, make_tap_again], ids=lambda change: change.__name__)
def test_what_a_frontend_changes_while_the_operator_is_awaited_moves(
    chain: Chain, change: Callable[[Chain], None]
) -> None:
    pause(chain, on=True)
    destination = begin(chain)
    chain.serving.process.wait_migration_status("pre-switchover")
    change(chain)
    # Frames flow while it waits, and each change is answered once it is made.
    assert chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX)
    change(chain)
    chain.serving.process.execute("migrate-continue", state="pre-switchover")
    end(chain, destination)
    # The successor goes on with what was said last, and a driver that resets is served by it.
    chain.reset_driver()
    assert chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX)


def test_a_recording_has_what_a_frontend_changed_and_nothing_twice(chain: Chain, tmp_path: Path) -> None:
    pause(chain, on=True)
    chain.serving.process.execute("migrate-set-parameters", record=str(tmp_path / "stream"))
    destination = begin(chain)
    chain.serving.process.wait_migration_status("pre-switchover")
    chain.guest.frontend.set_mtu(1234)
    chain.serving.process.execute("migrate-continue", state="pre-switchover")
    end(chain, destination)
    stream = analyze((tmp_path / "stream").read_bytes())
    names = [section.name for section in stream.sections]
    assert len(names) == len(set(names))
    nic = next(section for section in stream.sections if section.name == "nic0/vhost-user-device")
    assert [field.value for field in walk(nic.fields) if field.name == "mtu"] == [1234]


def walk(fields: Sequence[Field]) -> Iterator[Field]:
    """All fields, however deep."""
    for field in fields:
        yield field
        if isinstance(field.value, tuple):
            yield from walk(field.value)


@pytest.mark.parametrize(
    "stopped", ["after-receive:HELLO", "after-receive:DESCRIPTION", "after-receive:SETUP", "before-send:SETUP_ACK"]
)
def test_a_frontend_is_answered_while_a_destination_stands_still_in_setup(chain: Chain, stopped: str) -> None:
    pause(chain, on=False)
    destination = begin(chain, fault=f"{stopped}=stop")
    destination.process.wait_stopped()
    for change in CHANGES:
        change(chain)
    assert chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX)
    destination.process.send_signal(signal.SIGCONT)
    end(chain, destination)


def test_a_frontend_that_waits_for_its_answer_ends_a_switchover_that_hangs(chain: Chain) -> None:
    pause(chain, on=False)
    destination = begin(chain, fault="after-receive:SWITCHOVER=stop")
    destination.process.wait_stopped()
    set_mtu(chain)  # answered, although the source would wait a minute for the destination
    info = chain.serving.process.wait_migration()
    assert info["status"] == "failed"
    assert info["error-desc"] == ("the destination did not say READY, and a frontend waits for an answer; try again")
    destination.process.send_signal(signal.SIGCONT)
    assert destination.process.wait() == 1
    assert chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX)


def test_a_frontend_that_was_answered_something_is_not_served_by_who_does_not_know_it(chain: Chain) -> None:
    pause(chain, on=True)
    destination = begin(chain)
    chain.serving.process.wait_migration_status("pre-switchover")
    set_mtu(chain)
    chain.serving.process.kill()
    assert destination.process.wait() == 1
    assert "it died after a frontend changed something that was not sent again" in chain.log_of(destination)
    assert chain.guest.frontend.is_lost(FLOW_SECONDS_MAX)
    chain.renew()


@pytest.mark.parametrize(
    "habits", [QEMU, USER_MODE_LINUX, CLOUD_HYPERVISOR], ids=["qemu", "user-mode-linux", "cloud-hypervisor"]
)
def test_a_driver_that_resets_during_handovers_is_served_whatever_its_frontend_sends_for_it(
    tmp_path_factory: pytest.TempPathFactory, habits: Habits
) -> None:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(f"needs network namespaces: {reason}")
    chain = Chain(tmp_path_factory.mktemp("m"), habits=habits)
    try:
        moves = 0
        for _ in range(TRIES_MAX):
            chain.frames.stop()
            source, destination = chain.serving, chain.destination()
            info: dict[str, str] = {}
            source.process.execute("migrate", uri=destination.address)
            waiter = threading.Thread(target=lambda it=source, info=info: info.update(it.process.wait_migration()))
            waiter.start()
            while waiter.is_alive():
                chain.guest.reset_driver()
            if info["status"] == "completed":
                assert source.process.quit() == 0
                chain.serving = destination
                moves += 1
            else:
                # A frontend that never rests may take a handover back, if the source is starved meanwhile.
                assert "frontend" in info["error-desc"], info
                end_of(destination)
            chain.reset_driver()
            assert chain.frames.wait_flow(seconds=FLOW_SECONDS_MAX)
            assert not chain.guest.frontend.is_lost()
            if moves == 3:
                break
        assert moves == 3
    finally:
        chain.close()
