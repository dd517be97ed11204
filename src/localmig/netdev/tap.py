"""The netdev `tap`: a TAP interface as the host side of a NIC, and how it moves to another process.

Owns:        /dev/net/tun, which no other file opens; a TAP's queues, MTU, vnet header, offloads and scripts.
Never sees:  rings, vhost-user, options as text.
Read next:   device_api/ for when each method is called, dataplane/ for who reads and writes the frames.

What belongs to whom, which is what makes a handover delicate:

    the interface (name, MTU, up)           the machine's; unless persistent it vanishes with its last descriptor
    the open file description (O_NONBLOCK,  shared by source and destination during a handover: only the process
    queue attached or not), vnet header     that serves may set anything of it
    length, offloads, send buffer
    the descriptor (close-on-exec)          this process's

A TAP of several queues has an open file description for each. The kernel spreads what it sends over the attached ones:
a queue that nobody reads must be detached, or what is steered into it stays there. What waits in a queue is dropped
when it is detached.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from localmig.errors import ConfigError, KernelError, LocalmigError, PeerError, StateError
from localmig.fd_kind import FdKind, interface_of, is_same_file
from localmig.fds import OwnedFd, close_all
from localmig.netdev.interface import (
    Interface,
    hardware_address,
    open_queue_count,
    pack_request,
    unpack_request,
)
from localmig.netdev.script import NO_SCRIPT, run_script
from localmig.vmstate import Description, array, boolean, fd, optional, text, u8, u16
from localmig.vmstate import struct as nested

_logger = logging.getLogger(__name__)

_DEVICE: Final = "/dev/net/tun"

# linux/if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNGETIFF: Final = 0x800454D2
_TUNSETSNDBUF: Final = 0x400454D4
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETQUEUE: Final = 0x400454D9
_TUNSETVNETLE: Final = 0x400454DC
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_ATTACH_QUEUE: Final = 0x0200
_IFF_DETACH_QUEUE: Final = 0x0400
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000


class Offload(IntFlag):
    """What whoever reads a TAP can take over from the kernel (TUN_F_…, linux/if_tun.h)."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    USO4 = 0x20
    USO6 = 0x40


OFFLOADS: Final = Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.TSO_ECN | Offload.USO4 | Offload.USO6
_USO: Final = Offload.USO4 | Offload.USO6
"""The kernel takes these two together or not at all, and not before Linux 6.2."""

VNET_HEADER_LENGTHS: Final = (10, 12)
"""The virtio-net header without and with `num_buffers`: VERSION_1 and mergeable buffers bring it."""

_ETHERNET_HEADER_LENGTH: Final = 14
_VLAN_TAG_LENGTH: Final = 4

MTU_MIN: Final = 68
MTU_MAX: Final = 65521
"""What the kernel lets a TAP have (MIN_MTU, MAX_MTU in drivers/net/tun.c, less the Ethernet header)."""

QUEUE_COUNT_MAX: Final = 256
"""Queues the kernel lets a TAP have (MAX_TAP_QUEUES in drivers/net/tun.c)."""

SEGMENTED_LENGTH_MAX: Final = 65536
"""Bytes of the longest packet that the kernel leaves to others to segment (GSO_LEGACY_MAX_SIZE in netdevice.h); virtio
1.2, section 5.1.6.3.1, counts with it too."""

SNDBUF_MAX: Final = 2**31 - 1
"""An int of the kernel's; no packet is ever held back by it."""

_NAME_BYTES_MAX: Final = 15
"""IFNAMSIZ is 16, and the last byte is NUL (linux/if.h)."""

_PATH_BYTES_MAX: Final = 4095
"""PATH_MAX is 4096, and the last byte is NUL (linux/limits.h)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TapDescriptors:
    """What comes with a TAP only where the TAP itself moves.

    The downscript is here because the process that serves last must run it. A program's name from another
    process is believed only beside descriptors: who passes those was let in by the migration socket's mode.
    """

    queues: tuple[OwnedFd, ...]
    attached: tuple[bool, ...]
    downscript: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TapState:
    """A TAP as it travels: untrusted until `Tap.check_setup`."""

    ifname: str
    mtu: int
    vnet_header_length: int
    offloads: int
    has_uso: bool
    descriptors: TapDescriptors | None


TAP_DESCRIPTORS: Final = Description(
    name="tap-descriptors",
    version=1,
    oldest_version=1,
    state=TapDescriptors,
    fields=(
        array("queues", partial(fd, kind=FdKind.TAP), count_max=QUEUE_COUNT_MAX),
        array("attached", boolean, count_max=QUEUE_COUNT_MAX),
        text("downscript", size_max=_PATH_BYTES_MAX),
    ),
)

TAP: Final = Description(
    name="tap",
    version=1,
    oldest_version=1,
    state=TapState,
    fields=(
        text("ifname", size_max=_NAME_BYTES_MAX),
        u16("mtu"),
        u16("vnet_header_length"),
        u8("offloads"),
        boolean("has_uso"),
        optional(nested("descriptors", TAP_DESCRIPTORS)),
    ),
)


@dataclass(kw_only=True, slots=True)
class _OpenTap:
    """What exists only while the TAP is open. `arrived`: by a handover; else this process opened it."""

    queues: tuple[OwnedFd, ...]
    attached: list[bool]
    ifname: str
    mtu: int
    vnet_header_length: int
    offloads: Offload
    has_uso: bool
    downscript: str
    arrived: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TapInfo:
    """What there is to see of a TAP, for people and programs that ask.

    Attributes:
        id: the user's name for it.
        is_open: whether this process has it.
        queue_count: queues it has, open or not.
        attached_count: those that the kernel steers frames into.
        ifname: the interface's name, None where it is not open, as for all that follows.
        mtu: in bytes, as it was when the TAP was opened.
        vnet_header_length: bytes in front of each frame.
        offloads: what whoever reads the frames takes over.
    """

    type_name: ClassVar[str] = "tap"

    id: str
    is_open: bool
    queue_count: int
    attached_count: int
    ifname: str | None = None
    mtu: int | None = None
    vnet_header_length: int | None = None
    offloads: Offload = Offload(0)  # noqa: RUF009 - a number


class Tap:
    """A TAP, closed until `open` opens it or `adopt_setup` receives it.

    It has the methods of `device_api.Part`, which this layer cannot name.

    Args:
        id: the user's name for it.
        ifname: the interface to open, created where it does not exist. None: the kernel chooses its name, or
            the source's TAP does on arrival.
        script: program to run once this process has opened the TAP, "no" for none. Not run for one that arrived.
        downscript: program to run before the TAP is closed for good, "no" for none. It moves with the TAP.
        mtu: what to give the interface, in bytes; None leaves it as it is.
        queues: how many the TAP has. Only the first is attached once it is open.
        fds: its open queues, inherited from the parent process; this object owns them from `open` on.
        sndbuf: bytes a queue may have on their way into the network before it takes no more, 0 for no limit.
        stays_home: why its descriptors do not move, None where they do.
    """

    setup: ClassVar[Description[Any]] = TAP
    switchover: ClassVar[Description[Any] | None] = None

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
        stays_home: str | None = None,
    ) -> None:
        assert len(fds) in (0, queues), (queues, fds)
        self.id = id
        self._ifname = ifname
        self._script = script
        self._downscript = downscript
        self._mtu = mtu
        self.queue_count = queues
        """How many queues it has, open or not."""
        self._inherited_fds = tuple(fds)
        self._sndbuf = sndbuf
        self._stays_home = stays_home
        self._open: _OpenTap | None = None
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
    def has_program_to_run(self) -> bool:
        """Whether a script is still to come: the one for its opening, or the one for its end."""
        return (self._script if self._open is None else self._open.downscript) != NO_SCRIPT

    def fileno(self, queue: int = 0) -> int:
        """The descriptor of a queue, lent. StateError if the TAP is not open, as for all that follows."""
        return self._opened().queues[queue].fileno()

    @property
    def ifname(self) -> str:
        """The interface's name."""
        return self._opened().ifname

    @property
    def mtu(self) -> int:
        """The interface's MTU in bytes, as it was when the TAP was opened."""
        return self._opened().mtu

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
            with self._kernel_errors(f"cannot set the vnet header of TAP '{tap.ifname}' to {length} bytes"):
                _set_int(tap.queues[0], _TUNSETVNETHDRSZ, length)
            tap.vnet_header_length = length

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
            with self._kernel_errors(f"cannot set the offloads of TAP '{tap.ifname}' to {int(offloads):#x}"):
                fcntl.ioctl(tap.queues[0].fileno(), _TUNSETOFFLOAD, int(offloads))
            tap.offloads = offloads

    def attach(self, queue: int) -> None:
        """Lets the kernel steer frames into a queue. Only the process that serves may call this. Idempotent.

        Raises:
            KernelError: the queue is detached still.
        """
        tap = self._opened()
        if not tap.attached[queue]:
            self._changing()
            with self._kernel_errors(f"cannot attach queue {queue} of TAP '{tap.ifname}'"):
                _set_queue(tap.queues[queue], _IFF_ATTACH_QUEUE)
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
            with self._kernel_errors(f"cannot detach queue {queue} of TAP '{tap.ifname}'"):
                _set_queue(tap.queues[queue], _IFF_DETACH_QUEUE)
            tap.attached[queue] = False

    def inject(self, frame: bytes) -> None:
        """Sends one Ethernet frame into the network as if from the guest. Only for the process that serves.

        Raises:
            KernelError: the frame was not sent; EIO where the interface is down.
        """
        tap = self._opened()
        with self._kernel_errors(f"cannot send a frame into TAP '{tap.ifname}'"):
            # All zero is a vnet header that asks for nothing: no checksum, no segmentation.
            os.writev(tap.queues[0].fileno(), [bytes(tap.vnet_header_length), frame])

    # -- serving -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Opens the TAP, configures it, brings the interface up, runs the script.

        Raises:
            ConfigError: fd= is no TAP of ours, or the script failed. The TAP is closed.
            KernelError: the TAP cannot be opened or configured; the text says what to do. The TAP is closed.
        """
        assert self._open is None, self.id
        self._open = self._take_inherited() if self._inherited_fds else self._open_by_name(self._ifname or "")

    def resume(self) -> None:
        """Nothing: the device on the other side reads and writes the frames."""

    def stop(self) -> None:
        """Nothing, as `resume`."""

    def freeze(self) -> None:
        """Nothing: a TAP has no control plane."""

    def thaw(self) -> None:
        """Nothing, as `freeze`."""

    def close(self) -> None:
        """Runs the downscript, closes the TAP. A downscript that fails is logged."""
        if self._open is not None:
            try:
                run_script(self._open.downscript, self._open.ifname)
            except LocalmigError as error:
                _logger.warning("netdev '%s': %s", self.id, error)
        self.release()

    # -- to be seen ----------------------------------------------------------------------------------------

    def info(self) -> TapInfo:
        """The TAP as it is set. The kernel is not asked."""
        tap = self._open
        if tap is None:
            return TapInfo(id=self.id, is_open=False, queue_count=self.queue_count, attached_count=0)
        return TapInfo(
            id=self.id,
            is_open=True,
            queue_count=self.queue_count,
            attached_count=sum(tap.attached),
            ifname=tap.ifname,
            mtu=tap.mtu,
            vnet_header_length=tap.vnet_header_length,
            offloads=tap.offloads,
        )

    # -- source --------------------------------------------------------------------------------------------

    def local_migration_blocker(self) -> str | None:
        """What it was told, and: a TAP that is not open cannot move."""
        return self._stays_home or (None if self._open is not None else "its TAP is not open")

    def watch_setup(self, changing: Callable[[], None] | None) -> None:
        """As a part's: called before the device on the other side changes how the TAP is set."""
        self._changing = changing or _do_nothing

    def frontend_waits(self) -> bool:
        """Never: a TAP has no frontend."""
        return False

    def save_setup(self, *, with_descriptors: bool) -> TapState:
        """The TAP as it is, or as it is awaited. StateError if it is not open, and not awaited."""
        if self._awaited is not None:
            return self._awaited
        tap = self._opened()
        descriptors = TapDescriptors(
            queues=tap.queues, attached=tuple(tap.attached), downscript=_absolute(tap.downscript)
        )
        return TapState(
            # It may have another name since it was opened.
            ifname=interface_of(tap.queues[0].fileno()) or tap.ifname,
            mtu=tap.mtu,
            vnet_header_length=tap.vnet_header_length,
            offloads=int(tap.offloads),
            has_uso=tap.has_uso,
            descriptors=descriptors if with_descriptors else None,
        )

    def save_switchover(self) -> Any:
        """Never called: nothing of a TAP travels inside the downtime."""
        raise NotImplementedError

    def release(self) -> None:
        """Closes this process's copy. The interface stays as long as another process has it open."""
        self._awaited = None
        if self._open is not None:
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
            offloads & ~OFFLOADS
            or (offloads and Offload.CSUM not in offloads)
            or (offloads & _USO and not state.has_uso)
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
            if self._open is not None:
                close_all(self._open.queues)
            self._open = _OpenTap(
                queues=tuple(queue.take() for queue in state.descriptors.queues),
                attached=list(state.descriptors.attached),
                ifname=state.ifname,
                mtu=state.mtu,
                vnet_header_length=state.vnet_header_length,
                offloads=Offload(state.offloads),
                has_uso=state.has_uso,
                downscript=state.descriptors.downscript if self._downscript == NO_SCRIPT else self._downscript,
                arrived=True,
            )
            return
        if self._open is not None:
            return  # its own, which no frontend has changed
        if self._inherited_fds:
            self._open = self._take_inherited()
            return
        ifname = self._ifname or state.ifname
        try:
            self._open = self._open_by_name(ifname)
        except KernelError as error:
            if error.errno != errno.EBUSY:
                raise
            self._awaited = replace(state, ifname=ifname)  # busy here, so it is the same machine's

    def check_switchover(self, state: Any) -> None:
        """Never called, as `save_switchover`."""
        raise NotImplementedError

    def adopt_switchover(self, state: Any | None) -> None:
        """Nothing, as `save_switchover`."""

    def recover(self) -> None:
        """Makes the TAP what this process knows of it: the process that died may have served, and changed it.

        What cannot be made so is logged: the guest is served all the same.
        """
        if (tap := self._open) is None:
            return
        try:
            with self._kernel_errors(f"cannot bring TAP '{tap.ifname}' back to what it was"):
                _set_int(tap.queues[0], _TUNSETVNETHDRSZ, tap.vnet_header_length)
                fcntl.ioctl(tap.queues[0].fileno(), _TUNSETOFFLOAD, int(tap.offloads))
                for queue, attached in zip(tap.queues, tap.attached, strict=True):
                    if _is_attached(queue) != attached:
                        _set_queue(queue, _IFF_ATTACH_QUEUE if attached else _IFF_DETACH_QUEUE)
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

    def discard(self) -> None:
        """Closes what arrived without a side effect; undoes what this process opened itself."""
        if self._open is not None and not self._open.arrived:
            self.close()
        self.release()

    # -- inside --------------------------------------------------------------------------------------------

    def _opened(self) -> _OpenTap:
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
        for wanted, name, actual in ((self._ifname, "ifname", state.ifname), (self._mtu, "mtu", state.mtu)):
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

    def _open_by_name(self, ifname: str) -> _OpenTap:
        """Opens the TAP, configures it and runs the script; an empty name lets the kernel choose one."""
        with contextlib.ExitStack() as undo:
            queues: list[OwnedFd] = []
            undo.callback(lambda: close_all(queues))
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            what, advice = f"cannot open TAP '{ifname or '(any name)'}'", _open_advice(ifname, self.queue_count)
            if self.queue_count > 1:
                flags |= _IFF_MULTI_QUEUE
                with self._kernel_errors(what, advice):
                    # The kernel would add our queues to another process's, and take packets away from it.
                    if ifname and open_queue_count(ifname):
                        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            for _ in range(self.queue_count):
                queues.append(OwnedFd(self._open_device()))
                with self._kernel_errors(what, advice):
                    answer = fcntl.ioctl(queues[-1].fileno(), _TUNSETIFF, pack_request(ifname, struct.pack("H", flags)))
                ifname, _ = unpack_request(answer)
            has_uso = self._configure(queues, ifname)
            with Interface(ifname) as interface:
                mtu = self._set_up(interface)
            run_script(self._script, ifname)
            undo.pop_all()
            return self._open_tap(queues, ifname, mtu, has_uso=has_uso)

    def _take_inherited(self) -> _OpenTap:
        """Checks and configures fd= or fds=, whose interface may be in another namespace."""
        ifname = self._check_inherited()
        with contextlib.ExitStack() as undo:
            queues = [OwnedFd(number) for number in self._inherited_fds]
            undo.callback(lambda: close_all(queues))
            for queue in queues:
                os.set_inheritable(queue.fileno(), False)
                os.set_blocking(queue.fileno(), False)
            self._attach_inherited(queues, ifname)
            has_uso = self._configure(queues, ifname)
            with Interface(ifname) as interface:
                if _is_same(interface, queues[0]):
                    mtu = self._set_up(interface)
                elif self._mtu is not None:
                    mtu = self._mtu
                else:
                    raise ConfigError(
                        f"netdev '{self.id}': the interface of fd={queues[0].fileno()} ('{ifname}') is in another "
                        "network namespace, so its MTU cannot be read; say it with mtu="
                    )
            undo.pop_all()
            return self._open_tap(queues, ifname, mtu, has_uso=has_uso)

    def _check_inherited(self) -> str:
        """The interface's name. ConfigError if a descriptor is no TAP of ours, or they are of several; all are left."""
        first: tuple[int, str, bytes] | None = None
        for number in self._inherited_fds:
            try:
                answer = fcntl.ioctl(number, _TUNGETIFF, pack_request(""))
            except OSError as error:
                what = "is not open" if error.errno == errno.EBADF else "is no TAP"
                raise ConfigError(f"netdev '{self.id}': fd={number} {what}") from error
            ifname, value = unpack_request(answer)
            (flags,) = struct.unpack_from("H", value)
            wanted = [(_IFF_TAP, "IFF_TAP"), (_IFF_NO_PI, "IFF_NO_PI"), (_IFF_VNET_HDR, "IFF_VNET_HDR")]
            if len(self._inherited_fds) > 1:
                wanted.append((_IFF_MULTI_QUEUE, "IFF_MULTI_QUEUE"))
            for flag, name in wanted:
                if not flags & flag:
                    raise ConfigError(f"netdev '{self.id}': fd={number} ('{ifname}') was opened without {name}")
            found = (number, ifname, hardware_address(number, ifname))
            if (first := first or found)[1:] != found[1:]:
                raise ConfigError(
                    f"netdev '{self.id}': fd={first[0]} ('{first[1]}') and fd={number} ('{ifname}') are queues of two "
                    "interfaces"
                )
        assert first is not None, self.id
        return first[1]

    def _attach_inherited(self, queues: Sequence[OwnedFd], ifname: str) -> None:
        """Attaches all of them, whatever the parent did; ConfigError where two descriptors are one queue."""
        with self._kernel_errors(f"cannot configure TAP '{ifname}'"):
            for queue in queues:
                if not _is_attached(queue):
                    _set_queue(queue, _IFF_ATTACH_QUEUE)
            for number, queue in enumerate(queues[1:], 1):
                # Detached to see which others are detached by it.
                _set_queue(queue, _IFF_DETACH_QUEUE)
                for other in (*queues[:number], *queues[number + 1 :]):
                    if not _is_attached(other):
                        raise ConfigError(
                            f"netdev '{self.id}': fd={other.fileno()} and fd={queue.fileno()} "
                            f"are one queue of '{ifname}'"
                        )
                _set_queue(queue, _IFF_ATTACH_QUEUE)

    def _configure(self, queues: Sequence[OwnedFd], ifname: str) -> bool:
        """Sets what another user may have left otherwise: a little-endian header of 12 bytes, no offloads, one queue.

        Returns whether the TAP knows USO.
        """
        first = queues[0].fileno()
        with self._kernel_errors(f"cannot configure TAP '{ifname}'"):
            _set_int(queues[0], _TUNSETVNETHDRSZ, max(VNET_HEADER_LENGTHS))
            _set_int(queues[0], _TUNSETVNETLE, 1)
            # Of every attached queue, so before they are detached.
            _set_int(queues[0], _TUNSETSNDBUF, self._sndbuf or SNDBUF_MAX)
            try:
                fcntl.ioctl(first, _TUNSETOFFLOAD, int(Offload.CSUM | _USO))
                has_uso = True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                has_uso = False
            # No offloads yet: no guest has said that it bears frames without checksum, or longer than the MTU.
            fcntl.ioctl(first, _TUNSETOFFLOAD, 0)
            for queue in queues[1:]:
                _set_queue(queue, _IFF_DETACH_QUEUE)
        return has_uso

    def _open_tap(self, queues: Sequence[OwnedFd], ifname: str, mtu: int, *, has_uso: bool) -> _OpenTap:
        return _OpenTap(
            queues=tuple(queues),
            attached=[queue is queues[0] for queue in queues],
            ifname=ifname,
            mtu=mtu,
            vnet_header_length=max(VNET_HEADER_LENGTHS),
            offloads=Offload(0),
            has_uso=has_uso,
            downscript=self._downscript,
            arrived=False,
        )

    def _set_up(self, interface: Interface) -> int:
        """Gives the interface its MTU and brings it up; what is so already needs no privilege. Returns the MTU."""
        name = interface.name
        with self._kernel_errors(f"cannot read the state of '{name}'"):
            mtu = interface.mtu()
            is_up = interface.is_up()
        if self._mtu is not None and self._mtu != mtu:
            advice = f"set it beforehand: ip link set {name} mtu {self._mtu}"
            with self._kernel_errors(f"cannot set the MTU of '{name}' to {self._mtu}", {errno.EPERM: advice}):
                interface.set_mtu(self._mtu)
            mtu = self._mtu
        if not is_up:
            advice = f"bring it up beforehand: ip link set {name} up"
            with self._kernel_errors(f"cannot bring '{name}' up", {errno.EPERM: advice}):
                interface.bring_up()
        return mtu

    def _open_device(self) -> int:
        advice = {
            errno.ENOENT: "load the kernel module: modprobe tun",
            errno.ENODEV: "load the kernel module: modprobe tun",
            errno.EACCES: "give this user access to it",
        }
        with self._kernel_errors(f"cannot open {_DEVICE}", advice):
            return os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    @contextlib.contextmanager
    def _kernel_errors(self, what: str, advice: Mapping[int, str] | None = None) -> Iterator[None]:
        """Turns an OSError into a KernelError that says what failed, why, and what to do."""
        try:
            yield
        except OSError as error:
            number = error.errno or 0
            hint = (advice or {}).get(number)
            reason = f"{error.strerror}; {hint}" if hint else f"{error.strerror}"
            raise KernelError(f"netdev '{self.id}': {what}: {reason}", errno=number) from error


def _do_nothing() -> None:
    """Nobody wants to know of changes."""


def _set_int(queue: OwnedFd, request: int, value: int) -> None:
    fcntl.ioctl(queue.fileno(), request, struct.pack("i", value))


def _set_queue(queue: OwnedFd, flag: int) -> None:
    fcntl.ioctl(queue.fileno(), _TUNSETQUEUE, pack_request("", struct.pack("H", flag)))


def _is_attached(queue: OwnedFd) -> bool:
    _, value = unpack_request(fcntl.ioctl(queue.fileno(), _TUNGETIFF, pack_request("")))
    (flags,) = struct.unpack_from("H", value)
    return not flags & _IFF_DETACH_QUEUE


def _absolute(script: str) -> str:
    """A script's path as it reads from any working directory."""
    return script if script == NO_SCRIPT else str(Path(script).absolute())


def _is_same(interface: Interface, queue: OwnedFd) -> bool:
    """Whether the interface of that name in this namespace is the one behind `queue`."""
    try:
        return interface.hardware_address() == hardware_address(queue.fileno(), interface.name)
    except OSError:
        return False


def _open_advice(ifname: str, queue_count: int) -> dict[int, str]:
    """What to do about each error of TUNSETIFF."""
    made = " multi_queue" if queue_count > 1 else ""
    wrong = "without multi_queue, which queues=2 and more need" if queue_count > 1 else "with multi_queue"
    return {
        errno.EBUSY: "another process has it open; stop that process or name another interface "
        f"(to find it: grep -lsw {ifname} /proc/[0-9]*/fdinfo/*)",
        errno.EPERM: "run with CAP_NET_ADMIN, or have it made beforehand: "
        f"ip tuntap add dev {ifname or 'NAME'} mode tap vnet_hdr{made} user {os.geteuid()}",
        errno.EINVAL: f"an interface of that name exists and is no TAP, or one made {wrong}; "
        f"look at it: ip -d link show {ifname}",
    }
