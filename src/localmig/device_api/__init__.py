"""What the author of a device or a netdev imports: our promise of stability.

Owns:        nothing; the modules beside this one do.
Never sees:  a particular device or netdev, the stream.
Read next:   part.py for the life of a part, vhost_user_device.py for devices, netdev.py for the host side of a NIC,
             queues.py for the rings of all devices, objects.py for how a type is declared.
"""

from __future__ import annotations

from localmig.device_api.device_info import DeviceInfo, device_members
from localmig.device_api.netdev import Framing, Netdev, NetdevObserver, Offload
from localmig.device_api.objects import BuildContext, ObjectType
from localmig.device_api.part import Announces, Part, RunsPrograms
from localmig.device_api.queues import Queues
from localmig.device_api.ring_group import Layout, RingGroup
from localmig.device_api.vhost_user_device import VhostUserDevice
from localmig.device_api.vhost_user_options import VhostUserSpec
from localmig.options.specs import DeviceSpec, Fit, NetdevSpec, Spec, option, reference

__all__ = [
    "Announces",
    "BuildContext",
    "DeviceInfo",
    "DeviceSpec",
    "Fit",
    "Framing",
    "Layout",
    "Netdev",
    "NetdevObserver",
    "NetdevSpec",
    "ObjectType",
    "Offload",
    "Part",
    "Queues",
    "RingGroup",
    "RunsPrograms",
    "Spec",
    "VhostUserDevice",
    "VhostUserSpec",
    "device_members",
    "option",
    "reference",
]
