"""A vhost-user frontend with a virtio-net driver: what a VMM and its guest are to a backend.

Owns:        the frontend's side of the connection, step by step; a guest's memory; the whole bring-up, in QEMU's order.
Never sees:  the backend's code, namespaces.
Read next:   guest.py, which makes a guest with a network stack out of it.

Everything blocks, and every wait is bounded.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Final, Self

from localmig import fds
from localmig.dataplane import DriverCounters, DriverPair, GuestMemory
from localmig.device_api import Offload
from localmig.errors import PeerError, PeerLostError, StateError
from localmig.fds import OwnedFd
from localmig.vhost_user.message import (
    HEADER_SIZE,
    LOG_ALL_BIT,
    PROTOCOL_FEATURES_BIT,
    RULES,
    U64,
    ConfigSpace,
    Header,
    LogFile,
    MemoryTable,
    Payload,
    ProtocolFeature,
    RegionDescription,
    Request,
    SingleRegion,
    VringAddress,
    VringFile,
    VringNumber,
    decode_reply,
    encode_request,
)
from localmig.virtio import DeviceStatus, Feature, packed_ring, split_ring
from localmig.virtio.net import OFFLOADS, NetFeature, without_orphans

ANSWER_SECONDS_MAX: Final = 10.0
"""How long a backend may take for an answer: ten thousand times what one takes, enough for a handover in between."""

PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""What this frontend acknowledges where it is offered: what QEMU does for a NIC and needs no second channel."""

DRIVER_FEATURES: Final = int(Feature.VERSION_1 | Feature.RING_EVENT_IDX) | int(NetFeature.MRG_RXBUF)
"""The virtio features the driver makes use of."""

_DRIVER_OK: Final = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK

_GUEST_ADDRESS: Final = 0x4000_0000
_USER_ADDRESS: Final = 0x7F00_0000_0000


# -- the connection ---------------------------------------------------------------------------------------------


class FrontendListener:
    """Where a VMM waits for its backend: QEMU's chardev with `server=on`.

    Args:
        path: the socket's path, which goes with the listener; a socket that is there already is replaced.
        answer_seconds_max: how long a backend may take to connect, and then for each answer.
    """

    def __init__(self, path: str, *, answer_seconds_max: float = ANSWER_SECONDS_MAX) -> None:
        self.path = path
        self._answer_seconds_max = answer_seconds_max
        Path(path).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(answer_seconds_max)
            self._socket.bind(path)
            self._socket.listen(1)  # as QEMU does
        except OSError:
            self._socket.close()
            raise

    def accept(self) -> Frontend:
        """The frontend's end of the next connection. PeerLostError where none comes in time."""
        try:
            sock, _ = self._socket.accept()
        except TimeoutError:
            raise PeerLostError(
                f"no backend connected to '{self.path}' within {self._answer_seconds_max:g} s"
            ) from None
        return Frontend(sock, answer_seconds_max=self._answer_seconds_max)

    def close(self) -> None:
        """Listens no more, as a VMM that ends. Idempotent."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            Path(self.path).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Frontend:
    """The frontend's end of a vhost-user connection: a method for each request.

    Once REPLY_ACK is acknowledged every request waits for the backend's word that it is done. Each method raises

        PeerError: the backend refused, or answered something else than was asked; the connection is of no more use.
        PeerLostError: it closed the connection, or did not answer in time.

    Args:
        sock: a connected UNIX stream socket; this object owns it.
        answer_seconds_max: how long each answer may take.
    """

    def __init__(self, sock: socket.socket, *, answer_seconds_max: float = ANSWER_SECONDS_MAX) -> None:
        sock.settimeout(answer_seconds_max)
        self._socket = sock
        self._acknowledged = ProtocolFeature(0)

    @classmethod
    def connect(cls, path: str, *, answer_seconds_max: float = ANSWER_SECONDS_MAX) -> Self:
        """Connects to a backend that listens on `path`. PeerLostError if none does."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(answer_seconds_max)
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise PeerLostError(f"no backend listens on '{path}': {error.strerror or error}") from error
        return cls(sock, answer_seconds_max=answer_seconds_max)

    @property
    def protocol_features(self) -> ProtocolFeature:
        """The acknowledged ones."""
        return self._acknowledged

    def fileno(self) -> int:
        """The socket, lent. It turns readable when the backend is gone."""
        return self._socket.fileno()

    def is_lost(self, timeout: float = 0.0) -> bool:
        """Whether the backend closed the connection, waiting up to `timeout` seconds for it."""
        if not select.select([self._socket], [], [], timeout)[0]:
            return False
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def close(self) -> None:
        """Leaves, as a VMM that ends. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def call(self, request: Request, payload: Payload | None = None, lent: Sequence[int] = ()) -> Payload | None:
        """Sends a request with descriptors and waits for its reply, or its acknowledgement where there is one.

        Returns:
            the reply's payload; None where the request has no reply of its own.
        """
        replies = RULES[request].reply is not None
        acknowledges = not replies and bool(self._acknowledged & ProtocolFeature.REPLY_ACK)
        self.send(encode_request(request, payload, needs_reply=acknowledges), lent, what=request.name)
        if not replies and not acknowledges:
            return None
        header = Header.decode(self.receive(HEADER_SIZE, what=request.name))
        if header.request != request:
            raise PeerError(f"backend answered {header.request.name} to {request.name}")
        answer = decode_reply(header, self.receive(header.size, what=request.name))
        if replies:
            return answer
        assert isinstance(answer, U64), answer
        if answer.value != 0:
            raise PeerError(f"backend refused {request.name}: it acknowledged with {answer.value}, expected 0")
        return None

    def send(self, data: bytes, lent: Sequence[int] = (), *, what: str = "data") -> None:
        """Sends bytes as they are, descriptors with the first of them: also what no frontend should send."""
        try:
            sent = fds.send(self._socket, data, lent)
            if rest := data[sent:]:
                # Nothing at all would fail as well, once the backend closed the connection.
                self._socket.sendall(rest)
        except TimeoutError:
            raise PeerLostError(f"backend did not take {what} in time") from None
        except OSError as error:
            raise PeerLostError(f"backend closed the connection before {what}: {error.strerror}") from error

    def receive(self, size: int, *, what: str = "data") -> bytes:
        """Receives exactly `size` bytes."""
        data = b""
        while len(data) < size:
            try:
                piece, arrived = fds.receive(self._socket, size - len(data))
            except TimeoutError:
                raise PeerLostError(f"backend did not answer {what} within {self._socket.gettimeout()} s") from None
            except OSError as error:
                raise PeerLostError(f"backend is gone, no answer to {what}: {error.strerror}") from error
            if arrived:
                fds.close_all(arrived)
                raise PeerError(f"backend sent {len(arrived)} descriptors with its answer to {what}")
            if not piece:
                raise PeerLostError(f"backend closed the connection instead of answering {what}")
            data += piece
        return data

    def _number(self, request: Request) -> int:
        answer = self.call(request)
        assert isinstance(answer, U64), answer
        return answer.value

    # -- negotiation --

    def get_features(self) -> int:
        """The virtio feature bits on offer, with bit 30 for protocol features."""
        return self._number(Request.GET_FEATURES)

    def set_features(self, features: int) -> None:
        """Acknowledges virtio feature bits."""
        self.call(Request.SET_FEATURES, U64(value=features))

    def get_protocol_features(self) -> ProtocolFeature:
        """What the backend offers of vhost-user itself."""
        return ProtocolFeature(self._number(Request.GET_PROTOCOL_FEATURES))

    def set_protocol_features(self, features: ProtocolFeature) -> None:
        """Acknowledges them; they count from here on."""
        self.call(Request.SET_PROTOCOL_FEATURES, U64(value=int(features)))
        self._acknowledged = features

    def get_queue_num(self) -> int:
        """How many virtqueues the backend has."""
        return self._number(Request.GET_QUEUE_NUM)

    def set_owner(self) -> None:
        """Claims the session."""
        self.call(Request.SET_OWNER)

    def set_backend_request_fd(self, fd: int) -> None:
        """Lends the descriptor by which the backend may ask the frontend."""
        self.call(Request.SET_BACKEND_REQ_FD, None, [fd])

    # -- the device --

    def get_config(self, offset: int, size: int) -> bytes:
        """A piece of the configuration space."""
        answer = self.call(Request.GET_CONFIG, ConfigSpace(offset=offset, data=bytes(size)))
        assert isinstance(answer, ConfigSpace), answer
        return answer.data

    def set_mtu(self, mtu: int) -> None:
        """Tells the MTU the driver was told."""
        self.call(Request.NET_SET_MTU, U64(value=mtu))

    def send_rarp(self, mac: bytes) -> None:
        """Asks the backend to announce the guest's MAC address."""
        self.call(Request.SEND_RARP, U64(value=int.from_bytes(mac, "little")))

    def set_status(self, status: int) -> None:
        """Sets the device status field."""
        self.call(Request.SET_STATUS, U64(value=status))

    def get_status(self) -> int:
        """Reads the device status field."""
        return self._number(Request.GET_STATUS)

    def reset_device(self) -> None:
        """Stops all rings and forgets what was set."""
        self.call(Request.RESET_DEVICE)

    # -- memory --

    def set_mem_table(self, regions: Sequence[tuple[RegionDescription, int]]) -> None:
        """Shares guest memory: (description, lent descriptor) of each region. Replaces what was shared before."""
        table = MemoryTable(regions=tuple(description for description, _ in regions))
        self.call(Request.SET_MEM_TABLE, table, [fd for _, fd in regions])

    def get_max_mem_slots(self) -> int:
        """How many regions `add_mem_region` may add."""
        return self._number(Request.GET_MAX_MEM_SLOTS)

    def add_mem_region(self, region: RegionDescription, fd: int) -> None:
        """Shares one more region; `fd` is lent."""
        self.call(Request.ADD_MEM_REG, SingleRegion(region=region), [fd])

    def remove_mem_region(self, region: RegionDescription) -> None:
        """Takes one region back."""
        self.call(Request.REM_MEM_REG, SingleRegion(region=region))

    # -- the dirty log --

    def set_log_base(self, log: LogFile, fd: int) -> None:
        """Lends the log in which the backend marks pages it writes; the former one is this side's again."""
        answer = self.call(Request.SET_LOG_BASE, log, [fd])
        if answer != U64(value=0):
            raise PeerError(f"backend cannot use the dirty log of {log.size:#x} bytes: it answered {answer}")

    def set_log_fd(self, fd: int) -> None:
        """Lends an eventfd by which the backend may tell that it logged something."""
        self.call(Request.SET_LOG_FD, None, [fd])

    # -- vrings --

    def set_vring_num(self, index: int, size: int) -> None:
        """Sets a vring's number of entries."""
        self.call(Request.SET_VRING_NUM, VringNumber(index=index, number=size))

    def set_vring_base(self, index: int, base: int) -> None:
        """Sets where a vring goes on: an index of the avail ring, or both positions of a packed ring."""
        self.call(Request.SET_VRING_BASE, VringNumber(index=index, number=base))

    def get_vring_base(self, index: int) -> int:
        """Stops a vring; gives where it would go on."""
        answer = self.call(Request.GET_VRING_BASE, VringNumber(index=index))
        assert isinstance(answer, VringNumber), answer
        if answer.index != index:
            raise PeerError(f"backend answered for vring {answer.index}, asked was {index}")
        return answer.number

    def set_vring_addr(self, address: VringAddress) -> None:
        """Sets where a vring is, in user addresses."""
        self.call(Request.SET_VRING_ADDR, address)

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """Lends the eventfd the driver kicks, and starts the vring; None: the backend polls."""
        self._vring_file(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """Lends the eventfd that calls the driver; None: it polls."""
        self._vring_file(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        """Lends the eventfd that tells of a broken vring; None: nobody listens."""
        self._vring_file(Request.SET_VRING_ERR, index, fd)

    def enable_vring(self, index: int) -> None:
        """Lets a vring carry packets."""
        self.call(Request.SET_VRING_ENABLE, VringNumber(index=index, number=1))

    def disable_vring(self, index: int) -> None:
        """Lets a vring carry none."""
        self.call(Request.SET_VRING_ENABLE, VringNumber(index=index, number=0))

    def _vring_file(self, request: Request, index: int, fd: int | None) -> None:
        self.call(request, VringFile(index=index, has_fd=fd is not None), [] if fd is None else [fd])


def sending_offloads(features: int) -> Offload:
    """What the guest's TAP may leave to the device, which reads what the guest sends: the features' HOST_ half."""
    pairs = (
        (NetFeature.CSUM, Offload.CSUM),
        (NetFeature.HOST_TSO4, Offload.TSO4),
        (NetFeature.HOST_TSO6, Offload.TSO6),
        (NetFeature.HOST_ECN, Offload.TSO_ECN),
        (NetFeature.HOST_USO, Offload.USO4 | Offload.USO6),
    )
    return reduce(or_, (offload for feature, offload in pairs if features & feature), Offload(0))


# -- the guest --------------------------------------------------------------------------------------------------


class SharedMemory:
    """A guest's memory: one file, mapped here and shared with the backend.

    Args:
        size: bytes, a multiple of the page size.
    """

    def __init__(self, size: int) -> None:
        self.fd = OwnedFd(os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        try:
            os.ftruncate(self.fd.fileno(), size)
            self.region = RegionDescription(
                guest_address=_GUEST_ADDRESS, size=size, user_address=_USER_ADDRESS, mmap_offset=0
            )
            self.mapping = GuestMemory([(_GUEST_ADDRESS, size, _USER_ADDRESS, 0, self.fd.fileno())])
        except (OSError, ValueError):
            self.fd.close()
            raise

    def user_address(self, guest_address: int) -> int:
        """The frontend's address of a guest address, which is what vrings are told in."""
        return guest_address - _GUEST_ADDRESS + _USER_ADDRESS

    def close(self) -> None:
        """Drops the file; the mapping goes with the object. Idempotent."""
        self.fd.close()


class DirtyBitmap:
    """A dirty log as the frontend has it: a bit for each page of guest memory.

    Args:
        end: where guest memory ends.
        mmap_offset: where in its file the log begins.
    """

    PAGE_SIZE: Final = 4096

    def __init__(self, end: int, *, mmap_offset: int = 0) -> None:
        # As QEMU counts: whole words, one of them behind the last page.
        size = (end // self.PAGE_SIZE // 64 + 1) * 8
        self.file = LogFile(size=size, mmap_offset=mmap_offset)
        self.fd = OwnedFd(os.memfd_create("vhost-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(self.fd.fileno(), mmap_offset + size)

    def pages(self) -> set[int]:
        """The numbers of the marked pages."""
        bits = os.pread(self.fd.fileno(), self.file.size, self.file.mmap_offset)
        marked = (at for at, byte in enumerate(bits) if byte)
        return {8 * at + bit for at in marked for bit in range(8) if bits[at] >> bit & 1}

    def clear(self) -> None:
        """Unmarks all. What is marked meanwhile may be lost, so no ring may run."""
        os.pwrite(self.fd.fileno(), bytes(self.file.size), self.file.mmap_offset)

    def close(self) -> None:
        """Drops the file. Idempotent."""
        self.fd.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _VringFds:
    kick: OwnedFd
    call: OwnedFd
    error: OwnedFd

    @classmethod
    def create(cls) -> Self:
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        kick, call, error = (OwnedFd(os.eventfd(0, flags)) for _ in range(3))
        return cls(kick=kick, call=call, error=error)

    def close(self) -> None:
        fds.close_all((self.kick, self.call, self.error))


OFFLOAD_FEATURES: Final = int(OFFLOADS) | DRIVER_FEATURES
"""All of these, and what the driver can leave to the other side or take over from it, by its TAP's vnet header."""

RX: Final = 0
TX: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Habits:
    """What one frontend does that another does not.

    Attributes:
        set_up: the requests that set up rings. Each tuple is sent for every ring before the next tuple is.
        resets_by_base: whether GET_VRING_BASE tells that the guest's driver resets; otherwise its rings are disabled,
            and a question makes sure that the backend has done it.
        base_is_avail_index: whether SET_VRING_BASE of a split ring tells the avail index that stands in memory.
    """

    set_up: tuple[tuple[Request, ...], ...]
    resets_by_base: bool = True
    base_is_avail_index: bool = False


QEMU: Final = Habits(
    set_up=(
        (
            Request.SET_VRING_NUM,
            Request.SET_VRING_BASE,
            Request.SET_VRING_ADDR,
            Request.SET_VRING_ERR,
            Request.SET_VRING_KICK,
            Request.SET_VRING_CALL,
        ),
    )
)

USER_MODE_LINUX: Final = Habits(
    set_up=(
        (
            Request.SET_VRING_NUM,
            Request.SET_VRING_BASE,
            Request.SET_VRING_ADDR,
            Request.SET_VRING_CALL,
            Request.SET_VRING_KICK,
        ),
    ),
    resets_by_base=False,
)

CLOUD_HYPERVISOR: Final = Habits(
    set_up=(
        (Request.SET_VRING_NUM,),
        (Request.SET_VRING_ADDR, Request.SET_VRING_BASE, Request.SET_VRING_CALL, Request.SET_VRING_KICK),
    ),
    resets_by_base=False,
    base_is_avail_index=True,
)


class NetGuest:
    """A guest with one NIC: memory, a driver for each queue pair, and the VMM's part of the bring-up.

        detached ── attach ──▶ attached ── detach ──▶ detached        the rings stay as they are
                               attached ── reset_driver ──▶ attached  fresh rings, packets in flight are gone
                               attached, backend gone ── reconnect ──▶ attached

    Args:
        where: the backend's socket, or where it will connect; a listener is lent until `close`.
        tap_fds: a queue of the guest's own TAP for each pair, non-blocking, with a vnet header of 12 bytes, lent until
            `close`; none: what arrives is counted and dropped.
        queue_pairs: how many there are; all of them are enabled.
        queue_size: entries of each ring, a power of two up to 1024.
        features: virtio features to acknowledge where they are offered. VERSION_1 must be among both.
        protocol_features: vhost-user features to acknowledge where they are offered.
        answer_seconds_max: how long the backend may take for each answer.
        habits: whose requests it sends.
        fills_first: whether the driver fills its receive rings before the backend is told of them, as FreeBSD's does.
        moved_from: the same guest in the VMM that it moves from: memory, driver and notifiers are that one's, and lent
            until `close`. Queues, features and TAP are that one's too; connection and positions are this VMM's own.
    """

    def __init__(
        self,
        where: str | FrontendListener,
        *,
        moved_from: NetGuest | None = None,
        tap_fds: Sequence[int] = (),
        queue_pairs: int = 1,
        queue_size: int = 256,
        features: int = DRIVER_FEATURES,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
        answer_seconds_max: float = ANSWER_SECONDS_MAX,
        habits: Habits = QEMU,
        fills_first: bool = False,
    ) -> None:
        self._where = where
        self._habits = habits
        self._fills_first = fills_first
        assert len(tap_fds) in (0, queue_pairs), (tap_fds, queue_pairs)
        self._tap_fds: Sequence[int | None] = tap_fds or [None] * queue_pairs
        self._queue_pairs = queue_pairs
        self._enabled_pairs = queue_pairs
        self._queue_size = queue_size
        self._wanted = features | (NetFeature.MQ if queue_pairs > 1 else 0)
        self._wanted_protocol = protocol_features
        self._answer_seconds_max = answer_seconds_max
        self._features = 0
        self._bases: list[int | None] = [None] * (2 * queue_pairs)
        self._frontend: Frontend | None = None
        self._log: DirtyBitmap | None = None
        self._drivers: list[DriverPair] = []
        self._is_lent = moved_from is not None
        self.memory: SharedMemory
        self._vrings: list[_VringFds]
        if moved_from is None:
            self.memory = SharedMemory(queue_pairs * DriverPair.layout_size(queue_size))
            self._vrings = [_VringFds.create() for _ in range(2 * queue_pairs)]
        else:
            self._share(moved_from)

    # -- life --

    def connect(self) -> None:
        """Connects and negotiates, as a VMM does at its start; one that waits for a guest does no more. Idempotent.

        Raises as `attach`.
        """
        if self._frontend is not None:
            return
        frontend = self._meet()
        try:
            self._negotiate(frontend)
        except PeerError:
            frontend.close()
            raise
        self._frontend = frontend

    def arrive(self, bases: Sequence[int]) -> None:
        """Goes on with the guest at these positions, which the VMM that it moves from was told by `detach`.

        Raises as `attach`.
        """
        self._bases = list(bases)
        self.attach()

    def attach(self) -> None:
        """Connects if it is not connected, sets everything up and lets the driver run.

        Raises:
            PeerError: the backend refused a step, or offers too little. PeerLostError: it is not there or went
                away. The guest is detached, and disconnected.
        """
        try:
            self.connect()
            assert self._frontend is not None
            if self._fills_first:
                for driver in self._drivers_here():
                    driver.start()
            self._set_up(self._frontend)
        except PeerError:
            self.disconnect()
            raise
        for driver in self._drivers_here():
            driver.start()

    def detach(self) -> None:
        """Stops the rings at the backend and keeps where they stand, as a VMM does when it pauses the guest.

        The driver runs on: what it sends waits in the ring.
        """
        frontend = self.frontend
        for index in range(2 * self._queue_pairs):
            frontend.disable_vring(index)
        for index in range(2 * self._queue_pairs):
            base = frontend.get_vring_base(index)
            if self._is_packed and base != packed_ring.base_of(packed_ring.position_of(base)):
                raise PeerError(f"backend stopped packed ring {index} at {base:#x}: its halves differ")
            self._bases[index] = base

    def start_logging(self, log: DirtyBitmap) -> None:
        """Lets the backend mark what it writes from now on, as QEMU does when a migration begins. `log` is lent."""
        self.frontend.set_log_base(log.file, log.fd.fileno())
        self._log = log
        self._switch_logging()

    def stop_logging(self) -> None:
        """Lets it mark nothing any more, as QEMU does when a migration failed."""
        self._log = None
        self._switch_logging()

    def _switch_logging(self) -> None:
        self.frontend.set_features(self._features_to_say(self.frontend))
        for index in range(2 * self._queue_pairs):
            self._set_up_vring(self.frontend, index, Request.SET_VRING_ADDR)

    def set_queue_pairs(self, count: int) -> None:
        """Lets the first `count` pairs carry packets and the others none: what QEMU makes of `ethtool -L`.

        The guest's own TAP is the caller's to change: what it sends must come out of the first `count` of its queues.
        """
        assert 1 <= count <= self._queue_pairs, count
        frontend = self.frontend
        for index in range(2 * self._queue_pairs):
            if index < 2 * count:
                frontend.enable_vring(index)
            else:
                frontend.disable_vring(index)
        self._enabled_pairs = count

    def send_call_again(self, index: int) -> None:
        """Gives ring `index` its call descriptor once more, as QEMU does when the guest unmasks an interrupt."""
        self.frontend.set_vring_call(index, self._vrings[index].call.fileno())

    def reset_driver(self) -> None:
        """What a backend sees when the guest's driver resets the device and begins again: new, empty rings."""
        frontend = self.frontend
        self._drop_drivers()
        if self._habits.resets_by_base:
            self.detach()
        else:
            for index in reversed(range(2 * self._queue_pairs)):
                frontend.disable_vring(index)
            frontend.get_features()
        if ProtocolFeature.STATUS in frontend.protocol_features:
            frontend.set_status(0)
        self._bases = [None] * (2 * self._queue_pairs)
        self.attach()

    def disconnect(self) -> None:
        """Leaves the backend, without a word. The driver and its rings stay. Idempotent."""
        if self._frontend is not None:
            self._frontend.close()
            self._frontend = None

    def reconnect(self) -> None:
        """Connects to whoever listens now and goes on with the rings as they stand in memory, as QEMU does.

        Where packed rings stand nobody can say who was not told: then the driver begins anew.

        Raises:
            PeerLostError: nobody listens, or not for long. The guest is detached, and may try again.
            PeerError: the backend refused a step, or offers less than the driver uses. The guest is detached.
        """
        self.disconnect()
        # A backend that went away told no position: what it completed is in the used index, the rest is undone.
        if self._is_packed:
            self._drop_drivers()
            self._bases = [None] * (2 * self._queue_pairs)
        else:
            self._bases = [self.used_index(index) for index in range(2 * self._queue_pairs)]
        self.attach()

    def close(self) -> None:
        """Ends the guest: driver, connection, memory. Idempotent. What another VMM lent stays."""
        if self._is_lent:
            self.disconnect()
            return
        for driver in self._drivers:
            driver.stop()
        self._drivers.clear()
        self.disconnect()
        for vring in self._vrings:
            vring.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _share(self, other: NetGuest) -> None:
        """Is the same guest as `other`."""
        for name in ("memory", "_vrings", "_drivers", "_features", "_tap_fds", "_queue_pairs", "_queue_size"):
            setattr(self, name, getattr(other, name))
        self._enabled_pairs = self._queue_pairs
        self._bases = [None] * (2 * self._queue_pairs)

    # -- what it knows --

    @property
    def frontend(self) -> Frontend:
        """The connection. StateError if there is none."""
        if self._frontend is None:
            raise StateError(f"guest is not connected to '{self._path}'")
        return self._frontend

    @property
    def features(self) -> int:
        """The acknowledged virtio features."""
        return self._features

    @property
    def bases(self) -> tuple[int, ...]:
        """Positions of all vrings as told by `detach`, or where `attach` begins."""
        return tuple(map(self._base, range(2 * self._queue_pairs)))

    def used_index(self, index: int) -> int:
        """The used index of a split ring as it stands in guest memory; 0 before there is a ring."""
        if not self._drivers:
            return 0
        _, _, device_area = self._ring_addresses(index)
        return int.from_bytes(self.memory.mapping.read(device_area + 2, 2), "little")

    def avail_index(self, index: int) -> int:
        """The avail index of a split ring as it stands in guest memory."""
        _, driver_area, _ = self._ring_addresses(index)
        return int.from_bytes(self.memory.mapping.read(driver_area + 2, 2), "little")

    def counters(self) -> DriverCounters:
        """What the drivers of all pairs moved since their last reset.

        Raises:
            PeerError: the driver stopped: the backend broke a ring, or the guest's TAP is gone.
        """
        try:
            moved = [driver.counters() for driver in self._drivers_here()]
        except RuntimeError as error:
            raise PeerError(f"guest's driver stopped: {error}") from error
        return DriverCounters(*map(sum, zip(*moved, strict=True)))

    def ring_error(self, index: int, timeout: float = 0.0) -> bool:
        """Whether the backend told through the error eventfd that it stopped the ring, within `timeout` seconds."""
        fd = self._vrings[index].error.fileno()
        if not select.select([fd], [], [], timeout)[0]:
            return False
        os.eventfd_read(fd)
        return True

    @property
    def _path(self) -> str:
        return self._where if isinstance(self._where, str) else self._where.path

    # -- the steps, in QEMU's order --

    def _meet(self) -> Frontend:
        if isinstance(self._where, FrontendListener):
            return self._where.accept()
        return Frontend.connect(self._where, answer_seconds_max=self._answer_seconds_max)

    def _negotiate(self, frontend: Frontend) -> None:
        offered = frontend.get_features()
        if offered >> PROTOCOL_FEATURES_BIT & 1:
            protocol = frontend.get_protocol_features() & self._wanted_protocol
            frontend.set_protocol_features(protocol)
            count = frontend.get_queue_num() if ProtocolFeature.MQ in protocol else 2
            if count < 2 * self._queue_pairs:
                raise PeerError(f"backend has {count} virtqueues, needed are {2 * self._queue_pairs}")
        frontend.set_owner()
        # A driver that lost its backend must find at the next one what it has acknowledged.
        features = (self._features or self._wanted & offered) & ~(1 << PROTOCOL_FEATURES_BIT)
        if missing := features & ~offered:
            raise PeerError(f"backend does not offer features {missing:#x}, which the driver uses")
        if not features & Feature.VERSION_1:
            raise PeerError(f"backend offers features {offered:#x}, without VERSION_1")
        if not features & NetFeature.MRG_RXBUF:
            # The receive buffers are too small for what need not be segmented (virtio 1.2, section 5.1.6.3.1).
            features &= ~int(NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6)
            features &= ~int(NetFeature.GUEST_USO4 | NetFeature.GUEST_USO6)
        self._features = without_orphans(features)
        for index, vring in enumerate(self._vrings):
            frontend.set_vring_call(index, vring.call.fileno())

    def _set_up(self, frontend: Frontend) -> None:
        protocol = frontend.protocol_features
        frontend.set_features(self._features_to_say(frontend))
        frontend.set_mem_table([(self.memory.region, self.memory.fd.fileno())])
        for requests in self._habits.set_up:
            for index in range(2 * self._queue_pairs):
                for request in requests:
                    self._set_up_vring(frontend, index, request)
        if protocol:
            for index in range(2 * self._enabled_pairs):
                frontend.enable_vring(index)
        if ProtocolFeature.STATUS in protocol:
            frontend.set_status(_DRIVER_OK)
        if self._log is not None:
            # As QEMU does, which starts rings before it says where they are to log.
            frontend.set_log_base(self._log.file, self._log.fd.fileno())

    def _features_to_say(self, frontend: Frontend) -> int:
        """What the driver acknowledged, and what is the frontend's own."""
        protocol = 1 << PROTOCOL_FEATURES_BIT if frontend.protocol_features else 0
        return self._features | protocol | (0 if self._log is None else 1 << LOG_ALL_BIT)

    def _set_up_vring(self, frontend: Frontend, index: int, request: Request) -> None:
        vring = self._vrings[index]
        match request:
            case Request.SET_VRING_NUM:
                frontend.set_vring_num(index, self._queue_size)
            case Request.SET_VRING_BASE:
                frontend.set_vring_base(index, self._base(index))
            case Request.SET_VRING_ADDR:
                descriptor_area, driver_area, device_area = map(self.memory.user_address, self._ring_addresses(index))
                frontend.set_vring_addr(
                    VringAddress(
                        index=index,
                        flags=0 if self._log is None else VringAddress.LOGGED,
                        descriptor_area=descriptor_area,
                        device_area=device_area,
                        driver_area=driver_area,
                        log=0 if self._log is None else self._ring_addresses(index)[2],
                    )
                )
            case Request.SET_VRING_ERR:
                frontend.set_vring_err(index, vring.error.fileno())
            case Request.SET_VRING_KICK:
                frontend.set_vring_kick(index, vring.kick.fileno())
            case Request.SET_VRING_CALL:
                frontend.set_vring_call(index, vring.call.fileno())
            case _:
                raise AssertionError(request)

    def _ring_addresses(self, index: int) -> tuple[int, int, int]:
        return self._drivers_here()[index // 2].ring_addresses()[index % 2]

    @property
    def _is_packed(self) -> bool:
        return bool(self._features & Feature.RING_PACKED)

    def _base(self, index: int) -> int:
        """Where a ring goes on, in the words of SET_VRING_BASE."""
        base = self._bases[index]
        if self._habits.base_is_avail_index and not self._is_packed:
            return self.avail_index(index)
        if base is None:
            return packed_ring.base_of(packed_ring.START) if self._is_packed else split_ring.START
        return base

    def _drop_drivers(self) -> None:
        """Ends the drivers; raises what they found wrong."""
        for driver in self._drivers:
            driver.stop()
            driver.counters()
        self._drivers.clear()

    def _drivers_here(self) -> list[DriverPair]:
        if not self._drivers:
            size = DriverPair.layout_size(self._queue_size)
            for index, tap_fd in enumerate(self._tap_fds):
                rx, tx = self._vrings[2 * index : 2 * index + 2]
                driver = DriverPair(
                    name=f"guest-driver/{index}",
                    memory=self.memory.mapping,
                    guest_address=self.memory.region.guest_address + index * size,
                    queue_size=self._queue_size,
                    features=self._features,
                    rx_kick_fd=rx.kick.fileno(),
                    rx_call_fd=rx.call.fileno(),
                    tx_kick_fd=tx.kick.fileno(),
                    tx_call_fd=tx.call.fileno(),
                    tap_fd=tap_fd,
                )
                self._drivers.append(driver)
        return self._drivers
