"""The netdev `macvtap`: a TAP that is a port of another device of this machine, without a bridge.

Owns:        finding the one device node that leads to it; making it; what it keeps from a guest.
Never sees:  a guest's frames.
Read next:   tap.py, of which it is a kind; opening.py for what is the same.

A macvtap is opened by /dev/tapN, N being its number. Numbers belong to a network namespace and device nodes do not:
where two namespaces have a macvtap of one number, there is one node, and it leads to the first one's. So the node's
device number is compared with the one that sysfs tells of this interface, before it is opened.

It lets in what is sent to its own Ethernet address, to everybody, and to the groups that it knows of, which is none of
the guest's: so it is told to take all of them. No process is told by its descriptor that it is gone: rtnetlink tells.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localmig.device_api.objects import BuildContext, ObjectType
from localmig.errors import KernelError, LocalmigError
from localmig.fds import OwnedFd
from localmig.netdevs import tun
from localmig.netdevs.info import SHOWN
from localmig.netdevs.macvtap_options import MacvtapSpec
from localmig.netdevs.network import Network, Networks
from localmig.netdevs.opened import OpenTap, Wanted
from localmig.netdevs.opening import Opener
from localmig.netdevs.rtnetlink import Link
from localmig.netdevs.state import TapState
from localmig.netdevs.tap import Tap

SYSFS: Final = Path("/sys")
"""Mounted in the network namespace of whoever mounted it."""

DEVICES: Final = Path("/dev")


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedMacvtap(Wanted):
    """As `Wanted`; `link` and `mode` are what it is made with where there is none, `link` None: it is not made."""

    link: str | None
    mode: str

    def command_to_make(self, ifname: str) -> str:
        """What makes it, and lets this process's user open it."""
        made = f"ip link add link {self.link or 'DEVICE'} name {ifname} type macvtap mode {self.mode}"
        owner = f" && chown {os.geteuid()} /dev/tap$(cat /sys/class/net/{ifname}/ifindex)" if os.geteuid() else ""
        return made + owner


class MacvtapOpener(Opener):
    """Opens macvtaps; all that follows is a TAP's."""

    def __init__(self, wanted: WantedMacvtap, network: Network) -> None:
        super().__init__(wanted, network)
        self._made = wanted

    def open_anew(self, ifname: str) -> OpenTap:
        """Opens the interface of that name, which is made where there is none; what was made goes if it cannot be."""
        made = self._make(ifname)
        try:
            return super().open_anew(ifname)
        except BaseException:
            if made is not None:
                self._network.remove(made.ifindex)
            raise

    def _make(self, ifname: str) -> Link | None:
        """Makes it where there is none; what was made."""
        what = f"cannot make macvtap '{ifname}'"
        wanted = self._made
        with self._kernel_errors(what):
            lower = self._network.link(name=wanted.link) if wanted.link else None
            found = self._network.link(name=ifname)
        if wanted.link is not None and lower is None:
            raise self._refusal(f"{what}: there is no interface '{wanted.link}', which link= names")
        if found is not None:
            if lower is not None and found.lower != lower.ifindex:
                raise self._refusal(
                    f"'{ifname}' is there already and is not on '{wanted.link}': "
                    f"name another one, or ip link del {ifname}"
                )
            return None
        if lower is None:
            raise self._refusal(f"there is no interface '{ifname}': {wanted.command_to_make(ifname)}, or say link=")
        advice = {
            errno.EPERM: f"run with CAP_NET_ADMIN, or have it made beforehand: {wanted.command_to_make(ifname)}",
            errno.EBUSY: f"'{wanted.link}' is used in another way: by a bridge, or by a macvtap in mode passthru",
            errno.EOPNOTSUPP: "this kernel has no macvtap: modprobe macvtap",
        }
        with self._kernel_errors(what, advice):
            self._network.add_macvtap(ifname, lower.ifindex, wanted.mode)
            return self._network.link(name=ifname)

    def _open_queues(self, ifname: str, found: Link | None, what: str) -> list[OwnedFd]:
        if found is None:
            raise KernelError(f"netdev '{self._wanted.id}': {what}: it was deleted meanwhile", errno=errno.ENODEV)
        if found.kind != "macvtap":
            raise self._refusal(f"{what}: it is no macvtap; look at it: ip -d link show {ifname}")
        node = DEVICES / f"tap{found.ifindex}"
        number = self._device_number(found)
        made = f"mknod {node} c {os.major(number)} {os.minor(number)}"
        advice = {errno.ENOENT: made, errno.EACCES: f"chown {os.geteuid()} {node}"}
        with self._kernel_errors(f"cannot open {node} of '{ifname}'", advice):
            place = OwnedFd(os.open(node, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW))
        with place:
            status = os.fstat(place.fileno())
            if not stat.S_ISCHR(status.st_mode) or status.st_rdev != number:
                raise self._refusal(
                    f"{node} is not '{ifname}': the macvtap of another network namespace has the same number; make a "
                    f"node for this one in its place: rm {node} && {made}"
                )
            with self._kernel_errors(f"cannot open {node} of '{ifname}'", advice):
                queue = OwnedFd(os.open(f"/proc/self/fd/{place.fileno()}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        with self._kernel_errors(what):
            found_there = tun.hardware_address(queue.fileno())
        if found_there != found.address:
            queue.close()
            raise self._refusal(f"{what}: {node} leads to the interface of another network namespace")
        return [queue]

    def _device_number(self, found: Link) -> int:
        """What sysfs says of the node that leads to an interface. ConfigError where it tells of another namespace."""
        folder = SYSFS / "class/net" / found.name
        try:
            address = bytes.fromhex((folder / "address").read_text().strip().replace(":", ""))
            major, _, minor = (folder / f"tap{found.ifindex}/dev").read_text().strip().partition(":")
        except (OSError, ValueError):
            address, major, minor = b"", "0", "0"
        if address != found.address:
            raise self._refusal(
                f"{SYSFS} does not show '{found.name}': it is of another network namespace; mount this one's: "
                f"mount -t sysfs sysfs {SYSFS}"
            )
        return os.makedev(int(major), int(minor))

    def _set_up(self, link: Link) -> Link:
        link = super()._set_up(link)
        if not link.has_all_multicast:
            try:
                with self._kernel_errors(f"cannot let '{link.name}' take in all multicast"):
                    self._network.take_all_multicast(link.ifindex)
                    link = self._network.link(ifindex=link.ifindex) or link
            except LocalmigError:
                pass  # a note tells
        return link


class Macvtap(Tap):
    """A macvtap of one queue, closed until `open` opens it or `adopt_setup` receives it.

    Args:
        id: the user's name for it.
        ifname: the interface to open.
        link: the device to make it on where there is none, None: it must be there.
        mode: what it is made with, one of `rtnetlink.MACVTAP_MODES`.
        mtu: what to give the interface, in bytes; None leaves it as it is.
        stays_home: tells why its descriptors do not move, None where they do.
        networks: the networks of all netdevs of a daemon.
    """

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the user's word
        ifname: str,
        link: str | None = None,
        mode: str = "bridge",
        mtu: int | None = None,
        stays_home: Callable[[], str | None] = lambda: None,
        networks: Networks | None = None,
    ) -> None:
        super().__init__(id=id, ifname=ifname, mtu=mtu, stays_home=stays_home, networks=networks)
        self._wanted_macvtap = WantedMacvtap(
            id=id,
            mtu=mtu,
            queue_count=1,
            fds=(),
            sndbuf=0,
            bridge=None,
            guest_carrier=False,
            link=link,
            mode=mode,
        )
        self._wanted = self._wanted_macvtap

    def adopt_setup(self, state: TapState) -> None:
        """As a TAP's. One that does not come is opened once the source has released it: the kernel refuses nobody.

        A second process that has it open would be sent a share of what arrives, while the source serves.
        """
        if state.descriptors is not None:
            super().adopt_setup(state)
        elif self._open is None:
            self._awaited = state

    def _opener(self, network: Network) -> Opener:
        return MacvtapOpener(self._wanted_macvtap, network)

    def _notes(self, tap: OpenTap) -> Iterator[str]:
        yield from super()._notes(tap)
        if not tap.ifindex:
            return
        if not tap.has_all_multicast:
            yield (
                f"'{tap.ifname}' takes in no multicast, IPv6 for one needs it: ip link set {tap.ifname} allmulticast on"
            )
        if self.mac_told and tap.address and self.mac_told != tap.address:
            yield (
                f"'{tap.ifname}' has the address {tap.address.hex(':')}, and the guest {self.mac_told.hex(':')}: what "
                f"is sent to the guest does not arrive; ip link set {tap.ifname} address {self.mac_told.hex(':')}"
            )


def _build(spec: MacvtapSpec, context: BuildContext) -> Macvtap:
    return Macvtap(
        id=spec.id,
        ifname=spec.ifname,
        link=spec.link,
        mode=spec.mode,
        mtu=spec.mtu,
        stays_home=context.stays_home,
        networks=context.shared(Networks),
    )


OBJECT: Final = ObjectType(spec=MacvtapSpec, build=_build, info=SHOWN, opens_with_privileges=True)
