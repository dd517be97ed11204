"""A TAP as it travels: plain data, untrusted until it was checked.

Owns:        what of a TAP moves to another process, and what it can be at all.
Never sees:  a TAP.
Read next:   tap.py, which saves, checks and adopts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from localmig.device_api import Offload
from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd
from localmig.limits import INTERFACE_NAME_BYTES_MAX, PATH_BYTES_MAX
from localmig.vmstate import Description, array, boolean, fd, optional, text, u8, u16, u32, u64
from localmig.vmstate import struct as nested

OFFLOADS: Final = Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.TSO_ECN | Offload.USO4 | Offload.USO6
USO: Final = Offload.USO4 | Offload.USO6
"""The kernel takes these two together or not at all, and not before Linux 6.2."""

VNET_HEADER_LENGTHS: Final = (10, 12)
"""The virtio-net header without and with `num_buffers`: VERSION_1 and mergeable buffers bring it."""

QUEUE_COUNT_MAX: Final = 256
"""Queues the kernel lets a TAP have (MAX_TAP_QUEUES in drivers/net/tun.c)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TapDescriptors:
    """What comes with a TAP only where the TAP itself moves.

    The downscript is here because the process that serves last must run it. A program's name from another
    process is believed only beside descriptors: who passes those was let in by the migration socket's mode.

    Attributes:
        queues: a descriptor for each.
        attached: whether the kernel steers frames into each.
        downscript: "no" for none.
        netlink: the socket of its network, where no TAP before it brought that one.
        namespace: the number of that network.
        ifname_opened, mtu_opened, ifindex, bridge, is_up, is_gone, has_carrier: as `opened.OpenTap`'s.
    """

    queues: tuple[OwnedFd, ...]
    attached: tuple[bool, ...]
    downscript: str
    netlink: OwnedFd | None
    namespace: int
    ifname_opened: str
    mtu_opened: int
    ifindex: int
    bridge: str
    is_up: bool
    is_gone: bool
    has_carrier: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TapState:
    """A TAP as it travels: untrusted until `Tap.check_setup`."""

    ifname: str
    mtu: int
    vnet_header_length: int
    offloads: int
    has_uso: bool
    descriptors: TapDescriptors | None


TAP_DESCRIPTORS: Final = Description(
    name="tap-descriptors",
    version=1,
    oldest_version=1,
    state=TapDescriptors,
    fields=(
        array("queues", partial(fd, kind=FdKind.TAP), count_max=QUEUE_COUNT_MAX),
        array("attached", boolean, count_max=QUEUE_COUNT_MAX),
        text("downscript", size_max=PATH_BYTES_MAX),
        optional(fd("netlink", kind=FdKind.NETLINK)),
        u64("namespace"),
        text("ifname_opened", size_max=INTERFACE_NAME_BYTES_MAX),
        u16("mtu_opened"),
        u32("ifindex"),
        text("bridge", size_max=INTERFACE_NAME_BYTES_MAX),
        boolean("is_up"),
        boolean("is_gone"),
        boolean("has_carrier"),
    ),
)

TAP: Final = Description(
    name="tap",
    version=1,
    oldest_version=1,
    state=TapState,
    fields=(
        text("ifname", size_max=INTERFACE_NAME_BYTES_MAX),
        u16("mtu"),
        u16("vnet_header_length"),
        u8("offloads"),
        boolean("has_uso"),
        optional(nested("descriptors", TAP_DESCRIPTORS)),
    ),
)
