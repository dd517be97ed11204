"""The numbers of the virtio specification against the layout it prints."""

from __future__ import annotations

import pytest
from tests.kit.cases import each_case

from localmig.devices.virtio_net.features import offer
from localmig.devices.virtio_net.queue_pairs import thread_name
from localmig.vhost_user.message import ProtocolFeature
from localmig.virtio import Feature
from localmig.virtio.net import (
    OFFLOADS,
    LinkStatus,
    NetConfig,
    NetFeature,
    header_length,
    receive_queue,
    transmit_queue,
    without_orphans,
)

GUEST_OFFLOADS = (
    NetFeature.GUEST_CSUM
    | NetFeature.GUEST_TSO4
    | NetFeature.GUEST_TSO6
    | NetFeature.GUEST_ECN
    | NetFeature.GUEST_USO4
    | NetFeature.GUEST_USO6
)


def test_the_configuration_space_has_the_layout_of_section_5_1_4() -> None:
    config = NetConfig(
        mac=bytes.fromhex("525400123456"),
        status=LinkStatus.LINK_UP,
        queue_pair_count_max=2,
        mtu=1500,
        speed=1000,
        duplex=1,
    )
    assert config.encode().hex() == "52540012345601000200dc05e80300000100000000000000"


def test_the_header_has_two_bytes_more_where_buffers_are_counted() -> None:
    assert header_length(0) == 10
    assert header_length(NetFeature.MRG_RXBUF) == 12
    assert header_length(Feature.VERSION_1) == 12


def test_rings_come_in_pairs_receive_first() -> None:
    assert [(receive_queue(pair), transmit_queue(pair)) for pair in range(2)] == [(0, 1), (2, 3)]


@each_case(
    ("features", "left"),
    [
        (OFFLOADS, OFFLOADS),
        (OFFLOADS & ~NetFeature.CSUM, GUEST_OFFLOADS),
        (OFFLOADS & ~NetFeature.GUEST_CSUM, OFFLOADS & ~GUEST_OFFLOADS),
        (NetFeature.GUEST_CSUM | NetFeature.GUEST_ECN | NetFeature.MAC, NetFeature.GUEST_CSUM | NetFeature.MAC),
        (NetFeature.CSUM | NetFeature.HOST_ECN | NetFeature.HOST_TSO6,) * 2,
        (NetFeature.HOST_ECN | NetFeature.HOST_TSO6, 0),
    ],
)
def test_a_feature_without_the_one_it_requires_counts_for_nothing(features: int, left: int) -> None:
    assert without_orphans(features) == left


def test_a_nic_with_as_many_rings_as_vhost_user_can_name_has_no_control_queue() -> None:
    offered = offer(
        queue_pair_count=128, offloads=NetFeature(0), has_offloads=True, has_uso=False, has_mac=False, packed=False
    )
    assert offered.vring_count == 256
    assert not offered.features & (NetFeature.CTRL_VQ | NetFeature.GUEST_ANNOUNCE)


@pytest.mark.parametrize("queue_pair_count", [1, 2, 127])
def test_queues_are_counted_for_the_frontend_where_there_are_several_pairs(queue_pair_count: int) -> None:
    offered = offer(
        queue_pair_count=queue_pair_count,
        offloads=NetFeature(0),
        has_offloads=True,
        has_uso=False,
        has_mac=False,
        packed=False,
    )
    assert offered.vring_count == 2 * queue_pair_count + 1
    assert (ProtocolFeature.MQ in offered.protocol_features) == (queue_pair_count > 1)
    assert bool(offered.features & NetFeature.MQ) == (queue_pair_count > 1)
    assert offered.features >> 27 & 1, "ANY_LAYOUT"
    assert offered.features >> 35 & 1, "IN_ORDER"


def test_the_name_of_a_thread_keeps_the_number_of_its_queue_pair() -> None:
    assert thread_name("nic0", 0) == "nic0/0"
    assert thread_name("the-network-of-the-tenant", 127) == "the-network/127"
