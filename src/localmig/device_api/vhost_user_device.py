"""A device served over vhost-user, whatever it is: what frontends say becomes rings that an engine serves.

Owns:        the sessions of a device and which of them owns; their part of a handover.
Never sees:  vhost-user bytes, what is in a chain, the migration stream.
Read next:   vhost_user/protocol.py for the events, vhost_user/ownership.py for the rule of who owns, device_session.py
             for what there is of each session, device_rings.py for the rings, device_hooks.py for what a device says,
             devices/virtio_net/ for a device.

A subclass says what it is: which features and rings it offers, which engine serves each group of rings, what its
configuration space reads. It knows the session that owns and no other one: what another session says is kept in that
session's state, and reaches the subclass once that session owns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from localmig import trace
from localmig.contact import ConnectTo, Contact, ListenAt
from localmig.device_api import moved_state
from localmig.device_api.callback_group import CallbackGroup
from localmig.device_api.device_hooks import DeviceHooks
from localmig.device_api.device_info import DeviceInfo
from localmig.device_api.device_rings import DeviceRings
from localmig.device_api.device_session import DeviceSession
from localmig.device_api.device_state import DEVICE, DeviceState, SocketState, check_acked, check_socket
from localmig.device_api.notes import NOT_SHARED, Notes, held_note, set_up_notes
from localmig.device_api.own_state import OwnState
from localmig.device_api.part import Part
from localmig.device_api.queues import Queues
from localmig.device_api.ring_group import RingGroup
from localmig.errors import LocalmigError, NotFoundError, PeerError
from localmig.trace import DeviceNoted, MemoryMapped, OwnerChanged, SessionClosed, SessionOpened, Tracer
from localmig.vhost_user.info import SessionInfo, VringInfo
from localmig.vhost_user.ownership import Ownership, Role, Standing
from localmig.vhost_user.protocol import (
    LOG_ALL,
    DeviceReset,
    Event,
    FeaturesSet,
    LoggingChanged,
    LogSet,
    MemoryChanged,
    NotifiersChanged,
    Offer,
    RequestRefused,
    SessionState,
    StateSent,
    StateWanted,
    VringChanged,
)
from localmig.vhost_user.session import Endpoint, Session
from localmig.vmstate import Description

_logger = logging.getLogger(__name__)


class VhostUserDevice(DeviceHooks, Part):
    """A device with one vhost-user socket.

    Args:
        id: the user's name for it.
        socket: where and how frontends come.
        local_migration: whether its descriptors may move.
        queues: what starts and stops its rings together with those of all others.
        tracer: where facts go.

    Attributes:
        own_state: describes what it has to hand over besides sessions and rings, None for nothing. What it is
            travels by `save`, `check` and `load`.
        own_parts: the parts that stand before it in a handover.
    """

    setup = DEVICE
    own_state: ClassVar[Description[Any] | None] = None

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the user's word
        socket: ListenAt | ConnectTo,
        local_migration: bool,
        queues: Queues,
        tracer: Tracer,
    ) -> None:
        self.id = id
        self.tracer = tracer
        self.own_parts: tuple[Part, ...] = () if self.own_state is None else (OwnState(self, self.own_state),)
        self._socket = socket
        self._local_migration = local_migration
        self._queues = queues
        self._endpoint: Endpoint | None = None
        self._sessions: dict[int, DeviceSession] = {}
        self._ownership = Ownership()
        self._rings = DeviceRings(self, queues, tracer)
        self.callback_groups: list[CallbackGroup] = []
        """Those of its groups that Python code serves."""
        self._config_there = b""
        self._notes = Notes(self.find_notes, self._may_need_note, self._tell_note)
        self._closed_because: str | None = None
        queues.join(self)

    # -- what a device may ask ------------------------------------------------------------------------------------

    @property
    def config_there(self) -> bytes:
        """The configuration space as the source had it, empty where there was none."""
        return self._config_there

    @property
    def groups(self) -> Sequence[RingGroup]:
        """Its groups of rings, none while it is closed."""
        return self._rings.groups

    @property
    def is_open(self) -> bool:
        """Whether frontends can come, here or in the process that serves."""
        return self._endpoint is not None

    @property
    def is_serving(self) -> bool:
        """Whether rings may run."""
        return self._queues.serving

    @property
    def offer_made(self) -> Offer:
        """What sessions are offered here while it is open."""
        assert self._endpoint is not None, self.id
        return self._endpoint.offer

    @property
    def session_state(self) -> SessionState | None:
        """The state of the session that owns, None while none does."""
        return self._rings.session.state if self._rings.session is not None else None

    def seen_states(self) -> list[SessionState]:
        """The state of the session that owns; while none does, those of all sessions."""
        owner = self._rings.session
        return [each.state for each in (self._sessions.values() if owner is None else (owner,))]

    def is_served(self, vring: int) -> bool:
        """Whether a ring is the device's to serve."""
        state = self.session_state
        return state is not None and self.offer_made.serves(vring, state.vrings)

    def change_config(self) -> None:
        """`config_space` reads something else now: frontends that can hear of that do."""
        if self._endpoint is not None:
            self._endpoint.change_config(self.config_space())

    def note_change(self) -> None:
        """Something changes next that a successor must know."""
        if self._endpoint is not None:
            self._endpoint.note_change()

    def apply(self, group: RingGroup) -> None:
        """Lays a group out again, as the session and what is behind the device have it now. Raises as `on_event`."""
        self._rings.apply(group)

    def apply_all(self) -> None:
        """Lays out all groups again. Raises as `on_event`."""
        for group in self.groups:
            self._rings.apply(group)

    def stop_groups(self, groups: Iterable[RingGroup]) -> None:
        """Stops the rings of groups, which are laid out and start again next."""
        for group in groups:
            self._rings.stop(group)

    def lay_out_again(self) -> None:
        """As when the frontend sets everything up; a session that cannot go on ends."""
        owner = self._rings.session
        try:
            if owner is not None:
                self.features_changed()
            self.apply_all()
        except LocalmigError as error:
            for group in self.groups:
                group.release()  # what is behind them may close next
            _logger.warning("device '%s': %s", self.id, error)
            if owner is not None:
                # Not now: this may be in the middle of one of its messages.
                asyncio.get_running_loop().call_soon(owner.session.close, str(error))

    # -- serving ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Listens, or sees to a connection. What it refers to is open already."""
        self._make_groups()
        contacts: dict[str, Contact] = {}
        try:
            for plan in self._socket.each():
                contacts[plan.path] = plan.open()
            self._endpoint = self._make_endpoint(contacts)
        except BaseException:
            for contact in contacts.values():
                contact.close()
            self._drop_groups()
            raise

    def resume(self) -> None:
        """Nothing: its rings start with all others, see `Queues`."""

    def stop(self) -> None:
        """Nothing, as `resume`."""

    def freeze(self) -> None:
        """Leaves socket and connections alone from now on."""
        self._notes.stop()
        if self._endpoint is not None:
            self._endpoint.freeze()

    def thaw(self) -> None:
        """Serves socket and connections."""
        assert self._endpoint is not None, self.id
        for contact in self._endpoint.contacts.values():
            contact.claim()
        self.thawing()
        self._endpoint.thaw()
        self._rings.watch()
        self._rings.note_kicks()
        self._decide_owner()
        self._notes.expect()

    def close(self) -> None:
        """Ends the sessions, removes the socket."""
        if self._endpoint is not None:
            self._endpoint.freeze()
            # The one that owns last, so that no other one gets the rings for a moment.
            for each in sorted(self._sessions.values(), key=lambda each: each is self._rings.session):
                each.session.close("the device was closed")
            self._endpoint.close()
            self._endpoint = None
        self._drop_groups()

    def close_session(self, number: int) -> None:
        """Ends a session by the operator's word.

        Raises:
            NotFoundError: the device has no session of that number.
        """
        if number not in self._sessions:
            known = ", ".join(f"{each.number} ({each.role})" for each in self._sessions.values()) or "none"
            raise NotFoundError(f"Device '{self.id}' has no session {number}, there is {known}")
        self._sessions[number].session.close("ended by the operator")

    def add_socket(self, path: str) -> None:
        """Connects to a second address. KernelError: it cannot, and nothing was changed."""
        assert isinstance(self._socket, ConnectTo), self.id
        assert self._endpoint is not None, self.id
        wanted = replace(self._socket, second_path=path)
        *_, plan = wanted.each()
        contact = plan.open()
        self._socket = wanted
        self._endpoint.add_contact(path, contact)

    def remove_socket(self, path: str) -> None:
        """Connects to the other address only. The session that came by this one goes on."""
        assert isinstance(self._socket, ConnectTo), self.id
        assert self._endpoint is not None, self.id
        (left,) = (plan for plan in self._socket.each() if plan.path != path)
        self._socket = left
        self._endpoint.remove_contact(path)

    # -- to be seen ---------------------------------------------------------------------------------------------

    @property
    def socket(self) -> ListenAt | ConnectTo:
        """Where and how frontends come."""
        return self._socket

    def info(self) -> DeviceInfo:
        """What every device shows; a subclass returns one with more members, which its type's `info` declares."""
        return DeviceInfo(**self.facts())

    def facts(self) -> dict[str, Any]:
        """The members of a `DeviceInfo`, for one that has more."""
        return {
            "socket": self.socket.path,
            "second_socket": self.socket.second_path if isinstance(self.socket, ConnectTo) else None,
            "server": isinstance(self.socket, ListenAt),
            "sessions": tuple(each.info() for each in self._sessions.values()),
            "session": self.session_info(),
            "vrings": tuple(self.vring_infos()),
            "notes": self.notes(),
        }

    @property
    def _shown(self) -> DeviceSession | None:
        """The session that is shown as the device's: the one that owns; while none does, the one that came last."""
        return self._rings.session or next(reversed(self._sessions.values()), None)

    def session_info(self) -> SessionInfo | None:
        """The session that owns, as the frontend told it; while none does, the one that came last."""
        return None if self._shown is None else self._shown.info()

    def vring_infos(self) -> Iterator[VringInfo]:
        """Each ring of that session; none without one."""
        if self._shown is not None:
            yield from self._rings.infos(self._shown)

    def notes(self) -> tuple[str, ...]:
        """What keeps it from working, each with what to do."""
        return self._notes.get()

    # -- source -------------------------------------------------------------------------------------------------

    def local_migration_blocker(self) -> str | None:
        """Only the user's word keeps this device's descriptors home."""
        return None if self._local_migration else "local-migration=off"

    def watch_setup(self, changing: Callable[[], None] | None) -> None:
        """What changes is what its frontends say, and which there are."""
        if self._endpoint is not None:
            self._endpoint.watch(changing)

    def frontend_waits(self) -> bool:
        """Whether a frontend waits for an answer, or to be accepted."""
        return self._endpoint is not None and self._endpoint.frontend_waits()

    def save_setup(self, *, with_descriptors: bool) -> DeviceState:
        """The sessions as they stand; their descriptors stay this device's."""
        assert self._endpoint is not None, self.id
        state = self.session_state
        socket = None
        if with_descriptors:
            socket = SocketState(
                listener=self._endpoint.contacts[self._socket.path].save(),
                connections=tuple(
                    each.save(was_succeeded=each.number in self._ownership.succeeded)
                    for each in self._sessions.values()
                ),
                opened_count=self._endpoint.opened_count,
                owner=self._ownership.owner or 0,
            )
        # All of them were told the same.
        told = next((each.session.backend.config for each in self._sessions.values()), self._endpoint.config)
        features_acked = 0 if state is None else state.features_acked & ~LOG_ALL
        return DeviceState(features_acked=features_acked, config=told, socket=socket)

    def release(self) -> None:
        """Drops socket, connections, memory and rings: another process serves them."""
        if self._endpoint is not None:
            self._endpoint.release()
            self._endpoint = None
        self._drop_groups()

    # -- destination --------------------------------------------------------------------------------------------

    def check_setup(self, state: DeviceState) -> None:
        """Whether this daemon can serve the sessions: their features, their rings, their memory tables."""
        # What is behind the device is here later: `adopt_setup` looks again.
        offered = self.possible_offer()
        try:
            check_acked(state, offered)
            self.check_config(state.config)
            if state.socket is not None:
                self._socket.check(state.socket.listener)
                check_socket(state.socket, offered)
        except PeerError as error:
            raise PeerError(f"device '{self.id}': {error}") from error

    def adopt_setup(self, state: DeviceState) -> None:
        """Takes over socket and sessions, maps guest memory and lays out the rings, parked.

        Without descriptors it listens beside the path, which is the source's until `thaw` claims it. Again: groups
        stay, and so does memory that is the same.
        """
        former = {each.number: each.memory for each in self._sessions.values()}
        self._drop_adopted()
        if not self.groups:
            self._make_groups()
        self._config_there = state.config
        try:
            check_acked(state, self.offer())
            if state.socket is None:
                self._endpoint = self._make_endpoint({plan.path: plan.open_beside() for plan in self._socket.each()})
                return
            self._endpoint = self._make_endpoint(
                {plan.path: plan.adopt(state.socket.listener) for plan in self._socket.each()}
            )
            self._adopt_sessions(self._endpoint, state.socket)
            for each in self._sessions.values():
                each.adopt_memory(former.get(each.number))
                if each.memory is not None:
                    self._queues.populate(each.memory)
            for group in self.groups:
                self._rings.lay_out(group)
        except PeerError as error:
            raise PeerError(f"device '{self.id}': {error}") from error

    def _adopt_sessions(self, endpoint: Endpoint, socket: SocketState) -> None:
        for connection in socket.connections:
            session = endpoint.adopt_session(
                connection.connection,
                connection.session,
                number=connection.number,
                path=connection.path,
                config=self._config_there,
            )
            here = self._sessions[connection.number] = DeviceSession(self.id, session)
            here.adopt_records(connection)
            here.since_ns = connection.since_ns
        endpoint.opened_count = socket.opened_count
        wants = [each for each in self._sessions.values() if each.number != socket.owner and each.standing().wants]
        self._ownership = Ownership(
            owner=socket.owner or None,
            succeeded={connection.number for connection in socket.connections if connection.was_succeeded},
            held=[each.number for each in sorted(wants, key=lambda each: each.since_ns)],
        )
        for each in self._sessions.values():
            each.role = self._ownership.role(each.number)
        self._rings.session = self._sessions.get(socket.owner)
        if self._rings.session is not None:
            self.session_adopted()

    def recover(self) -> None:
        """Sees to it that frontends find it: who died may have claimed the socket's path. Rings: see `Queues`."""
        assert self._endpoint is not None, self.id
        contacts = self._endpoint.contacts
        for plan in self._socket.each():
            contacts[plan.path] = plan.recover(contacts[plan.path])

    def take_notes(self) -> list[str]:
        """Rings whose used index in guest memory stands elsewhere than the source said."""
        return [
            f"device '{self.id}': {text}"
            for group in self.groups
            for text in self._rings.report_corrections(group, logging.WARNING)
        ]

    def discard(self) -> None:
        """Drops what was adopted; a socket of our own, beside the source's, goes too."""
        self._drop_adopted()
        self.release()

    def _drop_adopted(self) -> None:
        """Drops what was adopted, all but the groups, which keep their memory until they are laid out again."""
        if self._endpoint is not None:
            self._endpoint.discard()
            self._endpoint = None
        self._drop_sessions()

    # -- the frontends' events ----------------------------------------------------------------------------------

    def session_opened(self, session: Session) -> None:
        """Rings come later, by their events."""
        self._sessions[session.number] = DeviceSession(self.id, session)
        pid = session.peer.pid if session.peer is not None else 0
        self.tracer.emit(SessionOpened(device=self.id, session=session.number, pid=pid))
        self._notes.expect()

    def handle(self, session: Session, event: Event) -> None:
        """Makes the rings what the session's state says, if it owns. See `SessionHandler`."""
        self._notes.expect()
        here = self._sessions[session.number]
        try:
            if isinstance(event, StateWanted | StateSent):
                self._move_state(here, event)
            elif here is self._rings.session:
                self._follow(here, event)
            else:
                self._keep(here, event)
            self._decide_owner(here)
        except LocalmigError as error:
            if event.refusable:
                self._note_refusal(str(error))
            raise

    def _move_state(self, here: DeviceSession, event: StateWanted | StateSent) -> None:
        """The frontend moves the guest away, and takes the device's state along; or the guest came with that.

        Raises:
            PeerError: the pipe does not serve, or what came through it is no state for this device. Nothing changed.
        """
        pipe, name = event.pipe.fileno(), self._state_name
        if isinstance(event, StateWanted):
            state = None if self.own_state is None else self.save(with_descriptors=False)
            moved_state.write(pipe, moved_state.encode(name, self.own_state, state))
            return
        data = moved_state.read_all(pipe)
        if (state := moved_state.decode(name, self.own_state, data)) is not None:
            self.check(state)
            here.state.moved_state = data
            if here is self._rings.session:
                self._take_moved(here)
                self.features_changed()
                self.apply_all()

    def _take_moved(self, owner: DeviceSession) -> None:
        """What came with the guest of the session that owns is the device's from now on."""
        if data := owner.state.moved_state:
            state = moved_state.decode(self._state_name, self.own_state, data)
            self.check(state)
            owner.state.moved_state = b""
            self.load_moved(state)

    @property
    def _state_name(self) -> str:
        return "device" if self.own_state is None else self.own_state.name

    def _follow(self, owner: DeviceSession, event: Event) -> None:
        """Does what the session that owns says."""
        match event:
            case VringChanged(index=vring, anew=anew):
                self._rings.apply(self._rings.group_of(vring), anew=vring if anew else None)
                for drained, leader in self.offer_made.drained_vrings.items():
                    if leader == vring:
                        self._rings.apply(self._rings.group_of(drained))
            case NotifiersChanged(index=vring):
                self._rings.set_notifiers(vring)
            case RequestRefused(reason=reason):
                self._note_refusal(reason)
            case FeaturesSet():
                owner.make_records(keeps_chains=self.keeps_chains(owner.state))
                self.features_changed()
                self.apply_all()
            case LogSet():
                self._rings.set_log()
            case LoggingChanged():
                self._rings.change_logging()
            case MemoryChanged():
                self._rings.change_memory()
            case DeviceReset():
                self.features_changed()
                for group in self.groups:
                    for vring in group.vrings:
                        self._rings.forget(vring)
                    self.driver_left(group)
                self.apply_all()
                owner.rewind()
            case _:
                self.check_event(event)
                self.on_event(event)

    def _keep(self, here: DeviceSession, event: Event) -> None:
        """Keeps what a session says that does not own, so that its rings can run at once when it does."""
        match event:
            case VringChanged(index=vring, anew=anew):
                if anew:
                    here.forget(vring)
                here.write_positions((vring,))
                here.forget_former_log()
            case LogSet():
                here.renew_log()
            case NotifiersChanged() | LoggingChanged():
                pass  # it stands in the session's state
            case RequestRefused(reason=reason):
                self._note_refusal(reason)
            case FeaturesSet():
                here.make_records(keeps_chains=self.keeps_chains(here.state))
            case MemoryChanged():
                here.memory, populated = here.map_memory()
                self.tracer.emit(
                    MemoryMapped(
                        device=self.id,
                        regions=len(here.state.regions),
                        populated_bytes=populated,
                        undisturbed_queue_pairs=(),
                    )
                )
            case DeviceReset():
                for vring in range(len(here.state.vrings)):
                    here.forget(vring)
                here.forget_former_log()
                here.rewind()
            case _:
                self.check_event(event)

    def session_closed(self, session: Session, reason: str | None) -> None:
        """None of its rings runs any more: its descriptors close next."""
        here = self._sessions.pop(session.number)
        left = None
        if here is self._rings.session:
            self._end_owner()
            left = here.standing()
        here.drop()
        self.frontend_left(here.state)
        if reason is not None:
            # A frontend that comes again and again with the same mistake fills no log.
            level = logging.WARNING if reason != self._closed_because else logging.DEBUG
            _logger.log(level, "device '%s': %s closed: %s", self.id, here, reason)
        self._closed_because = reason
        self.tracer.emit(SessionClosed(device=self.id, session=session.number, reason=reason))
        self._decide_owner(former=here if left is not None else None, left=left)
        if left is not None and self._rings.session is None:
            self.left_alone()

    # -- who owns -----------------------------------------------------------------------------------------------

    def _decide_owner(
        self,
        cause: DeviceSession | None = None,
        *,
        former: DeviceSession | None = None,
        left: Standing | None = None,
    ) -> None:
        """Finds who owns, and lets the rings follow.

        Args:
            cause: whose message this follows. It is to blame if its own rings cannot run.
            former: who owned and has left, `left` where it stood then.
            left: None where that has not happened.

        Raises:
            LocalmigError: the rings of `cause` cannot run.
        """
        owner = self._rings.session
        if owner is not None and len(self._sessions) == 1:
            return  # for most devices this is so with every message
        self._ownership.decide({each.number: each.standing() for each in self._sessions.values()}, left=left)
        for each in self._sessions.values():
            each.become(self._ownership.role(each.number))
        heir = None if self._ownership.owner is None else self._sessions[self._ownership.owner]
        if heir is None or heir is owner:
            return
        if owner is not None:
            self._end_owner()
            former = owner
        self._rings.session = heir
        try:
            self.session_began()
            self._take_moved(heir)
            self.features_changed()
            self.apply_all()
        except LocalmigError as error:
            for group in self.groups:
                group.release()
            if heir is cause:
                raise
            # Not now: this is in the middle of another session's message.
            asyncio.get_running_loop().call_soon(heir.session.close, str(error))
        else:
            self._tell_owner(heir, former)

    def _end_owner(self) -> None:
        """The session that owns does so no longer: its rings stop, and where they stand is in its state."""
        for group in self.groups:
            self._rings.stop(group)
            # A ring that its frontend disabled may be other memory of the guest's by now.
            self._rings.give_back(group, [vring for vring in group.vrings if self.is_served(vring)])
            for vring in group.vrings:
                self.ring_left(vring)
            self.driver_left(group)
            group.release()
        self.session_ended()
        self._rings.session = None

    def _tell_owner(self, owner: DeviceSession, former: DeviceSession | None) -> None:
        """A change of owner is never silent. Told once its rings run: whoever hears of it may send for them."""
        if former is None:
            _logger.info("device '%s': %s owns the device", self.id, owner)
        else:
            done = "left" if former.session.is_closed else "stopped"
            _logger.warning("device '%s': %s owns the device now, because %s %s", self.id, owner, former, done)
        self.tracer.emit(
            OwnerChanged(
                device=self.id,
                session=owner.number,
                pid=owner.session.peer.pid if owner.session.peer is not None else 0,
                former_session=None if former is None else former.number,
                former_pid=former.session.peer.pid if former is not None and former.session.peer is not None else 0,
            )
        )

    # -- what an engine or a frontend is told of ----------------------------------------------------------------

    def _note_refusal(self, reason: str) -> None:
        _logger.warning("device '%s': the frontend's request is refused: %s", self.id, reason)
        self.tracer.emit(trace.RequestRefused(device=self.id, reason=reason))

    # -- what keeps it from working -----------------------------------------------------------------------------

    def find_notes(self) -> Iterator[str]:
        """What keeps the device from working now, a sentence each."""
        if not self.groups:
            return
        owner = self._rings.session
        for each in self._sessions.values() if owner is None else (owner,):
            backend = each.session.backend
            yield from set_up_notes(backend.state, self.groups[0].vrings, has_spoken=backend.has_spoken)
        if owner is None:
            return
        for each in self._sessions.values():
            if each.role is Role.HELD:
                yield held_note(str(each), str(owner))
        kicks = self._rings.kicks()
        if any(kicks[vring] > before for vring, (_, before) in owner.kicks_before.items()) and self._may_need_note():
            yield NOT_SHARED

    def _may_need_note(self) -> bool:
        return self._rings.is_untouched()

    def _tell_note(self, note: str) -> None:
        _logger.warning("device '%s': %s", self.id, note)
        self.tracer.emit(DeviceNoted(device=self.id, note=note))

    # -- small things -------------------------------------------------------------------------------------------

    def _make_groups(self) -> None:
        self._rings.make(self.offer().vring_count)
        self.callback_groups = [group for group in self.groups if isinstance(group, CallbackGroup)]

    def _drop_groups(self) -> None:
        self.groups_dropped()
        self._rings.close()
        self.callback_groups = []
        self._drop_sessions()
        self._notes.stop()

    def _drop_sessions(self) -> None:
        for each in self._sessions.values():
            each.drop()
        self._sessions.clear()
        self._ownership = Ownership()
        self._rings.session = None

    def _make_endpoint(self, contacts: Mapping[str, Contact]) -> Endpoint:
        return Endpoint(contacts, self, self.offer(), config=self.config_space())
