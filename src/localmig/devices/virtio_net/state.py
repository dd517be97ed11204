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
from localmig.vmstate import Description, array, blob

QUEUE_PAIR_COUNT_MAX: Final = 256
"""Of one device: as many as a TAP has queues."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtioNetState:
    """A NIC's own.

    Attributes:
        mac: the guest's Ethernet address where it is known, else empty.
        heirs: for each queue pair whom the frames are for that wait; empty where descriptors stay home.
    """

    mac: bytes
    heirs: tuple[Heir, ...]


VIRTIO_NET: Final = Description(
    name="virtio-net",
    version=1,
    oldest_version=1,
    state=VirtioNetState,
    fields=(blob("mac", size_max=MAC_LENGTH), array("heirs", HEIR, count_max=QUEUE_PAIR_COUNT_MAX)),
)
