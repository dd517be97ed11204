"""Fixtures of the guest tier.

Owns:        the lab of a test, and the logs that a failed test shows.
Never sees:  what is being tested.
Read next:   lab.py.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from tests.guest.lab import Lab, LabError, ProcessorError

from localmig.errors import KernelError
from localmig.testing.namespace import unavailable_reason

LAB = pytest.StashKey[Lab]()


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A network namespace that guests and daemons run in."""
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    try:
        lab = Lab()
    except KernelError as error:
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
    except ProcessorError as error:
        # No skip, which is a failure where all tiers must run: nobody could install what would mend it.
        pytest.xfail(str(error))
