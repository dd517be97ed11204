"""Daemons one after another, each taking over from the one before, under numbered traffic.

Owns:        the NICs, who serves, the order of handovers, resets and reconnects; what each generation took.
Never sees:  what is judged about it.
Read next:   daemons.py for where daemons come from; long_lived.py for one daemon that fails to hand over; verdict.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.kit.fork_server import fork_server
from tests.soak.daemons import Daemon
from tests.soak.long_lived import FAILURES, Impostor
from tests.soak.monitor import ENDED, Monitor
from tests.soak.traffic import Nic, Traffic

from benchmarks.site import LOCAL, Footprint
from localmig.testing.frontend import DRIVER_FEATURES
from localmig.testing.namespace import configure
from localmig.testing.process import Start, start_program
from localmig.virtio import Feature

NICS: Final = {"tap0": DRIVER_FEATURES, "tap1": DRIVER_FEATURES | int(Feature.RING_PACKED)}
"""One with split rings, one with packed ones."""

RESET_EVERY: Final = 10
"""Handovers between resets of a guest's driver."""

RECONNECT_EVERY: Final = 25
"""Handovers between two times that a frontend leaves and comes again."""

PROGRAM_EVERY: Final = 50
"""Generations of which one is started as a program: it costs as much as ten others."""

RECORD_EVERY: Final = 100
"""Handovers of which one is recorded, for its size."""


DOWNTIME_LIMIT_MS: Final = 10_000
"""A soak is about what is left behind. On a machine that has much else to do one of thousands of handovers would take
longer than the usual 300 ms, and be taken back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What one daemon took once it served alone, and what its arrival cost.

    Attributes:
        number: which one; the first that took over is 1.
        is_program: whether it was started as a program.
        footprint: of its process.
        downtime_us: as its source told.
        descriptors: how many arrived.
        stream_bytes: what a recording of it had, None where none was made.
    """

    number: int
    is_program: bool
    footprint: Footprint
    downtime_us: int
    descriptors: int
    stream_bytes: int | None


class Soak:
    """NICs in the namespace of this thread, a daemon that serves them, traffic through all. A context manager.

    Args:
        on_generation: told of each.
    """

    def __init__(self, on_generation: Callable[[Generation], None] = lambda _: None) -> None:
        self._on_generation = on_generation
        self._resources = ExitStack()
        self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        self._alive: list[Daemon] = []
        self._resources.callback(self._end_daemons)
        self.resets = self.reconnects = 0
        self._number = 0
        self._impostors = 0
        objects: list[str] = []
        for tap, features in NICS.items():
            packed = ",packed=on" if features & Feature.RING_PACKED else ""
            objects += ["--netdev", f"tap,id={tap},ifname={tap}"]
            objects += ["--device", f"virtio-net,id={tap}-nic,netdev={tap},socket={self._folder / tap}{packed}"]
        self._daemon = self._start([*self._common(0), *objects], fork_server().start)
        self._daemon.wait_ready()
        self.monitor = Monitor(self._qmp(0))
        self.nics = [
            self._resources.enter_context(Nic(self._folder / tap, tap, features=features))
            for tap, features in NICS.items()
        ]
        for tap in NICS:
            configure(tap)
        self.traffic = self._resources.enter_context(Traffic(self.nics))

    @property
    def pid(self) -> int:
        """The daemon that serves."""
        return self._daemon.pid

    def hand_over(self, count: int) -> list[Generation]:
        """Hands over `count` times; what each generation took. Whatever goes wrong is raised."""
        generations = []
        last = self._number + count
        successor = self._successor(self._number + 1)
        for number in range(self._number + 1, last + 1):
            # The one after it starts while this one takes over.
            after_it = self._successor(number + 1) if number < last else None
            generation = self._hand_over_to(successor, number)
            generations.append(generation)
            self._on_generation(generation)
            self.traffic.check()
            if number % RESET_EVERY == 0:
                self._reset(self.nics[number // RESET_EVERY % len(self.nics)])
            if number % RECONNECT_EVERY == 0:
                self._reconnect(self.nics[number // RECONNECT_EVERY % len(self.nics)])
            if after_it is not None:
                successor = after_it
        return generations

    def fail_to_hand_over(self, count: int) -> list[Footprint]:
        """Lets the daemon that serves fail `count` times, each way in turn; what it took after each round of them."""
        footprints = []
        self._impostors += 1
        path = self._folder / f"i{self._impostors}"
        with Impostor(path) as impostor:
            for failures in range(1, count + 1):
                failure = FAILURES[failures % len(FAILURES)]
                self.monitor.migrate(f"unix:{path}")
                impostor.fail(failure, lambda: self.monitor.execute("migrate_cancel"))
                status = self.monitor.wait_status(*ENDED)
                assert status == failure.status, (failure, self.monitor.execute("query-migrate"))
                self.traffic.check()
                if failures % len(FAILURES) == 0:
                    footprints.append(Footprint.of(self.pid))
        return footprints

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # Everything that was sent arrives, then guests leave, then the daemon goes.
        self.monitor.close()
        self._resources.__exit__(kind, None, None)

    # -- small things -------------------------------------------------------------------------------------------

    def _common(self, number: int) -> list[str]:
        patient = ("--migration-parameter", f"downtime-limit={DOWNTIME_LIMIT_MS}")
        return [*LOCAL, *patient, "--qmp", f"unix:{self._qmp(number)}", "--log", str(self._folder / "log")]

    def _qmp(self, number: int) -> Path:
        return self._folder / f"q{number}"

    def _uri(self, number: int) -> str:
        return f"unix:{self._folder / f'm{number}'}"

    def _successor(self, number: int) -> Daemon:
        start = fork_server().start if number % PROGRAM_EVERY else start_program
        return self._start([*self._common(number), "--incoming", self._uri(number)], start)

    def _start(self, arguments: Sequence[str], start: Start) -> Daemon:
        daemon = Daemon(arguments, start)
        self._alive.append(daemon)
        return daemon

    def _end_daemons(self) -> None:
        """The one that serves, and the next one if something went wrong."""
        for daemon in self._alive:
            daemon.end()

    def _hand_over_to(self, successor: Daemon, number: int) -> Generation:
        successor.wait_ready()
        stream = self._folder / "stream"
        is_recorded = number % RECORD_EVERY == 1
        if is_recorded:
            self.monitor.execute("migrate-set-parameters", record=str(stream))
        self.monitor.migrate(self._uri(number))
        status = self.monitor.wait_status(*ENDED)
        info = self.monitor.execute("query-migrate")
        assert status == "completed", info
        self.monitor.quit()
        exit_status = self._daemon.wait()
        assert exit_status == 0, f"daemon {self._daemon.pid} ended with {exit_status}"
        self._alive.remove(self._daemon)
        self._daemon, self.monitor = successor, Monitor(self._qmp(number))
        # A source that has let go is settled with; only then is what it took back.
        self.monitor.wait_settled()
        self._number = number
        return Generation(
            number=number,
            is_program=number % PROGRAM_EVERY == 0,
            footprint=Footprint.of(successor.pid),
            downtime_us=info["local"]["downtime-us"],
            descriptors=info["local"]["descriptors"],
            stream_bytes=stream.stat().st_size if is_recorded else None,
        )

    def _reset(self, nic: Nic) -> None:
        """A driver begins anew. What is in its rings then goes with them, so there must be nothing."""
        self.traffic.pause()
        nic.guest.reset_driver()
        self.resets += 1
        self.traffic.go_on()

    def _reconnect(self, nic: Nic) -> None:
        """A frontend leaves and comes again. A TAP without a guest takes nothing, so nothing must be under way."""
        self.traffic.pause()
        nic.guest.reconnect()
        self.reconnects += 1
        self.traffic.go_on()
