"""Descriptors that an operator gave the daemon by QMP, under names: QEMU's getfd.

Owns:        them, until a migration or an object takes one over.
Never sees:  how they came, what they are good for.
Read next:   daemon.py, which resolves fd:NAME and fd=NAME by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from localmig.errors import ConfigError, StateError
from localmig.fds import OwnedFd, close_all, close_foreign
from localmig.limits import QUEUE_PAIR_COUNT_MAX
from localmig.options.address import Address, FdAddress

COUNT_MAX: Final = QUEUE_PAIR_COUNT_MAX + 16
"""A NIC needs one for each of its queues, a migration one. What is forgotten here must not use up the guests'
descriptors."""


class LentDescriptors:
    """Copies of named descriptors, for an object that may come to nothing: the names stay until `forget`."""

    def __init__(self, named: NamedDescriptors) -> None:
        self._named = named
        self._copies: dict[str, OwnedFd] = {}

    def number(self, descriptor: int | str) -> int:
        """The number of a copy of the one with this name.

        Raises:
            ConfigError: there is none of that name, or it is a number.
        """
        if isinstance(descriptor, int):
            raise ConfigError(
                f"descriptor {descriptor} is a number, which only the program that starts a daemon knows: give the "
                "descriptor a name by getfd, or give its number to 'localmig run'"
            )
        self._copies[descriptor] = self._named.copy_of(descriptor)
        return self._copies[descriptor].fileno()

    def give_away(self) -> None:
        """The object owns the copies from now on."""
        for copy in self._copies.values():
            copy.release()

    def forget(self) -> None:
        """The object is there: the names are free."""
        for name in self._copies:
            self._named.close(name)

    def close(self) -> None:
        """Closes the copies that were not given away."""
        close_all(self._copies.values())


class NamedDescriptors:
    """They belong to the daemon, not to the client that sent them: another one may use them, as in QEMU."""

    def __init__(self) -> None:
        self._named: dict[str, OwnedFd] = {}

    def add(self, name: str, fd: OwnedFd) -> None:
        """Takes `fd` over under `name`; the one that had it is closed.

        Raises:
            ConfigError: it would be taken for a number; `fd` is closed.
            StateError: there are too many; `fd` is closed.
        """
        try:
            if not name or name[0].isdigit():
                raise ConfigError("Parameter 'fdname' expects a name not starting with a digit")
            if name not in self._named and len(self._named) == COUNT_MAX:
                raise StateError(f"there are {COUNT_MAX} named file descriptors, which is the limit: closefd one")
            close_foreign((self._named.get(name),))
            self._named[name] = fd.take()
        finally:
            close_foreign((fd,))

    def close(self, name: str) -> None:
        """Closes the one with this name. ConfigError where there is none."""
        if name not in self._named:
            raise ConfigError(f"File descriptor named '{name}' not found")
        close_foreign((self._named.pop(name),))

    def lent_for(self, address: Address) -> OwnedFd | None:
        """The one that `fd:NAME` means, None for any other address. ConfigError where there is none of that name."""
        if not isinstance(address, FdAddress) or address.number is not None:
            return None
        if address.name not in self._named:
            raise ConfigError(f"File descriptor named '{address.name}' has not been found")
        return self._named[address.name]

    def give_away(self, fd: OwnedFd | None) -> None:
        """Forgets one that was lent: whoever has it owns it from now on."""
        self._named = {name: each for name, each in self._named.items() if each is not fd}

    @contextmanager
    def lend(self) -> Iterator[LentDescriptors]:
        """For an object that is added: copies of those that its options name. What it does not take is closed."""
        lent = LentDescriptors(self)
        try:
            yield lent
        finally:
            lent.close()

    def copy_of(self, name: str) -> OwnedFd:
        """A copy of the one with this name. ConfigError where there is none."""
        if name not in self._named:
            raise ConfigError(f"File descriptor named '{name}' has not been found")
        return self._named[name].duplicate()

    def close_all(self) -> None:
        """Closes all."""
        close_foreign(self._named.values())
        self._named.clear()
