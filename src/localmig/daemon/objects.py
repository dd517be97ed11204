"""From specs to parts: the object graph, and what of it travels in HELLO.

Owns:        which class serves which spec, the order of parts, the comparison of our specs with the source's.
Never sees:  a channel, the run state.
Read next:   devices/virtio_net/ and netdevs/ for the parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

from localmig.contact import ConnectTo, ListenAt
from localmig.device_api import Netdev, Part, Queues
from localmig.devices.virtio_net import VirtioNet
from localmig.errors import ConfigError, PeerError
from localmig.migration.hello import HandoverObject, Hello
from localmig.netdevs.network import Networks
from localmig.netdevs.stream import Stream
from localmig.netdevs.tap import Tap
from localmig.options import (
    AnySpec,
    NetdevSpec,
    StreamSpec,
    TapSpec,
    VirtioNetSpec,
    check_together,
    differences,
    from_mapping,
    to_mapping,
)
from localmig.options.specs import OFFLOADS, settle_local_migration
from localmig.options.values import mac_bytes
from localmig.trace import Tracer
from localmig.virtio.net import NetFeature


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """The specs of a daemon, checked together."""

    netdevs: tuple[NetdevSpec, ...] = ()
    devices: tuple[VirtioNetSpec, ...] = ()

    def __post_init__(self) -> None:
        check_together(self.netdevs, self.devices)
        object.__setattr__(self, "devices", settle_local_migration(self.netdevs, self.devices))

    @property
    def specs(self) -> tuple[AnySpec, ...]:
        """All of them, netdevs first."""
        return (*self.netdevs, *self.devices)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked for."""
        return not self.specs

    def types(self) -> dict[str, str]:
        """The type of each object by its id, as the user wrote it."""
        return {spec.id: spec.type_name for spec in self.specs}

    def for_hello(self) -> tuple[HandoverObject, ...]:
        """What HELLO tells of them."""
        return tuple(HandoverObject(kind=spec.kind, options=dict(to_mapping(spec))) for spec in self.specs)

    def build(self, tracer: Tracer) -> list[Part]:
        """The parts, each frozen and stopped: netdevs, then the devices on them, then the rings of all devices."""
        queues = Queues(tracer)
        networks = Networks()
        stays_home = {
            device.netdev: f"device '{device.id}' has local-migration=off"
            for device in self.devices
            if device.stays_home
        }
        netdevs = {spec.id: _netdev(spec, stays_home.get(spec.id), networks) for spec in self.netdevs}
        devices = [
            VirtioNet(
                id=spec.id,
                netdev=netdevs[spec.netdev],
                socket=_socket(spec),
                local_migration=not spec.stays_home,
                offloads=_offloads(spec),
                mac=mac_bytes(spec.mac) if spec.mac is not None else None,
                packed=spec.packed,
                queues=queues,
                tracer=tracer,
            )
            for spec in self.devices
        ]
        parts = (part for device in devices for part in (*device.own_parts, device))
        return [*netdevs.values(), *parts, queues]

    def fit(self, hello: Hello) -> Objects:
        """What the destination builds: its own specs where it has any, filled up with what the source says.

        Raises:
            PeerError: the source's objects cannot be, or do not fit ours; the text has both sides' values.
        """
        theirs = _read(hello)
        if self.is_empty:
            return theirs
        ours_by_id = {spec.id: spec for spec in self.specs}
        theirs_by_id = {spec.id: spec for spec in theirs.specs}
        problems = [
            *(f"'{each}' is here but not in the source" for each in ours_by_id.keys() - theirs_by_id.keys()),
            *(f"'{each}' is in the source but not here" for each in theirs_by_id.keys() - ours_by_id.keys()),
        ]
        home = {each for device in theirs.devices if device.stays_home for each in (device.id, device.netdev)}
        for each in ours_by_id.keys() & theirs_by_id.keys():
            problems += differences(
                ours_by_id[each], theirs_by_id[each], with_descriptors=hello.local and each not in home
            )
        if problems:
            raise PeerError("options do not fit: " + "; ".join(sorted(problems)))
        return replace(self, netdevs=tuple(_completed(spec, theirs_by_id[spec.id]) for spec in self.netdevs))


def _completed(ours: NetdevSpec, theirs: AnySpec) -> NetdevSpec:
    """Ours with the interface that the source opened, where ours says none."""
    if isinstance(ours, TapSpec) and isinstance(theirs, TapSpec) and not ours.ifname and not ours.descriptors:
        return replace(ours, ifname=theirs.ifname)
    return ours


def _netdev(spec: NetdevSpec, stays_home: str | None, networks: Networks) -> Netdev:
    if isinstance(spec, StreamSpec):
        plan: ListenAt | ConnectTo
        if spec.server:
            plan = ListenAt(path=spec.addr_path, peer="peer")
        else:
            plan = ConnectTo(path=spec.addr_path, reconnect_ms=spec.reconnect_ms, peer="peer")
        return Stream(id=spec.id, plan=plan, mtu=spec.mtu, stays_home=stays_home)
    return Tap(
        id=spec.id,
        ifname=spec.ifname,
        script=spec.script,
        downscript=spec.downscript,
        mtu=spec.mtu,
        queues=spec.queues,
        fds=spec.descriptors,
        sndbuf=spec.sndbuf,
        bridge=spec.br,
        guest_carrier=spec.guest_carrier,
        stays_home=stays_home,
        networks=networks,
    )


def _socket(spec: VirtioNetSpec) -> ListenAt | ConnectTo:
    if spec.server:
        return ListenAt(path=spec.socket, mode=int(spec.socket_mode, base=8), group=spec.socket_group)
    return ConnectTo(path=spec.socket, reconnect_ms=spec.reconnect_ms)


def _offloads(spec: VirtioNetSpec) -> NetFeature:
    return reduce(or_, (NetFeature[name.upper()] for name in OFFLOADS if getattr(spec, name)), NetFeature(0))


def _read(hello: Hello) -> Objects:
    specs: list[AnySpec] = []
    for each in hello.objects:
        if each.kind not in (TapSpec.kind, VirtioNetSpec.kind):
            raise PeerError(f"the source has an object of kind '{each.kind}', this release knows netdev and device")
        specs.append(from_mapping(each.kind, each.options))
    try:
        return Objects(
            netdevs=tuple(spec for spec in specs if isinstance(spec, TapSpec | StreamSpec)),
            devices=tuple(spec for spec in specs if isinstance(spec, VirtioNetSpec)),
        )
    except ConfigError as error:
        raise PeerError(f"the source's objects cannot be: {error}") from error
