"""What there is to see of a TAP, for people and programs that ask.

Owns:        TapInfo, and its names in QMP.
Never sees:  the TAP itself.
Read next:   opened.py, which says what is so; monitor/commands/objects.py for who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from localmig.device_api import Offload
from localmig.qapi import Array, Boolean, Enumeration, Member, String, Uint64
from localmig.qapi.bits import named, names_of


class Whereabouts(StrEnum):
    """Where a TAP's interface is; the value is QMP's."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    """In another network namespace: packets flow, and nothing is known of it."""
    GONE = "gone"
    """Deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TapInfo:
    """What there is to see of a TAP, for people and programs that ask.

    Attributes:
        id: the user's name for it.
        is_open: whether this process has it.
        queue_count: queues it has, open or not.
        attached_count: those that the kernel steers frames into.
        whereabouts: where its interface is, None where it is not open, as for all that follows.
        ifname: the interface's present name; the last one where it is gone.
        ifindex: its number, None where it is not in this network namespace, as for `is_up` and `bridge`.
        mtu: its present one, in bytes; the last one known where it is not here.
        is_up: whether it is up administratively.
        bridge: the bridge it is in, None for none.
        vnet_header_length: bytes in front of each frame.
        offloads: what whoever reads the frames takes over.
        notes: what is so and should perhaps not be, and what to do, a sentence each.
    """

    id: str
    is_open: bool
    queue_count: int
    attached_count: int
    whereabouts: Whereabouts | None = None
    ifname: str | None = None
    ifindex: int | None = None
    mtu: int | None = None
    is_up: bool | None = None
    bridge: str | None = None
    vnet_header_length: int | None = None
    offloads: Offload = Offload(0)  # noqa: RUF009 - a number
    notes: tuple[str, ...] = ()


_OFFLOADS: Final = named("TUN_F_", Offload)


def offload_names(bits: int) -> list[str]:
    """What a TAP leaves to its reader."""
    return names_of(bits, _OFFLOADS)


SHOWN: Final = (
    Member(name="open", attribute="is_open", type=Boolean()),
    Member(name="queues", attribute="queue_count", type=Uint64()),
    Member(name="attached-queues", attribute="attached_count", type=Uint64()),
    Member(name="interface", attribute="whereabouts", type=Enumeration(tuple(Whereabouts)), required=False),
    Member(name="ifname", attribute="ifname", type=String(), required=False),
    Member(name="ifindex", attribute="ifindex", type=Uint64(), required=False),
    Member(name="mtu", attribute="mtu", type=Uint64(), required=False),
    Member(name="up", attribute="is_up", type=Boolean(), required=False),
    Member(name="bridge", attribute="bridge", type=String(), required=False),
    Member(name="vnet-header-length", attribute="vnet_header_length", type=Uint64(), required=False),
    Member(name="offloads", attribute="offloads", type=Array(String()), convert=offload_names),
)
"""What query-netdevs shows of it, besides what it shows of every netdev."""
