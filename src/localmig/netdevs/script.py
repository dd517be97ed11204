"""The programs a user names to be run when a TAP comes and goes.

Owns:        running one, bounded in time.
Never sees:  when to run which.
Read next:   tap.py.
"""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path
from typing import Final

from localmig.errors import ConfigError, KernelError

NO_SCRIPT: Final = "no"
"""QEMU's word for: run nothing."""

SCRIPT_SECONDS_MAX: Final = 10
"""Adding an interface to a bridge takes milliseconds; the daemon serves nobody while it waits."""


def run_script(path: str, ifname: str) -> None:
    """Runs the program at `path` with the interface's name as its argument, as QEMU does; "no" is no program.

    Raises:
        KernelError: it could not be started.
        ConfigError: it failed, or took longer than SCRIPT_SECONDS_MAX and was killed.
    """
    if path == NO_SCRIPT:
        return
    # Absolute, because a name without a slash would be searched for in PATH.
    command = [str(Path(path).absolute()), ifname]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=SCRIPT_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired as error:
        text = f"network script {path} did not end within {SCRIPT_SECONDS_MAX} s for '{ifname}'"
        raise ConfigError(text) from error
    except OSError as error:
        hint = "; the sandbox forbids it: --sandbox on,spawn=allow" if error.errno == errno.EPERM else ""
        text = f"could not launch network script {path}: {error.strerror}{hint}"
        raise KernelError(text, errno=error.errno or 0) from error
    if result.returncode != 0:
        raise ConfigError(f"network script {path} failed with status {result.returncode} for '{ifname}'")
