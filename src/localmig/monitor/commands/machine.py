"""Commands about the daemon as a whole.

Owns:        query-version, query-status, query-security, stop, cont, getfd, closefd, quit.
Never sees:  clients, JSON text, migrations.
Read next:   migration.py.
"""

from __future__ import annotations

import os
from typing import Final

from localmig.daemon import Daemon, RunState
from localmig.errors import ConfigError
from localmig.fds import OwnedFd
from localmig.migration.hello import program_version
from localmig.monitor.protocol import version_info
from localmig.monitor.schema import Command
from localmig.qapi import Array, Boolean, Enumeration, Member, String, Struct, Uint64, returned


def query_version(daemon: Daemon) -> dict[str, object]:
    """Which program answers."""
    del daemon
    return version_info(program_version())


def query_status(daemon: Daemon) -> dict[str, object]:
    """The run state."""
    return {"running": daemon.run_state is RunState.RUNNING, "status": daemon.run_state.value}


def query_security(daemon: Daemon) -> dict[str, object]:
    """As whom the daemon runs, what it may not do, and who else may talk to it. QEMU has no such command."""
    access, sandbox = daemon.access, daemon.sandbox
    return {
        "user-id": os.geteuid(),
        "group-id": os.getegid(),
        "sandbox": {"option": sandbox.option, "enabled": sandbox.enabled, "spawn": sandbox.spawn}
        | ({} if sandbox.reason is None else {"reason": sandbox.reason}),
        "allowed-users": sorted(access.users),
        "socket-mode": f"{access.mode:04o}",
    } | ({} if access.group is None else {"socket-group": access.group})


def stop(daemon: Daemon) -> dict[str, object]:
    """Stops all rings."""
    daemon.stop()
    return {}


def cont(daemon: Daemon) -> dict[str, object]:
    """Lets all rings run."""
    daemon.cont()
    return {}


def getfd(daemon: Daemon, *, fdname: str, fd: OwnedFd | None) -> dict[str, object]:
    """Keeps the descriptor that came along, for an address `fd:NAME`."""
    if fd is None:
        raise ConfigError("No file descriptor supplied via SCM_RIGHTS")
    daemon.descriptors.add(fdname, fd)
    return {}


def closefd(daemon: Daemon, *, fdname: str) -> dict[str, object]:
    """Closes such a descriptor."""
    daemon.descriptors.close(fdname)
    return {}


def quit_daemon(daemon: Daemon) -> dict[str, object]:
    """Ends the daemon in good order."""
    daemon.quit()
    return {}


_NUMBERS: Final = Struct(tuple(returned(name, Uint64()) for name in ("major", "minor", "micro")))
_VERSION: Final = Struct((returned("qemu", _NUMBERS), returned("package", String())))
_STATUS: Final = Struct((returned("running", Boolean()), returned("status", Enumeration(tuple(RunState)))))

_SECURITY: Final = Struct(
    (
        returned("user-id", Uint64()),
        returned("group-id", Uint64()),
        returned(
            "sandbox",
            Struct(
                (
                    returned("option", String()),
                    returned("enabled", Boolean()),
                    returned("spawn", Boolean()),
                    returned("reason", String(), required=False),
                )
            ),
        ),
        returned("allowed-users", Array(Uint64())),
        returned("socket-mode", String()),
        returned("socket-group", String(), required=False),
    )
)

_FDNAME: Final = Struct((Member(name="fdname", attribute="fdname", type=String()),))

COMMANDS: Final = (
    Command(name="query-version", run=query_version, returns=_VERSION),
    Command(name="query-status", run=query_status, returns=_STATUS),
    Command(name="query-security", run=query_security, returns=_SECURITY),
    Command(name="stop", run=stop),
    Command(name="cont", run=cont),
    Command(name="getfd", run=getfd, arguments=_FDNAME, descriptor="fd"),
    Command(name="closefd", run=closefd, arguments=_FDNAME),
    Command(name="quit", run=quit_daemon),
)
