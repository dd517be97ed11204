"""A daemon: what it serves, whether it runs, and the one migration it may be in.

Owns:        the run state, the parts' life, starting and ending migrations.
Never sees:  QMP, argv, what a part is inside.
Read next:   migration/outgoing.py and incoming.py for what a migration does with the parts.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from enum import StrEnum
from typing import Final, cast

from localmig.access import Access
from localmig.confinement import Privileges, Sandbox, SandboxState
from localmig.daemon.announce import Announcer
from localmig.daemon.descriptors import LentDescriptors, NamedDescriptors
from localmig.daemon.objects import Assembly, BuiltObject, Objects
from localmig.device_api import Announces, HasSessions, Netdev, Part, RunsPrograms
from localmig.device_api.objects import inherited
from localmig.errors import ConfigError, LocalmigError, StateError, blamed
from localmig.fds import OwnedFd, close_all
from localmig.migration import transport
from localmig.migration.exchange import blaming_nobody
from localmig.migration.handover import SOURCE_SERVES, DestinationState, SourceState
from localmig.migration.hello import Hello
from localmig.migration.incoming import Incoming
from localmig.migration.outgoing import Outgoing
from localmig.migration.parameters import Announcement, Parameters
from localmig.migration.status import LocalMigrationReport, MigrationInfo
from localmig.migration.undo import for_all
from localmig.options import SandboxSpec, Spec
from localmig.options.address import Address, Defer, IncomingSpec
from localmig.options.specs import KINDS, DeviceSpec, references_of
from localmig.registry import Registry
from localmig.service_manager import ServiceManager
from localmig.trace import ObjectAdded, ObjectDeleted, RunStateChanged, Tracer

_logger = logging.getLogger(__name__)

THAW_RETRY_S: Final = 1.0
"""How soon memory is asked for again: frontends wait meanwhile, and there may be none for minutes."""


class RunState(StrEnum):
    """Whether this daemon serves the guest, in QEMU's words."""

    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    RUNNING = "running"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"


class Daemon:
    """Everything one process serves. All methods belong to the event loop's thread.

    Args:
        objects: what to build, for a beginning: `add_object` adds more.
        registry: the types of objects that there are; None: this program's, and those of installed packages.
        incoming: where a source will connect; None for a daemon that begins by itself. With no `objects` given, an
            incoming daemon builds what the source has.
        access: who may use QMP and migration sockets; None: root and this process's user.
        privileges: what the process gives up before it serves; None: nothing.
        service_manager: who watches this process; None: nobody. A daemon that takes over is watched by whoever watched
            its source, if somebody did.
        tracer: where facts go.

    Raises:
        ConfigError: the specs do not fit each other.
    """

    def __init__(
        self,
        *,
        objects: Sequence[Spec] = (),
        registry: Registry | None = None,
        incoming: IncomingSpec | None = None,
        access: Access | None = None,
        privileges: Privileges | None = None,
        service_manager: ServiceManager | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._service_manager = service_manager
        self._privileges = privileges or Privileges(run_as=None, sandbox=Sandbox(SandboxSpec(enabled=False)))
        self.access = access or Access()
        self.tracer = tracer or Tracer()
        self.registry = registry or Registry()
        self.parameters = Parameters()
        self.descriptors = NamedDescriptors()
        self._objects = Objects(specs=tuple(objects), registry=self.registry)
        self._assembly = Assembly(self.tracer)
        self._incoming_address = incoming
        self._run_state = RunState.PRELAUNCH
        self._parts: list[Part] = []
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self._listener: transport.Listener | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._quitting = asyncio.Event()
        self._is_ending = False
        self._incoming_failed: str | None = None
        self._announcer = Announcer()
        self._announcement_notes: list[str] = []
        self._announced: set[str] = set()
        """Devices that need not be announced once more for the handover that brought them."""

    # -- life ---------------------------------------------------------------------------------------------------

    @property
    def run_state(self) -> RunState:
        """Whether this daemon serves the guest."""
        return self._run_state

    @property
    def has_handed_over(self) -> bool:
        """Whether another daemon has all that this one served, beyond doubt."""
        return self._run_state is RunState.POSTMIGRATE and not self._parts

    async def start(self) -> None:
        """Opens everything and serves, or waits for a source. Privileges are given up once TAPs are open.

        Raises:
            ConfigError, KernelError: something cannot be opened. What was opened is closed again.
        """
        for spec in self._objects.specs:
            for what, which in spec.claims():
                if what == "descriptor" and isinstance(which, str):
                    inherited(which)
        if self._incoming_address is not None:
            self.registry.look_up()
            self.registry.load_built_in()
            self._privileges.give_up()
            self._set_run_state(RunState.INMIGRATE)
            if not isinstance(self._incoming_address, Defer):
                self.migrate_incoming(self._incoming_address)
            return
        try:
            self._assembly = Assembly.of(self._objects, self.tracer)
            first = self._assembly.parts_opened_with_privileges()
            self._open(first)
            # Before there are sockets, which are to be the user's, and threads, which would be left outside.
            self._privileges.give_up()
            opened = set(map(id, first))
            self._open([part for part in self._assembly.parts() if id(part) not in opened])
            self._parts = self._assembly.parts()
        except BaseException:
            self._close_parts()
            raise
        self._give_up_programs()
        for part in self._parts:
            part.resume()
        for part in self._parts:
            part.thaw()
        self._set_run_state(RunState.RUNNING)

    def _open(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._parts.append(part)
            with blamed(f"cannot open '{part.id}'"):
                part.open()

    def quit(self) -> None:
        """Begins an orderly end; `wait_quit` returns after it.

        A handover under way comes first: it ends in bounded time, and the guest is served there and no more here. It is
        taken back, if it can be, where it waits for the operator, or where this is asked for once more.
        """
        if self._outgoing is not None and self._is_migrating():
            if self._quitting.is_set() or self._outgoing.awaits_operator:
                self._outgoing.cancel()
            else:
                _logger.info("told to end: the handover comes first; told once more, it is taken back if it can be")
        self._is_ending = True
        self._quitting.set()

    def foretell_quit(self) -> None:
        """For signal handlers: `quit` follows. A takeover that is under way, where no callback gets in, hears of it."""
        self._is_ending = True

    def announce_ready(self) -> None:
        """Tells the service manager that this process serves, or waits for its source: who needs it may come."""
        if self._service_manager is not None:
            waits = self._run_state is RunState.INMIGRATE
            self._service_manager.tell_ready("waits for a daemon to take over from" if waits else self._describe())

    async def wait_quit(self) -> str | None:
        """Serves until `quit`, then closes everything that is ours. Gives the reason where the daemon failed."""
        await self._quitting.wait()
        handovers = {task for task in self._tasks if task.get_name() == "outgoing"}
        if handovers:
            await asyncio.wait(handovers)
        if self._service_manager is not None and self._run_state in (RunState.RUNNING, RunState.PAUSED):
            self._service_manager.tell_stopping()
        self._announcer.stop()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._listener is not None:
            self._listener.close()
        self._close_parts()
        if self._incoming is not None:
            self._incoming.close()
        self.descriptors.close_all()
        return self._incoming_failed

    # -- run state ----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stops the guest's rings; control sockets are served on. Nothing to do where they stand already.

        Raises:
            StateError: a handover is under way.
        """
        self._check_idle("stop")
        if self._run_state is RunState.RUNNING:
            for part in self._parts:
                part.stop()
            self._set_run_state(RunState.PAUSED)

    def cont(self) -> None:
        """Lets the guest's rings run. After a migration whose outcome nobody can know, takes the guest back.

        Raises:
            StateError: a handover is under way, or the guest is another daemon's.
        """
        self._check_idle("cont")
        if self._run_state is RunState.INMIGRATE:
            raise StateError("this daemon waits for an incoming migration and has nothing to run")
        if self._run_state is RunState.POSTMIGRATE:
            if self._outgoing is None or self._outgoing.state is not SourceState.IN_DOUBT:
                raise StateError("the guest was handed over: another daemon serves it")
            for_all(self._parts, lambda part: part.recover())
        if self._run_state is not RunState.RUNNING:
            for part in self._parts:
                part.resume()
            for part in self._parts:
                part.thaw()
            self._set_run_state(RunState.RUNNING)
            self._announce_arrivals()

    def announce(self, announcement: Announcement, *, devices: Sequence[str] | None, name: str) -> None:
        """Begins to tell the network where the guests are, in place of what is under way by that name.

        Args:
            announcement: how often; no rounds only end what is under way.
            devices: ids of those to tell of; None: of all.
            name: for a later announcement to take its place.

        Raises:
            ConfigError: a number is out of range.
            StateError: this daemon does not serve, or a guest's address is not known. Nothing was begun or ended.
        """
        announcement.check()
        if self._run_state is not RunState.RUNNING:
            raise StateError(f"nothing to announce in run state '{self._run_state}'")
        parts = [part for part in self._announcing() if devices is None or part.id in devices]
        if announcement.rounds and (blockers := [text for part in parts if (text := part.announcement_blocker())]):
            raise StateError("; ".join(blockers))
        self._announcer.start(parts, announcement, key=name)

    # -- objects ------------------------------------------------------------------------------------------------

    def objects(self, kind: str) -> list[BuiltObject]:
        """The objects of a kind that are served here."""
        return [each for each in self._served() if each.spec.kind == kind]

    def add_object(self, kind: str, options: Mapping[str, object]) -> None:
        """Builds one more object, opens it and serves it. Rings of others run on meanwhile.

        Args:
            kind: what it is, one of `KINDS`.
            options: what describes it, in the JSON form of the command line.

        Raises:
            ConfigError: it cannot be, or not beside the others. As for all that follow: nothing of it is left.
            KernelError: it cannot be opened.
            StateError: a handover is under way, or the guest is another daemon's.
        """
        self._check_changeable(f"{kind}_add")
        objects = self._objects.added(read := self.registry.read(kind, options))
        spec = objects[read.id]
        self._check_possible_now(spec)
        parts: list[Part] = []
        with self.descriptors.lend() as lent:
            try:
                built = self._assembly.add(spec, self.registry.type_of(spec), lent.number)
                self._assembly.arrange(objects.specs)
                parts += (*built.part.own_parts, built.part)
                self._begin(parts, lent)
            except BaseException:
                for_all(reversed(parts), lambda part: part.close())
                self._assembly.arrange(self._objects.specs)
                raise
            lent.forget()
        self._objects = objects
        self._parts = self._assembly.parts()
        self.tracer.emit(ObjectAdded(kind=kind, id=spec.id))

    def delete_object(self, kind: str, id: str) -> None:  # noqa: A002 - the user's word
        """Ends an object with all it has: sessions, sockets, rings, an interface that is not persistent.

        Raises:
            NotFoundError: there is none of that kind and id. As for all that follows: nothing was changed.
            StateError: another object refers to it, a handover is under way, or the guest is another daemon's.
        """
        self._check_changeable(f"{kind}_del")
        objects = self._objects.without(kind, id)
        built = self._assembly.built(id)
        gone = (built.part, *reversed(built.part.own_parts))
        for_all(gone, lambda part: part.close())
        self._assembly.arrange(objects.specs)
        self._objects = objects
        self._parts = self._assembly.parts()
        self._announced.discard(id)
        for handover in (self._outgoing, self._incoming):
            if handover is not None:
                handover.unthawed = [part for part in handover.unthawed if part not in gone]
        self.tracer.emit(ObjectDeleted(kind=kind, id=id))

    def set_link(self, id: str, *, up: bool) -> None:  # noqa: A002 - the user's word
        """Connects a netdev, or the one of a device, to the network, or takes it off.

        Raises:
            NotFoundError: there is no object of that id. As for all that follow: nothing was changed.
            StateError: it has no link, a handover is under way, or the guest is another daemon's.
            KernelError: the kernel refuses.
        """
        self._check_changeable("set_link")
        spec = self._objects.find(id, *KINDS)
        if spec.kind != "netdev":
            behind = [each for each, reference in references_of(spec).items() if reference.kind == "netdev"]
            if not behind:
                raise StateError(f"{spec.kind} '{id}' has no link that could be set")
            spec = self._objects[behind[0]]
        netdev = cast(Netdev, self._assembly.built(spec.id).part)
        with blamed(f"cannot set the link of '{spec.id}'"):
            netdev.set_link(up=up)

    def close_session(self, id: str, number: int) -> None:  # noqa: A002
        """Ends a session of a device: its frontend is disconnected, and another one that waits may get the rings.

        Raises:
            NotFoundError: there is no device of that id, or it has no session of that number. As for all that follow:
                nothing was changed.
            StateError: a handover is under way, or the guest is another daemon's.
        """
        self._check_changeable("session-close")
        self._with_sessions(id).close_session(number)

    def add_socket(self, id: str, path: str) -> None:  # noqa: A002
        """Has a device with server=off connect to a second address, at which another VMM listens.

        Raises:
            NotFoundError: there is no device of that id. As for all that follow: nothing was changed.
            ConfigError: the device listens itself, has a second address, or another object has that one.
            KernelError: nobody listens there, and nothing is tried again (reconnect-ms=0).
            StateError: a handover is under way, or the guest is another daemon's.
        """
        self._check_changeable("device_socket_add")
        part = self._with_sessions(id)
        self._change_spec(self._device_spec(id).with_second_socket(path), lambda: part.add_socket(path))

    def delete_socket(self, id: str, path: str) -> None:  # noqa: A002
        """Has a device connect to one of its two addresses no more; the other one stays. Raises as `add_socket`."""
        self._check_changeable("device_socket_del")
        part = self._with_sessions(id)
        self._change_spec(self._device_spec(id).without_socket(path), lambda: part.remove_socket(path))

    def _device_spec(self, id: str) -> DeviceSpec:  # noqa: A002
        return cast(DeviceSpec, self._objects.find(id, "device"))

    def _with_sessions(self, id: str) -> HasSessions:  # noqa: A002
        part = self._assembly.built(self._objects.find(id, "device").id).part
        if not isinstance(part, HasSessions):
            raise StateError(f"device '{id}' has no sessions")
        return part

    def _change_spec(self, spec: DeviceSpec, change: Callable[[], None]) -> None:
        """Makes an object what `spec` says, by `change`; a successor is told of it."""
        objects = self._objects.changed(spec)
        self._check_possible_now(objects[spec.id])
        change()
        self._assembly.change(objects[spec.id])
        self._objects = objects

    def _begin(self, parts: Sequence[Part], lent: LentDescriptors) -> None:
        """Opens the parts of an object, which own what was lent from then on, and makes them do what all others do."""
        with blamed(f"cannot open '{parts[-1].id}'"):
            for part in parts:
                part.open()
            lent.give_away()
            if self._run_state is RunState.RUNNING:
                for part in parts:
                    part.resume()
            for part in parts:
                part.thaw()

    def _check_changeable(self, command: str) -> None:
        """Raises StateError where objects can neither come nor go."""
        if self._is_migrating() or (self._incoming is not None and not self._incoming.has_ended):
            raise StateError(f"{command} not allowed while migrating: wait for its end, or end it by migrate_cancel")
        if self._run_state not in (RunState.RUNNING, RunState.PAUSED):
            raise StateError(f"{command} not allowed in run state '{self._run_state}'")
        self._check_sole_owner()

    def _check_not_ending(self) -> None:
        if self._is_ending:
            raise StateError("this daemon was told to end, and does that")

    def _check_sole_owner(self) -> None:
        """Raises StateError where what is served here may soon be another daemon's, or nobody's."""
        self._check_not_ending()
        if self._incoming is not None and self._incoming.source_may_return:
            raise StateError(
                "the daemon that had the guest before has not let go of it, and would take it back if this one ended: "
                "wait until its migration has completed, or end it"
            )

    def _check_possible_now(self, spec: Spec) -> None:
        """Raises ConfigError for what can be had only when a daemon starts."""
        sandbox = self._privileges.sandbox.state
        if spec.program_at_end is not None and not sandbox.spawn:
            raise ConfigError(
                f"{spec.kind} '{spec.id}' has {spec.program_at_end}, and the sandbox forbids this daemon to run "
                "programs: hand over to one with --sandbox on,spawn=allow"
            )

    # -- migration ----------------------------------------------------------------------------------------------

    def set_parameters(self, parameters: Parameters) -> None:
        """Sets all parameters at once.

        Raises:
            ConfigError: one is out of range, or `local` does not fit where this daemon waits for a source. Nothing was
                changed.
            StateError: a capability differs, and a migration is under way. Nothing was changed.
        """
        parameters.check()
        if self._is_migrating() and parameters.capabilities != self.parameters.capabilities:
            raise StateError("There's a migration process in progress")
        if self._listener is not None:
            self._listener.check_local(local=parameters.local)
        self.parameters = parameters

    def migrate(self, address: Address) -> None:
        """Begins to hand everything over to the daemon at `address`; `migration_info` tells how it goes.

        Raises:
            StateError: another migration is under way, or this daemon does not have the guest.
            ConfigError: `local` is on and the address is no UNIX socket. Nothing was stopped.
        """
        self._check_not_ending()
        if self._is_migrating() or (self._incoming is not None and not self._incoming.has_ended):
            raise StateError("There's a migration process in progress")
        if self._run_state not in (RunState.RUNNING, RunState.PAUSED):
            raise StateError(f"nothing to migrate in run state '{self._run_state}'")
        self._check_sole_owner()
        given = self.descriptors.lent_for(address)
        transport.check_local(address, given, local=self.parameters.local)
        self.descriptors.give_away(given)
        self._forget_incoming()
        self._outgoing = Outgoing(
            connect=lambda: transport.connect(address, given, access=self.access),
            parameters=self.parameters,
            parts=self._parts,
            objects=self._objects.for_hello(),
            running=self._run_state is RunState.RUNNING,
            service_manager=self._service_manager,
            is_ending=lambda: self._is_ending,
            tracer=self.tracer,
            blaming=self._blaming,
        )
        self._spawn("outgoing", self._migrate(self._outgoing, given))

    def migrate_incoming(self, address: Address) -> None:
        """Waits for a source at `address`.

        Raises:
            StateError: the daemon was not started with --incoming, or waits already.
            ConfigError: `local` is on and the address is no UNIX socket, or it cannot be listened on.
            KernelError: it cannot be listened on.
        """
        if self._incoming_address is None:
            raise StateError("'-incoming' was not specified on the command line")
        if self._incoming is not None or self._run_state is not RunState.INMIGRATE:
            raise StateError("The incoming migration has already been started")
        given = self.descriptors.lent_for(address)
        transport.check_local(address, given, local=self.parameters.local)
        self._listener = transport.Listener(address, given, access=self.access)
        self.descriptors.give_away(given)
        self._incoming = Incoming(
            parameters=lambda: self.parameters,
            build=self._build,
            on_serving=self._serve_incoming,
            is_ending=lambda: self._is_ending,
            tracer=self.tracer,
            blaming=self._blaming,
        )
        self._spawn("incoming", self._accept(self._listener, self._incoming))

    def migrate_cancel(self) -> None:
        """Takes an outgoing migration back, if it is not committed. No migration: nothing to do.

        Raises:
            StateError: COMMIT is out, so the guest is the destination's.
        """
        if self._outgoing is not None and self._is_migrating() and not self._outgoing.cancel():
            raise StateError("the handover is committed and cannot be cancelled any more")

    def migrate_continue(self, state: str) -> None:
        """Goes on from the pause before switchover; `state` is QEMU's name of it.

        Raises:
            StateError: the migration is in another state.
        """
        info = self.migration_info()
        status = info.status if info else "none"
        if state != status or self._outgoing is None or not self._outgoing.continue_switchover():
            raise StateError(f"Migration not in expected state: {status}")

    def migration_info(self) -> MigrationInfo | None:
        """The present or last migration; None where there was none."""
        if self._outgoing is not None:
            return self._outgoing.info()
        if self._incoming is None:
            return None
        info = self._incoming.info()
        if not self._incoming.has_ended:
            return info
        notes = [*([info.note] if info.note else []), *self._announcement_notes]
        return replace(info, note="; ".join(notes) or None)

    def local_migration_reports(self) -> list[LocalMigrationReport]:
        """For each object whether a local migration would move its descriptors."""
        reports = []
        for each in self._served():
            reason = each.part.local_migration_blocker()
            reports.append(
                LocalMigrationReport(id=each.spec.id, type=each.spec.type_name, transfers=reason is None, reason=reason)
            )
        return reports

    @property
    def sandbox(self) -> SandboxState:
        """What this process may not do any more."""
        return self._privileges.sandbox.state

    # -- inside -------------------------------------------------------------------------------------------------

    async def _migrate(self, outgoing: Outgoing, given: OwnedFd | None) -> None:
        try:
            state = await outgoing.run()
        finally:
            close_all((given,))  # where it ended before it connected
            # Also after an error nobody expected: what COMMIT gave away is not ours to run or to close.
            if outgoing.state not in SOURCE_SERVES:
                self._announcer.stop()
                self._set_run_state(RunState.POSTMIGRATE)
        info = outgoing.info()
        if state is SourceState.COMPLETED:
            _log_success("handed over", info)
            self._parts = []
            await self._point_to_destination(outgoing)
        elif state is SourceState.IN_DOUBT:
            _logger.error("%s", info.error_desc)
        else:
            reasons = [text for text in (info.error_desc, info.note) if text]
            _logger.warning("handover %s, this daemon serves on%s", info.status, ": ".join(["", *reasons]))
        self._spawn("thaw", self._thaw_late(outgoing))

    async def _point_to_destination(self, outgoing: Outgoing) -> None:
        """Lets the service manager follow the guest. Before this process ends, or the service would end with it."""
        if self._service_manager is None:
            return
        if not self.parameters.local:
            self._service_manager.tell_status("handed over to another machine")
        elif pid := outgoing.destination_pid:
            self._service_manager.tell_main_process(pid)
            await self._service_manager.wait_heard()
        else:
            _logger.warning(
                "the service manager is not told which process serves: the destination has no number in this process's "
                "PID namespace"
            )

    async def _accept(self, listener: transport.Listener, incoming: Incoming) -> None:
        try:
            channel = await listener.accept()
        except LocalmigError as error:
            self._fail_incoming(str(error))
            return
        finally:
            listener.close()
            self._listener = None
        state = await incoming.run(channel)
        self._spawn("thaw", self._thaw_late(incoming))
        if state is DestinationState.COMPLETED:
            _log_success("taken over", incoming.info())
            self._announce_arrivals()  # of those that could not be served before the source let go
            self._give_up_programs()
            self._tell_taken_over()
        else:
            self._fail_incoming(incoming.info().error_desc)

    def _tell_taken_over(self) -> None:
        # The source says so too, and waits until it was heard. It may have died before.
        if self._service_manager is not None:
            self._service_manager.tell_main_process(os.getpid())
            self._service_manager.tell_status(self._describe())

    def _describe(self) -> str:
        """What this process does, for people who look at the service."""
        counts = [(len(self.objects(kind)), kind) for kind in KINDS]
        served = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for count, kind in counts)
        return f"serves {served}" if self._run_state is RunState.RUNNING else f"{self._run_state}: {served}"

    async def _thaw_late(self, handover: Outgoing | Incoming) -> None:
        """Serves control sockets that could not be at once, as soon as there is what they need."""
        while handover.unthawed:
            await asyncio.sleep(THAW_RETRY_S)
            if handover not in (self._outgoing, self._incoming):
                return  # another one began, which freezes and thaws
            parts, handover.unthawed = handover.unthawed, []
            for_all(parts, lambda part: part.thaw(), short=handover.unthawed)
            if not handover.unthawed:
                _logger.info("control sockets are served again")

    def _fail_incoming(self, reason: str | None) -> None:
        """The guest stays where it is. This process ends: its end is how a source in doubt knows."""
        self._incoming_failed = f"incoming migration failed: {reason}"
        self._parts = []
        self.quit()

    def _build(self, hello: Hello) -> Sequence[Part]:
        self._objects = self._objects.fit(hello)
        self._service_manager = hello.service_manager or self._service_manager
        self._assembly = Assembly.of(self._objects, self.tracer)
        self._parts = self._assembly.parts()
        return self._parts

    def _blaming(self, part: Part, what: str) -> AbstractContextManager[None]:
        """See `exchange.Blaming`."""
        built = self._assembly.built_of(part)
        if built is None or built.type.is_built_in:
            return blaming_nobody(part, what)
        return blamed(f"{built.type} cannot {what} {built.spec.kind} '{part.id}'")

    def _served(self) -> list[BuiltObject]:
        """The objects that this process has."""
        here = set(map(id, self._parts))
        return [each for each in self._assembly.objects if id(each.part) in here]

    def _give_up_programs(self) -> None:
        """Past this no program can be run, unless a TAP has a script to run still."""
        if not any(part.has_program_to_run for part in self._parts if isinstance(part, RunsPrograms)):
            self._privileges.sandbox.forbid_programs()

    def _serve_incoming(self) -> None:
        assert self._incoming is not None
        self._set_run_state(RunState.RUNNING if self._incoming.source_was_running else RunState.PAUSED)
        self._announce_arrivals()

    def _announce_arrivals(self) -> None:
        """Tells the network of guests that a handover brought and that are reached by another way since."""
        if self._incoming is None or self._run_state is not RunState.RUNNING:
            return
        for part in self._announcing():
            if part.id not in self._announced and part.needs_announcement():
                self._announced.add(part.id)
                if (blocker := part.announcement_blocker()) is not None:
                    self._announcement_notes.append(f"not announced: {blocker}")
                else:
                    self._announcer.start([part], self.parameters.announcement, key=(part.id,))

    def _announcing(self) -> list[Announces]:
        return [part for part in self._parts if isinstance(part, Announces)]

    def _forget_incoming(self) -> None:
        if self._incoming is not None:
            self._incoming.close()
            self._incoming = None

    def _is_migrating(self) -> bool:
        return self._outgoing is not None and not self._outgoing.has_ended

    def _check_idle(self, what: str) -> None:
        if self._is_migrating():
            raise StateError(f"cannot {what} while a handover is under way: migrate_cancel ends it")

    def _set_run_state(self, state: RunState) -> None:
        self._run_state = state
        self.tracer.emit(RunStateChanged(state=state))

    def _spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _logger.critical("internal error in the %s migration", task.get_name(), exc_info=task.exception())
            # Who has the guest keeps it: whatever this is, nobody else can serve it.
            if task.get_name() == "incoming" and not (self._incoming is not None and self._incoming.is_sole_owner):
                self._fail_incoming(f"internal error: {task.exception()!r}")

    def _close_parts(self) -> None:
        # What is open here another process may serve: the destination of a handover whose end is unknown, or a source
        # that takes the guest back as soon as this one is gone.
        is_shared = self._run_state is RunState.POSTMIGRATE
        is_shared = is_shared or (self._incoming is not None and self._incoming.source_may_return)
        for part in reversed(self._parts):
            if is_shared:
                part.release()
            else:
                part.close()
        self._parts = []


def _log_success(what: str, info: MigrationInfo) -> None:
    """The guest has a daemon; where that came about in another way than usual, the log says so too."""
    if info.note:
        _logger.warning("%s: %s", what, info.note)
    else:
        _logger.info("%s: downtime %s us, %s descriptors", what, info.downtime_us, info.descriptors)
