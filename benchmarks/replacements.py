"""Section replacements: what a guest's peer notices of a handover, of a restart, and of QEMU's own migration.

Owns:        the rows and their table.
Never sees:  how a ping is counted, how QEMU is told.
Read next:   pinging.py, site.py and qemu_migration.py, which it puts together.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import qemu_migration
from benchmarks.pinging import Pings, await_answer
from benchmarks.qemu_migration import GUEST_ADDRESS, HOST_ADDRESS, PING_ADDRESS, QemuGuest
from benchmarks.report import NONE, Findings, Table, time_cells
from benchmarks.site import NicSite, namespace
from benchmarks.sizes import Sizes
from localmig.errors import LocalmigError, PeerError
from localmig.testing import qemu
from localmig.testing.guest import GuestProcess, GuestSettings
from localmig.testing.namespace import configure, create_tap, link

RECONNECT_MS: Final = (1, 100)
"""How often the frontend looks for its backend. QEMU's own choices are whole seconds up to 9.1."""

RECONNECTED_SECONDS_MAX: Final = 60.0
"""A new daemon listens within a second; a loaded machine takes more."""

_QUIET_PINGS: Final = 1000
"""As long as a replacement takes, to see how silent the machine is by itself."""


@dataclass(kw_only=True, slots=True)
class Row:
    """One way of replacing whoever serves the guest.

    Attributes:
        name: the way.
        downtimes_ns: as whoever is replaced tells it.
        silences_ns: the longest time in which pings waited and none was answered, of each replacement.
        lost: pings without an answer, of each.
        gave_up: why it could not be done, or not to its end.
    """

    name: str
    downtimes_ns: list[int] = field(default_factory=list)
    silences_ns: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    gave_up: str | None = None


def run(findings: Findings, sizes: Sizes) -> None:
    """Measures, and fills in what it found."""
    rows: list[Row] = []
    times = sizes.replacements
    try:
        _try(rows, "nothing happens", partial(_with_kit_guest, replace=_nothing, times=times))
        _try(rows, "localmig: handover", partial(_with_kit_guest, replace=_hand_over, times=times))
        for every_ms in RECONNECT_MS:
            measure = partial(_with_kit_guest, replace=_restart, times=times, reconnect_ms=every_ms)
            _try(rows, f"localmig: restart, frontend reconnects every {every_ms} ms", measure)
        if sizes.qemu_migrations:
            _qemu(rows, findings, sizes.qemu_migrations)
    finally:
        findings.samples |= {row.name: asdict(row) for row in rows}
        findings.tables.append(_table(rows))
        findings.notes += [f"**{row.name}**: {row.gave_up}" for row in rows if row.gave_up is not None]
        findings.note(
            "The guest is pinged each millisecond, from before the replacement until it answers after it. Silence: "
            "the longest time in which pings waited and none was answered; pings wait in the machine's own queues, "
            "too, so the first row is the floor."
        )
        findings.note(
            "Downtime of a handover and a restart: from the old daemon's rings stopping to the new one's running; of "
            "QEMU: as it tells, whole milliseconds. The guest of the first rows is the kit's own, a network "
            "namespace behind a driver; QEMU's is Linux. QEMU moves it to another TAP on the same bridge."
        )
        findings.note(
            "A frontend that loses its backend takes the guest's link down. Linux may believe in a link that is up "
            "again only a second later, so the silence of a restart may be that much longer than its downtime."
        )


def _try(rows: list[Row], name: str, measure: Callable[[Row], None]) -> None:
    row = Row(name=name)
    rows.append(row)
    sys.stderr.write(f"  {name}\n")
    try:
        measure(row)
    except (LocalmigError, OSError) as error:
        row.gave_up = str(error)


@contextmanager
def _watched(row: Row) -> Iterator[None]:
    """Pings from before the block until the guest answers after it."""
    with Pings(PING_ADDRESS) as pings:
        yield
        await_answer(PING_ADDRESS)
        report = pings.stop()
    row.silences_ns.append(report.silence_us_max * 1000)
    row.lost.append(report.lost)


# -- the kit's guest --------------------------------------------------------------------------------------------


def _with_kit_guest(
    row: Row,
    *,
    replace: Callable[[Row, NicSite, GuestProcess], None],
    times: int,
    reconnect_ms: float | None = None,
) -> None:
    with namespace(), NicSite(1) as site:
        create_tap("tap0")  # persistent: a restart keeps the host's addresses, as a careful operator has it
        configure("tap0", address=HOST_ADDRESS)
        site.start()
        mac = str(link("tap0")["address"])
        settings = GuestSettings(
            socket=str(site.nics["tap0"]),
            address=GUEST_ADDRESS,
            reconnect_ms=reconnect_ms,
            neighbors={HOST_ADDRESS.partition("/")[0]: mac},
        )
        with GuestProcess(settings) as guest:
            await_answer(PING_ADDRESS)
            for _ in range(times):
                replace(row, site, guest)


def _nothing(row: Row, _site: NicSite, _guest: GuestProcess) -> None:
    with _watched(row):
        for _ in range(_QUIET_PINGS // 100):
            await_answer(PING_ADDRESS)


def _hand_over(row: Row, site: NicSite, _guest: GuestProcess) -> None:
    site.start_destination()
    with _watched(row):
        row.downtimes_ns.append(site.hand_over().downtime_us * 1000)
        site.end_other()


def _restart(row: Row, site: NicSite, guest: GuestProcess) -> None:
    old = site.daemon
    with _watched(row):
        site.stop()
        site.start()
        guest.wait_for("reconnected", RECONNECTED_SECONDS_MAX)
    started = site.daemon.wait_event("RingsStarted")["at_ns"]
    stopped = [fact["at_ns"] for fact in old.facts if fact["event"] == "RingsStopped"]
    if not stopped:
        raise PeerError("the daemon that was restarted did not trace that its rings stopped")
    row.downtimes_ns.append(int(started - stopped[-1]))


# -- QEMU's -----------------------------------------------------------------------------------------------------


def _qemu(rows: list[Row], findings: Findings, times: int) -> None:
    try:
        version = qemu_migration.version()
        accelerator = qemu.best_accelerator(qemu_migration.KERNEL_PACKAGE)
    except (LocalmigError, OSError, ValueError) as error:
        findings.notes.append(f"**QEMU's own migration was not measured**: {error}")
        return
    number = ".".join(map(str, version))
    name = f"QEMU {number} ({accelerator.upper()}): live migration"
    _try(rows, name, partial(_migrate, accelerator=accelerator, times=times))
    if version < qemu_migration.CPR_TRANSFER_SINCE:
        since = ".".join(map(str, qemu_migration.CPR_TRANSFER_SINCE))
        rows.append(Row(name=f"QEMU: cpr-transfer (from {since} on, here is {number})"))
    else:
        rows.append(Row(name="QEMU: cpr-transfer", gave_up="these benchmarks do not drive it"))


def _migrate(row: Row, *, accelerator: str, times: int) -> None:
    with (
        namespace(),
        tempfile.TemporaryDirectory(prefix="localmig-bench-") as folder,
        QemuGuest(Path(folder), accelerator) as guest,
    ):
        for _ in range(times):
            with _watched(row):
                info = guest.migrate()
            row.downtimes_ns.append(int(info["downtime"]) * 1_000_000)


def _table(rows: list[Row]) -> Table:
    columns = ("way", "times", "downtime median", "p99", "max", "silence median", "p99", "max", "lost median", "max")
    table = Table(title="Replacing whoever serves a guest that is pinged each millisecond", columns=columns)
    for row in rows:
        lost = [str(sorted(row.lost)[len(row.lost) // 2]), str(max(row.lost))] if row.lost else [NONE, NONE]
        times = str(len(row.lost)) if row.lost else NONE
        table.add(row.name, times, *time_cells(row.downtimes_ns), *time_cells(row.silences_ns), *lost)
    return table
