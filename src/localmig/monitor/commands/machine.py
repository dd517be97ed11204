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
from localmig.monitor.schema import Boolean, Command, Enumeration, String, Struct, Uint64, returned


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


_NUMBERS: Final = Struct(tuple(returned(name, Uint64()) for name in ("major", "minor", "micro")))
_VERSION: Final = Struct((returned("qemu", _NUMBERS), returned("package", String())))
_STATUS: Final = Struct((returned("running", Boolean()), returned("status", Enumeration(tuple(RunState)))))

COMMANDS: Final = (
    Command(name="query-version", run=query_version, returns=_VERSION),
    Command(name="query-status", run=query_status, returns=_STATUS),
    Command(name="stop", run=stop),
    Command(name="cont", run=cont),
    Command(name="quit", run=quit_daemon),
)
