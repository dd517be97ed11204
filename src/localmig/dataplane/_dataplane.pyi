"""The Rust packet path, as Python sees it.

Descriptors are lent: the caller keeps each one open for as long as the object that got it uses it.
"""

# ruff: noqa: PYI021 - there is no Python source these docstrings could stand in; this file is the contract

from collections.abc import Sequence
from typing import Final, final

__all__ = [
    "COUNTER_NAMES",
    "DRIVER_COUNTER_NAMES",
    "FRAME_SIZE_MAX",
    "STREAM_IN_HAND_MAX",
    "DriverPair",
    "FrameStream",
    "GuestMemory",
    "Ledger",
    "QueuePair",
    "Ring",
    "check_positions",
    "fail_rings",
    "failed_rings",
    "forbid_programs",
    "forbid_unneeded",
    "keep_capabilities",
    "load_all",
    "load_waiting",
    "save_all",
    "save_waiting",
    "set_dumpable",
    "start_all",
    "stop_all",
    "swap_memory",
]

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

    def translate(self, user_address: int, size: int) -> int:
        """The guest address of `size` bytes at a frontend's user address.

        Raises:
            ValueError: no single region holds all of them.
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
class Ring:
    """Where one virtqueue is, plain numbers: `size` entries, three guest addresses, borrowed eventfds.

    The areas are virtio's: descriptor table, available and used ring of a split virtqueue; descriptor ring, driver's
    and device's event suppression of a packed one.

    `next_avail` is the position that was told: of a packed ring the index with the wrap counter in bit 15. None means
    what `ledger` says: a ledger and the ring's number in it. A split ring begins at the used index that stands in guest
    memory in any case; see `QueuePair.take_corrections`.
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

    def release(self) -> None:
        """Stops and forgets rings, memory and descriptors; the thread is parked. `configure` makes it usable again."""

    def close(self) -> None:
        """Stops, ends the thread and joins it. Idempotent; also done when the object goes away."""

def start_all(pairs: list[QueuePair]) -> list[int | None]:
    """As `QueuePair.start` for each pair that is configured and stands still; all are scanned before a thread is woken.

    Gives for each the CLOCK_MONOTONIC nanoseconds at which its scan began, None where it was not started.
    """

def stop_all(pairs: list[QueuePair]) -> list[bool]:
    """As `QueuePair.stop` for each; all threads are asked before one is waited for. Gives which of the pairs ran."""

def swap_memory(pairs: list[QueuePair], memory: GuestMemory) -> list[bool]:
    """Lets every configured pair go on with `memory` where both its rings are in the same place there: gives which did.

    Rings that run wait for a moment between two packets. A pair that went on does not use the former memory any more;
    the others are as they were.
    """

def save_all(pairs: list[QueuePair]) -> tuple[list[int], list[int], list[list[int]]]:
    """(next_avail of each rx ring, of each tx ring, a list for each counter): a place for each pair in every list.

    A ring that is not configured has 0. Counters come in the order of `COUNTER_NAMES`. Exact once the
    pairs are stopped.
    """

def check_positions(pairs: list[QueuePair], rx: Sequence[int], tx: Sequence[int]) -> None:
    """Whether the rings of each pair can go on there: a packed ring stands inside its entries. Changes nothing.

    Raises:
        ValueError: one cannot; the text names its place among the pairs.
        RuntimeError: a pair runs.
    """

def load_all(pairs: list[QueuePair], columns: tuple[Sequence[int], Sequence[int], Sequence[Sequence[int]]]) -> None:
    """Sets what `save_all` gave; the position of a ring that is not configured is passed over.

    Raises:
        ValueError: a list has not a place for each pair, or one for a counter is missing. Nothing changed.
        OverflowError: a number is out of range. Nothing changed.
        RuntimeError: a pair runs. Those before it are set.
    """

def save_waiting(pairs: list[QueuePair], fd: int) -> list[int]:
    """Writes the frame that waits in each pair that is stopped into a memory file.

    Returns the length of each, 0 where none waits. Each pair has a place of its own in the file.

    Raises:
        OSError: the file cannot be written.
    """

def load_waiting(pairs: list[QueuePair], fd: int, lengths: Sequence[int]) -> None:
    """Lets what `save_waiting` wrote wait here.

    Raises:
        ValueError: `lengths` has not a place for each pair (nothing changed), or one is more than `FRAME_SIZE_MAX`.
        OSError: the file has not so many bytes.
        RuntimeError: a pair runs. Those before it are set.
    """

def failed_rings(pairs: list[QueuePair]) -> bytes:
    """Which rings of each pair stopped for good: 1 is rx, 2 is tx, 3 both."""

def fail_rings(pairs: list[QueuePair], failed: Sequence[int]) -> None:
    """Takes note that these rings stopped for good elsewhere; one that is not configured is passed over.

    Raises:
        ValueError: `failed` has not a place for each pair. Nothing changed.
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
