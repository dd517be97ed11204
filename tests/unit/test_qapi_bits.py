"""Feature bits by name."""

from __future__ import annotations

from localmig.device_api import Offload
from localmig.netdevs.info import offload_names
from localmig.qapi.bits import named, names_of
from localmig.vhost_user.info import feature_names, protocol_feature_names, status_names
from localmig.vhost_user.message import ProtocolFeature
from localmig.virtio import DeviceStatus, Feature
from localmig.virtio.net import NetFeature


def test_features_have_the_names_that_qemu_gives_them() -> None:
    bits = (
        NetFeature.CSUM
        | NetFeature.MRG_RXBUF
        | Feature.RING_INDIRECT_DESC
        | Feature.RING_EVENT_IDX
        | 1 << 30
        | Feature.VERSION_1
        | Feature.RING_PACKED
        | NetFeature.HOST_USO
    )
    assert feature_names(bits, named("VIRTIO_NET_F_", NetFeature)) == [
        "VIRTIO_NET_F_CSUM",
        "VIRTIO_NET_F_MRG_RXBUF",
        "VIRTIO_RING_F_INDIRECT_DESC",
        "VIRTIO_RING_F_EVENT_IDX",
        "VHOST_USER_F_PROTOCOL_FEATURES",
        "VIRTIO_F_VERSION_1",
        "VIRTIO_F_RING_PACKED",
        "VIRTIO_NET_F_HOST_USO",
    ]
    assert protocol_feature_names(ProtocolFeature.REPLY_ACK) == ["VHOST_USER_PROTOCOL_F_REPLY_ACK"]
    assert status_names(DeviceStatus.DRIVER_OK) == ["VIRTIO_CONFIG_S_DRIVER_OK"]
    assert offload_names(Offload.CSUM | Offload.TSO4) == ["TUN_F_CSUM", "TUN_F_TSO4"]


def test_a_bit_without_a_name_is_told_by_its_number() -> None:
    assert names_of(1 << 43, {}) == ["bit 43"]
    assert names_of(0, {}) == []
