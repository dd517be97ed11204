"""The packet path: guest memory, rings and the threads that move packets, in Rust (`rust/dataplane/`).

Owns:        the Python face of the Rust core, nothing else.
Never sees:  vhost-user, migration, options.
Read next:   `_dataplane.pyi` for the contract, counters.py for what is counted,
             `rust/dataplane/src/lib.rs` for the inside.
"""

from __future__ import annotations

from localmig.dataplane._dataplane import (
    FRAME_SIZE_MAX,
    STREAM_IN_HAND_MAX,
    DriverPair,
    FrameStream,
    GuestMemory,
    Ledger,
    QueuePair,
    Ring,
    check_positions,
    fail_rings,
    failed_rings,
    forbid_programs,
    forbid_unneeded,
    keep_capabilities,
    load_all,
    load_waiting,
    save_all,
    save_waiting,
    set_dumpable,
    start_all,
    stop_all,
    swap_memory,
)
from localmig.dataplane.counters import Counters, DriverCounters

__all__ = [
    "FRAME_SIZE_MAX",
    "STREAM_IN_HAND_MAX",
    "Counters",
    "DriverCounters",
    "DriverPair",
    "FrameStream",
    "GuestMemory",
    "Ledger",
    "QueuePair",
    "Ring",
    "check_positions",
    "fail_rings",
    "failed_rings",
    "forbid_programs",
    "forbid_unneeded",
    "keep_capabilities",
    "load_all",
    "load_waiting",
    "save_all",
    "save_waiting",
    "set_dumpable",
    "start_all",
    "stop_all",
    "swap_memory",
]
