"""How a TAP comes to be open: by its name, by inherited descriptors, or once more after its interface was deleted.

Owns:        opening and configuring; what to do about each refusal of the kernel's.
Never sees:  a TAP in use; scripts; a handover.
Read next:   tap.py for when; tun.py and rtnetlink.py for what is asked of the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from localmig.device_api import Offload
from localmig.errors import ConfigError, KernelError, LocalmigError
from localmig.fds import OwnedFd, close_all
from localmig.netdevs import tun
from localmig.netdevs.network import Network
from localmig.netdevs.opened import OpenTap, Wanted
from localmig.netdevs.rtnetlink import Link
from localmig.netdevs.script import NO_SCRIPT
from localmig.netdevs.state import USO, VNET_HEADER_LENGTHS
from localmig.netdevs.tap_options import SNDBUF_MAX
from localmig.netdevs.tun import Flag

_logger = logging.getLogger(__name__)


class Opener:
    """Opens TAPs as the user wants them, in a network. No downscript is set in what it returns."""

    def __init__(self, wanted: Wanted, network: Network) -> None:
        self._wanted = wanted
        self._network = network

    def _refusal(self, text: str) -> ConfigError:
        return ConfigError(f"netdev '{self._wanted.id}': {text}")

    def _kernel_errors(self, what: str, advice: Mapping[int, str] | None = None) -> AbstractContextManager[None]:
        return kernel_errors(self._wanted.id, what, advice)

    def open_anew(self, ifname: str) -> OpenTap:
        """Opens the interface of that name, which is made where there is none; "" lets the kernel choose a name."""
        what = f"cannot open TAP '{ifname or '(any name)'}'"
        with contextlib.ExitStack() as undo:
            with self._kernel_errors(what):
                found = self._network.link(name=ifname) if ifname else None
            queues = self._open_queues(ifname, found, what)
            undo.callback(lambda: close_all(queues))
            has_uso = self._configure(queues, ifname or "(any name)")
            link = self._set_up(self._link_of(queues[0], what))
            tap = self._opened_here(queues, link, has_uso=has_uso)
            undo.pop_all()
            return tap

    def _open_queues(self, ifname: str, found: Link | None, what: str) -> list[OwnedFd]:
        """The queues of the interface `ifname`; `found` is what is called so already, None where it is to be made."""
        flags = Flag.TAP | Flag.NO_PI | Flag.VNET_HDR
        if self._wanted.queue_count > 1 or (found is not None and found.multi_queue):
            flags |= Flag.MULTI_QUEUE
        advice = _open_advice(ifname, found, self._wanted)
        with contextlib.ExitStack() as undo:
            queues: list[OwnedFd] = []
            undo.callback(lambda: close_all(queues))
            with self._kernel_errors(what, advice):
                # The kernel would add our queues to another process's, and take packets away from it.
                if found is not None and found.queue_count:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            for _ in range(self._wanted.queue_count):
                queues.append(OwnedFd(self._open_device()))
                with self._kernel_errors(what, advice):
                    tun.attach_to(queues[-1].fileno(), ifname, flags)
                    ifname, _flags = tun.interface(queues[-1].fileno()) or (ifname, flags)
            undo.pop_all()
            return queues

    def _link_of(self, queue: OwnedFd, what: str) -> Link:
        """The interface of a queue that was opened in this network namespace."""
        with self._kernel_errors(what):
            found = tun.interface(queue.fileno())
            link = find(self._network, queue, found[0]) if found else None
            if link is None:
                raise OSError(errno.ENODEV, "it was deleted, renamed or moved meanwhile")
        return link

    def take_inherited(self) -> OpenTap:
        """Checks and configures fd= or fds=, whose interface may be in another namespace. If it raises they stay."""
        ifname = self._check_inherited()
        with contextlib.ExitStack() as undo:
            queues = [OwnedFd(number) for number in self._wanted.fds]
            undo.callback(lambda: [queue.release() for queue in queues])
            for queue in queues:
                os.set_inheritable(queue.fileno(), False)
                os.set_blocking(queue.fileno(), False)
            self._attach_inherited(queues, ifname)
            has_uso = self._configure(queues, ifname)
            with self._kernel_errors(f"cannot read the state of '{ifname}'"):
                link = find(self._network, queues[0], ifname)
            if link is not None:
                tap = replace(self._opened_here(queues, self._set_up(link), has_uso=has_uso), ifname_opened="")
            elif self._wanted.mtu is not None:
                tap = self._new_tap(queues, ifname, self._wanted.mtu, has_uso=has_uso)
            else:
                raise self._refusal(
                    f"the interface of fd={queues[0].fileno()} ('{ifname}') is in another "
                    "network namespace, so its MTU cannot be read; say it with mtu="
                )
            undo.pop_all()
            return tap

    def _check_inherited(self) -> str:
        """The interface's name. ConfigError if a descriptor is no TAP of ours, or they are of several; all are left."""
        first: tuple[int, str, bytes] | None = None
        for number in self._wanted.fds:
            try:
                seen = tun.interface(number)
            except OSError as error:
                what = "is not open" if error.errno == errno.EBADF else "is no TAP"
                raise self._refusal(f"fd={number} {what}") from error
            if seen is None:
                raise self._refusal(f"fd={number} is a TAP without an interface: it was deleted")
            ifname, flags = seen
            wanted = Flag.TAP | Flag.NO_PI | Flag.VNET_HDR
            if len(self._wanted.fds) > 1:
                wanted |= Flag.MULTI_QUEUE
            for flag in wanted & ~flags:
                raise self._refusal(f"fd={number} ('{ifname}') was opened without IFF_{flag.name}")
            found = (number, ifname, tun.hardware_address(number))
            if (first := first or found)[1:] != found[1:]:
                raise self._refusal(
                    f"fd={first[0]} ('{first[1]}') and fd={number} ('{ifname}') are queues of two interfaces"
                )
        assert first is not None, self._wanted.id
        return first[1]

    def _attach_inherited(self, queues: Sequence[OwnedFd], ifname: str) -> None:
        """Attaches all of them, whatever the parent did; ConfigError where two descriptors are one queue."""
        numbers = [queue.fileno() for queue in queues]
        with self._kernel_errors(f"cannot configure TAP '{ifname}'"):
            for number in numbers:
                if not tun.is_attached(number):
                    tun.attach(number)
            for number in numbers[1:]:
                # Detached to see which others are detached by it.
                tun.detach(number)
                for other in numbers:
                    if other != number and not tun.is_attached(other):
                        raise self._refusal(f"fd={other} and fd={number} are one queue of '{ifname}'")
                tun.attach(number)

    def _configure(self, queues: Sequence[OwnedFd], ifname: str) -> bool:
        """Sets what another user may have left otherwise: a little-endian header of 12 bytes, no offloads, one queue.

        Returns whether the TAP knows USO.
        """
        first = queues[0].fileno()
        with self._kernel_errors(f"cannot configure TAP '{ifname}'"):
            tun.set_vnet_header_length(first, max(VNET_HEADER_LENGTHS))
            tun.set_little_endian(first)
            # Of every attached queue, so before they are detached.
            tun.set_send_buffer(first, self._wanted.sndbuf or SNDBUF_MAX)
            try:
                tun.set_offloads(first, Offload.CSUM | USO)
                has_uso = True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                has_uso = False
            # No offloads yet: no guest has said that it bears frames without checksum, or longer than the MTU.
            tun.set_offloads(first, Offload(0))
            for queue in queues[1:]:
                tun.detach(queue.fileno())
        if self._wanted.guest_carrier:
            advice = {errno.EINVAL: "leave guest-carrier= out: only a TAP has one that can be turned off"}
            with self._kernel_errors(f"cannot turn the carrier of '{ifname}' off", advice):
                tun.turn_carrier_off(first)
        return has_uso

    def _opened_here(self, queues: Sequence[OwnedFd], link: Link, *, has_uso: bool) -> OpenTap:
        tap = self._new_tap(queues, link.name, link.mtu, has_uso=has_uso)
        tap.ifname_opened = link.name
        with self._kernel_errors(f"cannot read the state of '{link.name}'"):
            tap.see(link.name, link)
        return tap

    def _new_tap(self, queues: Sequence[OwnedFd], ifname: str, mtu: int, *, has_uso: bool) -> OpenTap:
        """One that was configured just now, of an interface about which nothing else is known."""
        return OpenTap(
            queues=tuple(queues),
            attached=[queue is queues[0] for queue in queues],
            vnet_header_length=max(VNET_HEADER_LENGTHS),
            offloads=Offload(0),
            has_uso=has_uso,
            downscript=NO_SCRIPT,
            arrived=False,
            ifname_opened="",
            mtu_opened=mtu,
            network=self._network,
            ifname=ifname,
            ifindex=0,
            mtu=mtu,
            is_up=True,
            has_carrier=not self._wanted.guest_carrier,
        )

    def _set_up(self, link: Link) -> Link:
        """Gives the interface its MTU and its bridge and brings it up; what is so already needs no privilege."""
        name = link.name
        if self._wanted.mtu is not None and self._wanted.mtu != link.mtu:
            advice = f"set it beforehand: ip link set {name} mtu {self._wanted.mtu}"
            with self._kernel_errors(f"cannot set the MTU of '{name}' to {self._wanted.mtu}", {errno.EPERM: advice}):
                self._network.set_mtu(link.ifindex, self._wanted.mtu)
        if self._wanted.bridge is not None:
            self._put_into_bridge(link, self._wanted.bridge)
        if not link.is_up:
            advice = f"bring it up beforehand: ip link set {name} up"
            with self._kernel_errors(f"cannot bring '{name}' up", {errno.EPERM: advice}):
                self._network.bring_up(link.ifindex)
        with self._kernel_errors(f"cannot read the state of '{name}'"):
            now = self._network.link(ifindex=link.ifindex)
            if now is None:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return now

    def _put_into_bridge(self, link: Link, bridge: str) -> None:
        what = f"cannot put '{link.name}' into bridge '{bridge}'"
        with self._kernel_errors(what):
            found = self._network.link(name=bridge)
        if found is None:
            raise self._refusal(
                f"{what}: there is no such interface; make it: ip link add {bridge} type bridge && "
                f"ip link set {bridge} up"
            )
        if found.kind != "bridge":
            raise self._refusal(
                f"{what}: that is no bridge of the kernel's; for another kind, Open vSwitch for "
                "one, name a program with script= in place of br="
            )
        if link.master != found.ifindex:
            advice = f"put it there beforehand: ip link set {link.name} master {bridge}"
            with self._kernel_errors(what, {errno.EPERM: advice}):
                self._network.set_master(link.ifindex, found.ifindex)

    def open_existing(self, found: Link) -> OpenTap:
        """Opens the interface `found`. What a program with more privileges left undone is no error: notes tell it."""
        what = f"cannot open TAP '{found.name}'"
        with contextlib.ExitStack() as undo:
            queues = self._open_queues(found.name, found, what)
            undo.callback(lambda: close_all(queues))
            link = self._link_of(queues[0], what)
            if link.ifindex != found.ifindex:
                # It was deleted just before, and the kernel made another one for us: closing it undoes that.
                raise KernelError(f"netdev '{self._wanted.id}': {what}: it was deleted once more", errno=errno.ENODEV)
            has_uso = self._configure(queues, link.name)
            try:
                link = self._set_up(link)
            except LocalmigError as error:
                _logger.warning("%s", error)
            tap = self._opened_here(queues, link, has_uso=has_uso)
            undo.pop_all()
            return tap

    def _open_device(self) -> int:
        advice = {
            errno.ENOENT: "load the kernel module: modprobe tun",
            errno.ENODEV: "load the kernel module: modprobe tun",
            errno.EACCES: "give this user access to it",
        }
        with self._kernel_errors(f"cannot open {tun.DEVICE}", advice):
            return tun.open_device()


def find(network: Network, queue: OwnedFd, name: str, ifindex: int = 0) -> Link | None:
    """The interface of a queue, which is called `name` and had that number, None where it is not in this network.

    An interface in another namespace may have the same name, number and address. Where the kernel does not tell a
    process without privileges which namespace it is, name and address decide.
    """
    if tun.namespace(queue.fileno()) not in (None, network.namespace):
        return None
    address = tun.hardware_address(queue.fileno())
    # By its number first: it may have been renamed since the name was told.
    link = network.link(ifindex=ifindex) if ifindex else None
    if link is None or link.address != address:
        link = network.link(name=name)
    return link if link is not None and link.address == address else None


@contextlib.contextmanager
def kernel_errors(
    id: str,  # noqa: A002 - the user's word
    what: str,
    advice: Mapping[int, str] | None = None,
) -> Iterator[None]:
    """Turns an OSError into a KernelError that says what failed, why, and what to do."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        hint = (advice or {}).get(number)
        reason = f"{error.strerror}; {hint}" if hint else f"{error.strerror}"
        raise KernelError(f"netdev '{id}': {what}: {reason}", errno=number) from error


def _open_advice(ifname: str, found: Link | None, wanted: Wanted) -> dict[int, str]:
    """What to do about each error of TUNSETIFF; `found` is what is called so already."""
    command = wanted.command_to_make(ifname)
    if found is None:
        forbidden = f"run with CAP_NET_ADMIN, or have it made beforehand: {command}"
    else:
        owner = "others" if found.owner is None else f"user {found.owner}"
        forbidden = f"it is for {owner}, and this is user {os.geteuid()}: ip link del {ifname} && {command}"
    wrong = ", or one made without multi_queue, which queues=2 and more need" if wanted.queue_count > 1 else ""
    return {
        errno.EBUSY: "another process has it open; stop that process or name another interface "
        f"(to find it: grep -lsw {ifname} /proc/[0-9]*/fdinfo/*)",
        errno.EPERM: forbidden,
        errno.EINVAL: f"an interface of that name exists and is no TAP{wrong}; look at it: ip -d link show {ifname}",
    }
