"""What the author of a device or a netdev imports: our promise of stability.

Owns:        nothing; the modules beside this one do.
Never sees:  a particular device or netdev, the stream.
Read next:   part.py for the life of a part, vhost_user_device.py for devices, netdev.py for the host side of a NIC,
             queues.py for the rings of all devices.
"""

from __future__ import annotations

from localmig.device_api.netdev import Netdev, NetdevObserver, Offload
from localmig.device_api.part import Announces, Part, RunsPrograms
from localmig.device_api.queues import Queues
from localmig.device_api.ring_group import Layout, RingGroup
from localmig.device_api.vhost_user_device import VhostUserDevice

__all__ = [
    "Announces",
    "Layout",
    "Netdev",
    "NetdevObserver",
    "Offload",
    "Part",
    "Queues",
    "RingGroup",
    "RunsPrograms",
    "VhostUserDevice",
]
