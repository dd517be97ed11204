"""Section rust: the packet path's own benchmarks, which measure it without a kernel around it.

Owns:        running cargo, reading what it prints.
Never sees:  what is measured.
Read next:   rust/dataplane/benches.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from benchmarks.report import Findings, Table
from localmig.errors import ConfigError, LocalmigError

RUN_SECONDS_MAX: Final = 600.0
"""Most of it compiles."""

_ROOT: Final = Path(__file__).parents[1]


def run(findings: Findings) -> None:
    """Runs them, and fills in what they print: a line each, a name and what was found."""
    if shutil.which("cargo") is None:
        raise ConfigError("no cargo: see https://rustup.rs")
    argv = ["cargo", "bench", "--quiet", "--package", "localmig-dataplane", "--bench", "*"]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False)
    if done.returncode != 0:
        raise LocalmigError(f"cargo bench failed: {done.stderr.strip()[-500:]}")
    table = Table(title="The packet path by itself", columns=("what", "found"))
    for line in done.stdout.splitlines():
        name, colon, found = line.partition(": ")
        if colon:
            table.add(name.strip(), found.strip())
    findings.tables.append(table)
    findings.samples["printed"] = done.stdout.splitlines()
