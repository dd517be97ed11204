"""The demonstration as a whole, with the built-in guest: what a stranger runs first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS_MAX = 120
"""It takes five; a busy machine more."""


def test_handovers_do_no_harm_and_restarts_are_seen(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    argv = [sys.executable, "-m", "localmig.demo", "--handovers", "2", "--json"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts["handover"]["downtimes_us"]) == len(facts["restart"]["downtimes_us"]) == 2
    assert facts["handover"]["guest"]["carrier_changes"] == 0
    assert facts["restart"]["guest"]["carrier_changes"] == 4
    assert facts["restart"]["pings"]["lost"] > 0
    assert (tmp_path / "localmig-demo.png").read_bytes().startswith(b"\x89PNG")
