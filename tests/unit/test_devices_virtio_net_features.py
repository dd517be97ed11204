"""What a virtio-net device offers, can serve, and leaves to a guest."""

from __future__ import annotations

from functools import reduce
from operator import or_

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmig.device_api import Offload
from localmig.devices.virtio_net.features import offer, tap_offloads
from localmig.vhost_user.protocol import Offer
from localmig.virtio import Feature
from localmig.virtio.net import OFFLOADS, NetFeature

USO = NetFeature.HOST_USO | NetFeature.GUEST_USO4 | NetFeature.GUEST_USO6

SETS = st.lists(st.sampled_from(list(OFFLOADS))).map(lambda some: reduce(or_, some, NetFeature(0)))


def made(
    *, offloads: NetFeature = OFFLOADS, has_offloads: bool = True, has_uso: bool = True, packed: bool = False
) -> Offer:
    return offer(
        queue_pair_count=1,
        offloads=offloads,
        has_offloads=has_offloads,
        has_uso=has_uso,
        has_mac=False,
        packed=packed,
    )


@given(SETS)
def test_options_change_what_is_offered_and_not_what_can_be_served(offloads: NetFeature) -> None:
    made_less, made_all = made(offloads=offloads), made(packed=True)
    assert made_less.features & OFFLOADS & ~offloads == 0
    assert made_less.all_servable_features == made_all.all_servable_features
    assert made_all.all_features & ~made_all.all_servable_features == 0
    assert made_less.all_servable_features & Feature.RING_PACKED


def test_what_the_tap_does_not_know_can_not_be_served() -> None:
    assert made(has_uso=False).all_servable_features & USO == 0
    assert made(has_uso=True).all_servable_features & USO == USO


@given(SETS, SETS)
def test_a_guest_is_left_no_more_than_it_acknowledged_and_no_more_than_is_allowed(
    acked: NetFeature, allowed: NetFeature
) -> None:
    left = tap_offloads(acked | Feature.VERSION_1, allowed)
    for limit in (acked, allowed):
        assert left & ~tap_offloads(limit, OFFLOADS) == 0
    # Without checksums there is nothing else either.
    assert Offload.CSUM in left or left == Offload(0)


@pytest.mark.parametrize(
    ("off", "left"),
    [
        (NetFeature.GUEST_CSUM, Offload(0)),
        (NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6, Offload.CSUM | Offload.USO4 | Offload.USO6),
        (
            NetFeature.GUEST_USO4,
            Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.TSO_ECN,
        ),
        (NetFeature.CSUM | NetFeature.HOST_TSO4, ~Offload(0)),
    ],
)
def test_what_is_switched_off_takes_along_what_needs_it(off: NetFeature, left: Offload) -> None:
    assert tap_offloads(OFFLOADS, OFFLOADS & ~off) == left & tap_offloads(OFFLOADS, OFFLOADS)
