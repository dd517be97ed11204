"""What travels of a NIC besides its sessions and rings.

Owns:        its description.
Never sees:  a live object.
Read next:   device.py, which saves and loads it; device_api/device_state.py for what travels of every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.devices.virtio_net.heir import HEIR, Heir
from localmig.virtio.net import MAC_LENGTH
from localmig.vmstate import Description, array, blob, boolean, u16, u64

QUEUE_PAIR_COUNT_MAX: Final = 256
"""Of one device: as many as a TAP has queues."""

ALL_OFFLOADS: Final = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtioNetState:
    """A NIC's own.

    Attributes:
        mac: the guest's Ethernet address where it is known, else empty.
        heirs: for each queue pair whom the frames are for that wait; empty where descriptors stay home.
        pairs_used: how many queue pairs the driver said it uses, 0 where it has said nothing.
        guest_offloads: the GUEST_ features that the driver left on, all bits where it has said nothing.
        is_to_announce: whether the driver was asked to announce itself and has not said that it did.
    """

    mac: bytes
    heirs: tuple[Heir, ...]
    pairs_used: int = 0
    guest_offloads: int = ALL_OFFLOADS
    is_to_announce: bool = False


VIRTIO_NET: Final = Description(
    name="virtio-net",
    version=1,
    oldest_version=1,
    state=VirtioNetState,
    fields=(
        blob("mac", size_max=MAC_LENGTH),
        array("heirs", HEIR, count_max=QUEUE_PAIR_COUNT_MAX),
        u16("pairs_used"),
        u64("guest_offloads"),
        boolean("is_to_announce"),
    ),
)
