"""The benchmarks run end to end, at the smallest size; what they measure is nobody's business here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from localmig.testing.namespace import unavailable_reason

ROOT = Path(__file__).resolve().parents[2]
RUN_SECONDS_MAX = 200


def test_the_benchmarks_run_and_their_handovers_lose_nothing(tmp_path: Path) -> None:
    if (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("no C compiler: on Debian, apt-get install gcc libc6-dev")
    argv = [
        sys.executable,
        "-m",
        "benchmarks",
        "--smoke",
        "--only",
        "handovers,bare,replacements,logged",
        "--results",
        str(tmp_path),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False)
    assert done.returncode == 0, done.stderr

    sections = json.loads((tmp_path / "samples.json").read_text())["sections"]
    assert [found["failure"] for found in sections.values()] == [None] * 4
    flooded = sections["handovers"]["samples"]["1 NIC, flooded"]
    assert len(flooded["handovers"]) == 2
    for way in ("up", "down"):
        assert flooded["flood"][way]["received"] == flooded["flood"][way]["sent"] > 0
    assert "to bare C" in done.stdout
    ways = sections["replacements"]["samples"]
    assert [(name, way["gave_up"]) for name, way in ways.items() if way["gave_up"] is not None or not way["lost"]] == []
    assert ways["localmig: handover"]["lost"] == [0]
    assert len(sections["logged"]["samples"]) == 8


def test_a_comparison_with_an_unknown_commit_says_so(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "benchmarks", "compare", "--base", "no-such-commit", "--results", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cannot compare: ")
