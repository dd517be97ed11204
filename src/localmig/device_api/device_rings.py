"""The rings of a device: groups of them, each with its engine, laid out for the one session that owns.

Owns:        DeviceRings: when a group stops, where it is laid out, what became of its rings.
Never sees:  a session that does not own, vhost-user messages.
Read next:   ring_group.py for the engines, device_session.py for what they are laid out with, queues.py for how all
             rings of a daemon start and stop together.

A group of rings runs while three things hold: the frontend wants one of its rings served, guest memory holds that ring,
and this process serves. The first two are decided in `apply` alone; the third belongs to all devices together.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections.abc import Iterator, Sequence

from localmig.dataplane import Ring
from localmig.device_api.device_hooks import DeviceHooks
from localmig.device_api.device_session import DeviceSession
from localmig.device_api.queues import Queues
from localmig.device_api.ring_group import Layout, RingGroup
from localmig.errors import ConfigError, PeerError
from localmig.fds import OwnedFd
from localmig.trace import MemoryMapped, RingCorrected, RingFailed, RingsStarted, RingsStopped, Tracer
from localmig.vhost_user.info import VringInfo
from localmig.vhost_user.message import VRING_INDEX_MAX

_logger = logging.getLogger(__name__)


class DeviceRings:
    """The groups of rings of a device.

    Args:
        device: whose they are.
        queues: says whether they may run.
        tracer: where facts go.

    Attributes:
        groups: none while the device is closed.
        session: the one that owns, for which they are laid out; None where none does.
    """

    def __init__(self, device: DeviceHooks, queues: Queues, tracer: Tracer) -> None:
        self.groups: list[RingGroup] = []
        self.session: DeviceSession | None = None
        self._device = device
        self._queues = queues
        self._tracer = tracer
        self._events: OwnedFd | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    def make(self, vring_count: int) -> None:
        """Makes the groups. ConfigError: so many rings cannot be. KernelError: there is no room for one."""
        if vring_count > VRING_INDEX_MAX + 1:
            raise ConfigError(
                f"device '{self._device.id}' has {vring_count} rings, vhost-user can name {VRING_INDEX_MAX + 1}"
            )
        self._events = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        # Into the list one after the other: what was made is closed with the device.
        for group in self._device.make_groups(self._events.fileno()):
            self.groups.append(group)
        self._queues.groups_changed()

    def watch(self) -> None:
        """Reports from now on what becomes of rings."""
        assert self._events is not None
        asyncio.get_running_loop().add_reader(self._events.fileno(), self._report)

    def close(self) -> None:
        """Ends all of them. Idempotent."""
        for group in self.groups:
            group.close()
        self.groups = []
        self.session = None
        self._queues.groups_changed()
        if self._events is not None:
            asyncio.get_running_loop().remove_reader(self._events.fileno())
            self._events.close()
            self._events = None

    # -- what is asked ------------------------------------------------------------------------------------------

    def group_of(self, vring: int) -> RingGroup:
        """The group that a ring is in."""
        return next(group for group in self.groups if vring in group.vrings)

    def infos(self, session: DeviceSession) -> Iterator[VringInfo]:
        """Each ring of a session, as its group has it if the session owns."""
        state, offer = session.state, self._device.offer_made
        for group in self.groups:
            # Not `failed()`: what it knows and nobody has reported yet has no reason to tell either.
            positions = group.positions() if session is self.session else [None] * len(group.vrings)
            for index, position in zip(group.vrings, positions, strict=True):
                if not offer.has(index, state.features_acked):
                    continue
                vring = state.vrings[index]
                yield VringInfo(
                    index=index,
                    size=vring.size,
                    started=vring.started,
                    enabled=vring.enabled,
                    running=position is not None and self._device.moves(group) and not vring.failed,
                    position=vring.next_avail if position is None else position,
                    failed=vring.failed,
                    # Where it failed before a handover, the source's log has the reason.
                    failure=session.failures.get(index) if vring.failed else None,
                )

    def kicks(self) -> dict[int, int]:
        """How often each ring of the first group was kicked."""
        first = self.groups[0]
        return dict(zip(first.vrings, first.kicks(), strict=True))

    def is_untouched(self) -> bool:
        """Whether the first group runs and the driver has written into none of its rings, as far as memory tells."""
        session = self.session
        if session is None or session.memory is None or not self.groups or not self.groups[0].is_running():
            return False
        first = self.groups[0]
        if any(session.state.vrings[index].failed for index in first.vrings):
            return False
        return all(
            position is not None and session.is_untouched(index, position)
            for index, position in zip(first.vrings, first.positions(), strict=True)
        )

    # -- what the session says ----------------------------------------------------------------------------------

    def apply(self, group: RingGroup, *, anew: int | None = None) -> None:
        """Stops the group, lays it out as the session says, lets it run if it shall.

        `anew` is a ring of it that the frontend sets up again, so that a failure until now is over.
        """
        self._device.before_stop(group)
        self.stop(group, anew=anew)
        if (session := self.session) is not None:
            stopped = [vring for vring in group.vrings if not session.state.vrings[vring].started]
            self.give_back(group, [vring for vring in stopped if vring != anew])
            if anew is not None and (anew in stopped or not _goes_on(group, anew)):
                self.forget(anew)
        self._device.after_stop(group)
        self.lay_out(group)
        self._device.after_layout(group)
        if session is not None:
            session.write_positions(group.vrings)
        if group is self.groups[0]:
            self.note_kicks()
        if self._queues.serving:
            self._start(group)

    def lay_out(self, group: RingGroup) -> None:
        """Tells the stopped group where its rings are, or that it has none. PeerError: they cannot be there."""
        session = self.session
        if session is not None:
            session.forget_former_log()
        rings: tuple[Ring | None, ...] = ()
        if session is not None and session.memory is not None and self._device.can_serve:
            rings = tuple(session.ring(vring, self._device.offer_made) for vring in group.vrings)
        if not any(rings):
            group.release()
            return
        assert session is not None, group.name
        assert session.memory is not None, group.name
        self._device.before_layout(group)
        try:
            group.lay_out(
                Layout(
                    memory=session.memory,
                    rings=rings,
                    features=session.state.features_acked,
                    packed=session.state.is_packed,
                )
            )
        except ValueError as error:
            raise PeerError(f"{group.name}: {error}") from error

    def stop(self, group: RingGroup, *, anew: int | None = None) -> None:
        """Stops the group and writes its positions into the session's state. `anew` as in `apply`."""
        session = self.session
        was_running = group.is_running()
        positions = group.stop()
        for vring, position, failed in zip(group.vrings, positions, group.failed(), strict=True):
            if session is None or position is None:
                continue
            if vring != anew or (session.state.vrings[vring].started and not failed):
                session.state.vrings[vring].next_avail = position
        self._note_failed(group, anew=anew)
        if was_running:
            self._tracer.emit(RingsStopped(device=self._device.id, queue_pair=self.groups.index(group)))

    def give_back(self, group: RingGroup, vrings: Sequence[int]) -> None:
        """The frontend stopped these rings of a stopped group, and is told next where they stand."""
        for vring, position in zip(group.vrings, group.positions(), strict=True):
            if vring in vrings and position is not None:
                group.give_back(vring)
                self._device.ring_left(vring)

    def forget(self, vring: int) -> None:
        """The driver sets a stopped ring up again: its memory is the guest's, and nothing of it is in flight."""
        if self.session is not None and self.session.forget(vring):
            self._device.ring_left(vring)

    def set_notifiers(self, vring: int) -> None:
        """Lets a ring call its driver by the descriptors that the session has now; it goes on meanwhile."""
        assert self.session is not None, vring
        state, group = self.session.state.vrings[vring], self.group_of(vring)
        call, error = (None if fd is None else fd.fileno() for fd in (state.call, state.error))
        try:
            group.set_notifiers(vring, call_fd=call, error_fd=error)
        except ValueError as reason:
            raise PeerError(f"{group.name}: {reason}") from reason

    def change_memory(self) -> None:
        """Goes on with the session's new table. Groups whose rings stay where they are do not stop for it.

        Raises as `DeviceSession.map_memory`; then nothing changed.
        """
        session = self.session
        assert session is not None
        memory, populated = session.map_memory()
        swapped = [memory is not None and group.swap_memory(memory) for group in self.groups]
        # From here on the former memory has no user but the groups that were not swapped.
        session.memory = memory
        undisturbed = tuple(
            index
            for index, (group, done) in enumerate(zip(self.groups, swapped, strict=True))
            if done and not self._awaits_memory(session, group)
        )
        for index, group in enumerate(self.groups):
            if index not in undisturbed:
                self.apply(group)
        self._tracer.emit(
            MemoryMapped(
                device=self._device.id,
                regions=len(session.state.regions),
                populated_bytes=populated,
                undisturbed_queue_pairs=undisturbed,
            )
        )

    def set_log(self) -> None:
        """Marks go to the session's new log. PeerError where none can: the rings that need it have stopped."""
        assert self.session is not None
        try:
            self.session.renew_log()
        finally:
            self.change_logging()

    def change_logging(self) -> None:
        """Marks go where the session says now. A group stops only if its rings have to wait for a log, or had to."""
        session = self.session
        assert session is not None
        vrings, offer = session.state.vrings, self._device.offer_made
        for group in self.groups:
            laid_out = [position is not None for position in group.positions()]
            can_run = [session.ring(vring, offer) is not None for vring in group.vrings]
            rings = zip(group.vrings, laid_out, can_run, strict=True)
            if any(is_there != may for vring, is_there, may in rings if not vrings[vring].failed):
                self.apply(group)
                continue
            for vring, is_there in zip(group.vrings, laid_out, strict=True):
                if is_there:
                    group.set_log(vring, session.log.of(session.state, vring))

    def _awaits_memory(self, session: DeviceSession, group: RingGroup) -> bool:
        """Whether a ring of the group was not in the former memory, and is in the present one."""
        offer = self._device.offer_made
        rings = zip(group.vrings, group.positions(), strict=True)
        return any(position is None and session.ring(vring, offer) is not None for vring, position in rings)

    def _start(self, group: RingGroup) -> None:
        if any(position is not None for position in group.positions()):
            began_ns = group.start()
            self._tracer.emit(RingsStarted(device=self._device.id, queue_pair=self.groups.index(group), at_ns=began_ns))
            # The frontend told the position. Cloud Hypervisor always tells another, so that is no news for people.
            self.report_corrections(group, logging.DEBUG)

    # -- what becomes of them -----------------------------------------------------------------------------------

    def note_kicks(self) -> None:
        """A new kick descriptor is a new life of a ring. QEMU makes one with a kick in it, whatever the driver does."""
        session = self.session
        if session is None:
            return
        for (vring, count), position in zip(self.kicks().items(), self.groups[0].positions(), strict=True):
            kick = session.state.vrings[vring].kick
            # Only of a ring that is laid out it is known what the descriptor is: a file's server may hold poll(2) up.
            if kick is None or position is None:
                continue
            if vring not in session.kicks_before or session.kicks_before[vring][0] is not kick:
                pending = select.poll()
                pending.register(kick.fileno(), select.POLLIN)
                session.kicks_before[vring] = kick, count + len(pending.poll(0))

    def report_corrections(self, group: RingGroup, level: int) -> list[str]:
        """Reports rings that began elsewhere than they were told, and returns the same as text."""
        texts = []
        for vring, told, begun in group.take_corrections():
            name = self._device.ring_name(vring)
            text = f"{name} goes on at {begun}, where its used index stands, and was told {told}"
            _logger.log(level, "device '%s': %s", self._device.id, text)
            self._tracer.emit(RingCorrected(device=self._device.id, vring=vring, told=told, begun=begun))
            texts.append(text)
        return texts

    def _note_failed(self, group: RingGroup, *, anew: int | None = None) -> None:
        """Writes into the session's state which rings of a group stopped for good. `anew` as in `apply`."""
        if self.session is None:
            return
        vrings = self.session.state.vrings
        for vring, position, failed in zip(group.vrings, group.positions(), group.failed(), strict=True):
            # One that the frontend stopped meanwhile begins anew.
            if failed and position is not None and vrings[vring].started and vring != anew:
                vrings[vring].failed = True
                vrings[vring].next_avail = position

    def _report(self) -> None:
        assert self._events is not None
        os.read(self._events.fileno(), 8)
        for group in self.groups:
            # All groups started together, so a handover told the positions, or this process itself, which went on.
            self.report_corrections(group, logging.WARNING)
            for vring, reason in group.take_errors():
                if self.session is not None:
                    self.session.failures[vring] = reason
                _logger.warning("device '%s': %s stopped: %s", self._device.id, self._device.ring_name(vring), reason)
                self._tracer.emit(RingFailed(device=self._device.id, vring=vring, reason=reason))
            self._note_failed(group)
        self._device.rings_reported()


def _goes_on(group: RingGroup, vring: int) -> bool:
    """Whether a ring of a stopped group, which was given another kick descriptor, is the one that ran."""
    index = group.vrings.index(vring)
    return group.positions()[index] is not None and not group.failed()[index]
