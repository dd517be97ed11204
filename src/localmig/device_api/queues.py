"""The rings of all devices of a daemon, whatever serves them: they start, stop and travel as one.

Owns:        whether the daemon's rings may run; where they stand and what they counted, as it travels.
Never sees:  what a frontend said; a single ring.
Read next:   queues_state.py for what travels; vhost_user_device.py, which lays the rings out; dataplane/ for what runs
             them.

A device for itself would be asked, stopped, written, read and started one after the other, and the guests of all others
would wait meanwhile. Together that is one call for each of these steps, and few arrays of numbers in the stream.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from localmig import dataplane
from localmig.dataplane import FRAME_SIZE_MAX, CallbackQueues, GuestMemory, QueuePair
from localmig.device_api.part import Part
from localmig.device_api.queues_state import (
    ENGINE_KINDS,
    QUEUES,
    QUEUES_SETUP,
    Arriving,
    QueuesSetup,
    QueuesState,
    check_same_groups,
    check_setup,
)
from localmig.device_api.ring_group import RingGroup
from localmig.errors import KernelError, PeerError
from localmig.fds import OwnedFd
from localmig.trace import RingsStarted, RingsStopped, Tracer

POPULATE_SECONDS_MAX: Final = 15.0
"""For the memory of all guests of a handover together, half of what the source waits for. A frontend may announce
terabytes without a page, and looking for pages in them takes a second and a half for each. Memory that comes with a
change of a frontend's gets what is left."""


class Device(Protocol):
    """A device with rings."""

    id: str

    @property
    def groups(self) -> Sequence[RingGroup]:
        """Its groups of rings in a fixed order, none while it is closed."""


class Queues(Part):
    """The rings of a daemon. Devices join as they are built; in the list of parts it stands behind them.

    Args:
        tracer: where facts go.

    Attributes:
        serving: whether rings may run. A device whose frontend starts a ring asks this.
    """

    id = "*"
    """No object can be called so."""

    setup = QUEUES_SETUP
    switchover = QUEUES

    def __init__(self, tracer: Tracer) -> None:
        self.serving = False
        self._devices: list[Device] = []
        self._populate_seconds_left = POPULATE_SECONDS_MAX
        self._waiting: OwnedFd | None = None
        """Shared with the other side of a handover, for the frames that wait."""
        self._arriving: Arriving | None = None
        """What the source sends, as long as it may send it."""
        self._tracer = tracer
        self._engines_known: list[QueuePair | CallbackQueues] | None = None
        """Looked up before the downtime: a thousand of them take longer than what is done with them."""
        self._places_known: list[tuple[str, int]] | None = None

    def groups_changed(self) -> None:
        """A device has other groups, or none."""
        self._engines_known = self._places_known = None

    def join(self, device: Device) -> None:
        """Lets `device` start and stop with the others."""
        self._devices.append(device)
        self.groups_changed()

    def arrange(self, ids: Sequence[str]) -> None:
        """Keeps the devices among `ids`, in that order; the others leave."""
        by_id = {device.id: device for device in self._devices}
        self._devices = [by_id[each] for each in ids if each in by_id]
        self.groups_changed()

    # -- serving ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Nothing: devices make their groups of rings."""

    def resume(self) -> None:
        """Starts all rings that are ready."""
        if self.serving:
            return
        self.serving = True
        began = dataplane.start_all(self._engines())
        places = self._places()
        self._tracer.emit_made(
            lambda: (
                RingsStarted(device=device, queue_pair=index, at_ns=began_ns)
                for (device, index), began_ns in zip(places, began, strict=True)
                if began_ns is not None
            )
        )

    def stop(self) -> None:
        """Stops all rings: those that Python serves between two chains, the others between two packets."""
        if not self.serving:
            return
        self.serving = False
        ran = dataplane.stop_all(self._engines())
        stopped_ns = time.monotonic_ns()
        places = self._places()
        self._tracer.emit_made(
            lambda: (
                RingsStopped(device=device, queue_pair=index, at_ns=stopped_ns)
                for (device, index), was_running in zip(places, ran, strict=True)
                if was_running
            )
        )

    def freeze(self) -> None:
        """Nothing: rings have no control plane."""

    def thaw(self) -> None:
        """Closes the file for frames that wait: it is a handover's, and that is over."""
        self._end_handover()

    def close(self) -> None:
        """Stops."""
        self.stop()
        self._end_handover()

    # -- source -------------------------------------------------------------------------------------------------

    def watch_setup(self, changing: Callable[[], None] | None) -> None:
        """Which groups there are does not change. At the end the file for frames that wait is closed."""
        if changing is None:
            self._end_handover()

    def save_setup(self, *, with_descriptors: bool) -> QueuesSetup:
        """Which groups of rings there are, and what is counted of them."""
        if not with_descriptors:
            self._end_handover()
        elif self._waiting is None:
            try:
                self._waiting = OwnedFd(os.memfd_create("waiting-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            except OSError as error:
                reason = f"cannot make a file for frames that wait: {error.strerror}"
                raise KernelError(reason, errno=error.errno or 0) from error
        return self._setup(self._waiting)

    def save_switchover(self) -> QueuesState:
        """Positions, exact once stopped, and counters; frames that wait go into their file."""
        engines = self._engines()
        positions, failed, counters = dataplane.save_all(engines)
        if self._waiting is None:
            waiting = bytes(4 * sum(isinstance(engine, QueuePair) for engine in engines))
        else:
            waiting = dataplane.save_waiting(engines, self._waiting.fileno())
        if self._arriving is not None:
            # A rehearsal of what the source will send, which may be of another release.
            counters = bytes(8 * self._arriving.counter_count)
        return QueuesState(positions, failed, waiting, counters)

    def release(self) -> None:
        """Stops for good; devices let go of their rings."""
        self.stop()
        self._end_handover()

    # -- destination --------------------------------------------------------------------------------------------

    def check_setup(self, state: QueuesSetup) -> None:
        """Whether it is consistent in itself. Devices have their rings later: `adopt_setup` compares."""
        check_setup(state)

    def populate(self, memory: GuestMemory) -> None:
        """Maps existing pages of a guest that arrives, in what time all of them have."""
        begun_s = time.monotonic()
        memory.populate(self._populate_seconds_left)
        self._populate_seconds_left = max(0.0, self._populate_seconds_left - (time.monotonic() - begun_s))

    def adopt_setup(self, state: QueuesSetup) -> None:
        """Takes the file for frames that wait. Both sides must have the same groups of rings in the same order."""
        self._end_handover()
        self._waiting = state.waiting
        check_same_groups(state, self._setup(None))
        self._arriving = Arriving(state)

    def check_switchover(self, state: QueuesState) -> None:
        """Whether there is a number for each ring, and each ring can stand where it is said to."""
        assert self._arriving is not None
        self._arriving.check(state)
        if state.waiting.strip(b"\0"):
            longest = max(length for (length,) in struct.iter_unpack(">I", state.waiting))
            if self._waiting is None:
                raise PeerError(f"a frame of {longest} bytes waits for its guest, and no file came that has it")
            if longest > FRAME_SIZE_MAX:
                raise PeerError(f"a frame that waits for its guest has {longest} bytes, limit is {FRAME_SIZE_MAX}")
        if problem := dataplane.check_positions(self._engines(), state.positions):
            place, reason = problem
            raise PeerError(f"'{self._arriving.groups[place]}': {reason}")

    def adopt_switchover(self, state: QueuesState) -> None:
        """Sets where the rings go on and what was counted, and takes over the frames that wait."""
        assert self._arriving is not None
        engines = self._engines()
        dataplane.load_all(engines, state.positions, state.failed, self._arriving.counters(state.counters))
        if self._waiting is not None and state.waiting.strip(b"\0"):
            try:
                dataplane.load_waiting(engines, self._waiting.fileno(), state.waiting)
            except OSError as error:
                raise PeerError(f"a frame that waits for its guest is not in its file: {error}") from error

    def recover(self) -> None:
        """Guest memory, ledgers and in-flight files tell where each ring stands."""
        dataplane.recover_all(self._engines())

    def discard(self) -> None:
        """Closes what came; devices drop what they adopted."""
        self._end_handover()

    # -- inside -------------------------------------------------------------------------------------------------

    def _end_handover(self) -> None:
        self._arriving = None
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def _setup(self, waiting: OwnedFd | None) -> QueuesSetup:
        return QueuesSetup.of(
            (
                (f"{device.id}/{index}", ENGINE_KINDS[type(group.engine)], len(group.vrings))
                for device in self._devices
                for index, group in enumerate(device.groups)
            ),
            waiting,
        )

    def _engines(self) -> list[QueuePair | CallbackQueues]:
        if self._engines_known is None:
            self._engines_known = [group.engine for device in self._devices for group in device.groups]
        return self._engines_known

    def _places(self) -> list[tuple[str, int]]:
        """Device and number of each of `_engines`."""
        if self._places_known is None:
            self._places_known = [(device.id, index) for device in self._devices for index in range(len(device.groups))]
        return self._places_known
