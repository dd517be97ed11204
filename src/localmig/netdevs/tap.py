"""The netdev `tap`: a TAP interface as the host side of a NIC, and how it moves to another process.

Owns:        a TAP's queues, MTU, vnet header, offloads, bridge and scripts; what became of its interface.
Never sees:  rings, vhost-user, options as text; an ioctl's number, a netlink message.
Read next:   device_api/ for when each method is called, tun.py and rtnetlink.py for what is asked of the kernel,
             network.py for when, dataplane/ for who reads and writes the frames.

What belongs to whom, which is what makes a handover delicate:

    the interface (name, MTU, up, bridge)   the machine's; unless persistent it vanishes with its last descriptor
    the open file description (O_NONBLOCK,  shared by source and destination during a handover: only the process
    queue attached or not), vnet header     that serves may set anything of it
    length, offloads, send buffer, carrier
    the descriptor (close-on-exec)          this process's

A TAP of several queues has an open file description for each. The kernel spreads what it sends over the attached ones:
a queue that nobody reads must be detached, or what is steered into it stays there. What waits in a queue is dropped
when it is detached.

The host does to an interface what it likes: it is renamed, brought down, moved to another network namespace, deleted
and made again. Which one is ours is known by its descriptor, never by a name. `look` finds out what became of it, and
is called when the kernel says that something changed, when the packet path finds its queue without an interface, when
this process begins to serve, and before an answer that depends on it. Once the interface is gone, the descriptors are
only kept as a place: everything that is set meanwhile is set again when an interface of that name can be attached.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from localmig.device_api import Netdev, Offload
from localmig.device_api.objects import BuildContext, ObjectType
from localmig.errors import KernelError, LocalmigError, PeerError, StateError
from localmig.fd_kind import interface_of, is_same_file
from localmig.fds import close_all
from localmig.limits import MTU_MAX, MTU_MIN
from localmig.netdevs import tun
from localmig.netdevs.info import SHOWN, TapInfo
from localmig.netdevs.network import Network, Networks, namespace_here
from localmig.netdevs.opened import OpenTap, Wanted
from localmig.netdevs.opening import Opener, find, kernel_errors
from localmig.netdevs.script import NO_SCRIPT, run_script
from localmig.netdevs.state import OFFLOADS, TAP, USO, VNET_HEADER_LENGTHS, TapDescriptors, TapState
from localmig.netdevs.tap_options import TapSpec

_logger = logging.getLogger(__name__)

_ETHERNET_HEADER_LENGTH: Final = 14
_VLAN_TAG_LENGTH: Final = 4

SEGMENTED_LENGTH_MAX: Final = 65536
"""Bytes of the longest packet that the kernel leaves to others to segment (GSO_LEGACY_MAX_SIZE in netdevice.h); virtio
1.2, section 5.1.6.3.1, counts with it too."""


class Tap(Netdev):
    """A TAP, closed until `open` opens it or `adopt_setup` receives it.

    Args:
        id: the user's name for it.
        ifname: the interface to open, created where it does not exist. None: the kernel chooses its name, or
            the source's TAP does on arrival.
        script: program to run once this process has opened the TAP, "no" for none. Not run for one that arrived.
        downscript: program to run before the TAP is closed for good, "no" for none. It moves with the TAP.
        mtu: what to give the interface, in bytes; None leaves it as it is.
        queues: how many the TAP has. Only the first is attached once it is open.
        fds: its open queues; this object owns them once `open` has succeeded.
        sndbuf: bytes a queue may have on their way into the network before it takes no more, 0 for no limit.
        bridge: the bridge to put the interface into, None leaves it where it is.
        guest_carrier: whether the interface has a carrier only while a driver serves the NIC.
        stays_home: tells why its descriptors do not move, None where they do.
        networks: the networks of all TAPs of a daemon.

    """

    setup = TAP

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the user's word
        ifname: str | None = None,
        script: str = NO_SCRIPT,
        downscript: str = NO_SCRIPT,
        mtu: int | None = None,
        queues: int = 1,
        fds: Sequence[int] = (),
        sndbuf: int = 0,
        bridge: str | None = None,
        guest_carrier: bool = False,
        stays_home: Callable[[], str | None] = lambda: None,
        networks: Networks | None = None,
    ) -> None:
        assert len(fds) in (0, queues), (queues, fds)
        self.id = id
        self._ifname = ifname
        self._script = script
        self._downscript = downscript
        self.queue_count = queues
        """How many queues it has, open or not."""
        self._wanted = Wanted(
            id=id,
            mtu=mtu,
            queue_count=queues,
            fds=tuple(fds),
            sndbuf=sndbuf,
            bridge=bridge,
            guest_carrier=guest_carrier,
        )
        self._stays_home = stays_home
        self._networks = networks or Networks()
        self.observer = None
        self.mtu_told = 0
        self._is_thawed = False
        self._open: OpenTap | None = None
        self._awaited: TapState | None = None
        """What to open once the source has let go of it."""
        self._changing: Callable[[], None] = _do_nothing
        """Called before anything changes that `save_setup` saves."""

    # -- for the device on the other side ------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether there is a TAP to read and write."""
        return self._open is not None

    @property
    def has_arrived(self) -> bool:
        """Whether it is open and came by a handover: the network knows already where the guest is."""
        return self._open is not None and self._open.arrived

    @property
    def is_fresh(self) -> bool:
        """Whether this process opened it, so that nothing in its queues waited for a guest of an earlier one."""
        return self._open is not None and not self._open.arrived and bool(self._open.ifname_opened)

    @property
    def has_program_to_run(self) -> bool:
        """Whether a script is still to come: the one for its opening, or the one for its end."""
        return (self._script if self._open is None else self._open.downscript) != NO_SCRIPT

    def fileno(self, queue: int = 0) -> int:
        """The descriptor of a queue, lent. StateError if the TAP is not open, as for all that follows."""
        return self._opened().queues[queue].fileno()

    def host(self, queue: int = 0) -> int:
        """As `fileno`."""
        return self.fileno(queue)

    @property
    def ifname(self) -> str:
        """The interface's name, as it was seen last."""
        return self._opened().ifname

    @property
    def mtu(self) -> int:
        """The interface's MTU in bytes, as it was seen last: `look` sees the present one."""
        return self._opened().mtu

    @property
    def is_gone(self) -> bool:
        """Whether the interface was deleted. What is set meanwhile reaches the one that is attached in its place."""
        return self._open is not None and self._open.is_gone

    @property
    def link_is_up(self) -> bool:
        """Whether frames can pass: the interface is there and up. One in another namespace counts as up."""
        return self._open is not None and self._open.link_is_up

    @property
    def frame_length_max(self) -> int:
        """Bytes of the longest frame the TAP delivers, without its vnet header, with a VLAN tag."""
        tap = self._opened()
        # Whatever it is that need not be segmented: its packets are longer than the MTU.
        segmented = SEGMENTED_LENGTH_MAX if tap.offloads & ~Offload.CSUM else 0
        return max(tap.mtu, segmented) + _ETHERNET_HEADER_LENGTH + _VLAN_TAG_LENGTH

    @property
    def has_uso(self) -> bool:
        """Whether UDP segmentation can be left to whoever is at its ends; the source's word while it is not open."""
        tap = self._open or self._awaited
        return tap is not None and tap.has_uso

    @property
    def vnet_header_length(self) -> int:
        """Bytes in front of each frame."""
        return self._opened().vnet_header_length

    def set_vnet_header_length(self, length: int) -> None:
        """Sets the bytes in front of each frame to 10 or 12. Only the process that serves may call this.

        Raises:
            KernelError: the TAP keeps the length it has.
        """
        assert length in VNET_HEADER_LENGTHS, length
        tap = self._opened()
        if length != tap.vnet_header_length:
            self._changing()
            with self._setting(tap, f"cannot set the vnet header of TAP '{tap.ifname}' to {length} bytes"):
                tun.set_vnet_header_length(tap.queues[0].fileno(), length)
            tap.vnet_header_length = length

    @property
    def offloads(self) -> Offload:
        """What whoever reads the frames takes over."""
        return self._opened().offloads

    def set_offloads(self, offloads: Offload) -> None:
        """Says what whoever reads the frames can take over. Only the process that serves may call this.

        Args:
            offloads: what else there is needs CSUM; USO4 and USO6 come together, and where `has_uso` is true.

        Raises:
            KernelError: the TAP keeps what it has.
        """
        assert Offload.CSUM in offloads or not offloads, offloads
        tap = self._opened()
        if offloads != tap.offloads:
            self._changing()
            with self._setting(tap, f"cannot set the offloads of TAP '{tap.ifname}' to {int(offloads):#x}"):
                tun.set_offloads(tap.queues[0].fileno(), offloads)
            tap.offloads = offloads

    def attach(self, queue: int) -> None:
        """Lets the kernel steer frames into a queue. Only the process that serves may call this. Idempotent.

        Raises:
            KernelError: the queue is detached still.
        """
        tap = self._opened()
        if not tap.attached[queue]:
            self._changing()
            with self._setting(tap, f"cannot attach queue {queue} of TAP '{tap.ifname}'"):
                tun.attach(tap.queues[queue].fileno())
            tap.attached[queue] = True

    def detach(self, queue: int) -> None:
        """Lets the kernel steer no more frames into a queue; those that wait in it are dropped. Otherwise as `attach`.

        Args:
            queue: any but the first: somebody must get what the network sends.
        """
        assert queue > 0, queue
        tap = self._opened()
        if tap.attached[queue]:
            self._changing()
            with self._setting(tap, f"cannot detach queue {queue} of TAP '{tap.ifname}'"):
                tun.detach(tap.queues[queue].fileno())
            tap.attached[queue] = False

    def driver_begins(self) -> None:
        """A driver serves the NIC: the interface has a carrier. Only the process that serves may call this.

        Raises:
            KernelError: the carrier is as it was.
        """
        self._let_carrier_be(on=True)

    def driver_ends(self) -> None:
        """No driver serves it: the interface has none, where the options say so. Otherwise as `driver_begins`."""
        self._let_carrier_be(on=not self._wanted.guest_carrier)

    def set_link(self, *, up: bool) -> None:
        """Brings the interface up or down. Only the process that serves may call this.

        Raises:
            StateError: the interface is not here.
            KernelError: the kernel refuses; the text says what to do.
        """
        self.look()
        tap, word = self._opened(), "up" if up else "down"
        if not tap.ifindex:
            raise StateError(f"netdev '{self.id}': '{tap.ifname}' is not here and cannot be brought {word}")
        advice = f"do it with CAP_NET_ADMIN: ip link set {tap.ifname} {word}"
        with kernel_errors(self.id, f"cannot bring '{tap.ifname}' {word}", {errno.EPERM: advice}):
            (tap.network.bring_up if up else tap.network.bring_down)(tap.ifindex)
        self.look()

    def inject(self, frame: bytes) -> None:
        """Sends one Ethernet frame into the network as if from the guest. Only for the process that serves.

        Raises:
            KernelError: the frame was not sent; EIO where the interface is down.
        """
        tap = self._opened()
        with self._setting(tap, f"cannot send a frame into TAP '{tap.ifname}'"):
            # All zero is a vnet header that asks for nothing: no checksum, no segmentation.
            os.writev(tap.queues[0].fileno(), [bytes(tap.vnet_header_length), frame])

    # -- what becomes of the interface ---------------------------------------------------------------------

    @property
    def ifindexes(self) -> tuple[int, ...]:
        """Numbers of the interface and of its bridge. See `network.Watcher`."""
        return () if self._open is None else (self._open.ifindex, self._open.bridge_ifindex)

    @property
    def awaited_name(self) -> str | None:
        """What the interface is called that would be ours if it came up in its network, None where none would."""
        tap = self._open
        if tap is None or tap.ifindex:
            return None
        return tap.ifname_opened if tap.is_gone else tap.ifname

    def look(self) -> bool:
        """Finds out what became of the interface, and attaches the one that was made again in its place.

        Only the process that serves may call this. What changed is told to the observer.

        Returns:
            Whether it is worth looking again although the kernel tells of no change.
        """
        tap = self._open
        if tap is None:
            return False
        before = tap.mtu, tap.link_is_up
        try:
            self._see(tap)
            # Not while frozen: the descriptors may be on their way to another process.
            again = tap.is_gone and self._is_thawed and self._attach_again(tap)
        except OSError as error:
            _logger.warning("netdev '%s': cannot see what became of '%s': %s", self.id, tap.ifname, error.strerror)
            again = True
        if self._open is not tap:
            return False
        if (tap.mtu, tap.link_is_up) != before:
            self._changing()
            if self.observer is not None:
                self.observer.interface_changed()
        return again

    def look_soon(self) -> None:
        """Has `look` called by the event loop, while this process serves."""
        if self._open is not None:
            self._open.network.look_soon(self)

    # -- serving -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Opens the TAP, configures it, puts it into the bridge, brings the interface up, runs the script.

        Raises:
            ConfigError: fd= is no TAP of ours, there is no such bridge, or the script failed. The TAP is closed.
            KernelError: the TAP cannot be opened or configured; the text says what to do. The TAP is closed.
        """
        assert self._open is None, self.id
        self._open = self._take_inherited() if self._wanted.fds else self._open_by_name(self._ifname or "")

    def resume(self) -> None:
        """Nothing: the device on the other side reads and writes the frames."""

    def stop(self) -> None:
        """Nothing, as `resume`."""

    def freeze(self) -> None:
        """What becomes of the interface is another process's to see."""
        self._is_thawed = False
        if self._open is not None:
            self._open.network.unwatch(self)

    def thaw(self) -> None:
        """Has a look at the interface soon, and at each change."""
        self._is_thawed = True
        if self._open is not None:
            self._open.network.watch(self)

    def close(self) -> None:
        """Runs the downscript, closes the TAP. A downscript that fails is logged."""
        if self._open is not None:
            try:
                run_script(self._open.downscript, self._present_name(self._open))
            except LocalmigError as error:
                _logger.warning("netdev '%s': %s", self.id, error)
        self.release()

    # -- to be seen ----------------------------------------------------------------------------------------

    def info(self) -> TapInfo:
        """The TAP as it is set, and its interface as it was seen last."""
        tap = self._open
        if tap is None:
            return TapInfo(id=self.id, is_open=False, queue_count=self.queue_count, attached_count=0)
        return TapInfo(
            id=self.id,
            is_open=True,
            queue_count=self.queue_count,
            attached_count=0 if tap.is_gone else sum(tap.attached),
            whereabouts=tap.whereabouts,
            ifname=tap.ifname,
            ifindex=tap.ifindex or None,
            mtu=tap.mtu,
            is_up=tap.is_up if tap.ifindex else None,
            bridge=tap.bridge or None,
            vnet_header_length=tap.vnet_header_length,
            offloads=tap.offloads,
            notes=tuple(self._notes(tap)),
        )

    # -- source --------------------------------------------------------------------------------------------

    def local_migration_blocker(self) -> str | None:
        """What it was told, and: a TAP that is not open cannot move."""
        return self._stays_home() or (None if self._open is not None else "its TAP is not open")

    def watch_setup(self, changing: Callable[[], None] | None) -> None:
        """As a part's: called before the device on the other side changes how the TAP is set."""
        self._changing = changing or _do_nothing

    @property
    def moves(self) -> bool:
        """Whether its descriptors do. See `network.Watcher`."""
        return self.local_migration_blocker() is None

    def save_setup(self, *, with_descriptors: bool) -> TapState:
        """The TAP as it is, or as it is awaited. StateError if it is not open, and not awaited."""
        if self._awaited is not None:
            return self._awaited
        tap = self._opened()
        descriptors = TapDescriptors(
            queues=tap.queues,
            attached=tuple(tap.attached),
            downscript=_absolute(tap.downscript),
            ifname_opened=tap.ifname_opened,
            mtu_opened=tap.mtu_opened,
            netlink=tap.network.fd if self._is_first_to_move(tap.network) else None,
            namespace=tap.network.namespace,
            ifindex=tap.ifindex,
            bridge=tap.bridge,
            is_up=tap.is_up,
            is_gone=tap.is_gone,
            has_carrier=tap.has_carrier,
        )
        return TapState(
            # It may have another name since it was seen last.
            ifname=interface_of(tap.queues[0].fileno()) or tap.ifname,
            mtu=tap.mtu,
            vnet_header_length=tap.vnet_header_length,
            offloads=int(tap.offloads),
            has_uso=tap.has_uso,
            descriptors=descriptors if with_descriptors else None,
        )

    def _is_first_to_move(self, network: Network) -> bool:
        """Whether none of the TAPs that move before this one brings its network's socket."""
        return next((user for user in network.users if user.moves), None) is self

    def release(self) -> None:
        """Closes this process's copy. The interface stays as long as another process has it open."""
        self._awaited = None
        if self._open is not None:
            self._open.network.leave(self)
            close_all(self._open.queues)
            self._open = None

    # -- destination ---------------------------------------------------------------------------------------

    def check_setup(self, state: TapState) -> None:
        """Raises PeerError where `state` is no TAP, or not the one this netdev was configured for."""
        if not state.ifname or "\0" in state.ifname:
            raise PeerError(f"netdev '{self.id}': {state.ifname!r} is no interface name")
        if not MTU_MIN <= state.mtu <= MTU_MAX:
            raise PeerError(f"netdev '{self.id}': MTU of {state.mtu} bytes, possible are {MTU_MIN} to {MTU_MAX}")
        if state.vnet_header_length not in VNET_HEADER_LENGTHS:
            raise PeerError(
                f"netdev '{self.id}': vnet header has {state.vnet_header_length} bytes, "
                f"possible are {' and '.join(map(str, VNET_HEADER_LENGTHS))}"
            )
        offloads = Offload(state.offloads)
        if (
            state.offloads & ~int(OFFLOADS)
            or (offloads and Offload.CSUM not in offloads)
            or (offloads & USO and not state.has_uso)
        ):
            raise PeerError(f"netdev '{self.id}': no TAP has offloads {state.offloads:#x} (USO: {state.has_uso})")
        if state.descriptors is not None:
            self._check_arriving(state, state.descriptors)

    def adopt_setup(self, state: TapState) -> None:
        """Takes the TAP out of `state`, or opens one of its own where none came. Again: what arrived is replaced.

        Raises:
            ConfigError: as `open`, for a TAP of its own.
            KernelError: the TAP of its own cannot be opened. One the source has open still is no error:
                `source_released` opens it.
        """
        if state.descriptors is not None:
            former, self._open = self._open, self._arrived(state, state.descriptors)
            if former is not None:
                close_all(former.queues)
                if former.network is not self._open.network:
                    former.network.leave(self)
            return
        if self._open is not None:
            return  # its own, which nothing has changed
        if self._wanted.fds:
            self._open = self._take_inherited()
            return
        ifname = self._ifname or state.ifname
        try:
            self._open = self._open_by_name(ifname)
        except KernelError as error:
            if error.errno != errno.EBUSY:
                raise
            self._awaited = replace(state, ifname=ifname)  # busy here, so it is the same machine's

    def recover(self) -> None:
        """Makes the TAP what this process knows of it: the process that died may have served, and changed it.

        What cannot be made so is logged: the guest is served all the same.
        """
        if (tap := self._open) is None:
            return
        first = tap.queues[0].fileno()
        try:
            with self._setting(tap, f"cannot bring TAP '{tap.ifname}' back to what it was"):
                tun.set_vnet_header_length(first, tap.vnet_header_length)
                tun.set_offloads(first, tap.offloads)
                for queue, attached in zip(tap.queues, tap.attached, strict=True):
                    if tun.is_attached(queue.fileno()) != attached:
                        (tun.attach if attached else tun.detach)(queue.fileno())
                with contextlib.suppress(OSError):  # a macvtap has none to turn
                    (tun.turn_carrier_on if tap.has_carrier else tun.turn_carrier_off)(first)
        except KernelError as error:
            _logger.warning("%s", error)

    def source_released(self) -> None:
        """Opens the interface that was the source's until now. Does nothing where none is awaited.

        Raises:
            ConfigError: the script failed; calling again tries again, as below.
            KernelError: it cannot be opened. EBUSY: the source has it open still; calling again tries again.
        """
        if self._awaited is not None:
            self._open = self._open_by_name(self._awaited.ifname)
            self._awaited = None
            if self._is_thawed:
                self._open.network.watch(self)

    def discard(self) -> None:
        """Closes what arrived without a side effect; undoes what this process opened itself."""
        if self._open is not None and not self._open.arrived:
            self.close()
        self.release()

    # -- inside --------------------------------------------------------------------------------------------

    def _opened(self) -> OpenTap:
        if self._open is None:
            raise StateError(f"netdev '{self.id}': its TAP is not open")
        return self._open

    def _check_arriving(self, state: TapState, descriptors: TapDescriptors) -> None:
        if len(descriptors.queues) != self.queue_count:
            raise PeerError(
                f"netdev '{self.id}' has queues={self.queue_count} here and {len(descriptors.queues)} there"
            )
        if len(descriptors.attached) != self.queue_count or not descriptors.attached[0]:
            raise PeerError(f"netdev '{self.id}': its {self.queue_count} queues cannot be attached as told")
        if "\0" in descriptors.ifname_opened:
            raise PeerError(f"netdev '{self.id}': {descriptors.ifname_opened!r} is no interface name")
        if descriptors.ifindex >= 2**31:
            raise PeerError(f"netdev '{self.id}': {descriptors.ifindex} is no interface's number")
        # As it was when it was opened: what the host did to it since is no reason not to go on.
        opened = descriptors.ifname_opened or state.ifname
        known = (("ifname", self._ifname, opened), ("mtu", self._wanted.mtu, descriptors.mtu_opened))
        for name, wanted, actual in known:
            if wanted is not None and wanted != actual:
                raise PeerError(f"netdev '{self.id}' has {name}={wanted} here and {actual} there")
        for number, queue in enumerate(descriptors.queues):
            ifname = interface_of(queue.fileno())
            if ifname is not None and ifname != state.ifname:
                raise PeerError(f"netdev '{self.id}': queue {number} is one of '{ifname}', not of '{state.ifname}'")
            for earlier, other in enumerate(descriptors.queues[:number]):
                if is_same_file(queue.fileno(), other.fileno()):
                    raise PeerError(f"netdev '{self.id}': queues {earlier} and {number} are one and the same")
        if descriptors.downscript != NO_SCRIPT and not Path(descriptors.downscript).is_absolute():
            raise PeerError(f"netdev '{self.id}': downscript '{descriptors.downscript}' is no absolute path")

    def _opener(self, network: Network) -> Opener:
        return Opener(self._wanted, network)

    def _notes(self, tap: OpenTap) -> Iterator[str]:
        """What is so and should perhaps not be."""
        return tap.notes(self._wanted, mtu_told=self.mtu_told)

    def _open_by_name(self, ifname: str) -> OpenTap:
        """Opens the TAP and runs the script; an empty name lets the kernel choose one."""
        with self._in_network_here() as network:
            tap = self._opener(network).open_anew(ifname)
            tap.downscript = self._downscript
            try:
                run_script(self._script, tap.ifname)
            except LocalmigError:
                close_all(tap.queues)
                raise
            return tap

    def _take_inherited(self) -> OpenTap:
        with self._in_network_here() as network:
            tap = self._opener(network).take_inherited()
            tap.downscript = self._downscript
            return tap

    @contextlib.contextmanager
    def _in_network_here(self) -> Iterator[Network]:
        """This process's network, which is left again if the TAP cannot be opened."""
        network = self._networks.here(self)
        try:
            yield network
        except BaseException:
            network.leave(self)
            raise

    def _arrived(self, state: TapState, descriptors: TapDescriptors) -> OpenTap:
        """One that came by a handover: nothing of it is touched."""
        known = self._networks.adopt(descriptors.netlink, descriptors.namespace, self)
        network = known or self._networks.here(self)
        knows_it = known is not None and not descriptors.is_gone
        return OpenTap(
            queues=tuple(queue.take() for queue in descriptors.queues),
            attached=list(descriptors.attached),
            vnet_header_length=state.vnet_header_length,
            offloads=Offload(state.offloads),
            has_uso=state.has_uso,
            downscript=descriptors.downscript if self._downscript == NO_SCRIPT else self._downscript,
            arrived=True,
            ifname_opened=descriptors.ifname_opened,
            mtu_opened=descriptors.mtu_opened,
            network=network,
            ifname=state.ifname,
            ifindex=descriptors.ifindex if knows_it else 0,
            mtu=state.mtu,
            is_up=descriptors.is_up,
            has_carrier=descriptors.has_carrier,
            bridge=descriptors.bridge,
            is_gone=descriptors.is_gone,
        )

    # -- the interface, after it was opened ----------------------------------------------------------------

    def _see(self, tap: OpenTap) -> None:
        """Notes what the interface is now. Raises OSError where the kernel does not say."""
        known = set(self._notes(tap))
        found = tun.interface(tap.queues[0].fileno())
        tap.is_gone = found is None
        if found is None:
            tap.ifindex, tap.bridge_ifindex, tap.bridge = 0, 0, ""
        else:
            tap.see(found[0], find(tap.network, tap.queues[0], found[0], tap.ifindex))
        for note in self._notes(tap):
            if note not in known:
                _logger.warning("netdev '%s': %s", self.id, note)

    def _attach_again(self, tap: OpenTap) -> bool:
        """Attaches what is called now as the interface that is gone was when it was opened; creates nothing.

        Returns whether to try again later. Raises OSError where the kernel does not say what there is.
        """
        if not tap.ifname_opened:
            return False
        found = tap.network.link(name=tap.ifname_opened)
        if found is None:
            tap.refusal = ""
            return False
        if tap.network.namespace != namespace_here():
            tap.refusal = "it is in another network namespace than this daemon; hand over to one that is started there"
            return False
        try:
            fresh = self._opener(tap.network).open_existing(found)
        except LocalmigError as error:
            if str(error) != tap.refusal:
                tap.refusal = str(error)
                _logger.warning("%s", error)
            # Nobody tells when the other process closes it, which may be the program that makes it.
            return isinstance(error, KernelError) and error.errno in (errno.EBUSY, errno.ENODEV)
        fresh.downscript, fresh.arrived = tap.downscript, tap.arrived
        self._changing()
        self._open = fresh
        _logger.warning("netdev '%s': '%s' was made again and is attached", self.id, fresh.ifname)
        if self.observer is not None:
            self.observer.queues_changed()
            self.observer.interface_changed()
        close_all(tap.queues)
        return False

    def _present_name(self, tap: OpenTap) -> str:
        """What the interface is called now; the last name where it is gone."""
        with contextlib.suppress(OSError):
            if (found := tun.interface(tap.queues[0].fileno())) is not None:
                return found[0]
        return tap.ifname

    def _let_carrier_be(self, *, on: bool) -> None:
        tap = self._opened()
        if tap.has_carrier != on:
            self._changing()
            with self._setting(tap, f"cannot turn the carrier of TAP '{tap.ifname}' {'on' if on else 'off'}"):
                (tun.turn_carrier_on if on else tun.turn_carrier_off)(tap.queues[0].fileno())
            tap.has_carrier = on

    @contextlib.contextmanager
    def _setting(self, tap: OpenTap, what: str) -> Iterator[None]:
        """As `kernel_errors`, for what is done to an open TAP: where its interface is gone there is nothing to do."""
        try:
            with kernel_errors(self.id, what):
                yield
        except KernelError:
            if not _is_deleted(tap):
                raise
            self.look_soon()


def _do_nothing() -> None:
    """Nobody wants to know of changes."""


def _is_deleted(tap: OpenTap) -> bool:
    with contextlib.suppress(OSError):
        return tun.interface(tap.queues[0].fileno()) is None
    return False


def _absolute(script: str) -> str:
    """A script's path as it reads from any working directory."""
    return script if script == NO_SCRIPT else str(Path(script).absolute())


def _build(spec: TapSpec, context: BuildContext) -> Tap:
    return Tap(
        id=spec.id,
        ifname=spec.ifname,
        script=spec.script,
        downscript=spec.downscript,
        mtu=spec.mtu,
        queues=spec.queues,
        fds=[context.descriptor(each) for each in spec.descriptors],
        sndbuf=spec.sndbuf,
        bridge=spec.br,
        guest_carrier=spec.guest_carrier,
        stays_home=context.stays_home,
        networks=context.shared(Networks),
    )


OBJECT: Final = ObjectType(spec=TapSpec, build=_build, info=SHOWN, opens_with_privileges=True)
