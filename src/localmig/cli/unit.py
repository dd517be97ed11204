"""The systemd unit that a daemon is the main process of: whether there is one, and letting systemd reload it.

Owns:        what /proc and systemctl(1) say of it.
Never sees:  a handover: the unit's ExecReload= does it, by `localmig upgrade` inside the unit.
Read next:   upgrade.py, its user.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localmig.errors import ConfigError, StateError

STDERR: Final = 2

ANSWER_SECONDS_MAX: Final = 10.0
"""For systemctl to tell what a unit is: a question over a local bus."""

RELOAD_SECONDS_SPARE: Final = 10.0
"""How much longer than systemd itself we wait for a reload (TimeoutStartSec= ends one)."""

_UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,247}\.service", re.ASCII)
"""systemd.unit(5): a name has 256 characters with its suffix. One that begins like an option is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A service unit that has a daemon for its main process.

    Attributes:
        name: as systemctl takes it.
        manager: words for systemctl that choose the service manager: of the system, or of a user.
        can_reload: whether it has an ExecReload=.
        reload_seconds_max: when systemd gives a reload up.
    """

    name: str
    manager: tuple[str, ...]
    can_reload: bool
    reload_seconds_max: float

    def reload(self) -> None:
        """Lets systemd reload it, and waits for the outcome.

        Raises:
            ConfigError: it has no ExecReload=. Nothing was begun.
            StateError: the reload failed; which process serves is to be asked.
        """
        if not self.can_reload:
            raise ConfigError(
                f"unit '{self.name}' would end with its main process, which this daemon is: give the unit "
                "'ExecReload=localmig upgrade QMP-SOCKET' and NotifyAccess=all, see docs/systemd.md"
            )
        try:
            done = subprocess.run(
                ["systemctl", *self.manager, "reload", self.name],
                capture_output=True,
                check=False,
                text=True,
                timeout=self.reload_seconds_max + RELOAD_SECONDS_SPARE,
            )
        except subprocess.TimeoutExpired as error:
            raise StateError(f"systemd does not say how the reload of '{self.name}' went: {error}") from error
        if done.returncode != 0:
            raise StateError(f"the reload of unit '{self.name}' failed: {' '.join(done.stderr.split())}")


def unit_name(cgroups: str) -> tuple[str, bool] | None:
    """The service unit that a process with these control groups (/proc/PID/cgroup) belongs to, None where to none.

    Returns:
        Its name, and whether it is a user's rather than the system's.
    """
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "name=systemd"):  # version 2, or the hierarchy that systemd keeps beside version 1
            units = [part for part in path.split("/") if _UNIT.fullmatch(part)]
            of_user = [part for part in units if part.startswith("user@")]
            if units and units[-1] not in of_user:
                return units[-1], bool(of_user)
    return None


def logs_to_journal(environment: Mapping[str, str]) -> bool:
    """Whether our stderr is the journal's, as JOURNAL_STREAM tells: device and inode of the stream, systemd.exec(5)."""
    try:
        stream = os.fstat(STDERR)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def unit_of(pid: int) -> Unit | None:
    """The unit that a process is the main process of; None where it is that of none, as far as can be seen from here.

    None also inside of the unit, where ExecReload= runs: there the handover itself is what is to be done.
    """
    try:
        theirs, ours = (unit_name(Path(f"/proc/{who}/cgroup").read_text()) for who in (pid, "self"))
    except OSError:
        return None
    if theirs is None or theirs == ours or shutil.which("systemctl") is None:
        return None
    name, is_of_user = theirs
    manager = ("--user",) if is_of_user else ()
    try:
        asked = subprocess.run(
            ["systemctl", *manager, "show", "--property=MainPID,CanReload,TimeoutStartUSec", name],
            capture_output=True,
            check=False,
            text=True,
            timeout=ANSWER_SECONDS_MAX,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    facts = dict(line.split("=", 1) for line in asked.stdout.splitlines() if "=" in line)
    # A control group's name alone proves nothing: in a container it may be a unit of the host's.
    if facts.get("MainPID") != str(pid):
        return None
    return Unit(
        name=name,
        manager=manager,
        can_reload=facts.get("CanReload") == "yes",
        reload_seconds_max=_seconds(facts.get("TimeoutStartUSec", "")),
    )


_SPAN: Final = re.compile(r"([0-9.]+) ?(us|ms|s|min|h)?", re.ASCII)
_UNITS_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "": 1e-6}

LONGEST_RELOAD_S: Final = 3600.0
"""Where a unit has no limit (infinity): a handover that takes an hour hangs."""


def _seconds(span: str) -> float:
    """A time span as systemctl shows it ("1min 30s")."""
    found = _SPAN.findall(span)
    if not found or span == "infinity":
        return LONGEST_RELOAD_S
    return min(LONGEST_RELOAD_S, sum(float(number) * _UNITS_S[unit] for number, unit in found))
