"""The demonstration with Linux under QEMU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tests.guest.lab import UNPACKED_KERNEL

from localmig.testing import qemu
from localmig.testing.namespace import unavailable_reason

SECONDS_MAX = 240
"""It takes twenty, some of them to find out whether KVM works; a busy machine more."""


def test_a_guest_under_qemu_bears_handovers_and_sees_restarts() -> None:
    reason = unavailable_reason() or qemu.unavailable_reason(UNPACKED_KERNEL)
    if reason is not None:
        pytest.skip(reason)
    argv = [sys.executable, "-m", "localmig.demo", "--handovers", "2", "--json", "--no-picture"]
    argv += ["--guest", "qemu", "--guest-kernel", str(UNPACKED_KERNEL)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["handover"]["guest"]["carrier_changes"] == 0
    assert facts["restart"]["guest"]["carrier_changes"] == 4


@pytest.mark.alone
def test_a_guest_whose_qemu_is_replaced_notices_nothing() -> None:
    reason = unavailable_reason() or qemu.unavailable_reason(UNPACKED_KERNEL)
    if reason is not None:
        pytest.skip(reason)
    argv = [sys.executable, "-m", "localmig.demo", "--vmm", "--handovers", "2", "--json", "--no-picture"]
    argv += ["--guest-kernel", str(UNPACKED_KERNEL)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    facts = json.loads(done.stdout)
    assert len(facts["localmig"]["downtimes_us"]) == len(facts["own TAP"]["downtimes_us"]) == 2
