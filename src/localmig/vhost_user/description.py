"""How a vhost-user session travels in the migration stream.

Owns:        the description of SessionState, which every vhost-user device embeds in its own.
Never sees:  the stream around them.
Read next:   devices/virtio_net/state.py for a device that embeds them.
"""

from __future__ import annotations

from typing import Final

from localmig.vhost_user.memory import REGION_COUNT_MAX, MemoryRegion
from localmig.vhost_user.message import (
    HEADER_SIZE,
    MOVED_STATE_SIZE_MAX,
    PAYLOAD_SIZE_MAX,
    TABLE_REGION_COUNT_MAX,
    VRING_INDEX_MAX,
)
from localmig.vhost_user.protocol import LogState, SessionState, VringState
from localmig.virtio.net import MAC_LENGTH
from localmig.vmstate import Description, array, blob, boolean, fd, optional, struct, u8, u16, u32, u64

MEMORY_REGION: Final = Description(
    name="vhost-user-memory-region",
    version=1,
    oldest_version=1,
    state=MemoryRegion,
    fields=(u64("guest_address"), u64("size"), u64("user_address"), u64("mmap_offset"), fd("fd", kind="memory")),
)

LOG: Final = Description(
    name="vhost-user-log",
    version=1,
    oldest_version=1,
    state=LogState,
    fields=(u64("size"), u64("mmap_offset"), fd("fd", kind="memory")),
)

VRING: Final = Description(
    name="vhost-user-vring",
    version=1,
    oldest_version=1,
    state=VringState,
    fields=(
        u32("size"),
        u64("descriptor_area"),
        u64("driver_area"),
        u64("device_area"),
        u16("next_avail"),
        boolean("started"),
        boolean("enabled"),
        boolean("failed"),
        boolean("base_told"),
        boolean("is_logged"),
        u64("log_address"),
        optional(fd("kick", kind="eventfd")),
        optional(fd("call", kind="eventfd")),
        optional(fd("error", kind="eventfd")),
    ),
)

SESSION: Final = Description(
    name="vhost-user-session",
    version=1,
    oldest_version=1,
    state=SessionState,
    fields=(
        u64("features_offered"),
        u64("protocol_features_offered"),
        u64("features_acked"),
        u64("protocol_features_acked"),
        u8("device_status"),
        u16("mtu"),
        blob("announced_mac", size_max=MAC_LENGTH),
        array("regions", MEMORY_REGION, count_max=REGION_COUNT_MAX),
        array("vrings", VRING, count_max=VRING_INDEX_MAX + 1),
        u16("vring_count_asked"),
        boolean("was_served"),
        optional(fd("backend_request_fd", kind="socket")),
        optional(fd("state_pipe", kind="pipe")),
        blob("moved_state", size_max=MOVED_STATE_SIZE_MAX),
        optional(struct("log", LOG)),
        blob("unparsed", size_max=HEADER_SIZE + PAYLOAD_SIZE_MAX),
        array("unparsed_fds", fd, count_max=TABLE_REGION_COUNT_MAX),
        blob("unsent", size_max=HEADER_SIZE + PAYLOAD_SIZE_MAX),
    ),
)
