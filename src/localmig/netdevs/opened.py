"""An open TAP: its descriptors, how they are set, and what was seen of its interface last.

Owns:        OpenTap; what a user should know of it.
Never sees:  the kernel; who changes it.
Read next:   tap.py, which looks and sets; opening.py for where it comes from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from localmig.device_api import Offload
from localmig.fds import OwnedFd
from localmig.netdevs.info import Whereabouts
from localmig.netdevs.network import Network
from localmig.netdevs.rtnetlink import Link


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the user asked for, of which each is described at `tap.Tap`."""

    id: str
    mtu: int | None
    queue_count: int
    fds: tuple[int, ...]
    sndbuf: int
    bridge: str | None
    guest_carrier: bool

    def command_to_make(self, ifname: str) -> str:
        """What makes the interface `ifname`, for this process's user."""
        made = " multi_queue" if self.queue_count > 1 else ""
        return f"ip tuntap add dev {ifname or 'NAME'} mode tap vnet_hdr{made} user {os.geteuid()}"


@dataclass(kw_only=True, slots=True)
class OpenTap:
    """What exists only while the TAP is open, and what was seen of its interface last.

    Attributes:
        queues: a descriptor for each.
        attached: whether the kernel steers frames into each.
        vnet_header_length, offloads, has_uso, downscript: as they are set.
        arrived: it came by a handover; else this process opened it.
        ifname_opened: the name it was opened by, "" where its descriptors were inherited.
        mtu_opened: its MTU in bytes when it was opened.
        network: where names and numbers of interfaces mean what they do here.
        ifname: its present name, or the last one.
        ifindex: its number there, 0 while it is in another network or gone.
        mtu: its present one, or the last one.
        is_up: whether it is up, as it was seen last.
        bridge: the bridge it is in, "" for none.
        bridge_ifindex: its number, 0 for none or an unknown one.
        has_carrier: whether this program lets it have a carrier.
        sees_carrier: whether it has one.
        is_gone: whether its descriptors have no interface any more.
        address: its Ethernet address, as it was seen last; empty where it never was.
        has_all_multicast: whether it takes in frames to every group, as far as that was seen.
        refusal: why the interface that was made again under its name is not attached, "" where there is none.
    """

    queues: tuple[OwnedFd, ...]
    attached: list[bool]
    vnet_header_length: int
    offloads: Offload
    has_uso: bool
    downscript: str
    arrived: bool
    ifname_opened: str
    mtu_opened: int
    network: Network
    ifname: str
    ifindex: int
    mtu: int
    is_up: bool
    has_carrier: bool
    bridge: str = ""
    bridge_ifindex: int = 0
    sees_carrier: bool = True
    is_gone: bool = False
    address: bytes = b""
    has_all_multicast: bool = True
    refusal: str = ""

    @property
    def link_is_up(self) -> bool:
        """Whether frames can pass it, as far as this process can see."""
        return not self.is_gone and (self.is_up or not self.ifindex)

    def see(self, name: str, link: Link | None) -> None:
        """Takes note of what its interface is now; `link` is None where it is in another network.

        Raises OSError where the kernel does not tell what the bridge is called; the rest is noted.
        """
        self.ifname, self.ifindex = name, 0
        self.bridge, self.bridge_ifindex = "", 0
        if link is None:
            return
        self.ifname, self.ifindex, self.mtu, self.is_up = link.name, link.ifindex, link.mtu, link.is_up
        self.sees_carrier = link.has_carrier
        self.address, self.has_all_multicast = link.address, link.has_all_multicast
        if link.master and (bridge := self.network.link(ifindex=link.master)) is not None:
            self.bridge, self.bridge_ifindex = bridge.name, bridge.ifindex

    @property
    def whereabouts(self) -> Whereabouts:
        """Where its interface is."""
        if self.is_gone:
            return Whereabouts.GONE
        return Whereabouts.HERE if self.ifindex else Whereabouts.ELSEWHERE

    def notes(self, wanted: Wanted, *, mtu_told: int) -> Iterator[str]:
        """What is so and should perhaps not be, and what to do, a sentence each.

        Args:
            wanted: what the user asked for.
            mtu_told: the MTU that the guest uses, in bytes, 0 where it is not known.
        """
        match self.whereabouts:
            case Whereabouts.GONE:
                yield self._note_gone(wanted)
            case Whereabouts.ELSEWHERE if self.ifname_opened:
                yield (
                    f"'{self.ifname}' was moved to another network namespace: its frames flow, but whether it is up is "
                    f"unknown here, and so is its MTU, which was {self.mtu}; move it back to have it watched"
                )
            case Whereabouts.HERE:
                yield from self._notes_here(wanted)
        if self.mtu < mtu_told:
            yield (
                f"'{self.ifname}' has MTU {self.mtu}, and the guest uses {mtu_told}: "
                f"ip link set {self.ifname} mtu {mtu_told}"
            )

    def _notes_here(self, wanted: Wanted) -> Iterator[str]:
        if self.ifname_opened not in ("", self.ifname):
            yield (
                f"'{self.ifname_opened}' was renamed to '{self.ifname}': a new daemon would look for "
                f"'{self.ifname_opened}'; rename it back, or say ifname={self.ifname} there"
            )
        if not self.is_up:
            yield f"'{self.ifname}' is down: ip link set {self.ifname} up"
        elif self.has_carrier and not self.sees_carrier:
            yield f"'{self.ifname}' has no carrier, so nothing reaches the guest: ip link set {self.ifname} carrier on"
        if wanted.bridge not in (None, self.bridge):
            where = f"in '{self.bridge}'" if self.bridge else "in no bridge"
            yield (
                f"'{self.ifname}' is {where}, not in '{wanted.bridge}': "
                f"ip link set {self.ifname} master {wanted.bridge}"
            )
        if wanted.mtu is not None and wanted.mtu != self.mtu:
            yield (
                f"'{self.ifname}' has MTU {self.mtu}, and mtu= says {wanted.mtu}: "
                f"ip link set {self.ifname} mtu {wanted.mtu}"
            )

    def _note_gone(self, wanted: Wanted) -> str:
        if not self.ifname_opened:
            return (
                f"'{self.ifname}' was deleted, and came as a descriptor: add the netdev again with a new one, or start "
                "a daemon with one"
            )
        if self.refusal:
            return f"'{self.ifname}' was deleted, and the one made again cannot be attached: {self.refusal}"
        name = self.ifname_opened
        renamed = "" if name == self.ifname else f" (it was '{name}' when it was opened)"
        return (
            f"'{self.ifname}'{renamed} was deleted: make it again and it is attached by itself: "
            f"{wanted.command_to_make(name)} && ip link set {name} up"
        )
