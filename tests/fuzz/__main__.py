"""Looks for inputs that break a target, guided by what they reach: `make fuzz`.

    python -m tests.fuzz TARGET SECONDS

Owns:        the fuzzer (atheris, which is libFuzzer for Python), its corpus in .fuzz/TARGET.
Never sees:  what a target does.
Read next:   targets.py.

An input that broke a target is left in .fuzz/TARGET-crash-…, the process ends with an error. To see it again:

    python -m tests.fuzz TARGET .fuzz/TARGET-crash-…
"""

from __future__ import annotations

import gc
import hashlib
import sys
import warnings
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["localmig", "tomllib"]):
    from tests.fuzz.targets import TARGETS, check

CORPUS: Final = Path(__file__).parents[2] / ".fuzz"

MEMORY_MIB_MAX: Final = 1024
"""A sixteenth is what the longest input needs; libFuzzer's own memory grows with its corpus."""

INPUT_SECONDS_MAX: Final = 10
"""No input of some kilobytes may take a hundredth of it."""


def main() -> None:
    """Fuzzes one target, or shows it one input."""
    name, what = sys.argv[1:]
    target = TARGETS[name]
    dropped: list[object] = []
    # A descriptor that is dropped without being closed warns where an exception goes nowhere.
    warnings.simplefilter("error")
    sys.unraisablehook = lambda told: dropped.append(told.exc_value)

    def run(data: bytes) -> None:
        check(target, data)
        if dropped:
            raise AssertionError(dropped)

    if not what.isdecimal():
        run(Path(what).read_bytes())
        return
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (folder / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    gc.collect()
    limits = (
        f"-max_total_time={what}",
        f"-max_len={4 * max(map(len, target.seeds))}",
        f"-rss_limit_mb={MEMORY_MIB_MAX}",
        f"-timeout={INPUT_SECONDS_MAX}",
        f"-artifact_prefix={folder}-",
        "-print_final_stats=1",
    )
    atheris.Setup([sys.argv[0], *limits, str(folder)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
