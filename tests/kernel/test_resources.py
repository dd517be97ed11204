"""What many NICs cost: threads and descriptors as the page says, and a limit that leaves room for them."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.kit.processes import DaemonProcess

from localmig.testing.frontend import NetGuest
from localmig.testing.process import start_program

PAGE: Final = (Path(__file__).resolve().parents[2] / "docs/operating.md").read_text()

SOFT_LIMIT: Final = 64
"""Less than what the NICs below need, and enough for a Python process to start."""

pytestmark = pytest.mark.usefixtures("namespace")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a daemon holds, or what something adds to it."""

    threads: int
    descriptors: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(threads=self.threads - other.threads, descriptors=self.descriptors - other.descriptors)

    def __mul__(self, count: int) -> Cost:
        return Cost(threads=self.threads * count, descriptors=self.descriptors * count)


def stated(*, queue_pairs: int) -> Cost:
    """What the page says of a NIC whose guest has one memory region."""
    rows = [
        line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith(("| threads |", "| descriptors |"))
    ]
    numbers = {cells[0].strip(): [int(cell.split(",")[0]) for cell in cells[1:]] for cells in rows}
    assert "and 1 for each memory region" in rows[1][1]
    threads, descriptors = numbers["threads"], numbers["descriptors"]
    return Cost(
        threads=threads[0] + queue_pairs * threads[1], descriptors=descriptors[0] + 1 + queue_pairs * descriptors[1]
    )


def cost_of(folder: Path, nics: int, *, queue_pairs: int) -> Cost:
    """What a daemon holds while it serves so many NICs, each with a frontend."""
    folder = folder / f"{nics}"
    folder.mkdir()
    options = []
    for index in range(nics):
        options += ["--netdev", f"tap,id=net{index},queues={queue_pairs}"]
        options += ["--device", f"virtio-net,id=nic{index},netdev=net{index},socket={folder}/{index}"]
    with DaemonProcess(options) as daemon, ExitStack() as guests:
        for index in range(nics):
            guests.enter_context(NetGuest(f"{folder}/{index}", queue_pairs=queue_pairs)).attach()
        process = Path(f"/proc/{daemon.pid}")
        return Cost(threads=len(list((process / "task").iterdir())), descriptors=len(list((process / "fd").iterdir())))


@contextmanager
def low_soft_limit() -> Iterator[None]:
    """Processes that are started meanwhile have it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT_LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("queue_pairs", [1, 2])
def test_each_nic_costs_what_the_page_says(tmp_path: Path, queue_pairs: int) -> None:
    one, five = (cost_of(tmp_path, nics, queue_pairs=queue_pairs) for nics in (1, 5))
    assert five - one == stated(queue_pairs=queue_pairs) * 4


def test_a_daemon_needs_no_more_than_the_hard_limit(tmp_path: Path) -> None:
    with ExitStack() as guests:
        options = []
        for index in range(8):
            options += ["--netdev", f"tap,id=net{index}"]
            options += ["--device", f"virtio-net,id=nic{index},netdev=net{index},socket={tmp_path}/{index}"]
        with low_soft_limit():
            daemon = guests.enter_context(DaemonProcess(options, start=start_program))
        for index in range(8):
            guests.enter_context(NetGuest(f"{tmp_path}/{index}")).attach()
        assert len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())) > SOFT_LIMIT
