"""How much is measured: a full run, a quick one, one that only shows that it runs.

Owns:        the three sizes.
Never sees:  what is measured.
Read next:   __main__.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What one run measures.

    Attributes:
        handovers: how many handovers for each number of NICs, idle and again under load.
        flood_rate: frames a second each way under load, all NICs together.
        bare_rounds: bare handovers for each number of descriptors.
        replacements: handovers, and restarts of each kind, under a pinger.
        qemu_migrations: migrations of QEMU's own; 0 leaves QEMU out, which boots a guest first.
        rate_seconds: how long each packet rate is measured.
    """

    handovers: Mapping[int, int]
    flood_rate: int
    bare_rounds: int
    replacements: int
    qemu_migrations: int
    rate_seconds: float


FULL: Final = Sizes(
    handovers={1: 200, 8: 200, 64: 60, 512: 12},
    flood_rate=20_000,
    bare_rounds=1000,
    replacements=20,
    qemu_migrations=10,
    rate_seconds=5.0,
)
"""Half an hour on two cores. With 64 and 512 NICs a handover takes seconds, so there are fewer."""

QUICK: Final = Sizes(
    handovers={1: 30, 8: 20, 64: 6, 512: 2},
    flood_rate=20_000,
    bare_rounds=200,
    replacements=5,
    qemu_migrations=3,
    rate_seconds=2.0,
)
"""A few minutes: medians come near, p99 is worth nothing."""

SMOKE: Final = Sizes(
    handovers={1: 2, 2: 1},
    flood_rate=1_000,
    bare_rounds=3,
    replacements=1,
    qemu_migrations=0,
    rate_seconds=0.3,
)
"""Some seconds a section: shows that it runs, and that nothing is lost; the times mean nothing."""

SIZES: Final[Mapping[str, Sizes]] = {"full": FULL, "quick": QUICK, "smoke": SMOKE}
"""By the names that the command line has for them."""
