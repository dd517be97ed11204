"""What feature bits are called, in Linux's and QEMU's words.

Owns:        the tables from bits to names.
Never sees:  what a bit does.
Read next:   virtio/, vhost_user/message.py and netdevs/tun.py for the bits; commands/objects.py, which shows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntFlag
from typing import Final

from localmig.device_api import Offload
from localmig.vhost_user.message import PROTOCOL_FEATURES_BIT, ProtocolFeature
from localmig.virtio import DeviceStatus, Feature
from localmig.virtio.net import NetFeature


def _prefixed(prefix: str, bits: Iterable[IntFlag]) -> dict[int, str]:
    return {bit.value: f"{prefix}{bit.name}" for bit in bits}


_FEATURES: Final[Mapping[int, str]] = {
    **_prefixed("VIRTIO_NET_F_", NetFeature),
    **_prefixed("VIRTIO_F_", Feature),
    Feature.RING_INDIRECT_DESC.value: "VIRTIO_RING_F_INDIRECT_DESC",
    Feature.RING_EVENT_IDX.value: "VIRTIO_RING_F_EVENT_IDX",
    1 << PROTOCOL_FEATURES_BIT: "VHOST_USER_F_PROTOCOL_FEATURES",
}
_PROTOCOL_FEATURES: Final = _prefixed("VHOST_USER_PROTOCOL_F_", ProtocolFeature)
_STATUS: Final = _prefixed("VIRTIO_CONFIG_S_", DeviceStatus)
_OFFLOADS: Final = _prefixed("TUN_F_", Offload)


def feature_names(bits: int) -> list[str]:
    """A virtio-net device's feature bits."""
    return _names(bits, _FEATURES)


def protocol_feature_names(bits: int) -> list[str]:
    """vhost-user's own feature bits."""
    return _names(bits, _PROTOCOL_FEATURES)


def status_names(bits: int) -> list[str]:
    """The bits of a device status."""
    return _names(bits, _STATUS)


def offload_names(bits: int) -> list[str]:
    """What a TAP leaves to its reader."""
    return _names(bits, _OFFLOADS)


def _names(bits: int, table: Mapping[int, str]) -> list[str]:
    """Lowest bit first; a bit without a name by its number."""
    numbers = (number for number in range(bits.bit_length()) if bits >> number & 1)
    return [table.get(1 << number, f"bit {number}") for number in numbers]
