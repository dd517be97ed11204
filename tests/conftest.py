"""What every tier shares: its markers, its order, and the rule that where all tiers must run a skip is a failure.

Owns:        the options --require-all-tiers (CI=true implies it) and --kill-matrix; the markers "kernel" and "guest";
             the order of tests, and that one marked "alone" runs while no other does; how long each tier took.
Never sees:  what any tier needs: its own fixtures skip, and say why.
Read next:   guest/conftest.py for the guest tier.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections import defaultdict
from collections.abc import Generator
from operator import itemgetter
from pathlib import Path
from typing import Final, TypeVar

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
TIERS = ROOT / "tests"

LONGEST_FIRST: Final = ("guest", "host", "faults", "examples", "soak", "kernel", "fuzz", "protocol", "compat", "unit")
"""The tiers in the order in which they run: what waits for much begins early, and what is short fills the end."""

LOCK: Final = ROOT / ".pytest_cache/alone.lock"
"""Held by every test that runs, shared; by one that is to be alone, for itself. Other work that would disturb may hold
it too: `flock --shared .pytest_cache/alone.lock make fuzz`."""

# The guest tier's lab is imported as tests.guest.lab; importlib mode leaves sys.path to us.
sys.path.insert(0, str(ROOT))

# How long an example takes is the machine's matter: tests run side by side. The examples are the same each time.
hypothesis.settings.register_profile("localmig", deadline=None, derandomize=True)
hypothesis.settings.load_profile("localmig")

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-all-tiers",
        action="store_true",
        default=os.environ.get("CI") == "true",
        help="a skipped test is a failed one (the default where CI=true)",
    )
    parser.addoption(
        "--kill-matrix", metavar="PAGE", help="go through the whole kill matrix, and write what came of it into PAGE"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    # Before pytest-xdist looks at groups, and after pytest has its own order.
    for item in items:
        tier = tier_of(item)
        if tier in ("kernel", "guest"):
            item.add_marker(tier)
        if is_alone(item):
            # One worker takes them all, and others have nothing left to run then.
            item.add_marker(pytest.mark.xdist_group("alone"))
    yield
    items.sort(key=lambda item: (is_alone(item), LONGEST_FIRST.index(tier_of(item))))


def tier_of(item: pytest.Item) -> str:
    """The folder that a test lives in."""
    return item.path.relative_to(TIERS).parts[0]


def is_alone(item: pytest.Item) -> bool:
    """Whether no other test may run meanwhile."""
    return item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # First of all wrappers: a test's time, which is bounded, begins when it may run.
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tells how long each tier took, its fixtures and all; of tests that ran side by side this is more than passed."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[Path(report.nodeid).parts[1]] += report.duration
    if seconds:
        terminalreporter.write_sep("=", "time of each tier")
        for tier, duration in sorted(seconds.items(), key=itemgetter(1), reverse=True):
            terminalreporter.write_line(f"{duration:7.1f} s  {tier}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _skip_as_failure((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _skip_as_failure((yield), collector.config)


def _skip_as_failure(report: Report, config: pytest.Config) -> Report:
    # An expected failure is reported as a skip too, with `wasxfail` set.
    if config.getoption("--require-all-tiers") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"nothing may be skipped here. {reason}"
    return report
