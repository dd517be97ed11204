"""The NIC that the demonstration replaces daemons under.

Owns:        the daemons, one after another; when rings stopped and started, by their trace.
Never sees:  guests, traffic.
Read next:   rounds.py, which has them replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from localmig.errors import PeerError
from localmig.fds import OwnedFd

STEP_SECONDS_MAX: Final = 60
"""For one handover or restart whole: it takes a second, most of it Python starting; a busy machine more."""


class Service:
    """One NIC on `tap0`, served by one daemon after another."""

    def __init__(self, folder: Path) -> None:
        self.nic = str(folder / "nic0.sock")
        self._qmp = str(folder / "qmp.sock")
        self._trace = folder / "trace.jsonl"
        self._log = folder / "daemon.log"
        self._seen = 0
        self._pid: int | None = None

    def start(self) -> None:
        """Starts a daemon and waits until it is ready. PeerError if it is not."""
        with contextlib.ExitStack() as ends:
            ready, announce = (ends.enter_context(OwnedFd(fd)) for fd in os.pipe())
            argv = [sys.executable, "-m", "localmig.cli", "run", "--netdev", "tap,id=net0,ifname=tap0"]
            argv += ["--device", f"virtio-net,id=nic0,netdev=net0,socket={self.nic}", "--qmp", f"unix:{self._qmp}"]
            argv += ["--trace", str(self._trace), "--log", str(self._log), "--ready-fd", str(announce.fileno())]
            # In a session of its own: Ctrl-C is for us, who end it in order.
            daemon = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stderr=ends.enter_context(self._log.open("a")),
                pass_fds=[announce.fileno()],
                start_new_session=True,
            )
            self._pid = daemon.pid
            announce.close()
            if not select.select([ready], [], [], STEP_SECONDS_MAX)[0] or not os.read(ready.fileno(), 1):
                raise PeerError(f"the daemon did not start:\n{self._log_tail()}")

    def hand_over(self) -> None:
        """Replaces the daemon as localmig does it. PeerError if the new one does not serve."""
        argv = [sys.executable, "-m", "localmig.cli", "upgrade", "--json", "--log", str(self._log), self._qmp]
        argv += ["--", "--trace", str(self._trace)]
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=STEP_SECONDS_MAX, start_new_session=True, check=False
        )
        if done.returncode != 0:
            raise PeerError(f"the upgrade failed:\n{done.stderr}")
        self._pid = json.loads(done.stdout)["new-pid"]

    def restart(self) -> None:
        """Replaces the daemon as a service manager does: ends it, then starts another."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """Ends the daemon, if there is one, and waits until it is gone."""
        if self._pid is None:
            return
        pid, self._pid = self._pid, None
        with OwnedFd(os.pidfd_open(pid)) as daemon:
            signal.pidfd_send_signal(daemon.fileno(), signal.SIGTERM)
            if not select.select([daemon], [], [], STEP_SECONDS_MAX)[0]:
                signal.pidfd_send_signal(daemon.fileno(), signal.SIGKILL)

    def moved_ns(self) -> tuple[int, int | None]:
        """When, since `forget`, the first ring stopped and the last one started, as traced; None if none did."""
        with self._trace.open() as trace:
            trace.seek(self._seen)
            events = [json.loads(line) for line in trace]
        stopped = [event["at_ns"] for event in events if event["event"] == "RingsStopped"]
        started = [event["at_ns"] for event in events if event["event"] == "RingsStarted"]
        if not stopped:
            raise PeerError(f"the daemons traced no stop of the rings, and {len(started)} starts")
        return min(stopped), max(started, default=None)

    def forget(self) -> None:
        """Lets `moved_ns` begin here."""
        self._seen = self._trace.stat().st_size

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
