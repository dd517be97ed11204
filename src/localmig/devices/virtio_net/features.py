"""What a virtio-net device offers, and what comes of what a guest acknowledged.

Owns:        which features are offered, by options and kernel; which offloads the TAP is to leave to a guest.
Never sees:  a session; a TAP.
Read next:   virtio/net.py for the bits, device.py, which offers and obeys.
"""

from __future__ import annotations

from typing import Final

from localmig.errors import PeerError
from localmig.netdev.tap import Offload
from localmig.vhost_user.protocol import Offer
from localmig.virtio import Feature
from localmig.virtio.net import NetFeature, transmit_queue, without_orphans

FEATURES: Final = (
    Feature.VERSION_1
    | Feature.RING_EVENT_IDX
    | Feature.RING_INDIRECT_DESC
    | NetFeature.MRG_RXBUF
    | NetFeature.STATUS
    | NetFeature.MTU
)
"""What the packet path serves, whatever the options say."""

_TAP_OFFLOADS: Final = (
    (NetFeature.GUEST_CSUM, Offload.CSUM),
    (NetFeature.GUEST_TSO4, Offload.TSO4),
    (NetFeature.GUEST_TSO6, Offload.TSO6),
    (NetFeature.GUEST_ECN, Offload.TSO_ECN),
    # The kernel has these two together or not at all.
    (NetFeature.GUEST_USO4 | NetFeature.GUEST_USO6, Offload.USO4 | Offload.USO6),
)

_USO: Final = NetFeature.HOST_USO | NetFeature.GUEST_USO4 | NetFeature.GUEST_USO6
"""What not every kernel's TAP has."""


def offer(*, queue_pair_count: int, offloads: NetFeature, has_uso: bool, has_mac: bool, packed: bool) -> Offer:
    """What a frontend is offered.

    Args:
        queue_pair_count: as many as the netdev has queues.
        offloads: which of `virtio.net.OFFLOADS` the options leave.
        has_uso: whether the TAP has UDP segmentation.
        has_mac: whether the options say the guest's address.
        packed: whether they let guests have packed rings.
    """
    features = FEATURES | without_orphans(offloads if has_uso else offloads & ~_USO)
    if queue_pair_count > 1:
        # MQ needs CTRL_VQ (virtio 1.2, section 5.1.3.1), which a VMM serves and offers itself. A driver that talks
        # to us without one in between, as User-Mode Linux has it, refuses the device then.
        features |= NetFeature.MQ
    if has_mac:
        features |= NetFeature.MAC
    if packed:
        features |= Feature.RING_PACKED
    return Offer(
        features=features,
        vring_count=2 * queue_pair_count,
        queue_count=queue_pair_count,
        drained_vrings={transmit_queue(index): transmit_queue(0) for index in range(1, queue_pair_count)},
    )


def check_acked(features_acked: int, offered: Offer) -> None:
    """Whether a guest that comes with a handover can be served on. PeerError where it uses what is not offered here."""
    if missing := features_acked & ~offered.all_features:
        raise PeerError(f"the guest uses features {features_acked:#x}, of which {missing:#x} are not offered here")


def tap_offloads(features_acked: int) -> Offload:
    """What the guest takes over from whoever sends to it.

    A feature acknowledged without the one it requires counts for nothing, as in QEMU: the guest is served all the same,
    and gets nothing that it could not handle.
    """
    features = without_orphans(features_acked)
    offloads = Offload(0)
    for feature, offload in _TAP_OFFLOADS:
        if features & feature == feature:
            offloads |= offload
    return offloads
