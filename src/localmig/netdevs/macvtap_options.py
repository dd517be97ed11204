"""What can be said of a macvtap: the options of `--netdev macvtap`.

Owns:        MacvtapSpec.
Never sees:  an interface, a device node.
Read next:   options/specs.py for what a spec is, macvtap.py for what is made of this one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from localmig.errors import ConfigError
from localmig.limits import MTU_MAX, MTU_MIN
from localmig.netdevs.rtnetlink import MACVTAP_MODES
from localmig.options.specs import Fit, NetdevSpec, Spec, option
from localmig.options.values import Choice, InterfaceName, Number


@dataclass(frozen=True, kw_only=True, slots=True)
class MacvtapSpec(NetdevSpec):
    """`--netdev macvtap,…`: the host side of a NIC, a TAP that is a port of another device."""

    type_name: ClassVar[str] = "macvtap"
    summary: ClassVar[str] = "a macvtap, a port of another device of this machine"

    ifname: str = option(InterfaceName(), "interface to open", fit=Fit.WITH_DESCRIPTORS)
    link: str | None = option(
        InterfaceName(),
        "device to make the interface on where there is none; without it the interface must be there",
        fit=Fit.OURS,
        default=None,
    )
    mode: str = option(
        Choice(tuple(MACVTAP_MODES)), "with link=, what the interface is made with", fit=Fit.OURS, default="bridge"
    )
    mtu: int | None = option(
        Number(lowest=MTU_MIN, highest=MTU_MAX, reason="what the kernel lets a TAP have"),
        "MTU to give the interface; without it the interface keeps its own",
        default=None,
    )

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        if self.link is None and self.mode != "bridge":
            raise ConfigError("mode= is invalid without link=: whoever made the interface chose its mode")

    def claims(self) -> Iterator[tuple[str, Hashable]]:
        """The interface."""
        yield "interface", self.ifname
