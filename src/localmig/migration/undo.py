"""Steps that have to be taken for every part, whatever happens at one of them: going back, letting go.

Owns:        taking them all, telling what failed.
Never sees:  which steps, why.
Read next:   outgoing.py and incoming.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from localmig.device_api import Part
from localmig.errors import KernelError, LocalmigError, reason_of

_logger = logging.getLogger(__name__)


def for_all(parts: Iterable[Part], step: Callable[[Part], None], *, short: list[Part] | None = None) -> list[str]:
    """Takes `step` for each of `parts`; gives what went wrong, which is logged too.

    Args:
        parts: whose step it is.
        step: what to do.
        short: gets the parts that had not what they need of the machine: later they may.

    There is nothing better to do than to go on: one part that stands still is no reason that others do.
    """
    problems = []
    for part in parts:
        try:
            step(part)
        except (LocalmigError, OSError, MemoryError) as error:
            reason = reason_of(error) if isinstance(error, LocalmigError) else f"'{part.id}': {reason_of(error)}"
            _logger.warning("'%s': %s", part.id, error)
            problems.append(reason)
            if short is not None and isinstance(error, KernelError | OSError | MemoryError):
                short.append(part)
        except Exception as error:  # a bug in one part is no reason for the others to stand still
            _logger.exception("'%s': internal error", part.id)
            problems.append(f"'{part.id}': internal error: {error!r}")
    return problems
