"""What was measured on: kernel, processor, load, the versions of everything beside us.

Owns:        finding these out.
Never sees:  measurements.
Read next:   report.py, which prints them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from localmig.migration.hello import program_version

_ANSWER_SECONDS_MAX: Final = 20.0
"""A program that tells its version does so in milliseconds."""

_PROGRAMS: Final[dict[str, Sequence[str]]] = {
    "rustc": ("rustc", "--version"),
    "gcc": ("gcc", "--version"),
    "QEMU": ("qemu-system-x86_64", "--version"),
    "DPDK": ("dpkg-query", "--show", "--showformat", "${Version}", "dpdk"),
    "passt": ("dpkg-query", "--show", "--showformat", "${Version}", "passt"),
    "iperf3": ("iperf3", "--version"),
}


def facts() -> dict[str, str]:
    """The machine and its programs, a text each."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "localmig": program_version(),
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "frequency governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "none",
        "virtual machine": "yes" if " hypervisor" in _read("/proc/cpuinfo") else "no",
        "memory": _memory(),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()) + " when the run began",
        "Python": platform.python_version(),
        **{name: _version(argv) for name, argv in _PROGRAMS.items()},
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.machine()


def _memory() -> str:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return f"{int(found[1]) / 1024**2:.0f} GiB" if found else "unknown"


def _version(argv: Sequence[str]) -> str:
    if shutil.which(argv[0]) is None:
        return "not here"
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_ANSWER_SECONDS_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not tell: {error}"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "not here"
