"""What can be said of a NIC: the options of `--device virtio-net`.

Owns:        VirtioNetSpec.
Never sees:  a session, a netdev.
Read next:   device_api/vhost_user_options.py for all devices over vhost-user; device.py for what is made of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, ClassVar, Final

from localmig.device_api.vhost_user_options import VhostUserSpec
from localmig.errors import ConfigError
from localmig.options.specs import Fit, NetdevSpec, Spec, option, reference, value_text
from localmig.options.values import MacAddress, Switch
from localmig.virtio.net import OFFLOADS, NetFeature


def _offload(name: str, help_text: str) -> Any:
    """An option that switches an offload. QEMU writes these names with '_', as nothing else.

    Each side may have its own: a session goes on with what it was offered, and the netdev leaves to a guest what both
    the guest and the options allow.
    """
    return option(Switch(), help_text, default=True, fit=Fit.OURS, name=name)


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtioNetSpec(VhostUserSpec):
    """`--device virtio-net,…`: the guest side of a NIC, served over vhost-user."""

    type_name: ClassVar[str] = "virtio-net"
    summary: ClassVar[str] = "a virtio NIC, served to a VMM over vhost-user"

    netdev: str = reference("netdev", "id of the netdev that is its host side", exclusive=True)
    mac: str | None = option(
        MacAddress(),
        "the guest's Ethernet address, for who asks the device: User-Mode Linux does, QEMU has its own",
        default=None,
    )
    packed: bool = option(
        Switch(),
        "whether packed rings are offered; the VMM must know them: QEMU with packed=on does, User-Mode Linux not",
        fit=Fit.OURS,
        default=False,
    )
    device_state: bool = option(
        Switch(),
        "whether a VMM that migrates the guest takes this device's state along: QEMU does from 10.0 on, and needs "
        "it at both ends then",
        fit=Fit.OURS,
        default=False,
    )
    csum: bool = _offload("csum", "let the guest leave checksums to the host")
    guest_csum: bool = _offload("guest_csum", "let the host leave checksums to the guest")
    host_tso4: bool = _offload("host_tso4", "let the guest leave segmentation to the host: TCP over IPv4")
    host_tso6: bool = _offload("host_tso6", "TCP over IPv6")
    host_ecn: bool = _offload("host_ecn", "TCP with explicit congestion notification")
    host_uso: bool = _offload("host_uso", "UDP, where the kernel has it (Linux 6.2)")
    guest_tso4: bool = _offload("guest_tso4", "let the host leave segmentation to the guest: TCP over IPv4")
    guest_tso6: bool = _offload("guest_tso6", "TCP over IPv6")
    guest_ecn: bool = _offload("guest_ecn", "TCP with explicit congestion notification")
    guest_uso4: bool = _offload("guest_uso4", "UDP over IPv4, together with guest_uso6, where the kernel has it")
    guest_uso6: bool = _offload("guest_uso6", "UDP over IPv6, together with guest_uso4, where the kernel has it")

    @property
    def offloads(self) -> NetFeature:
        """The offloads that are on."""
        return reduce(or_, (NetFeature[name.upper()] for name in OFFLOAD_NAMES if getattr(self, name)), NetFeature(0))

    def settled(self, referred: Mapping[str, Spec]) -> VirtioNetSpec:
        """This device with its netdev's word on local migration as its own: off, or not said."""
        netdev = referred[self.netdev]
        assert isinstance(netdev, NetdevSpec), netdev
        ours, theirs = self.local_migration, netdev.local_migration_word
        if ours is not None and theirs is not None and ours != theirs:
            raise ConfigError(
                f"device '{self.id}' has local-migration={value_text(ours)} and its netdev '{netdev.id}' has "
                f"local-migration-supported={value_text(theirs)}: they are one switch, leave one out"
            )
        return replace(self, local_migration=False if ours is False or theirs is False else None)


OFFLOAD_NAMES: Final = frozenset(feature.name.lower() for feature in NetFeature if feature in OFFLOADS and feature.name)
"""The options that switch an offload, each the name of virtio's feature in small letters."""
