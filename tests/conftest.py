"""What every tier shares: markers by folder, and the rule that where all tiers must run a skip is a failure.

Owns:        the options --require-all-tiers (CI=true implies it) and --kill-matrix; the markers "kernel" and "guest".
Never sees:  what any tier needs: its own fixtures skip, and say why.
Read next:   guest/conftest.py for the guest tier.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIERS = ROOT / "tests"

# The guest tier's lab is imported as tests.guest.lab; importlib mode leaves sys.path to us.
sys.path.insert(0, str(ROOT))

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


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(TIERS).parts[0]
        if tier in ("kernel", "guest"):
            item.add_marker(tier)


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
