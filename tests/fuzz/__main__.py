"""Looks for inputs that break a target, guided by what they reach: `make fuzz`.

    python -m tests.fuzz TARGET SECONDS
    python -m tests.fuzz TARGET runs=COUNT      from a fixed seed

Owns:        the fuzzer (libFuzzer: atheris for Python, rust/dataplane/fuzz for rings), its corpus in .fuzz/TARGET.
Never sees:  what a target does.
Read next:   targets.py; rust/dataplane/tests/common/bytes.rs for rings.

An input that broke a target is left in .fuzz/TARGET-crash-…, the process ends with an error. To see it again:

    python -m tests.fuzz TARGET .fuzz/TARGET-crash-…
"""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["localmig", "tomllib"]):
    from tests.fuzz.targets import SEEDS, TARGETS, check

ROOT: Final = Path(__file__).parents[2]

CORPUS: Final = ROOT / ".fuzz"

RINGS: Final = ("split", "packed")
"""Targets of the packet path, which is Rust."""

RING_BYTES_MAX: Final = 4096
"""Of an input: a ring of 64 entries and its indirect tables, written a few times over."""

MEMORY_MIB_MAX: Final = 1024
"""A sixteenth is what the longest input needs; libFuzzer's own memory grows with its corpus."""

INPUT_SECONDS_MAX: Final = 10
"""No input of some kilobytes may take a hundredth of it."""


def main() -> None:
    """Fuzzes one target, or shows it one input."""
    name, what = sys.argv[1:]
    if name in RINGS:
        sys.exit(fuzz_ring(name, what))
    target = TARGETS[name]
    dropped: list[object] = []
    # A descriptor that is dropped without being closed warns where an exception goes nowhere.
    warnings.simplefilter("error")
    sys.unraisablehook = lambda told: dropped.append(told.exc_value)

    def run(data: bytes) -> None:
        check(target, data)
        if dropped:
            raise AssertionError(dropped)

    if (bound := bound_of(what)) is None:
        run(Path(what).read_bytes())
        return
    options = options_for(name, bound, target.seeds, length_max=4 * max(map(len, target.seeds)))
    gc.collect()
    atheris.Setup([sys.argv[0], *options], run)
    atheris.Fuzz()


def fuzz_ring(name: str, what: str) -> int:
    """Builds and runs a target that is Rust; its exit status."""
    seeds = tuple(path.read_bytes() for path in (SEEDS / name).iterdir())
    bound = bound_of(what)
    options = (
        (str(Path(what).resolve()),) if bound is None else options_for(name, bound, seeds, length_max=RING_BYTES_MAX)
    )
    folder = ROOT / "rust/dataplane/fuzz"
    # With a target named, the flags that count what is reached are not for build scripts, which nobody counts.
    host = subprocess.run(["rustc", "--print", "host-tuple"], check=True, capture_output=True, text=True).stdout.strip()
    command = ["cargo", "run", "--quiet", "--release", "--target", host, "--bin", name, "--", *options]
    return subprocess.run(command, cwd=folder, check=False).returncode


def bound_of(what: str) -> tuple[str, ...] | None:
    """How libFuzzer is told when to end: after so many seconds, or runs. None where `what` is an input's path."""
    if what.isdecimal():
        return (f"-max_total_time={what}",)
    if what.startswith("runs="):
        return (f"-{what}", "-seed=1")
    return None


def options_for(name: str, bound: tuple[str, ...], seeds: Iterable[bytes], *, length_max: int) -> tuple[str, ...]:
    """What libFuzzer is told; the corpus is there then, with the seeds in it."""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    return (
        *bound,
        f"-max_len={length_max}",
        f"-rss_limit_mb={MEMORY_MIB_MAX}",
        f"-timeout={INPUT_SECONDS_MAX}",
        f"-artifact_prefix={folder}-",
        "-print_final_stats=1",
        str(folder),
    )


if __name__ == "__main__":
    main()
