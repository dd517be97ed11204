"""The packet path: guest memory, rings and the threads that move packets, in Rust (`rust/dataplane/`).

Owns:        the Python face of the Rust core, nothing else.
Never sees:  vhost-user, migration, options.
Read next:   `_dataplane.pyi` for the contract, counters.py for what is counted,
             `rust/dataplane/src/lib.rs` for the inside.
"""

from __future__ import annotations

from localmig.dataplane._dataplane import (
    CHAIN_DATA_SIZE_MAX,
    FRAME_SIZE_MAX,
    STREAM_IN_HAND_MAX,
    CallbackQueues,
    Chain,
    DirtyLog,
    DriverPair,
    FrameStream,
    GuestMemory,
    InFlight,
    Ledger,
    QueuePair,
    Ring,
    check_positions,
    forbid_programs,
    forbid_unneeded,
    keep_capabilities,
    load_all,
    load_waiting,
    recover_all,
    save_all,
    save_waiting,
    set_dumpable,
    start_all,
    stop_all,
    swap_memory,
)
from localmig.dataplane.counters import CallbackCounters, Counters, DriverCounters

__all__ = [
    "CHAIN_DATA_SIZE_MAX",
    "FRAME_SIZE_MAX",
    "STREAM_IN_HAND_MAX",
    "CallbackCounters",
    "CallbackQueues",
    "Chain",
    "Counters",
    "DirtyLog",
    "DriverCounters",
    "DriverPair",
    "FrameStream",
    "GuestMemory",
    "InFlight",
    "Ledger",
    "QueuePair",
    "Ring",
    "check_positions",
    "forbid_programs",
    "forbid_unneeded",
    "keep_capabilities",
    "load_all",
    "load_waiting",
    "recover_all",
    "save_all",
    "save_waiting",
    "set_dumpable",
    "start_all",
    "stop_all",
    "swap_memory",
]
