"""What a device has besides its sessions and rings, as a part that travels beside it.

Owns:        OwnState.
Never sees:  what that state is.
Read next:   vhost_user_device.py, whose `save`, `check` and `load` it calls.
"""

from __future__ import annotations

from typing import Any, Protocol

from localmig.device_api.part import Part
from localmig.vmstate import Description, default_of


class HasOwnState(Protocol):
    """A device with a state of its own."""

    id: str

    def local_migration_blocker(self) -> str | None:
        """Why its descriptors stay home, None where they move."""

    def is_own_state_outdated(self) -> bool:
        """Whether the state is another one than was saved last."""

    def note_saved(self) -> None:
        """It is saved now."""

    def save(self, *, with_descriptors: bool) -> Any:
        """The state, its descriptors lent."""

    def check(self, state: Any) -> None:
        """Raises PeerError where it cannot be served."""

    def load(self, state: Any) -> None:
        """Takes it over."""


class OwnState(Part):
    """The section of a device's own. It stands before the device in the list of parts: the device builds on it."""

    def __init__(self, device: HasOwnState, description: Description[Any]) -> None:
        self.id = device.id
        self.setup = description
        self._device = device

    def open(self) -> None:
        """Nothing, as in what follows: the device does it."""

    def resume(self) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""

    def freeze(self) -> None:
        """Nothing."""

    def thaw(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def local_migration_blocker(self) -> str | None:
        """What the device says."""
        return self._device.local_migration_blocker()

    def save_setup(self, *, with_descriptors: bool) -> Any:
        """What the device saves."""
        self._device.note_saved()
        return self._device.save(with_descriptors=with_descriptors)

    def setup_default(self) -> Any:
        """All defaults, where there are: an earlier release of the device may have had no state of its own."""
        return default_of(self.setup)

    def is_outdated(self) -> bool:
        """What the device says."""
        return self._device.is_own_state_outdated()

    def release(self) -> None:
        """Nothing."""

    def check_setup(self, state: Any) -> None:
        """Whether the device can go on with it."""
        self._device.check(state)

    def adopt_setup(self, state: Any) -> None:
        """Lets the device go on with it."""
        self._device.load(state)

    def recover(self) -> None:
        """Nothing."""

    def discard(self) -> None:
        """Nothing."""
