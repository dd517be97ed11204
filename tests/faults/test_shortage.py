"""Whatever runs out at whichever system call of a handover: one side serves, says what ran out, and loses nothing.

`make shortage` lets every call fail with every error, which takes some minutes. Here the 1st, 2nd, 4th, 8th … call
of each kind fails once, with its errors in turn, and the first one for good.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.kit.shortage import CALLS, Shortage, calls_here
from tests.kit.site import new_site
from tests.soak.monitor import Monitor

pytestmark = pytest.mark.xdist_group("shortage")  # they share a chain of daemons

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

EVERY: Final = os.environ.get("LOCALMIG_EVERY_CALL") == "1"

SOURCE: Final = "source"
DESTINATION: Final = "destination"
BEGINS: Final = {SOURCE: "socket", DESTINATION: "accept4"}
"""Each side's first call of a handover."""

PATIENCE_S: Final = 20.0

MADE: Final = {
    SOURCE: (
        *("connect", "epoll_ctl", "eventfd2", "getsockopt", "madvise", "openat", "pidfd_open", "recvmsg", "sendmsg"),
        *("sendto", "socket", "socketpair"),
    ),
    DESTINATION: (
        *("accept4", "clone3", "epoll_ctl", "eventfd2", "getsockopt", "madvise", "mmap", "openat", "pidfd_open"),
        *("recvmsg", "sendmsg", "sendto", "socketpair"),
    ),
}
"""The calls of a handover on each side, of those that can run out of something."""

NEVER_REACHED: Final = {(SOURCE, "connect"), (SOURCE, "socket"), (DESTINATION, "getsockopt")}
"""Where the destination waits for the next source: nobody came, or nobody whom it could see."""

WAITS: Final = {(SOURCE, "connect"), (DESTINATION, "accept4")}
"""Where the other side waits for ten seconds when they fail for good."""

ADVICE: Final = {
    errno.EAGAIN: "RLIMIT_NPROC|no answer in",
    errno.EMFILE: "RLIMIT_NOFILE",
    errno.ENFILE: "fs.file-max",
    errno.ENOBUFS: "memory",
    errno.ENOMEM: "memory|RLIMIT_NPROC",
    errno.ENOSPC: "fs.epoll.max_user_watches",
    errno.ETOOMANYREFS: "RLIMIT_NOFILE",
}
"""What a person is told to look at. glibc says EAGAIN of a thread where it was memory."""

ABORTED: Final = (127, -6)
"""How libc ends a process that has no memory for a thread it began."""


class ShortDaemons:
    """Daemons of a site that hand one guest on, each of which can be made to run short."""

    def __init__(self, site: Site, ends: ExitStack) -> None:
        self.site = site
        self._ends = ends
        self._count = 0
        self.serving, self._shortage = self._daemon(*site.objects())
        site.address_tap()
        site.attach()
        self.hand_over(DESTINATION, "accept4", errno.EMFILE, nth=1000)
        self._held = self.held()

    def _daemon(self, *arguments: str) -> tuple[DaemonProcess, Shortage]:
        shortage = self._ends.enter_context(Shortage())
        return self.site.daemon(*arguments, "--migration-parameter", "local=on", start=shortage.start), shortage

    def held(self) -> Counter[str]:
        """Threads and descriptors of the daemon that serves, by kind, without its conversations and its files."""
        named = Counter(target.split(":")[0] for target in self.site.descriptors(self.serving))
        kinds = Counter({kind: named[kind] for kind in ("anon_inode", "/memfd", "/dev/net/tun")})
        kinds["threads"] = len(list(Path(f"/proc/{self.serving.pid}/task").iterdir()))
        return kinds

    def hand_over(self, side: str, call: str, error: int, *, nth: int, for_good: bool = False) -> int:
        """A handover in which the `nth` call of one side fails; how many such calls there were."""
        self._count += 1
        source, path = self.serving, self.site.folder / f"c{self._count}"
        destination, other = self._daemon("--incoming", f"unix:{path}")
        short = self._shortage if side == SOURCE else other
        began, pinger = len(source.facts), self.site.pinger()
        # A conversation that lasts: its end would be calls in the middle of a handover.
        assert source.qmp is not None
        with Monitor(source.qmp) as monitor:
            short.plan(call, error, nth=nth, for_good=for_good, after=BEGINS[side])
            monitor.migrate(f"unix:{path}")
            fact = source.wait_fact(
                lambda fact: fact["event"] == "MigrationStatusChanged" and fact["status"] in ("completed", "failed"),
                seconds=PATIENCE_S,
                after=began,
            )
            if fact["status"] == "completed":
                destination.wait_event("MigrationStatusChanged", status="completed")
            else:
                is_left_waiting = (side, call) in NEVER_REACHED or (call == "accept4" and for_good)
                self._await_end(destination, is_left_waiting=is_left_waiting)
            seen, failed = short.end()
        info, run_state = source.execute("query-migrate"), source.execute("query-status")["status"]
        if info["status"] == "completed":
            assert run_state == "postmigrate"
            assert destination.execute("query-status")["status"] == "running"
            assert source.quit() == 0
            self.serving, self._shortage = destination, other
        else:
            assert failed, info
            assert run_state == "running"
            told = str(info["error-desc"])
            if side == DESTINATION:
                told += self.site.log_of(destination)  # where it could not even refuse
            if destination.wait() not in ABORTED:
                assert any(advice in told for advice in ADVICE[error].split("|")), (info, told)
        report = pinger.stop()
        assert (report.lost, report.duplicates) == (0, 0), (report, info)
        return seen

    def _await_end(self, destination: DaemonProcess, *, is_left_waiting: bool) -> None:
        if is_left_waiting:
            destination.send_signal(signal.SIGTERM)  # which needs no descriptor to be heard
        destination.wait(seconds=PATIENCE_S)

    def check(self) -> None:
        """Nothing is left behind of all that went before, in whoever serves now."""
        assert self.site.ping(20).lost == 0
        assert self.held() == self._held


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShortDaemons]:
    if not calls_here():
        pytest.skip(f"system calls of {os.uname().machine} are not listed")
    with new_site(tmp_path_factory) as site, ExitStack() as ends:
        yield ShortDaemons(site, ends)


CASES: Final = [(side, call) for side, calls in MADE.items() for call in calls]


@pytest.mark.parametrize(("side", "call"), CASES)
def test_a_call_that_fails_once_costs_a_handover_at_most(chain: ShortDaemons, side: str, call: str) -> None:
    nth, seen, rounds = 1, 1, 0
    while nth <= seen:
        for error in CALLS[call] if EVERY else (CALLS[call][rounds % len(CALLS[call])],):
            seen = chain.hand_over(side, call, error, nth=nth)
        assert seen or rounds, f"{side} makes no such call"
        rounds += 1
        nth = nth + 1 if EVERY else 2 * nth
    chain.check()


@pytest.mark.parametrize(("side", "call"), CASES if EVERY else [case for case in CASES if case not in WAITS])
def test_a_call_that_fails_for_good_costs_no_more(chain: ShortDaemons, side: str, call: str) -> None:
    for error in CALLS[call] if EVERY else CALLS[call][:1]:
        # A socket that can be written to by poll(2) and never by send(2) there is not.
        if (call, error) != ("sendto", errno.EAGAIN):
            chain.hand_over(side, call, error, nth=1, for_good=True)
    chain.check()


def test_a_source_that_had_no_memory_to_serve_its_frontend_serves_it_later(chain: ShortDaemons) -> None:
    # The second one is for the destination's answer; what follows is for the frontend's connection.
    chain.hand_over(SOURCE, "epoll_ctl", errno.ENOMEM, nth=2, for_good=True)
    assert chain.site.guest is not None
    chain.site.guest.reset_driver()
    assert chain.site.ping(20).received > 0
