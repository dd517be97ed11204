"""What a device has of one session: the guest memory that it shares, and the memory files beside its rings.

Owns:        DeviceSession: the mapping, the ledger, the in-flight file, the dirty log, why its rings failed, what it is
             to the device.
Never sees:  an engine, another session.
Read next:   vhost_user_device.py, which lays the rings of one of these out; device_state.py for how one travels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from localmig.dataplane import GuestMemory, InFlight, Ledger, Ring
from localmig.device_api.device_state import ConnectionState
from localmig.device_api.session_log import SessionLog
from localmig.errors import KernelError, PeerError
from localmig.fds import OwnedFd, close_all
from localmig.vhost_user.info import SessionInfo
from localmig.vhost_user.memory import borrowed, to_guest_address
from localmig.vhost_user.ownership import Role, Standing
from localmig.vhost_user.protocol import Offer, SessionState
from localmig.vhost_user.session import Session
from localmig.virtio import packed_ring, split_ring

_logger = logging.getLogger(__name__)

POPULATE_SECONDS_MAX: Final = 0.01
"""For memory that a frontend adds while this process serves. The frontend waits for its reply meanwhile, and so do all
others. Ten milliseconds map a gigabyte of pages that exist, or look through gigabytes that have none; the rest comes by
page faults."""

Regions = list[tuple[int, int, int, int, int]]


class DeviceSession:
    """A frontend's session, as its device has it.

    Args:
        device: the id of the device.
        session: the connection.

    Attributes:
        session: the connection.
        memory: what the frontend shares, None where that is nothing.
        log: where its rings mark what they write.
        failures: why a ring failed last, by its number.
        kicks_before: of the first group's rings: the kick descriptor, and how many kicks are not its driver's.
        role: what it is to the device.
        since_ns: since when, by CLOCK_MONOTONIC.
    """

    def __init__(self, device: str, session: Session) -> None:
        self.session = session
        self.memory: GuestMemory | None = None
        self.failures: dict[int, str] = {}
        self.kicks_before: dict[int, tuple[OwnedFd, int]] = {}
        self.role = Role.IDLE
        self.since_ns = time.monotonic_ns()
        self.log = SessionLog()
        self._device = device
        self._ledger: Ledger | None = None
        self._ledger_file: OwnedFd | None = None
        self._in_flight: InFlight | None = None
        self._in_flight_file: OwnedFd | None = None

    @property
    def number(self) -> int:
        """The session's."""
        return self.session.number

    @property
    def state(self) -> SessionState:
        """What the frontend said."""
        return self.session.backend.state

    def __str__(self) -> str:
        peer = self.session.peer
        return f"session {self.number}" + (f" ({peer})" if peer is not None else "")

    def become(self, role: Role) -> None:
        """Takes note of what it is to the device from now on."""
        if role is not self.role:
            self.role, self.since_ns = role, time.monotonic_ns()

    def standing(self) -> Standing:
        """Where it stands, for the rule of who owns."""
        return Standing.of(self.state, self.session.backend.offer)

    def info(self) -> SessionInfo:
        """What there is to see of it."""
        peer = self.session.peer
        age_ns = time.monotonic_ns() - self.since_ns
        return SessionInfo.of(
            self.state,
            number=self.number,
            role=self.role,
            since_s=int(time.time() - age_ns / 1e9),
            path=self.session.path,
            pid=peer.pid if peer is not None and peer.pid else None,
            uid=peer.uid if peer is not None else None,
        )

    # -- guest memory -------------------------------------------------------------------------------------------

    def map_memory(self) -> tuple[GuestMemory | None, int]:
        """The frontend's present table as memory, and how many bytes of pages were mapped; nothing else changes.

        Raises as `adopt_memory`.
        """
        memory = self._mapped(lambda regions: GuestMemory(regions, self.memory))
        # Before any ring meets it, and while all rings run.
        return memory, 0 if memory is None else memory.populate(POPULATE_SECONDS_MAX)

    def adopt_memory(self, former: GuestMemory | None) -> None:
        """Maps the table of a session that came by a handover. What is the same in `former` is kept.

        A frontend that spoilt its memory since it announced it loses its own rings and stops no handover.

        Raises:
            PeerError: the regions or their files cannot be.
            KernelError: this process cannot map them.
        """
        self.memory = self._mapped(lambda regions: GuestMemory.adopt(regions, former))

    def _mapped(self, mapped: Callable[[Regions], GuestMemory]) -> GuestMemory | None:
        if not self.state.regions:
            return None
        try:
            return mapped(borrowed(self.state.regions))
        except ValueError as error:
            raise PeerError(f"guest memory: {error}") from error
        except OSError as error:
            raise KernelError(f"cannot map guest memory: {error.strerror}", errno=error.errno or 0) from error

    # -- memory files -------------------------------------------------------------------------------------------

    def make_records(self, *, keeps_chains: bool) -> None:
        """Makes the files that its rings need from the first chain on, as far as they are not there.

        Args:
            keeps_chains: whether Python code serves rings of it, and may keep what it takes of them.

        Raises:
            KernelError: one cannot be made or mapped.
        """
        count = len(self.state.vrings)
        try:
            if self.state.is_packed and self._ledger_file is None:
                self._ledger_file = OwnedFd(Ledger.create(count))
            if keeps_chains and self._in_flight_file is None:
                self._in_flight_file = OwnedFd(InFlight.create(count))
        except OSError as error:
            raise KernelError(f"cannot make a memory file: {error.strerror}", errno=error.errno or 0) from error
        self._map_records()

    def adopt_records(self, connection: ConnectionState) -> None:
        """Takes the files over that came by a handover. Raises PeerError or KernelError where they cannot be mapped."""
        self._ledger_file, self._in_flight_file = connection.ledger, connection.in_flight
        self._map_records()
        self.log.adopt(self.state)

    def _map_records(self) -> None:
        count = len(self.state.vrings)
        try:
            if self._ledger_file is not None and self._ledger is None:
                self._ledger = Ledger(self._ledger_file.fileno(), count)
            if self._in_flight_file is not None and self._in_flight is None:
                self._in_flight = InFlight(self._in_flight_file.fileno(), count)
        except ValueError as error:
            raise PeerError(str(error)) from error
        except OSError as error:
            raise KernelError(f"cannot map a memory file: {error.strerror}", errno=error.errno or 0) from error

    def renew_log(self) -> None:
        """Maps the log that the frontend announced. PeerError: no ring can run with it."""
        reason = self.log.renew(self.state)
        if reason is not None:
            raise PeerError(reason)

    def forget_former_log(self) -> None:
        """A log that the frontend took away, by stopping its rings, is not held any more."""
        if self.state.log is None:
            self.log.forget()

    def write_positions(self, vrings: Iterable[int]) -> None:
        """Writes into the ledger where rings go on that may not run for a while, and may run elsewhere next."""
        if self.state.is_packed and self._ledger is not None:
            for vring in vrings:
                self._ledger.settle(vring, self.state.vrings[vring].next_avail)

    def forget(self, vring: int) -> bool:
        """The driver sets a stopped ring up again, so nothing of it is in flight. Whether that was remembered."""
        if self._in_flight is None:
            return False
        self._in_flight.forget(vring)
        return True

    def rewind(self) -> None:
        """Every ring is back at the beginning: stopping it wrote down where it stood."""
        for vring in self.state.vrings:
            vring.next_avail = 0

    # -- rings --------------------------------------------------------------------------------------------------

    def ring(self, index: int, offer: Offer) -> Ring | None:
        """A ring as an engine is told of it, None where it is not to run."""
        state = self.state
        vring = state.vrings[index]
        if not offer.serves(index, state.vrings) or vring.failed or state.awaits_log:
            return None
        assert vring.kick is not None, index
        sizes = (packed_ring if state.is_packed else split_ring).part_sizes(vring.size)
        try:
            descriptor_area, driver_area, device_area = (
                to_guest_address(state.regions, address, size)
                for address, size in zip(
                    (vring.descriptor_area, vring.driver_area, vring.device_area), sizes, strict=True
                )
            )
        except PeerError as error:
            # A frontend may take memory away and bring it back in another shape: until then the ring stands still.
            _logger.info("device '%s': vring %s stands still: %s", self._device, index, error)
            return None
        return Ring(
            size=vring.size,
            descriptor_area=descriptor_area,
            driver_area=driver_area,
            device_area=device_area,
            kick_fd=vring.kick.fileno(),
            call_fd=None if vring.call is None else vring.call.fileno(),
            error_fd=None if vring.error is None else vring.error.fileno(),
            next_avail=vring.next_avail,
            ledger=None if self._ledger is None else (self._ledger, index),
            in_flight=None if self._in_flight is None else (self._in_flight, index),
            log=self.log.of(state, index),
        )

    def is_untouched(self, index: int, position: int) -> bool:
        """Whether the driver has written nothing into a ring that stands at `position`, as far as memory tells."""
        state, vring = self.state, self.state.vrings[index]
        ring = packed_ring if state.is_packed else split_ring
        area, offset = ring.TOUCHED
        address = (vring.descriptor_area, vring.driver_area, vring.device_area)[area] + offset
        try:
            assert self.memory is not None, index
            written = self.memory.read(to_guest_address(state.regions, address, 2), 2)
        except (PeerError, ValueError, OSError):
            return False  # its ring fails or stands still, and that is told
        return position == ring.START and not any(written)

    # -- a handover ---------------------------------------------------------------------------------------------

    def save(self, *, was_succeeded: bool) -> ConnectionState:
        """The session as it travels; descriptors are lent."""
        return ConnectionState(
            number=self.number,
            path=self.session.path,
            since_ns=self.since_ns,
            was_succeeded=was_succeeded,
            connection=self.session.connection,
            session=self.state,
            ledger=self._ledger_file,
            in_flight=self._in_flight_file,
        )

    def drop(self) -> None:
        """Lets go of memory and files; the session has its own descriptors. Idempotent."""
        self.memory = None
        self.log.forget()
        self._ledger = self._in_flight = None
        close_all((self._ledger_file, self._in_flight_file))
        self._ledger_file = self._in_flight_file = None
