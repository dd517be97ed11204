"""What the author of a device or a netdev imports: our promise of stability.

Owns:        nothing; the modules beside this one do, and what is lent here from other packages.
Never sees:  a particular device or netdev, the stream.
Read next:   part.py for the life of a part, callback_device.py and vhost_user_device.py for devices, netdev.py for the
             host side of a NIC, objects.py for how a type is declared, queues.py for the rings of all devices.
"""

from __future__ import annotations

from localmig.device_api.callback_device import CallbackDevice, callback_members
from localmig.device_api.callback_group import CallbackGroup, Chain
from localmig.device_api.device_hooks import DeviceHooks
from localmig.device_api.device_info import DeviceInfo, device_members
from localmig.device_api.netdev import Netdev, NetdevObserver, Offload
from localmig.device_api.objects import BuildContext, ObjectType
from localmig.device_api.part import Announces, HasSessions, Part, RunsPrograms
from localmig.device_api.queues import Queues
from localmig.device_api.ring_group import Layout, RingGroup
from localmig.device_api.vhost_user_device import VhostUserDevice
from localmig.device_api.vhost_user_options import VhostUserSpec
from localmig.errors import ConfigError, KernelError, PeerError
from localmig.fds import OwnedFd
from localmig.options.specs import DeviceSpec, Fit, NetdevSpec, Spec, option, reference
from localmig.options.values import Choice, FilePath, Identifier, MacAddress, Number, SocketPath, Switch
from localmig.qapi import Array, Boolean, Enumeration, Member, String, Struct, Uint64
from localmig.vhost_user.protocol import Event, MtuSet, Offer, RarpRequested
from localmig.vmstate import (
    Description,
    Subsection,
    array,
    blob,
    boolean,
    fd,
    numbers,
    optional,
    struct,
    text,
    u8,
    u16,
    u32,
    u64,
)

__all__ = [
    "Announces",
    "Array",
    "Boolean",
    "BuildContext",
    "CallbackDevice",
    "CallbackGroup",
    "Chain",
    "Choice",
    "ConfigError",
    "Description",
    "DeviceHooks",
    "DeviceInfo",
    "DeviceSpec",
    "Enumeration",
    "Event",
    "FilePath",
    "Fit",
    "HasSessions",
    "Identifier",
    "KernelError",
    "Layout",
    "MacAddress",
    "Member",
    "MtuSet",
    "Netdev",
    "NetdevObserver",
    "NetdevSpec",
    "Number",
    "ObjectType",
    "Offer",
    "Offload",
    "OwnedFd",
    "Part",
    "PeerError",
    "Queues",
    "RarpRequested",
    "RingGroup",
    "RunsPrograms",
    "SocketPath",
    "Spec",
    "String",
    "Struct",
    "Subsection",
    "Switch",
    "Uint64",
    "VhostUserDevice",
    "VhostUserSpec",
    "array",
    "blob",
    "boolean",
    "callback_members",
    "device_members",
    "fd",
    "numbers",
    "option",
    "optional",
    "reference",
    "struct",
    "text",
    "u8",
    "u16",
    "u32",
    "u64",
]
