"""From specs to parts, and how a destination's own specs meet the source's."""

from __future__ import annotations

import dataclasses

import pytest
from tests.kit.cases import each_case

from localmig.daemon.objects import Assembly, Objects
from localmig.device_api import Part, Queues
from localmig.device_api.own_state import OwnState
from localmig.devices.virtio_net import VirtioNet
from localmig.devices.virtio_net.options import VirtioNetSpec
from localmig.errors import ConfigError, PeerError
from localmig.migration.hello import HandoverObject, Hello
from localmig.netdevs.tap import Tap
from localmig.netdevs.tap_options import TapSpec
from localmig.options import Spec
from localmig.registry import Registry
from localmig.trace import Tracer

TAP = TapSpec(id="net0", ifname="tap0")
NIC = VirtioNetSpec(id="nic0", netdev="net0", socket="/run/nic0.sock")
REGISTRY = Registry(entry_points=list)


def together(*specs: Spec) -> Objects:
    return Objects(specs=specs, registry=REGISTRY)


def parts(objects: Objects) -> list[Part]:
    return Assembly.of(objects, Tracer()).parts()


BOTH = together(TAP, NIC)
NOTHING = together()


def hello(objects: Objects, *, local: bool = True) -> Hello:
    """What a source with these objects says, after a journey."""
    return Hello.decode(Hello(version="0.1.0", local=local, running=True, objects=objects.for_hello()).encode())


def test_parts_are_built_netdevs_first_and_rings_last() -> None:
    other_tap, other_nic = TapSpec(id="net1"), VirtioNetSpec(id="nic1", netdev="net1", socket="/run/nic1.sock")
    built = parts(together(NIC, TAP, other_nic, other_tap))
    assert [part.id for part in built] == ["net0", "net1", "nic0", "nic0", "nic1", "nic1", "*"]
    assert [type(part) for part in built] == [Tap, Tap, OwnState, VirtioNet, OwnState, VirtioNet, Queues]


def test_specs_that_do_not_fit_each_other_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="can't find netdev 'net0'"):
        together(NIC)


def test_objects_are_empty_where_nothing_was_asked_for() -> None:
    assert (NOTHING.is_empty, BOTH.is_empty) == (True, False)


def test_a_device_that_stays_home_keeps_its_netdev_there_too() -> None:
    home = together(TAP, dataclasses.replace(NIC, local_migration=False))
    reasons = [part.local_migration_blocker() for part in parts(home)]
    assert reasons == ["device 'nic0' has local-migration=off", "local-migration=off", "local-migration=off", None]


@pytest.mark.parametrize("device", [None, False])
def test_what_a_netdev_says_of_local_migration_is_its_devices_and_travels_as_that(device: bool | None) -> None:
    nic = dataclasses.replace(NIC, local_migration=device)
    said = together(dataclasses.replace(TAP, local_migration_supported=False), nic)
    assert [part.local_migration_blocker() is None for part in parts(said)] == [False, False, False, True]
    home = together(TAP, dataclasses.replace(NIC, local_migration=False))
    assert said.for_hello() == home.for_hello()
    assert (said.fit(hello(home)), home.fit(hello(said))) == (said, home)
    with pytest.raises(PeerError, match="device 'nic0' has local-migration=off here and on there"):
        said.fit(hello(BOTH))


@pytest.mark.parametrize("device", [None, True])
@pytest.mark.parametrize("netdev", [None, True])
def test_local_migration_that_is_on_does_not_travel(netdev: bool | None, device: bool | None) -> None:
    said = together(
        dataclasses.replace(TAP, local_migration_supported=netdev), dataclasses.replace(NIC, local_migration=device)
    )
    assert said.for_hello() == BOTH.for_hello()


@pytest.mark.parametrize(("netdev", "device"), [(True, False), (False, True)])
def test_a_netdev_and_its_device_that_disagree_about_local_migration_are_refused(netdev: bool, device: bool) -> None:
    words = {True: "on", False: "off"}
    with pytest.raises(ConfigError) as caught:
        together(
            dataclasses.replace(TAP, local_migration_supported=netdev), dataclasses.replace(NIC, local_migration=device)
        )
    assert str(caught.value) == (
        f"device 'nic0' has local-migration={words[device]} and its netdev 'net0' has "
        f"local-migration-supported={words[netdev]}: they are one switch, leave one out"
    )


# -- at the destination ---------------------------------------------------------------------------------------


def test_a_destination_without_objects_builds_the_sources() -> None:
    assert NOTHING.fit(hello(BOTH)) == BOTH


def test_a_destination_with_the_same_objects_keeps_its_own() -> None:
    assert BOTH.fit(hello(BOTH)) == BOTH


def test_a_netdev_without_a_name_gets_the_sources() -> None:
    own = together(TapSpec(id="net0", script="/etc/up"), NIC)
    assert own.fit(hello(BOTH)).specs == (TapSpec(id="net0", script="/etc/up", ifname="tap0"), NIC)


def test_a_netdev_with_an_inherited_descriptor_needs_no_name() -> None:
    own = together(TapSpec(id="net0", fd="7"), NIC)
    assert own.fit(hello(BOTH, local=False)).specs == (TapSpec(id="net0", fd="7"), NIC)


@pytest.mark.parametrize(
    ("ours", "complaints"),
    [
        (
            together(dataclasses.replace(TAP, id="net9"), dataclasses.replace(NIC, netdev="net9")),
            ["'net9' is here but not in the source", "'net0' is in the source but not here", "netdev=net9 here"],
        ),
        (together(TAP), ["'nic0' is in the source but not here"]),
        (
            together(dataclasses.replace(TAP, ifname="tap1", mtu=9000), NIC),
            ["netdev 'net0' has ifname=tap1 here and tap0 there"],
        ),
        (
            together(TAP, dataclasses.replace(NIC, local_migration=False)),
            ["device 'nic0' has local-migration=off here and on there"],
        ),
    ],
)
def test_every_option_that_does_not_fit_is_named(ours: Objects, complaints: list[str]) -> None:
    with pytest.raises(PeerError, match="options do not fit: ") as caught:
        ours.fit(hello(BOTH))
    for complaint in complaints:
        assert complaint in str(caught.value)


def test_what_only_matters_beside_descriptors_may_differ_without_them() -> None:
    ours = together(dataclasses.replace(TAP, ifname="tap1"), dataclasses.replace(NIC, socket="/run/b.sock"))
    assert ours.fit(hello(BOTH, local=False)) == ours
    home = together(TAP, dataclasses.replace(NIC, local_migration=False))
    own = together(ours.specs[0], dataclasses.replace(NIC, local_migration=False, socket="/b"))
    assert own.fit(hello(home)) == own


@each_case(
    ("spoiled", "complaint"),
    [
        (HandoverObject(kind="drive", options={}), "object of kind 'drive', this release knows netdev and device"),
        (HandoverObject(kind="netdev", options={"type": "user", "id": "x"}), "user"),
        (HandoverObject(kind="netdev", options={"type": "tap"}), "id"),
        (HandoverObject(kind="netdev", options={"type": "tap", "id": "n", "color": "blue"}), "color"),
        (HandoverObject(kind="netdev", options={"type": "tap", "id": "n", "mtu": "big"}), "mtu"),
        (
            HandoverObject(kind="device", options={"driver": "virtio-net", "id": "n", "netdev": "no", "socket": "/s"}),
            "the source's objects cannot be: device 'n': can't find netdev 'no'",
        ),
    ],
)
@each_case("ours", [NOTHING, BOTH])
def test_objects_that_cannot_be_are_the_sources_fault(ours: Objects, spoiled: HandoverObject, complaint: str) -> None:
    with pytest.raises(PeerError, match=complaint):
        ours.fit(Hello(version="0.1.0", local=True, running=True, objects=(spoiled,)))
