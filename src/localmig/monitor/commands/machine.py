"""Commands about the daemon as a whole.

Owns:        query-version, query-status, stop, cont, quit.
Never sees:  clients, JSON text, migrations.
Read next:   migration.py.
"""

from __future__ import annotations

from typing import Final

from localmig.daemon import Daemon, RunState
from localmig.migration.hello import program_version
from localmig.monitor.protocol import version_info
from localmig.monitor.schema import Command


def query_version(daemon: Daemon) -> dict[str, object]:
    """Which program answers."""
    del daemon
    return version_info(program_version())


def query_status(daemon: Daemon) -> dict[str, object]:
    """The run state."""
    return {"running": daemon.run_state is RunState.RUNNING, "status": daemon.run_state.value}


def stop(daemon: Daemon) -> dict[str, object]:
    """Stops all rings."""
    daemon.stop()
    return {}


def cont(daemon: Daemon) -> dict[str, object]:
    """Lets all rings run."""
    daemon.cont()
    return {}


def quit_daemon(daemon: Daemon) -> dict[str, object]:
    """Ends the daemon in good order."""
    daemon.quit()
    return {}


COMMANDS: Final = (
    Command(name="query-version", run=query_version),
    Command(name="query-status", run=query_status),
    Command(name="stop", run=stop),
    Command(name="cont", run=cont),
    Command(name="quit", run=quit_daemon),
)
