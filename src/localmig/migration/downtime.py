"""What does not happen inside the downtime.

Owns:        holding back garbage collection and trace events while the guest waits.
Never sees:  the steps of a handover.
Read next:   outgoing.py and incoming.py, its two users.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from localmig.trace import Tracer


@contextmanager
def undisturbed(tracer: Tracer) -> Iterator[None]:
    """Until the end of the block no garbage is collected and no event handed out; events come then, in order.

    A collection takes milliseconds in a large daemon. A subscriber that writes wakes a reader, which on a small
    machine takes the processor from the very process the guest waits for.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with tracer.held():
            yield
    finally:
        if was_enabled:
            gc.enable()
