"""Why a handover ended as it did is told alike by query-migrate, by the command line and by the log of each side."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from typing import TYPE_CHECKING, Any

import pytest
from tests.kit.proxy import StrippingProxy

from localmig.cli import main

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

PATIENT_MS = 10_000
"""For what does not hang."""

COMMIT_TIMEOUT_MS = 500
"""For what hangs past COMMIT: long enough for a busy machine, short enough to be awaited."""


def localmig(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


def migrate(source: DaemonProcess, uri: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, report and stderr of `localmig migrate`."""
    status, out, err = localmig("migrate", str(source.qmp), uri, "--local", "--json")
    report: dict[str, Any] = json.loads(out)
    return status, report, err


def migration_shown(daemon: DaemonProcess) -> str:
    """What `localmig status` says of the migration."""
    _, out, _ = localmig("status", str(daemon.qmp))
    (line,) = (line for line in out.splitlines() if line.startswith("migration "))
    return line.removeprefix("migration ").strip()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("after-receive:HELLO=kill", "destination lost while 'greeting'"),
        ("after-receive:SETUP=raise", "the destination refused: internal error: InjectedError"),
        ("before-send:READY=kill", "destination lost while 'switching'"),
        ("after-receive:SWITCHOVER=stop", "the destination did not say READY within downtime-limit"),
        ("after-receive:COMMIT=kill", "the destination died after COMMIT: this daemon serves again"),
        (
            "before-send:DONE=stop",
            f"killed after COMMIT, for it said nothing for {COMMIT_TIMEOUT_MS} ms (commit-timeout)",
        ),
    ],
)
def test_a_handover_that_failed_has_one_reason_everywhere(site: Site, fault: str, reason: str) -> None:
    source, destination = site.source(), site.destination(fault=fault)
    # A loaded machine must not look like a hang where none is meant.
    limits = {} if fault.endswith("=stop") else {"downtime_limit": PATIENT_MS, "commit_timeout": PATIENT_MS}
    source.execute("migrate-set-parameters", **{"commit_timeout": COMMIT_TIMEOUT_MS, **limits})
    status, report, err = migrate(source, site.address)
    assert status == 1
    assert report["outcome"] == "rolled-back"
    told = source.execute("query-migrate")["error-desc"]
    assert reason in told
    assert report["reason"] == report["migration"]["error-desc"] == told
    assert f"localmig: error: rolled back: {told}" in err
    assert f"handover failed, this daemon serves on: {told}" in site.log_of(source)
    assert migration_shown(source).startswith("failed")
    assert migration_shown(source).endswith(f": {told}")
    if destination.is_alive:
        destination.send_signal(signal.SIGCONT)
    destination.wait()


def test_a_refusal_is_told_by_both_sides(site: Site) -> None:
    source, destination = site.source(), site.destination(*site.objects(netdev=",mtu=1400"))
    _, report, _ = migrate(source, site.address)
    refusal = "netdev 'net0' has mtu="
    assert report["reason"].startswith(f"the destination refused: {refusal}")
    assert destination.wait() == 1
    assert report["reason"].removeprefix("the destination refused: ") in site.log_of(destination)
    assert report["reason"] in site.log_of(source)


def test_a_proxy_is_told_by_both_sides(site: Site) -> None:
    source, destination = site.source(), site.destination()
    front = site.folder / "proxy"
    with StrippingProxy(str(front), site.address.removeprefix("unix:")):
        _, report, _ = migrate(source, f"unix:{front}")
    assert "connect them directly, or set local to false" in report["reason"]
    assert destination.wait() == 1
    assert "connect them directly, or set local to false" in site.log_of(destination)
    assert report["reason"] in site.log_of(source)


def test_a_cancelled_handover_is_logged_as_such(site: Site) -> None:
    source, destination = site.source(), site.destination()
    source.execute("migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}])
    source.execute("migrate", uri=site.address)
    source.wait_event("MigrationStatusChanged", status="pre-switchover")
    source.execute("migrate_cancel")
    assert source.wait_migration()["status"] == "cancelled"
    assert destination.wait() == 1
    assert "handover cancelled, this daemon serves on\n" in site.log_of(source)
    assert "the source took the handover back: cancelled by the operator" in site.log_of(destination)


@pytest.mark.parametrize("fault", ["after-send:SWITCHOVER=kill", "before-send:COMMIT=kill"])
def test_a_daemon_that_took_over_because_the_other_one_died_is_shown_as_that(site: Site, fault: str) -> None:
    source, destination = site.source(fault=fault), site.destination()
    source.execute("migrate", uri=site.address)
    assert source.wait() == -signal.SIGKILL
    destination.wait_event("MigrationStatusChanged", status="completed")
    note = destination.execute("query-migrate")["local"]["note"]
    assert note == "the source died during the handover; this daemon took over from guest memory"
    assert f"taken over: {note}" in site.log_of(destination)
    assert migration_shown(destination).startswith("completed")
    assert migration_shown(destination).endswith(f": {note}")
