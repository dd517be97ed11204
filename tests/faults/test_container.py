"""A daemon that is the first process of a container: a PID namespace that ends with it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from localmig.testing.process import start_program

if TYPE_CHECKING:
    from tests.kit.site import Site

SECONDS_MAX = 60
"""For one program; it takes a second, a machine under load gets much more."""

CONTAINER = """\
import ctypes, os, subprocess, sys
assert ctypes.CDLL(None).unshare(0x20020000) == 0  # CLONE_NEWPID, CLONE_NEWNS
if process_1 := os.fork():
    os.closerange(3, 4096)  # the daemon's own, which tell its end
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(process_1, 0)[1]))
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Runs a command as the first process of fresh PID and mount namespaces, and ends with it."""


def test_process_1_of_a_container_serves_on_where_its_end_would_kill_its_successor(site: Site) -> None:
    daemon = site.source(start=partial(start_program, launcher=(sys.executable, "-c", CONTAINER)))
    site.attach()
    (process_1,) = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    enter = ("nsenter", f"--target={process_1}", "--pid", "--mount", "--net")
    upgrade = (sys.executable, "-P", "-m", "localmig.cli", "upgrade", str(daemon.qmp))
    done = subprocess.run([*enter, *upgrade], capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 1
    assert "rolled back: this daemon is process 1 of its PID namespace" in done.stderr
    assert site.ping(20).lost == 0
    # A daemon elsewhere outlives it.
    destination = site.destination()
    daemon.execute("migrate", uri=site.address)
    assert daemon.wait_migration()["status"] == "completed"
    with suppress(EOFError):  # it ends without a word at times
        daemon.execute("quit")
    daemon.wait()
    assert site.ping(20).lost == 0
    assert destination.is_alive
