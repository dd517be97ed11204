"""The host side of a NIC as the NIC sees it: where frames come from and go to, and what may be set of it.

Owns:        Netdev, NetdevObserver; Offload, a word between the two sides of a NIC.
Never sees:  a TAP, a socket, a ring.
Read next:   part.py for the rest of a netdev's life; netdevs/tap.py for a whole example.
"""

from __future__ import annotations

from abc import abstractmethod
from enum import IntFlag
from typing import ClassVar, Protocol

from localmig.dataplane import FrameStream
from localmig.device_api.part import Part
from localmig.errors import StateError


class Offload(IntFlag):
    """What whoever reads a netdev's frames can take over from whoever writes them: the kernel's TUN_F_… bits."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    USO4 = 0x20
    USO6 = 0x40


class NetdevObserver(Protocol):
    """Who reads and writes a netdev's frames."""

    def interface_changed(self) -> None:
        """The MTU or the link is another one."""

    def queues_changed(self) -> None:
        """The queues have other descriptors, with everything as after `open`; the old ones are open until this ends."""


class Netdev(Part, Protocol):
    """The host side of a NIC. What follows `host` may be asked only while it is open, else StateError.

    What is set may be set only by the process that serves. A netdev that has no such thing keeps what stands here.

    Attributes:
        has_offloads: whether checksums and segmentation can be left to whoever is at its ends.
        queue_count: how many queues it has, open or not: a queue pair of the NIC for each.
        observer: who reads and writes the frames, None where nobody does.
        mac_told: the guest's Ethernet address, empty where it is not known; for a note.
        mtu_told: the MTU that the guest uses, in bytes, 0 where it is not known; for a note.
        was_left: whether a NIC of this daemon was deleted that had it: what waits in its queues is for no other one.
    """

    has_offloads: ClassVar[bool] = True
    queue_count: int
    observer: NetdevObserver | None = None
    mac_told: bytes = b""
    mtu_told: int = 0
    was_left: bool = False

    # -- at any time --------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether there is something to read and write."""

    @property
    def has_arrived(self) -> bool:
        """Whether it is open and came by a handover: the network knows already where the guest is."""
        return False

    @property
    def is_fresh(self) -> bool:
        """Whether nothing in its queues can be for a guest of an earlier process: this one made it."""
        return False

    @property
    def is_gone(self) -> bool:
        """Whether what it leads to is gone for now. What is set meanwhile reaches what comes in its place."""
        return False

    @property
    @abstractmethod
    def link_is_up(self) -> bool:
        """Whether frames can pass."""

    @property
    def has_uso(self) -> bool:
        """Whether UDP segmentation can be left to whoever is at its ends; while it is awaited, the source's word."""
        return False

    def look(self) -> bool:
        """Finds out what became of it; what changed is told to the observer. Whether to look again later."""
        return False

    def look_soon(self) -> None:
        """Has `look` called by the event loop, while this process serves."""
        return

    # -- while it is open ---------------------------------------------------------------------------------------

    @abstractmethod
    def host(self, queue: int = 0) -> int | FrameStream:
        """What a queue pair reads and writes: the descriptor of a TAP's queue, lent, or a stream."""

    @property
    @abstractmethod
    def mtu(self) -> int:
        """Its MTU in bytes, as it was seen last: `look` sees the present one."""

    @property
    @abstractmethod
    def frame_length_max(self) -> int:
        """Bytes of the longest frame it delivers, with a VLAN tag, without what stands in front of it."""

    @property
    def offloads(self) -> Offload:
        """What whoever reads the frames takes over."""
        return Offload(0)

    def set_offloads(self, offloads: Offload) -> None:
        """Says what whoever reads the frames can take over, as far as there is such a thing here.

        Args:
            offloads: what else there is needs CSUM; USO4 and USO6 come together, and where `has_uso` is true.

        Raises:
            KernelError: it keeps what it has.
        """
        del offloads

    def set_vnet_header_length(self, length: int) -> None:
        """Sets the bytes of the vnet header to 10 or 12. KernelError: it keeps the length it has."""
        del length

    def attach(self, queue: int) -> None:
        """Lets frames come into a queue. Idempotent. KernelError: it is detached still."""
        del queue

    def detach(self, queue: int) -> None:
        """Lets no more frames come into a queue, any but the first; those that wait in it are dropped. As `attach`."""
        del queue

    def driver_begins(self) -> None:
        """A driver serves the NIC: whoever is at the other end may see that. KernelError: nobody does."""
        return

    def driver_ends(self) -> None:
        """No driver serves it. Otherwise as `driver_begins`."""
        return

    def set_link(self, *, up: bool) -> None:
        """Connects it to the network or takes it off, as if somebody had the cable. The observer is told.

        Raises:
            StateError: that cannot be done to it. As for the next: the link is as it was.
            KernelError: the kernel refuses.
        """
        del up
        raise StateError(f"netdev '{self.id}' has no link that could be set")

    @abstractmethod
    def inject(self, frame: bytes) -> None:
        """Sends one Ethernet frame, as if the guest had. KernelError: it was not sent."""
