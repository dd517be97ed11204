"""What a virtio-net device offers, and what comes of what a guest acknowledged.

Owns:        which features are offered, by options and kernel; which offloads the TAP is to leave to a guest.
Never sees:  a session; a TAP.
Read next:   virtio/net.py for the bits, device.py, which offers and obeys.
"""

from __future__ import annotations

from typing import Final

from localmig.device_api import Offload
from localmig.vhost_user.message import VRING_INDEX_MAX, ProtocolFeature
from localmig.vhost_user.protocol import PROTOCOL_FEATURES_OFFERED, Offer
from localmig.virtio import Feature
from localmig.virtio.net import OFFLOADS, NetFeature, control_queue, transmit_queue, without_orphans

FEATURES: Final = (
    Feature.VERSION_1
    # A header may lie in any buffers of its chain, and chains are used in the order in which they were made available,
    # those of a packet that was dropped too.
    | Feature.ANY_LAYOUT
    | Feature.IN_ORDER
    | Feature.RING_EVENT_IDX
    | Feature.RING_INDIRECT_DESC
    | NetFeature.MRG_RXBUF
    | NetFeature.STATUS
    | NetFeature.MTU
)
"""What the packet path serves, whatever the options say."""

CONTROL: Final = NetFeature.CTRL_VQ | NetFeature.CTRL_GUEST_OFFLOADS | NetFeature.GUEST_ANNOUNCE
"""What comes with a control queue. Linux refuses a NIC that offers GUEST_ANNOUNCE or MQ without CTRL_VQ."""

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


def offer(
    *,
    queue_pair_count: int,
    offloads: NetFeature,
    has_offloads: bool,
    has_uso: bool,
    has_mac: bool,
    packed: bool,
    device_state: bool = False,
) -> Offer:
    """What a frontend is offered, and what can be served of one that was offered more by another process.

    That is all that the packet path knows. Offloads that a guest acknowledged for what it sends are in each frame's
    header, whatever the options say; for what it receives, see `tap_offloads`.

    Args:
        queue_pair_count: as many as the netdev has queues.
        offloads: which of `virtio.net.OFFLOADS` the options leave.
        has_offloads: whether the netdev has any.
        has_uso: whether it has UDP segmentation.
        has_mac: whether the options say the guest's address.
        packed: whether they let guests have packed rings.
        device_state: whether a frontend that moves the guest may take the device's state along.
    """
    possible = NetFeature(0)
    if has_offloads:
        possible = OFFLOADS if has_uso else OFFLOADS & ~_USO
    features = FEATURES | without_orphans(offloads & possible)
    if queue_pair_count > 1:
        features |= NetFeature.MQ
    vring_count = control_queue(queue_pair_count)
    if has_control_queue(queue_pair_count):
        features |= CONTROL
        vring_count += 1
    if has_mac:
        features |= NetFeature.MAC
    if packed:
        features |= Feature.RING_PACKED
    protocol_features = PROTOCOL_FEATURES_OFFERED
    if device_state:
        protocol_features |= ProtocolFeature.DEVICE_STATE
    if queue_pair_count == 1:
        # The specification would have it, because a NIC may have any number of pairs. But QEMU takes the answer to
        # GET_QUEUE_NUM, 3 here, for a number of pairs; without MQ it knows that there is one.
        protocol_features &= ~ProtocolFeature.MQ
    return Offer(
        features=features,
        servable_features=features | possible | NetFeature.MAC | Feature.RING_PACKED,
        vring_count=vring_count,
        # To a frontend that serves its control queue itself this ring is one of a queue pair that is not there.
        conditional_vrings={control_queue(queue_pair_count): NetFeature.CTRL_VQ},
        protocol_features=protocol_features,
        drained_vrings={transmit_queue(index): transmit_queue(0) for index in range(1, queue_pair_count)},
    )


def has_control_queue(queue_pair_count: int) -> bool:
    """Whether vhost-user can name it behind so many queue pairs: all but for 128, the most there can be."""
    return control_queue(queue_pair_count) <= VRING_INDEX_MAX


def tap_offloads(features_acked: int, allowed: NetFeature) -> Offload:
    """What is left to the guest of what is sent to it: never more than it acknowledged, and than the options allow.

    A feature acknowledged without the one it requires counts for nothing, as in QEMU: the guest is served all the same,
    and gets nothing that it could not handle.
    """
    features = without_orphans(features_acked & allowed)
    offloads = Offload(0)
    for feature, offload in _TAP_OFFLOADS:
        if features & feature == feature:
            offloads |= offload
    return offloads
