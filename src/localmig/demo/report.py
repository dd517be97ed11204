"""What the demonstration measured: one round by itself, both side by side, and the verdict on the handovers.

Owns:        the facts of a round, the table and how it is to be read.
Never sees:  how they were measured.
Read next:   picture.py, which draws the same; rounds.py, which measures.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

from localmig.testing.traffic import PingRecord, PingReport, StreamReport, percentile

GUEST_REPLY_ROOM_US: Final = 100_000
"""A guest's network stack has room for some 170 unsent ping replies, one a millisecond. Where every downtime is shorter
than this, the replies that it discarded piled up for another reason: it was kept from running by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replacement:
    """When the guest had no daemon, by CLOCK_MONOTONIC.

    Attributes:
        stopped_ns: the first ring of the old daemon stopped.
        started_ns: the last ring of the new one ran; None if the guest did not survive it, as below.
        recovered_ns: the guest's stream had flowed again for a while.
    """

    stopped_ns: int
    started_ns: int | None
    recovered_ns: int | None

    @property
    def downtime_us(self) -> int | None:
        """How long that was, in microseconds; None where it never ended."""
        return None if self.started_ns is None else (self.started_ns - self.stopped_ns) // 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestCounters:
    """What the guest's own kernel counts.

    Attributes:
        carrier_changes: how often it saw its link change.
        discarded_replies: answers to pings that its network stack discarded before they reached its NIC.
    """

    carrier_changes: int
    discarded_replies: int

    def __sub__(self, earlier: GuestCounters) -> GuestCounters:
        """What came since."""
        return GuestCounters(
            carrier_changes=self.carrier_changes - earlier.carrier_changes,
            discarded_replies=self.discarded_replies - earlier.discarded_replies,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one way of replacing the daemon did to the guest.

    Attributes:
        replacements: in their order; what the guest did not survive stands last, and nothing started there.
        pings: one a millisecond.
        record: each of them.
        stream: TCP from host to guest; None if it did not survive.
        guest: what the guest counted meanwhile; None if nobody could ask it any more.
    """

    replacements: tuple[Replacement, ...]
    pings: PingReport
    record: PingRecord
    stream: StreamReport | None
    guest: GuestCounters | None

    @property
    def downtimes_us(self) -> list[int]:
        """Of each replacement that the guest survived."""
        return [downtime for gap in self.replacements if (downtime := gap.downtime_us) is not None]

    @property
    def guest_lost(self) -> bool:
        """Whether the guest has no network any more."""
        return any(gap.started_ns is None for gap in self.replacements)

    @property
    def lost_by_guest(self) -> int:
        """Of the lost pings, those that are proven to be the guest's own doing."""
        if self.guest is None or max(self.downtimes_us, default=0) >= GUEST_REPLY_ROOM_US:
            return 0
        return min(self.guest.discarded_replies, self.pings.lost)

    @property
    def is_unharmed(self) -> bool:
        """Whether the guest cannot have noticed anything."""
        intact = self.stream is not None and self.stream.intact
        return (
            intact
            and self.guest is not None
            and self.guest.carrier_changes == 0
            and self.pings.lost == self.lost_by_guest
        )

    def silences_us(self) -> tuple[int, int]:
        """The longest time without an answer that a replacement had a part in, and the longest of the others.

        All until the guest has recovered is the replacement's.
        """
        stops = [gap.stopped_ns for gap in self.replacements]
        within, between = 0, 0
        for since, end in self.record.silences():
            # The last one that had begun when the silence ended.
            index = bisect_right(stops, end) - 1
            recovered = self.replacements[index].recovered_ns if index >= 0 else -1
            if recovered is None or since <= recovered:
                within = max(within, end - since)
            else:
                between = max(between, end - since)
        return within // 1000, between // 1000

    def facts(self) -> dict[str, object]:
        """What was measured, for programs: all but the record."""
        within, between = self.silences_us()
        return {
            "downtimes_us": self.downtimes_us,
            "pings": dataclasses.asdict(self.pings),
            "guest": None if self.guest is None else dataclasses.asdict(self.guest),
            "silence_us_max_replacing": within,
            "silence_us_max_between": between,
            "stream": None if self.stream is None else dataclasses.asdict(self.stream),
            "guest_lost": self.guest_lost,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """What two rounds are called.

    Attributes:
        first: the first round, at the head of its column.
        second: the other one.
        noun: what was done in the first one, again and again.
        subject: what was replaced.
        gap: what is so in the meantime.
    """

    first: str
    second: str
    noun: str
    subject: str
    gap: str


DAEMONS: Final = Naming(
    first="handover", second="restart", noun="handover", subject="its NIC's daemon", gap="no daemon serves"
)
VMMS: Final = Naming(first="localmig", second="own TAP", noun="move", subject="its QEMU", gap="the guest is stopped")


def table(first_round: Round, second_round: Round, naming: Naming = DAEMONS) -> str:
    """Both rounds side by side."""
    left, right = _cells(first_round), _cells(second_round)
    rows = [("", naming.first, naming.second), *((name, left[name], right[name]) for name in left)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}   {first:>{widths[1]}}   {second:>{widths[2]}}".rstrip() for name, first, second in rows
    )


def _cells(result: Round) -> dict[str, str]:
    downtimes = result.downtimes_us
    pings = result.pings
    stream = result.stream
    within, between = result.silences_us()
    guest = result.guest
    return {
        "pings lost": str(pings.lost),
        "  discarded by the guest": "-" if guest is None else str(guest.discarded_replies),
        "downtime p50": milliseconds(percentile(downtimes, 0.5)),
        "downtime p99": milliseconds(percentile(downtimes, 0.99)),
        "downtime max": milliseconds(max(downtimes, default=None)),
        "longest silence": "for good" if result.guest_lost else milliseconds(within),
        "  between replacements": milliseconds(between),
        "pinger itself late": milliseconds(pings.send_gap_us_max),
        "link changes in guest": "-" if guest is None else str(guest.carrier_changes),
        "TCP stream": "broken" if stream is None else f"{stream.bytes_sent / 1e6:.0f} MB",
        "SHA-256 at both ends": "-" if stream is None else "equal" if stream.intact else "DIFFERENT",
        "replacements": f"{len(downtimes)}, then guest lost" if result.guest_lost else str(len(downtimes)),
        "pings sent, one a ms": str(pings.sent),
    }


def milliseconds(microseconds: int | None) -> str:
    """As people read it."""
    return "-" if microseconds is None else f"{microseconds / 1000:.2f} ms"


def counted(number: int, noun: str) -> str:
    """A number of things, as people say it."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def legend(*, reconnects: str) -> str:
    """How the table is to be read.

    Args:
        reconnects: how the guest looks for a backend that is gone.
    """
    return f"""\
handover   'localmig upgrade' under the running guest.
restart    the daemon ends, then another starts; {reconnects}.
discarded  replies that the guest's own network stack dropped (ICMP OutErrors); it has room for some 170. Where no
           downtime is nearly as long, a busy machine kept the guest from running: no handover had a part in it.
downtime   from the old daemon's first ring stopping to the new one's last ring running, as both daemons stamped it.
           Of fewer than 100, p99 is the longest.
silence    pings were waiting and none was answered. What lies between replacements is this machine's own doing.
late       the longest time between two pings, which should be 1 ms. Nobody asked then: that is neither loss nor
           silence, but what kept the pinger waiting may have kept guest and daemon waiting, too."""


def vmm_legend() -> str:
    """How the table of replaced VMMs is to be read."""
    return """\
localmig   'localmig vm-upgrade' under the running guest, whose NIC a daemon serves on one TAP all the time.
own TAP    the same with the NIC on TAPs of QEMU's own: the old QEMU and the new one each have theirs, on a bridge.
discarded  replies that the guest's own network stack dropped (ICMP OutErrors); it has room for some 170.
downtime   from the guest's stop in the old QEMU to its start in the new one, as both QEMUs stamped it.
           Of fewer than 100, p99 is the longest.
silence    pings were waiting and none was answered. What lies between replacements is this machine's own doing.
late       the longest time between two pings, which should be 1 ms. Nobody asked then: that is neither loss nor
           silence, but what kept the pinger waiting may have kept guest and daemon waiting, too."""


def verdict(handovers: Round, naming: Naming = DAEMONS) -> str:
    """The first round in a sentence."""
    lost, by_guest = handovers.pings.lost, handovers.lost_by_guest
    count = counted(len(handovers.downtimes_us), naming.noun)
    if handovers.is_unharmed:
        told = (
            "no ping lost"
            if lost == 0
            else f"{lost} pings lost, all discarded by the guest itself and none by a {naming.noun}"
        )
        return f"{count}: {told}, no link change, every byte of the stream intact."
    wrong = []
    if lost > by_guest:
        wrong.append(f"{counted(lost, 'ping')} lost, {by_guest} of them proven to be discarded by the guest itself")
    if handovers.guest is None:
        wrong.append("the guest has lost its network")
    elif handovers.guest.carrier_changes:
        wrong.append(f"the guest saw {counted(handovers.guest.carrier_changes, 'link change')}")
    if handovers.stream is None:
        wrong.append("the stream broke")
    elif not handovers.stream.intact:
        wrong.append("the stream's bytes differ at both ends")
    return f"{count}, and they did harm: {'; '.join(wrong)}."
