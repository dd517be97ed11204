"""The contract between a part (a device, a netdev) and the daemon that hands it over.

Owns:        Part, the life of a part across a handover, in words and types; Announces, which a NIC is besides,
             RunsPrograms, which a netdev is, and HasSessions, which a device is.
Never sees:  a particular device, a socket, the stream.
Read next:   netdev.py for the host side of a NIC; devices/virtio_net/ for a whole example; migration/outgoing.py and
             incoming.py for who calls what, when.

A part is born frozen (its control sockets are not read) and stopped (its rings stand still). Its life:

    open → resume → thaw → … → close                              a fresh daemon

    watch_setup → save_setup → freeze → stop → save_switchover → release    the source: it moved
                  ↑______|            └→ resume → thaw          it stays: any step before COMMIT may lead here
                  a frontend          └→ recover → resume → thaw    it came back: the destination died after COMMIT
                  changed something

    adopt_setup → adopt_switchover → resume → thaw → source_released        the destination
    ↑___|│       └→ recover ────────────┘     the source died: ring positions come from memory
         └→ discard                           at any time before COMMIT

A part with code that takes time is told to `quiesce` before `freeze`; `thaw` lets it go on.

Until `resume` in the destination the source may still run: a part touches no descriptor it shares with it. No
ioctl, no fcntl, no read, no write, no shutdown; closing is allowed, for it only drops this process's copy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

from localmig.vmstate import Description


class Part(Protocol):
    """Something a handover moves: a device, or the host side of one.

    Attributes:
        id: the user's name for it, unique in the daemon.
        setup: describes what travels while the guest runs.
        switchover: describes what travels inside the downtime, None where nothing does. Keep it small and of a
            size that does not change while the rings run.
        own_parts: parts of the same object, which travel before it.
    """

    id: str
    setup: ClassVar[Description[Any]]
    switchover: ClassVar[Description[Any] | None] = None
    own_parts: tuple[Part, ...] = ()

    # -- serving ------------------------------------------------------------------------------------------------

    @abstractmethod
    def open(self) -> None:
        """Opens what a fresh daemon needs: interfaces, sockets. Raises ConfigError or KernelError, nothing kept."""

    @abstractmethod
    def resume(self) -> None:
        """Lets rings run from where they stand. Idempotent. Fails for nothing that a check could have found."""

    @abstractmethod
    def stop(self) -> None:
        """Stops touching the guest's rings, in microseconds. Idempotent."""

    def quiesce(self) -> bool:
        """Begins nothing more that takes time, until `thaw`; whether nothing of that kind is under way.

        Called before `freeze`, again and again until it is so. For code of an author's that cannot be interrupted.
        """
        return True

    @abstractmethod
    def freeze(self) -> None:
        """Stops reading control sockets; rings run on. What is unread stays in the kernel. Idempotent."""

    @abstractmethod
    def thaw(self) -> None:
        """Reads control sockets (again). Idempotent, and bears a `freeze` that failed half-way."""

    @abstractmethod
    def close(self) -> None:
        """Ends the part for good with all it owns, sockets unlinked, scripts run: the daemon quits."""

    # -- to be seen ---------------------------------------------------------------------------------------------

    def info(self) -> object | None:
        """What there is to see of it, a dataclass; None where that is nothing.

        Asked at any time, also during a handover: it only reads, and touches no running ring and no descriptor.
        """
        return None

    # -- source -------------------------------------------------------------------------------------------------

    def local_migration_blocker(self) -> str | None:
        """Why the descriptors of this part stay home, None where they move."""
        return None

    def watch_setup(self, changing: Callable[[], None] | None) -> None:
        """From now on calls `changing` before anything changes that `save_setup` saves; None ends that.

        What a frontend says is such a thing: `changing` is called before its message is taken out of the socket, so
        that a successor knows of it even if this process dies with the message. What a ring does by itself is none: the
        switchover carries that.
        """
        del changing

    @abstractmethod
    def save_setup(self, *, with_descriptors: bool) -> Any:
        """The state that `setup` describes. Descriptors in it are lent for the length of the call and its saving.

        Called again for a part that changed since.
        """

    def setup_default(self) -> Any:
        """The state of a part that was never saved, for a source whose release does not know that it can be.

        None: the part has always been saved. A state that equals this one does not travel.
        """
        return None

    def is_outdated(self) -> bool:
        """Whether `save_setup` would save something else than last time, without `changing` having been called.

        Asked once it is quiesced. For what a successor can do without if this process dies first.
        """
        return False

    def frontend_waits(self) -> bool:
        """Whether a frontend said something that nobody has read, while this part is frozen."""
        return False

    def save_switchover(self) -> Any:
        """The state that `switchover` describes. Called before `stop` for its shape, and after it for its values."""
        return None

    @abstractmethod
    def release(self) -> None:
        """Drops every copy without a side effect: no shutdown, no unlink, no script. It moved."""

    # -- destination --------------------------------------------------------------------------------------------

    @abstractmethod
    def check_setup(self, state: Any) -> None:
        """Raises PeerError where this daemon cannot serve the state; changes nothing."""

    @abstractmethod
    def adopt_setup(self, state: Any) -> None:
        """Takes over a checked state with all its descriptors and builds everything, parked.

        Called again with a newer state where the part changed in the source: it takes the place of what was adopted.
        The guest's frontend may be waiting then, so what did not change is kept as it is.
        Raises PeerError, ConfigError or KernelError; `discard` follows.
        """

    def check_switchover(self, state: Any) -> None:
        """Raises PeerError where the state does not fit what was set up; changes nothing."""
        del state

    def adopt_switchover(self, state: Any) -> None:
        """Applies a checked state. Must not fail.

        Called more than once: before the state that counts, it is rehearsed with this part's own `save_switchover`.
        """
        del state

    @abstractmethod
    def recover(self) -> None:
        """Takes ring positions from guest memory or a ledger, for the process that knew them is dead.

        What that process may have changed outside becomes what this one knows: a TAP's settings, a socket's path.
        Called while frozen and stopped. Raises LocalmigError where that cannot be; the rest is served all the same.
        """

    def take_notes(self) -> list[str]:
        """What an operator should know of how the guest goes on here; nothing for most. Told once.

        Called behind `resume` and `thaw` of a guest that was taken over. The other side shows it too.
        """
        return []

    def source_released(self) -> None:
        """The source lets go, or is about to: what could not be opened beside it can be now.

        Idempotent. Raises LocalmigError where something cannot be opened yet; for a while it is called again then.
        """
        return

    @abstractmethod
    def discard(self) -> None:
        """Drops all that was adopted without a side effect: the source goes on serving."""


@runtime_checkable
class RunsPrograms(Protocol):
    """A part that runs programs of the operator's: the sandbox leaves that open while there is one to run."""

    @property
    def has_program_to_run(self) -> bool:
        """Whether one is still to come."""


@runtime_checkable
class Announces(Protocol):
    """A part that can tell the network where its guest is.

    Attributes:
        id: as `Part`'s.
    """

    id: str

    @abstractmethod
    def needs_announcement(self) -> bool:
        """Whether its guest came by a handover and is reached by another way than before."""

    @abstractmethod
    def announcement_blocker(self) -> str | None:
        """Why it cannot announce, None where it can."""

    @abstractmethod
    def announce(self) -> None:
        """Tells the network once. Nothing while it is stopped, closed, or cannot. KernelError: it was not told."""


@runtime_checkable
class HasSessions(Protocol):
    """A part with frontends: their sessions, and the addresses by which they come."""

    @abstractmethod
    def close_session(self, number: int) -> None:
        """Ends a session by the operator's word. NotFoundError: there is none of that number."""

    @abstractmethod
    def add_socket(self, path: str) -> None:
        """Connects to a second address besides its own. KernelError: it cannot, and nothing was changed."""

    @abstractmethod
    def remove_socket(self, path: str) -> None:
        """Connects to one of its two addresses no more. The session that came by it goes on."""
