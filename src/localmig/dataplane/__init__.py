"""The packet path: guest memory, rings and the threads that move packets, in Rust (`rust/dataplane/`).

Owns:        the Python face of the Rust core, nothing else.
Never sees:  vhost-user, migration, options.
Read next:   `_dataplane.pyi` for the contract, `rust/dataplane/src/lib.rs` for the inside.
"""

from __future__ import annotations

from localmig.dataplane._dataplane import Counters, DriverPair, GuestMemory, QueuePair, Ring

__all__ = ["Counters", "DriverPair", "GuestMemory", "QueuePair", "Ring"]
