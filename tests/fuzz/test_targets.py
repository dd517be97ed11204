"""Every target bears its seeds and a fixed number of mutations of them; `make fuzz` looks further."""

from __future__ import annotations

import random
import time
from typing import Final

import pytest
from tests.fuzz.targets import TARGETS, Target, check

MUTATIONS: Final = 5000
"""A second for most targets; a vhost-user session with its descriptors takes ten."""

CPU_SECONDS_MAX: Final = 5.0
"""For one input of some kilobytes, which needs some milliseconds: only what grows faster than its input gets there."""

INTERESTING: Final = (
    b"\x00",
    b"\x01",
    b"\x20",
    b"\x7f",
    b"\xff",
    b"\x00" * 8,
    b"\xff" * 8,
    b"{",
    b'"',
    b"[",
    b",",
    b"\\",
)


each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


@each_target
def test_the_seeds_are_borne(target: Target) -> None:
    assert target.seeds
    for seed in target.seeds:
        check(target, seed)


@each_target
def test_a_seed_that_ends_early_is_borne(target: Target) -> None:
    for seed in target.seeds:
        for size in range(0, len(seed), max(1, len(seed) // 100)):
            check(target, seed[:size])


@pytest.mark.parametrize(("name", "target"), TARGETS.items(), ids=TARGETS.keys())
def test_mutations_of_the_seeds_are_borne(name: str, target: Target) -> None:
    chance = random.Random(name)
    for _ in range(MUTATIONS):
        data = mutated(chance, target.seeds)
        began = time.process_time()
        try:
            check(target, data)
        except Exception as error:
            error.add_note(f"the input was {data.hex()}")
            raise
        assert time.process_time() - began < CPU_SECONDS_MAX, data.hex()


def mutated(chance: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    """A seed with up to four changes, as a fuzzer makes them."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randint(0, len(data)), chance.randint(1, 16)
        match chance.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at : at + size] = chance.choice(INTERESTING)
            case 2:
                data[at:at] = chance.choice(INTERESTING)
            case 3:
                del data[at : at + size]
            case 4:
                other = chance.choice(seeds)
                start = chance.randint(0, len(other))
                data[at : at + size] = other[start : start + size]
            case _:
                data[at:at] = data[at : at + 4 * size]
    return bytes(data)
