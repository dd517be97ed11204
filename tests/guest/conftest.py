"""Fixtures of the guest tier.

Owns:        the lab of a test, and the logs that a failed test shows.
Never sees:  what is being tested.
Read next:   lab.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator

import pytest
from tests.guest.image import LabError
from tests.guest.lab import Lab

LAB = pytest.StashKey[Lab]()


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A network namespace that guests and daemons run in."""
    for program in ("busybox", "ip", "nsenter", "setpriv", "sysctl", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} for the guest lab")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/net/tun for the guest lab")
    try:
        lab = Lab()
    except LabError as error:
        pytest.skip(str(error))
    request.node.stash[LAB] = lab
    with lab:
        yield lab


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    lab = item.stash.get(LAB, None)
    if lab is not None and report.failed and report.when == "call":
        report.sections += lab.logs()
    return report


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    try:
        return (yield)
    except LabError as error:
        pytest.skip(str(error))
