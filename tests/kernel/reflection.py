"""A program that tells what it began with, for test_fork_server.py: `python -m tests.kernel.reflection WORD…`."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> dict[str, Any]:
    """What there is to see from inside."""
    descriptors = {}
    for link in Path("/proc/self/fd").iterdir():
        if link.exists():  # not the listing itself
            descriptors[link.name] = str(link.readlink())
    return {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "descriptors": descriptors,
        "namespace": str(Path("/proc/self/ns/net").readlink()),
        "handlers": {number.name: str(signal.getsignal(number)) for number in signal.Signals},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "threads": threading.active_count(),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "collects": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "name": __name__,
        "limits": Path("/proc/self/limits").read_text(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main()))
    if sys.argv[1:] == ["stop"]:
        sys.stdout.flush()
        signal.raise_signal(signal.SIGSTOP)
        sys.exit("continued")
