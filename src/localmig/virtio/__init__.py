"""Facts of the virtio specification that hold for every device (virtio 1.2).

Owns:        feature bits of the transport and the rings, device status bits.
Never sees:  a device; virtio/net.py has a NIC's facts.
Read next:   net.py.
"""

from __future__ import annotations

from enum import IntFlag


class Feature(IntFlag):
    """Feature bits of rings and transport (section 6)."""

    ANY_LAYOUT = 1 << 27
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


class DeviceStatus(IntFlag):
    """Bits of the device status field (section 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128
