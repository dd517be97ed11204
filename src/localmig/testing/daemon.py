"""A localmig daemon as a process: started, asked over QMP, watched by its trace, killed.

Owns:        the process, its trace pipe, one QMP conversation per question.
Never sees:  the inside of the daemon.
Read next:   process.py for how it is started; tests/faults/, which starts many.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from qemu.qmp import ExecuteError, QMPClient

from localmig.errors import PeerError, PeerLostError
from localmig.fds import OwnedFd
from localmig.testing.faults import Fault
from localmig.testing.process import Start, is_ready, start_program

ANSWER_SECONDS_MAX: Final = 20.0
"""No command waits for anything; a daemon under test may be starved by its neighbours."""

END_SECONDS_MAX: Final = 20.0
"""An orderly end closes descriptors and joins threads; the kernel may have much memory to unmap."""

Fact = Mapping[str, Any]
"""A traced event as its JSON line has it."""


class DaemonProcess:
    """One daemon. Use it as a context manager: at the end it is gone, one way or the other.

    Args:
        arguments: what follows `localmig run`; the trace is added.
        qmp: the path of its QMP socket, where it is to have one.
        fault: what shall happen to it, see faults.py; or the file that will say so when a handover begins.
        journal: the folder for the points that it passes, where they are to be written down.
        log: where its stderr goes; None: to ours.
        inherited: descriptors of ours it shall have too, under the same numbers.
        start: how it is started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        qmp: Path | None = None,
        fault: Fault | Path | None = None,
        journal: Path | None = None,
        log: Path | None = None,
        inherited: Sequence[int] = (),
        start: Start = start_program,
    ) -> None:
        self.qmp = qmp
        self._facts: list[Fact] = []
        self._changed = threading.Condition()
        self._trace_ended = False
        self._migration_began_ns = 0
        module, before = "localmig.cli", []
        if fault is not None:
            written = ["--journal", str(journal)] if journal is not None else []
            named = f"@{fault}" if isinstance(fault, Path) else str(fault)
            module, before = "localmig.testing.faults", [named, *written, "--"]
        if qmp is not None:
            arguments = [*arguments, "--qmp", f"unix:{qmp}"]
        trace_reader, trace_writer = (OwnedFd(fd) for fd in os.pipe())
        ready_reader, ready_writer = (OwnedFd(fd) for fd in os.pipe())
        with trace_writer, ready_reader, ready_writer, open(log, "ab") if log else _nothing() as stderr:
            self._process = start(
                module,
                [
                    *(*before, "run", *arguments),
                    *("--trace", f"/dev/fd/{trace_writer.fileno()}", "--ready-fd", str(ready_writer.fileno())),
                ],
                stderr=stderr.fileno() if stderr else None,
                inherited=(trace_writer.fileno(), ready_writer.fileno(), *inherited),
            )
            trace_writer.close()
            ready_writer.close()
            self._watcher = threading.Thread(target=self._watch, args=(trace_reader,), name="trace", daemon=True)
            self._watcher.start()
            if not is_ready(ready_reader):
                self.kill()
                raise PeerError(f"the daemon did not start: {' '.join(arguments)}")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def facts(self) -> list[Fact]:
        """What it traced so far."""
        with self._changed:
            return list(self._facts)

    def execute(self, command: str, **arguments: object) -> Any:
        """What the daemon answers; `_` in names is `-`, as QMP writes them. PeerError with the text of an error."""
        assert self.qmp is not None, self.pid
        if command == "migrate":
            self._migration_began_ns = time.monotonic_ns()
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return asyncio.run(_execute(self.qmp, command, named))

    def wait_fact(self, what: Callable[[Fact], bool], *, seconds: float = ANSWER_SECONDS_MAX, after: int = 0) -> Fact:
        """The first traced fact that `what` is true of, of those there are and those still to come.

        Args:
            what: whether a fact is the one.
            seconds: how long to wait.
            after: how many of `facts` to pass over.

        Raises:
            PeerLostError: the daemon ended without it.
            TimeoutError: it did not come.
        """
        deadline = time.monotonic() + seconds
        seen = after
        with self._changed:
            while True:
                for fact in self._facts[seen:]:
                    if what(fact):
                        return fact
                seen = len(self._facts)
                if self._trace_ended:
                    raise PeerLostError(f"the daemon {self.pid} ended before that")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"the daemon {self.pid} did not trace it in {seconds:g} s")

    def wait_event(self, name: str, *, seconds: float = ANSWER_SECONDS_MAX, **fields: object) -> Fact:
        """As `wait_fact`, for an event of this name with these fields."""
        return self.wait_fact(
            lambda fact: fact["event"] == name and all(fact.get(key) == value for key, value in fields.items()),
            seconds=seconds,
        )

    def wait_migration(self, *, seconds: float = ANSWER_SECONDS_MAX) -> dict[str, Any]:
        """Waits until the migration that `execute("migrate")` began has ended; what query-migrate tells then."""
        self.wait_migration_status("completed", "failed", "cancelled", seconds=seconds)
        info: dict[str, Any] = self.execute("query-migrate")
        return info

    def wait_migration_status(self, *statuses: str, seconds: float = ANSWER_SECONDS_MAX) -> None:
        """Waits until the migration that `execute("migrate")` began has one of `statuses`."""

        def has_status(fact: Fact, *expected: str, since_ns: int) -> bool:
            if fact["event"] != "MigrationStatusChanged" or fact["at_ns"] < since_ns:
                return False
            return fact["status"] in expected

        # A daemon that took over a moment ago may trace only now that it did. That has no beginning behind ours.
        began = self.wait_fact(
            lambda fact: has_status(fact, "setup", since_ns=self._migration_began_ns), seconds=seconds
        )
        self.wait_fact(lambda fact: has_status(fact, *statuses, since_ns=began["at_ns"]), seconds=seconds)

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def wait_stopped(self, *, seconds: float = END_SECONDS_MAX) -> None:
        """Waits until SIGSTOP has stopped it, or it has ended."""
        self._process.wait_stopped(seconds)

    def wait(self, *, seconds: float = END_SECONDS_MAX) -> int:
        """Waits for its end; the exit status, negative for a signal."""
        status = self._process.wait(seconds)
        self._watcher.join(seconds)
        return status

    def quit(self) -> int:
        """Ends it in order; its exit status."""
        if self.is_alive:
            self.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kills it, if it lives."""
        if self.is_alive:
            self.send_signal(signal.SIGKILL)
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def _watch(self, trace: OwnedFd) -> None:
        with open(trace.release(), encoding="utf-8") as lines:
            for line in lines:
                with self._changed:
                    self._facts.append(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self._trace_ended = True
            self._changed.notify_all()


async def _execute(path: Path, command: str, arguments: Mapping[str, object]) -> Any:
    client = QMPClient("localmig-testing")
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        await client.connect(str(path))
        try:
            return await client.execute(command, dict(arguments) or None)
        except ExecuteError as error:
            raise PeerError(str(error)) from error
        finally:
            await client.disconnect()


def _nothing() -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()
