"""What a kind of device says of itself, and what it does when the session that owns it changes.

Owns:        DeviceHooks, the methods that an author of a device overrides; most do nothing.
Never sees:  when they are called.
Read next:   vhost_user_device.py and device_rings.py, which call them; devices/virtio_net/ for a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from localmig.device_api.callback_group import CallbackGroup
from localmig.device_api.ring_group import RingGroup
from localmig.vhost_user.protocol import Event, Offer, SessionState


class DeviceHooks(ABC):
    """What a kind of device says of itself and does. `offer` and `make_groups` are all that it must have.

    Attributes:
        id: the user's name for it.
        callback_groups: those of its groups that Python code serves.
    """

    id: str
    callback_groups: list[CallbackGroup]

    @property
    @abstractmethod
    def offer_made(self) -> Offer:
        """What sessions are offered here while it is open."""

    @abstractmethod
    def offer(self) -> Offer:
        """What a session that begins is offered."""

    def possible_offer(self) -> Offer:
        """What it may offer once all that arrives is here; `offer` itself unless something is still to come."""
        return self.offer()

    @abstractmethod
    def make_groups(self, event_fd: int) -> Iterator[RingGroup]:
        """Makes its groups of rings, one after the other; between them they have every ring of the offer once.

        Args:
            event_fd: for each to signal where a ring failed.

        Raises:
            KernelError: one cannot be made. Those that were are closed.
        """

    def config_space(self) -> bytes:
        """What its configuration space reads now."""
        return b""

    def check_config(self, config: bytes) -> None:
        """Raises PeerError where the source's configuration space cannot be one of this device's."""
        del config

    @property
    def can_serve(self) -> bool:
        """Whether what is behind it is there."""
        return True

    def check_event(self, event: Event) -> None:
        """Raises LocalmigError where an event that only this kind of device has cannot be followed. Changes nothing.

        Asked of every session's events, whether it owns or not.
        """
        raise AssertionError(event)

    def on_event(self, event: Event) -> None:
        """Follows such an event of the session that owns. Raises as `SessionHandler.handle`.

        What a session said before it owned stands in its state when `session_began` is called.
        """
        raise AssertionError(event)

    def session_began(self) -> None:
        """A session owns from now on; `features_changed` and the layout of every group follow. Raises as `on_event`."""

    def features_changed(self) -> None:
        """The driver acknowledged other features. Every group is laid out again next. Raises as `on_event`."""

    def before_layout(self, group: RingGroup) -> None:
        """A stopped group is about to be laid out."""

    def before_stop(self, group: RingGroup) -> None:
        """A group is about to be stopped and laid out again."""

    def after_stop(self, group: RingGroup) -> None:
        """It is stopped; the session's state has its positions."""

    def after_layout(self, group: RingGroup) -> None:
        """It is laid out, and may start next."""

    def driver_left(self, group: RingGroup) -> None:
        """The driver of a stopped group is reset, or its session owns no longer."""

    def ring_left(self, vring: int) -> None:
        """A ring is the driver's again; what was in flight of it has been returned, or is of no meaning any more."""

    def session_ended(self) -> None:
        """The session owns no longer, and every ring is stopped. Another one may own at once."""

    def left_alone(self) -> None:
        """After `session_ended`: no session owns."""

    def frontend_left(self, state: SessionState) -> None:
        """A session has ended, whether it owned or not; `state` is what its frontend had said."""

    def groups_dropped(self) -> None:
        """Its groups are closed next."""

    def thawing(self) -> None:
        """This process serves the session from now on."""

    def is_own_state_outdated(self) -> bool:
        """Whether `save` would give something else than last time, without a message of the frontend's."""
        return False

    def note_saved(self) -> None:
        """`save` is called next."""

    def save(self, *, with_descriptors: bool) -> Any:
        """The state that `own_state` describes.

        Args:
            with_descriptors: whether descriptors move. They are lent: they stay this device's until `release`.
        """
        raise NotImplementedError

    def check(self, state: Any) -> None:
        """Raises PeerError if this device cannot go on with a state that arrived, with the reason. Changes nothing."""

    def load(self, state: Any) -> None:
        """Goes on with a checked state, and takes its descriptors over (`OwnedFd.take`). `open` is not called then.

        Called again with a newer state if it changed in the source, so what it took before is dropped first.
        """
        raise NotImplementedError

    def load_moved(self, state: Any) -> None:
        """As `load`, while the device is open and no ring runs: its guest came with another VMM's help.

        Only frontends that were offered DEVICE_STATE bring one (vhost-user, "Migrating back-end state").
        """
        self.load(state)

    def keeps_chains(self, state: SessionState) -> bool:
        """Whether Python code serves rings of a session with this state, and may keep what it takes of them."""
        del state
        return bool(self.callback_groups)

    def ring_name(self, vring: int) -> str:
        """What a ring is called when people are told of it."""
        return f"vring {vring}"

    def moves(self, group: RingGroup) -> bool:
        """Whether what a guest puts into the group's rings gets anywhere."""
        return group.is_running()

    def session_adopted(self) -> None:
        """The session that owns came; its rings are laid out next."""

    def rings_reported(self) -> None:
        """An engine signalled: a ring failed, or what is behind it is another."""
