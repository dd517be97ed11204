"""The rings of all NICs of a daemon: they start, stop and travel as one.

Owns:        whether the daemon's rings may run; where they stand and what they counted, as it travels.
Never sees:  what a frontend said; a single ring.
Read next:   devices/virtio_net/device.py, which lays the rings out; dataplane/ for what runs them.

A device for itself would be asked, stopped, written, read and started one after the other, and the guests of all others
would wait meanwhile. Together that is one call for each of these steps, and a column for each number in the stream.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from localmig import dataplane
from localmig.dataplane import FRAME_SIZE_MAX, Counters, GuestMemory, QueuePair
from localmig.device_api.callback_group import CallbackGroup
from localmig.device_api.part import Part
from localmig.errors import KernelError, PeerError
from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd
from localmig.trace import RingsStarted, RingsStopped, Tracer
from localmig.vmstate import Description, array, fd, optional, text, u8, u16, u32, u64

QUEUE_PAIR_COUNT_MAX: Final = 65536
"""Queue pairs of one daemon: each has a thread, and the kernel's default gives a process 32768 of them or fewer."""

POPULATE_SECONDS_MAX: Final = 15.0
"""For the memory of all guests of a handover together, half of what the source waits for. A frontend may announce
terabytes without a page, and looking for pages in them takes a second and a half for each. Memory that comes with a
change of a frontend's gets what is left."""

_NAME_SIZE_MAX: Final = 80
"""A device's id has at most 63 letters, a slash and a queue pair's number follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RingsSetup:
    """What the columns are about.

    Attributes:
        queue_pairs: which is which place of the columns: its device's id, a slash, its number.
        waiting: a memory file, into which the source writes the frames that wait, at the switchover. None where
            descriptors stay home, and the frames in the TAPs as well.
    """

    queue_pairs: tuple[str, ...]
    waiting: OwnedFd | None


Column = tuple[int, ...]
"""A number of each queue pair."""


class RingsState(NamedTuple):
    """What travels inside the downtime: where each ring goes on (0 where it does not run), and what was counted.

    The counters are those of `dataplane.Counters`, in their order.

    Attributes:
        failed: rings that were given up: 1 is rx, 2 is tx, 3 both.
        rx_waiting: bytes of the frame that was read and that the guest has no buffers for yet, 0 where none waits. The
            frame itself is in a file, because what is described before the switchover cannot become longer in it.
    """

    rx_next_avail: Column
    tx_next_avail: Column
    failed: Column
    rx_waiting: Column
    rx_packets: Column
    rx_bytes: Column
    rx_dropped_length: Column
    rx_dropped_stale: Column
    rx_dropped_error: Column
    rx_kicks: Column
    rx_calls: Column
    tx_packets: Column
    tx_bytes: Column
    tx_dropped_interface: Column
    tx_dropped_header: Column
    tx_dropped_memory: Column
    tx_kicks: Column
    tx_calls: Column


_POSITIONS: Final = ("rx_next_avail", "tx_next_avail")
_KINDS: Final = {**dict.fromkeys(_POSITIONS, u16), "failed": u8, "rx_waiting": u32}
_BOTH_FAILED: Final = 3
assert RingsState._fields == (*_POSITIONS, "failed", "rx_waiting", *Counters._fields)

RINGS_SETUP: Final = Description(
    name="virtio-net-queue-pairs",
    version=1,
    oldest_version=1,
    state=RingsSetup,
    fields=(
        array("queue_pairs", lambda name: text(name, size_max=_NAME_SIZE_MAX), count_max=QUEUE_PAIR_COUNT_MAX),
        optional(fd("waiting", kind=FdKind.MEMORY)),
    ),
)

RINGS: Final = Description(
    name="virtio-net-rings",
    version=1,
    oldest_version=1,
    state=RingsState,
    fields=tuple(array(name, _KINDS.get(name, u64), count_max=QUEUE_PAIR_COUNT_MAX) for name in RingsState._fields),
)


class Device(Protocol):
    """A device with queue pairs. It has as many as it says, or none while it is closed."""

    id: str

    @property
    def queue_pair_count(self) -> int:
        """How many it has while it is open."""

    @property
    def queue_pairs(self) -> Sequence[QueuePair]:
        """Those that exist now."""

    @property
    def callback_groups(self) -> Sequence[CallbackGroup]:
        """Its rings that Python code serves."""


class Queues(Part):
    """The rings of a daemon. Every device joins before the first step; in the list of parts it stands behind them.

    Args:
        tracer: where facts go.

    Attributes:
        serving: whether rings may run. A device whose frontend starts a ring asks this.
    """

    id = "*"
    """No object can be called so."""

    setup = RINGS_SETUP
    switchover = RINGS

    def __init__(self, tracer: Tracer) -> None:
        self.serving = False
        self._devices: list[Device] = []
        self._populate_seconds_left = POPULATE_SECONDS_MAX
        self._waiting: OwnedFd | None = None
        """Shared with the other side of a handover, for the frames that wait."""
        self._tracer = tracer

    def join(self, device: Device) -> None:
        """Lets `device` start and stop with the others."""
        self._devices.append(device)

    # -- serving ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Nothing: devices make their queue pairs."""

    def resume(self) -> None:
        """Starts every queue pair whose rings are ready."""
        if not self.serving:
            self.serving = True
            for (device, index), began_ns in zip(self._places(), dataplane.start_all(self._pairs()), strict=True):
                if began_ns is not None:
                    self._tracer.emit(RingsStarted(device=device, queue_pair=index, at_ns=began_ns))
            for group in self._callback_groups():
                if any(position is not None for position in group.positions()) and not group.is_running():
                    group.start()

    def stop(self) -> None:
        """Stops every queue pair between two packets."""
        if self.serving:
            self.serving = False
            for group in self._callback_groups():
                group.stop()
            for (device, index), was_running in zip(self._places(), dataplane.stop_all(self._pairs()), strict=True):
                if was_running:
                    self._tracer.emit(RingsStopped(device=device, queue_pair=index))

    def freeze(self) -> None:
        """Nothing: rings have no control plane."""

    def thaw(self) -> None:
        """Closes the file for frames that wait: it is a handover's, and that is over."""
        self._close_waiting()

    def close(self) -> None:
        """Stops."""
        self.stop()
        self._close_waiting()

    # -- source -------------------------------------------------------------------------------------------------

    def watch_setup(self, changing: Callable[[], None] | None) -> None:
        """Which queue pairs there are does not change. At the end the file for frames that wait is closed."""
        if changing is None:
            self._close_waiting()

    def save_setup(self, *, with_descriptors: bool) -> RingsSetup:
        """Which queue pairs there are."""
        if not with_descriptors:
            self._close_waiting()
        elif self._waiting is None:
            try:
                self._waiting = OwnedFd(os.memfd_create("waiting-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            except OSError as error:
                reason = f"cannot make a file for frames that wait: {error.strerror}"
                raise KernelError(reason, errno=error.errno or 0) from error
        return RingsSetup(queue_pairs=self._names(), waiting=self._waiting)

    def save_switchover(self) -> RingsState:
        """Positions, exact once stopped, and counters; frames that wait go into their file."""
        pairs = self._pairs()
        rx, tx, counted = dataplane.save_all(pairs)
        counters = counted or [[]] * len(Counters._fields)  # where there is no queue pair
        failed = dataplane.failed_rings(pairs)
        waiting = [0] * len(pairs) if self._waiting is None else dataplane.save_waiting(pairs, self._waiting.fileno())
        return RingsState(tuple(rx), tuple(tx), tuple(failed), tuple(waiting), *map(tuple, counters))

    def release(self) -> None:
        """Stops for good; devices let go of their queue pairs."""
        self.stop()
        self._close_waiting()

    # -- destination --------------------------------------------------------------------------------------------

    def check_setup(self, state: RingsSetup) -> None:
        """Whether both sides count the same queue pairs in the same order."""
        names = self._names()
        if state.queue_pairs != names:
            odd = next((pair for pair in zip(state.queue_pairs, names, strict=False) if pair[0] != pair[1]), None)
            difference = f"'{odd[0]}' stands there for '{odd[1]}' here" if odd else "the rest is the same"
            raise PeerError(
                f"the source has {len(state.queue_pairs)} queue pairs, this daemon has {len(names)}: {difference}"
            )

    def populate(self, memory: GuestMemory) -> None:
        """Maps existing pages of a guest that arrives, in what time all of them have."""
        begun_s = time.monotonic()
        memory.populate(self._populate_seconds_left)
        self._populate_seconds_left = max(0.0, self._populate_seconds_left - (time.monotonic() - begun_s))

    def adopt_setup(self, state: RingsSetup) -> None:
        """Takes the file for frames that wait; devices make their queue pairs."""
        self._close_waiting()
        self._waiting = state.waiting

    def check_switchover(self, state: RingsState) -> None:
        """Whether each column has a place for each queue pair, and each ring can stand where it is said to."""
        pairs = self._pairs()
        count = len(pairs)
        for name, column in zip(RingsState._fields, state, strict=True):
            if len(column) != count:
                raise PeerError(f"column {name} of the rings has {len(column)} places, there are {count} queue pairs")
        if any(failed > _BOTH_FAILED for failed in state.failed):
            raise PeerError(
                f"a queue pair has failed rings {max(state.failed):#x}, of which there are {_BOTH_FAILED:#x}"
            )
        if longest := max(state.rx_waiting, default=0):
            if self._waiting is None:
                raise PeerError(f"a frame of {longest} bytes waits for its guest, and no file came that has it")
            if longest > FRAME_SIZE_MAX:
                raise PeerError(f"a frame that waits for its guest has {longest} bytes, limit is {FRAME_SIZE_MAX}")
        try:
            dataplane.check_positions(pairs, state.rx_next_avail, state.tx_next_avail)
        except ValueError as error:
            raise PeerError(str(error)) from error

    def adopt_switchover(self, state: RingsState) -> None:
        """Sets where the rings go on and what was counted, and takes over the frames that wait."""
        pairs = self._pairs()
        rx, tx, failed, waiting, *counters = state
        dataplane.load_all(pairs, (rx, tx, counters))
        dataplane.fail_rings(pairs, failed)
        if self._waiting is not None and any(waiting):
            try:
                dataplane.load_waiting(pairs, self._waiting.fileno(), waiting)
            except OSError as error:
                raise PeerError(f"a frame that waits for its guest is not in its file: {error}") from error

    def recover(self) -> None:
        """The used index in guest memory tells where each ring stands: nothing is ever left in flight."""
        for pair in self._pairs():
            if pair.positions() != (None, None):
                pair.set_positions(None, None)
        for group in self._callback_groups():
            group.engine.set_positions([None] * len(group.vrings))

    def discard(self) -> None:
        """Closes what came; devices drop what they adopted."""
        self._close_waiting()

    # -- inside -------------------------------------------------------------------------------------------------

    def _close_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def _callback_groups(self) -> Iterator[CallbackGroup]:
        return (group for device in self._devices for group in device.callback_groups)

    def _pairs(self) -> list[QueuePair]:
        return [pair for device in self._devices for pair in device.queue_pairs]

    def _places(self) -> Iterator[tuple[str, int]]:
        """Device and number of each of `_pairs`."""
        return ((device.id, index) for device in self._devices for index in range(len(device.queue_pairs)))

    def _names(self) -> tuple[str, ...]:
        return tuple(f"{device.id}/{index}" for device in self._devices for index in range(device.queue_pair_count))
