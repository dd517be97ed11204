"""The Rust packet path, as Python sees it.

Descriptors are lent: the caller keeps each one open for as long as the object that got it uses it.
"""

# ruff: noqa: PYI021 - there is no Python source these docstrings could stand in; this file is the contract

from collections.abc import Sequence
from typing import Final, TypeAlias, final

__all__ = [
    "CALLBACK_COUNTER_NAMES",
    "CHAIN_DATA_SIZE_MAX",
    "COUNTER_NAMES",
    "DRIVER_COUNTER_NAMES",
    "FRAME_SIZE_MAX",
    "STREAM_IN_HAND_MAX",
    "CallbackQueues",
    "Chain",
    "DirtyLog",
    "DriverPair",
    "FrameStream",
    "GuestMemory",
    "InFlight",
    "Ledger",
    "QueuePair",
    "Ring",
    "check_positions",
    "forbid_programs",
    "forbid_unneeded",
    "keep_capabilities",
    "load_all",
    "load_waiting",
    "recover_all",
    "save_all",
    "save_waiting",
    "set_dumpable",
    "start_all",
    "stop_all",
    "swap_memory",
]

CALLBACK_COUNTER_NAMES: Final[tuple[str, ...]]
"""What each number of a ring's in `CallbackQueues.counters` is: the fields of `dataplane.CallbackCounters`."""

CHAIN_DATA_SIZE_MAX: Final[int]
"""Bytes of one chain that a device reads, and bytes that it may write. The longest that such devices move at once are
64 KiB and a header, and a stop may have to wait while so much is copied."""

COUNTER_NAMES: Final[tuple[str, ...]]
"""What each number of `QueuePair.counters` is: the fields of `dataplane.Counters`."""

DRIVER_COUNTER_NAMES: Final[tuple[str, ...]]
"""What each number of `DriverPair.counters` is: the fields of `dataplane.DriverCounters`."""

FRAME_SIZE_MAX: Final[int]
STREAM_IN_HAND_MAX: Final[int]
"""Bytes of the longest frame that a TAP delivers, with its virtio-net header."""

@final
class GuestMemory:
    """Guest memory, mapped shared and writable into this process. Immutable: another table is another object.

    Args:
        regions: (guest_address, size, user_address, mmap_offset, fd) of each region, in bytes. `fd` is only used
            during the call; the mapping keeps the memory alive.
        previous: regions that it has as well, which are the same bytes of the same file at the same addresses, keep
            their mapping, page tables and all. One of them that is lost is mapped again if that can be.

    Raises:
        ValueError: regions overlap, are empty, wrap around, or the file behind `fd` is smaller than announced or on a
            file system whose pages may never come. `previous` is as before.
        OSError: `mmap` failed. As above.
    """

    def __new__(
        cls, regions: list[tuple[int, int, int, int, int]], previous: GuestMemory | None = None
    ) -> GuestMemory: ...
    @staticmethod
    def adopt(regions: list[tuple[int, int, int, int, int]], previous: GuestMemory | None = None) -> GuestMemory:
        """Maps what another process had mapped, as it is now. `previous` is as for a new one.

        What the frontend has spoilt since, by making a file smaller or unfit to be mapped, is no error: the rings that
        need it fail at their first turn.

        Raises:
            ValueError: the numbers cannot be.
            OSError: this process has no room.
        """

    def populate(self, seconds_max: float) -> int:
        """Maps the pages that already exist (it creates none), so that the first packets meet no page fault.

        Returns the number of bytes populated; what there was no time for comes by page faults. The time is looked at
        every 256 MiB. Mappings that were populated before, in a previous memory too, take none. Releases the GIL.
        """

    def read(self, guest_address: int, size: int) -> bytes:
        """Copies `size` bytes out.

        Raises:
            ValueError: they are not all inside guest memory.
            OSError: a part of guest memory is lost (EFAULT): the frontend made its file smaller.
        """

    def write(self, guest_address: int, data: bytes) -> None:
        """Copies `data` in. Raises as `read`."""

@final
class Ledger:
    """Where a device's packed rings stand, in memory that a successor shares.

    Whoever runs a packed ring writes into it, so that after its death at any instruction the next one goes on exactly.

    Args:
        fd: a file that `create` made, here or in another process; only used during the call.
        ring_count: for how many rings it was made.

    Raises:
        ValueError: it is no such file. OSError: it is none of memory, or cannot be mapped.
    """

    def __new__(cls, fd: int, ring_count: int) -> Ledger: ...
    @staticmethod
    def create(ring_count: int) -> int:
        """A new file for 1 to 256 rings; its descriptor is the caller's. OSError where the kernel refuses."""

    def settle(self, ring: int, position: int) -> None:
        """A ring that nobody runs goes on at `position`."""

@final
class InFlight:
    """Which chains of a device's split rings are in flight, in memory that a successor shares.

    Whoever serves such a ring by `CallbackQueues` writes into it, so that after its death at any instruction the next
    one knows exactly which chains are in flight: none is lost, none is completed twice. What it says is checked at each
    start; a ring of which it says what cannot be fails.

    Args:
        fd: a file that `create` made, here or in another process; only used during the call.
        ring_count: for how many rings it was made.

    Raises:
        ValueError: it is no such file. OSError: it is none of memory, or cannot be mapped.
    """

    def __new__(cls, fd: int, ring_count: int) -> InFlight: ...
    @staticmethod
    def create(ring_count: int) -> int:
        """A new file for 1 to 256 rings, with nothing in flight; its descriptor is the caller's.

        Raises:
            ValueError: another number of rings. OSError: the kernel refuses.
        """

    def forget(self, ring: int) -> None:
        """The driver set the ring up again, with whatever size: nothing of it is in flight any more.

        Only for the process that may run the ring, and while it does not run. Chains that were handed out stay so until
        the next start; completing one of them after that is too late. ValueError if the file has no such ring.
        """

@final
class DirtyLog:
    """Which pages of guest memory were written: a bit for each 4096 bytes, in a file that a frontend reads.

    A log that cannot be mapped, or whose file became too small since, is one that no ring runs with: it stops with the
    reason.

    Args:
        size: bytes of the log.
        mmap_offset: where in the file it begins, a multiple of the page size.
        fd: only used during the call.
    """

    def __new__(cls, size: int, mmap_offset: int, fd: int) -> DirtyLog: ...
    @staticmethod
    def adopt(size: int, mmap_offset: int, fd: int) -> DirtyLog:
        """Maps the log of a frontend that another process served; what the frontend has spoilt since is lost.

        Raises:
            OSError: this process has no room.
        """

    def reason(self) -> str | None:
        """Why no ring can run with it, None where one can."""

@final
class Ring:
    """Where one virtqueue is, plain numbers: `size` entries, three guest addresses, borrowed eventfds.

    The areas are virtio's: descriptor table, available and used ring of a split virtqueue; descriptor ring, driver's
    and device's event suppression of a packed one.

    `next_avail` is the position that was told: of a packed ring the index with the wrap counter in bit 15. None means
    what `ledger` says: a ledger and the ring's number in it. A split ring begins at the used index that stands in guest
    memory in any case; see `QueuePair.take_corrections`.

    `in_flight` is a file and the ring's number in it. A split ring of `CallbackQueues` needs one.

    `log` is where it marks each page that it writes, and the guest address at which its writes to the third area are
    logged (a packed ring logs those to its descriptors then, too). None in the place of that address: they are not
    logged. A ring fails at its start if its log is too small for guest memory or that address, or cannot be written.
    """

    def __new__(
        cls,
        *,
        size: int,
        descriptor_area: int,
        driver_area: int,
        device_area: int,
        kick_fd: int,
        call_fd: int | None,
        error_fd: int | None,
        next_avail: int | None,
        ledger: tuple[Ledger, int] | None = None,
        in_flight: tuple[InFlight, int] | None = None,
        log: tuple[DirtyLog, int | None] | None = None,
    ) -> Ring: ...

@final
class FrameStream:
    """Frames on a stream socket, each behind its length (4 bytes, the most significant first), for a queue pair.

    What was read and not delivered, and what is unsent of a frame that was begun, is in hand here, whatever queue pair
    runs on it. It ends for good when the peer left and all that it sent was taken, and when the peer announces a frame
    of 0 or more than 65553 bytes.

    Args:
        fd: a borrowed, connected socket, which nobody else reads or writes; None: nobody is connected.
    """

    def __new__(cls, fd: int | None = None) -> FrameStream: ...
    def ended(self) -> str | None:
        """Why it ended, None while it goes on."""

    def end(self, reason: str) -> None:
        """Ends it here: nothing more is read or sent. The socket is not touched."""

    def inject(self, frame: bytes) -> None:
        """Sends a frame between two of the guest's; what a full socket does not take is sent later.

        Raises:
            OSError: nobody is connected (ENOTCONN), or too much is unsent (ENOBUFS).
        """

    def save(self, file: int) -> tuple[int, int]:
        """Writes what is in hand into a borrowed file, for `load`. OSError where it cannot be written.

        Gives (bytes read, bytes unsent), each at most `STREAM_IN_HAND_MAX`; exact once no queue pair runs on it.
        """

    def load(self, file: int, read: int, unsent: int) -> None:
        """Takes in hand what another process saved, in the place of anything else. OSError where it cannot be read."""

@final
class QueuePair:
    """One queue pair of a NIC and its thread, which runs without the GIL.

    The thread is created at once and parks until `start`. A ring the guest broke stops alone: its error eventfd
    fires, `event_fd` is signalled, and `take_ring_errors` tells the reason. So do both rings after a panic.

    A frame that does not fit into what the driver has posted waits until it posts more, for 10 seconds. It is dropped
    if the whole ring could not take it. It is the pair's, whatever is configured meanwhile.

    Args:
        name: the thread's name, cut to 15 bytes.
        event_fd: a borrowed eventfd, signalled when there is a ring error or a correction to take, and when the TAP's
            interface is found to be gone, or the stream to have ended.
    """

    def __new__(cls, name: str, event_fd: int) -> QueuePair: ...
    def configure(
        self,
        *,
        memory: GuestMemory,
        host: int | FrameStream,
        header_length: int,
        frame_length_max: int,
        offloads: int,
        event_index: bool,
        indirect: bool,
        mergeable: bool,
        rx: Ring | None,
        tx: Ring | None,
        packed: bool = False,
    ) -> None:
        """Sets all there is to know; None is a ring that does not run. Touches neither `host` nor guest memory.

        `host` is where frames come from and go to: the borrowed descriptor of a TAP, or a stream.
        `header_length` is the virtio-net header's, 10 or 12 bytes, and the TAP's vnet header has the same;
        `frame_length_max` is the longest frame that a TAP is expected to deliver, and the longest that is sent on a
        stream, without that header. `offloads` are the
        bits (TUN_F_…, linux/if_tun.h) of what the driver takes over from who sends to it: a frame that asks for more is
        dropped and counted. `packed` is the rings' format.

        Raises:
            ValueError: a ring's size or alignment is wrong, or it lies outside guest memory. Nothing changed.
            RuntimeError: the pair runs.
        """

    def set_positions(self, rx_next_avail: int | None, tx_next_avail: int | None) -> None:
        """Sets where the rings go on. RuntimeError if the pair runs.

        None is for rings of a process that died: a split ring goes on at the used index in guest memory, a packed one
        where its ledger says, and what it was telling the guest is told to the end. A ring whose ledger says what
        cannot be fails.
        """

    def start(self) -> int:
        """Scans both rings and the TAP once, and lets the thread go on from there.

        Both call eventfds are signalled, for a call may have been lost; not so where `set_positions` told a position.
        Gives the CLOCK_MONOTONIC nanoseconds at which the scan began. The first packets are moved before this returns,
        at most 16 each way; releases the GIL.

        Raises:
            RuntimeError: the pair runs already or was never configured. Nothing changed.
        """

    def stop(self) -> tuple[int | None, int | None]:
        """Stops between two packets and gives (rx_next_avail, tx_next_avail), None for a ring that is not configured.

        Afterwards the thread touches no ring and no TAP, every used buffer has been told to the guest, and no
        packet is held. Takes tens of microseconds; releases the GIL. Stopping a stopped pair gives the same answer.
        """

    def positions(self) -> tuple[int | None, int | None]:
        """Where the rings would go on; exact while stopped."""

    def failed(self) -> tuple[bool, bool]:
        """Whether each ring, rx first, stopped for good since it was configured; exact while stopped."""

    def interface_gone(self) -> bool:
        """Whether the TAP's interface was deleted, as the kernel confirmed, or the stream ended, since `configure`.

        No ring has failed by that: what the guest sends is counted as dropped, and nothing is received any more.
        """

    def reserve_waiting(self, position: int | None) -> None:
        """What waits is for a driver whose receive ring goes on at `position` (of a packed ring with the wrap counter).

        None is for no driver that comes. The next start with a receive ring decides, once. The frame that waits for
        buffers and up to 65536 in the TAP are read out, dropped and counted before another driver receives anything.
        The start does not wait for that. RuntimeError if the pair runs.
        """

    def refuse_waiting(self, position: int) -> None:
        """As `reserve_waiting`, for a driver whose receive ring goes on anywhere but at `position`."""

    def is_running(self) -> bool: ...
    def counters(self) -> tuple[int, ...]:
        """What was counted, as `Counters(*pair.counters())` names it. Waits for nothing."""

    def set_counters(self, counters: Sequence[int]) -> None:
        """Counting goes on from these, as many as `counters` gives. RuntimeError if the pair runs."""

    def take_ring_errors(self) -> list[tuple[str, str]]:
        """("rx" or "tx", reason) of each ring that failed since the last call."""

    def take_corrections(self) -> list[tuple[str, int, int]]:
        """("rx" or "tx", where it was told to begin, where it began) of each such ring since the last call.

        Only split rings are corrected: nothing is in flight, so they begin at the used index in guest memory.
        """

    def set_notifiers(self, direction: str, *, call_fd: int | None, error_fd: int | None) -> None:
        """Calls the driver of the "rx" or "tx" ring, and tells it of a failure, by other descriptors from now on.

        Rings that run go on. The former descriptors are not used any more when this returns; a new call descriptor of a
        ring that runs is called once, because a call by the former one may have gone unheard. A ring that is not
        configured has no descriptors.

        Raises:
            ValueError: a descriptor is neither eventfd nor pipe nor UNIX socket. Nothing changed.
        """

    def set_log(self, direction: str, log: tuple[DirtyLog, int | None] | None) -> None:
        """Lets the "rx" or "tx" ring mark what it writes in another log from now on, or in none; see `Ring`.

        Rings that run go on. When this returns, the former log has the marks of all that was written before, and is
        written no more. A ring that cannot mark all that it may write fails. Nothing for one that is not configured.
        """

    def release(self) -> None:
        """Stops and forgets rings, memory and descriptors; the thread is parked. `configure` makes it usable again."""

    def close(self) -> None:
        """Stops, ends the thread and joins it. Idempotent; also done when the object goes away."""

@final
class Chain:
    """A chain of buffers that a device took and has to complete, when it likes.

    Attributes:
        ring: the number of its ring.
        head: what the driver knows it by: its first descriptor in a split ring, its buffer id in a packed one.
        readable: what the driver wrote, at most `CHAIN_DATA_SIZE_MAX` bytes.
        writable: how many bytes the device may write, at most `CHAIN_DATA_SIZE_MAX`.
        was_taken: whoever served the ring before had taken it, and did not complete it as far as the guest knows.
    """

    @property
    def ring(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def readable(self) -> bytes: ...
    @property
    def writable(self) -> int: ...
    @property
    def was_taken(self) -> bool: ...

@final
class CallbackQueues:
    """All rings of a device that Python answers: it takes chains of buffers, and completes them in any order.

    There is no thread in it: the device's own sleeps on `fileno()`, and calls `take` until there is nothing. A chain
    that is taken and not completed is *in flight*, for as long as the device likes. Of a packed ring one chain is in
    flight at a time, so a device that keeps several offers no packed rings.

    Every method may be called by any thread, releases the GIL, and waits for no more than the copying of one chain. A
    ring that the guest broke stops alone: its error eventfd fires, `event_fd` is signalled, and `take_ring_errors`
    tells the reason.

    Args:
        ring_count: how many rings the device has; they are known by their numbers, from 0 on.
        event_fd: a borrowed eventfd, signalled when there is a ring error or a correction to take.
    """

    def __new__(cls, ring_count: int, event_fd: int) -> CallbackQueues: ...
    def configure(
        self,
        *,
        memory: GuestMemory,
        rings: Sequence[Ring | None],
        event_index: bool,
        indirect: bool,
        packed: bool = False,
    ) -> None:
        """Sets all there is to know; None is a ring that is not served. Touches neither guest memory nor a file.

        A ring with the same addresses, size, features and place in the same in-flight file as before goes on: chains
        that were handed out stay in flight, whatever happens to other rings. Every other ring begins anew: what was
        handed out of it is too late, and what the file says is in flight is handed out (again) by `take`. The caller
        has it forgotten (`InFlight.forget`) if the driver set the ring up again. A ring that failed runs again.

        Raises:
            ValueError: a ring's size or alignment is wrong, it lies outside guest memory, it is split and has no
                in-flight file, or there are not `ring_count` places. Nothing changed.
            RuntimeError: the rings run, or are closed.
        """

    def check_positions(self, positions: Sequence[int]) -> None:
        """Whether each ring can go on there; one that is not configured can anywhere. Changes nothing.

        Raises:
            ValueError: one cannot; the text names it. RuntimeError: the rings run.
        """

    def set_positions(self, positions: Sequence[int | None]) -> None:
        """Tells where each ring goes on; passed over for one that is not configured. RuntimeError if the rings run.

        A split ring goes on at the used index in guest memory and as many chains as are in flight, whatever is told
        here; see `take_corrections`. None is for rings of a process that died: a packed ring goes on where its ledger
        says, and every guest is called once at `start`, for a call may have been lost.
        """

    def start(self) -> int:
        """Lets the rings run. Gives the CLOCK_MONOTONIC nanoseconds at which it began.

        Chains in flight that were not handed out here come first from `take`, in the order in which they were taken
        first. What another process completed meanwhile is in flight here no more. What was completed here since `stop`
        is told to the guest now.

        Raises:
            RuntimeError: the rings run already, or were never configured. Nothing changed.
        """

    def stop(self) -> list[int | None]:
        """Stops, and gives where each ring would go on, None for one that is not configured.

        Afterwards neither guest memory nor a kick descriptor is touched, and `take` gives nothing. Chains in flight
        stay in flight. Stopping stopped rings gives the same answer.
        """

    def give_back(self, ring: int) -> int:
        """Returns the chains in flight of a stopped ring to the guest, unused (length 0) and in order; gives how many.

        For a frontend's GET_VRING_BASE, before the position is told: vhost-user has no word for chains in flight unless
        INFLIGHT_SHMFD is negotiated. Chains that were completed since `stop` are completed, not returned. For the
        device all of them are too late from now on. A ring that failed is left alone; a packed one returns nothing,
        because its chain is only taken out of the ring when it is completed.

        Raises:
            RuntimeError: the rings run, or this one is not configured. Nothing changed.
        """

    def positions(self) -> list[int | None]:
        """Where each ring would go on, None for one that is not configured."""

    def is_running(self) -> bool: ...
    def failed(self) -> list[bool]:
        """Whether each ring stopped for good since it was configured."""

    def fail(self, ring: int, reason: str) -> None:
        """The device gives a ring up: it stops for good, as one that the guest broke. ValueError if there is no such
        ring.
        """

    def set_failed(self, ring: int) -> None:
        """Takes note that a ring stopped for good elsewhere, and everybody was told.

        Raises:
            RuntimeError: the rings run, or this one is not configured.
        """

    def take_ring_errors(self) -> list[tuple[int, str]]:
        """(ring, reason) of each that failed since the last call."""

    def take_corrections(self) -> list[tuple[int, int, int]]:
        """(ring, where it was told to begin, where it began) of each such split ring since the last call."""

    def counters(self) -> list[tuple[int, ...]]:
        """What was counted for each ring, as `CallbackCounters(*counters)` names it."""

    def set_counters(self, counters: Sequence[Sequence[int]]) -> None:
        """Counting goes on from these, as many as `counters` gives. RuntimeError if the rings run."""

    def set_notifiers(self, ring: int, *, call_fd: int | None, error_fd: int | None) -> None:
        """Calls the ring's driver, and tells it of a failure, by other descriptors from now on; as `QueuePair` does.

        Raises:
            ValueError: a descriptor is neither eventfd nor pipe nor UNIX socket. Nothing changed.
        """

    def set_log(self, ring: int, log: tuple[DirtyLog, int | None] | None) -> None:
        """As `QueuePair.set_log`."""

    def swap_memory(self, memory: GuestMemory) -> bool:
        """Goes on with `memory` if all rings are in the same place there; False if they are not, and nothing changed.

        Rings may run and chains may be in flight: their buffers are looked for when they are completed. Guest memory
        that was used before is used no more afterwards.
        """

    def fileno(self) -> int:
        """A borrowed descriptor for select, poll and epoll: readable when there may be a chain, or a ring failed.

        It stays readable until `take` gives None. RuntimeError if closed. OSError where the kernel gives none: the
        first call makes it, or `configure` with a ring.
        """

    def take(self) -> Chain | None:
        """The next chain of any ring that runs, each ring in its turn; None if there is none. Waits for nothing.

        A ring of which 1 MiB in `readable` is in flight, or one chain if it is packed, gives none until one is
        completed.
        """

    def complete(self, chain: Chain, data: bytes) -> bool:
        """Writes `data` into the chain's buffers and gives it back to the driver. By any thread, in any order.

        While the rings are stopped it is kept, and done at the next `start` or `give_back`. It is lost with `release`,
        and a successor's device gets the chain (again): a device to which that matters completes nothing between being
        quiesced and being resumed.

        Returns:
            False if it is too late, and nothing was done: the ring failed, was configured anew, or the chain was given
            back, forgotten, or completed by another process.

        Raises:
            ValueError: this chain was completed before, or `data` is longer than `chain.writable`. Nothing changed.
        """

    def release(self) -> None:
        """Stops and forgets rings, memory and descriptors. `configure` makes it usable again."""

    def close(self) -> None:
        """As `release`, for good; closes `fileno()`. Nobody may sleep on that any more. Idempotent."""

# What serves the rings of a daemon. Numbers of several engines stand one after the other, big endian, as they travel.
# Positions are 2 bytes a ring; what failed is 1 byte a ring, 0 or 1; counters are 8 bytes each. A queue pair has two
# rings, rx and tx, and one set of `COUNTER_NAMES`; callback queues have `CALLBACK_COUNTER_NAMES` for each ring.
_Engines: TypeAlias = Sequence[QueuePair | CallbackQueues]

def start_all(engines: _Engines) -> list[int | None]:
    """As `start` for each that is configured and stands still, queue pairs first.

    All rings of queue pairs are scanned before the first thread is woken. Gives for each engine the CLOCK_MONOTONIC
    nanoseconds at which it began, None where it was not started.
    """

def stop_all(engines: _Engines) -> list[bool]:
    """As `stop` for each, callback queues first. All threads are asked before one is waited for. Gives which ran."""

def swap_memory(pairs: list[QueuePair], memory: GuestMemory) -> list[bool]:
    """Lets every configured pair go on with `memory` where both its rings are in the same place there: gives which did.

    Rings that run wait for a moment between two packets. A pair that went on does not use the former memory any more;
    the others are as they were.
    """

def save_all(engines: _Engines) -> tuple[bytes, bytes, bytes]:
    """Positions, what failed, and counters; exact once all are stopped. A ring that is not configured stands at 0."""

def check_positions(engines: _Engines, positions: bytes) -> tuple[int, str] | None:
    """The first engine, by its place, whose rings cannot go on there, and why; None if all can. Changes nothing.

    Raises:
        ValueError: there is not a position for each ring. RuntimeError: an engine runs.
    """

def load_all(engines: _Engines, positions: bytes, failed: bytes, counters: bytes) -> None:
    """Sets what `save_all` gave. A ring that is not configured takes only the counters.

    Raises:
        ValueError: there are more or fewer numbers than that. Nothing changed.
        RuntimeError: an engine runs. Those before it are set.
    """

def recover_all(engines: _Engines) -> None:
    """As `set_positions` with None for each ring that is configured: whoever knew where they stand is dead.

    Raises:
        RuntimeError: an engine runs. Those before it are set.
    """

def save_waiting(engines: _Engines, fd: int) -> bytes:
    """Writes the frame that waits in each queue pair that is stopped into a memory file.

    Returns the length of each, 4 bytes a queue pair, 0 where none waits. Each pair has a place of its own in the file.

    Raises:
        OSError: the file cannot be written.
    """

def load_waiting(engines: _Engines, fd: int, lengths: bytes) -> None:
    """Lets what `save_waiting` wrote wait here.

    Raises:
        ValueError: `lengths` has not a place for each pair (nothing changed), or one is more than `FRAME_SIZE_MAX`.
        OSError: the file has not so many bytes.
        RuntimeError: a pair runs. Those before it are set.
    """

@final
class DriverPair:
    """The other side of one queue pair: a virtio-net driver (the guest's part) between its rings and a TAP.

    For tests, demonstrations and benchmarks: it lays its rings and buffers into guest memory it shares with the
    backend, keeps the receive ring filled, and moves packets between the rings and a TAP that belongs to the "guest".

    Args:
        name: the thread's name.
        memory: the guest's memory; rings and buffers are laid from `guest_address` on.
        guest_address: first byte to use; `layout_size` tells how many are used.
        queue_size: entries of each ring, a power of two up to 1024.
        features: the acknowledged virtio feature bits.
        rx_kick_fd, rx_call_fd, tx_kick_fd, tx_call_fd: borrowed eventfds.
        tap_fd: a borrowed, non-blocking TAP with a vnet header as long as the features say, or None for no pump.

    Raises:
        ValueError: the queue size is not one, or the rings do not lie in one region of guest memory. Nothing was
            written.
        OSError: there is no eventfd left.
    """

    def __new__(
        cls,
        *,
        name: str,
        memory: GuestMemory,
        guest_address: int,
        queue_size: int,
        features: int,
        rx_kick_fd: int,
        rx_call_fd: int,
        tx_kick_fd: int,
        tx_call_fd: int,
        tap_fd: int | None,
    ) -> DriverPair: ...
    @staticmethod
    def layout_size(queue_size: int) -> int:
        """Bytes of guest memory that one pair uses, a multiple of 4096."""

    def ring_addresses(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """((descriptor table, avail ring, used ring) of rx, the same of tx), guest addresses."""

    def start(self) -> None:
        """Fills the receive ring and lets the thread pump."""

    def stop(self) -> None:
        """Stops pumping and joins the thread. Idempotent."""

    def counters(self) -> tuple[int, ...]:
        """What was counted, as `DriverCounters(*pair.counters())` names it.

        Raises:
            RuntimeError: the driver gave up, because the device broke a ring or the TAP is gone.
        """

def forbid_unneeded() -> None:
    """Forbids the system calls that no daemon needs, to all threads and to all programs they run, for good.

    They fail with EPERM from then on. Privileges that a program's file grants are not granted any more.

    Raises:
        OSError: the kernel knows no filters. Nothing is forbidden.
    """

def forbid_programs() -> None:
    """Forbids to run programs and to fork, likewise; threads may be made. Raises as `forbid_unneeded`."""

def keep_capabilities(names: Sequence[str]) -> None:
    """Drops all capabilities but `names` ("CAP_…") from this thread, and from threads that it makes later, for good.

    Raises:
        OSError: there is none of such a name, or the kernel refuses.
    """

def set_dumpable() -> None:
    """Lets processes of the same user look into this one, which the kernel forbids once it changed its user."""
