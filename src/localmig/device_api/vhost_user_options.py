"""What can be said of any device that is served over vhost-user.

Owns:        VhostUserSpec: its socket, and whether it moves.
Never sees:  a particular device; a socket.
Read next:   options/specs.py for what a spec is; devices/virtio_net/options.py for one with options of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from localmig.contact import ConnectTo, ListenAt
from localmig.device_api.contact_options import check_contact, reconnect_option, server_option
from localmig.device_api.objects import BuildContext
from localmig.errors import ConfigError
from localmig.options.specs import DeviceSpec, Fit, Spec, option
from localmig.options.values import Descriptor, FileMode, GroupName, SocketPath, Switch, descriptor_of


@dataclass(frozen=True, kw_only=True, slots=True)
class VhostUserSpec(DeviceSpec):
    """A device served over vhost-user."""

    socket: str = option(SocketPath(), "UNIX socket of the vhost-user connection", fit=Fit.WITH_DESCRIPTORS)
    server: bool = server_option("VMM", default=True)
    second_socket: str | None = option(
        SocketPath(),
        "with server=off, a second address to connect to: of the VMM that the guest moves to",
        fit=Fit.WITH_DESCRIPTORS,
        default=None,
    )
    reconnect_ms: int = reconnect_option("VMM")
    socket_mode: str = option(
        FileMode(), "with server=on, the socket's mode: who may connect", fit=Fit.WITH_DESCRIPTORS, default="0600"
    )
    socket_group: str | None = option(
        GroupName(), "with server=on, the socket's group, by name or number", fit=Fit.WITH_DESCRIPTORS, default=None
    )
    fd: str | None = option(
        Descriptor(),
        "an inherited socket: one that listens at socket=, or with server=off one that a VMM is connected to",
        fit=Fit.NEVER,
        default=None,
    )
    local_migration: bool | None = option(
        Switch(),
        "whether a local migration moves this device's descriptors; off: its plain state only",
        fit=Fit.WITH_DESCRIPTORS,
        unsaid=True,
        default=None,
    )

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        check_contact(server=self.server, reconnect_ms=self.reconnect_ms)
        if self.server and self.second_socket is not None:
            raise ConfigError("second-socket= is invalid with server=on: any number of VMMs connects to socket=")
        if self.second_socket == self.socket:
            raise ConfigError(f"second-socket= and socket= are both '{self.socket}'")
        if not self.server and (self.socket_group is not None or self.socket_mode != "0600"):
            raise ConfigError("socket-mode= and socket-group= are invalid with server=off: the VMM makes the socket")

        if self.fd is not None and (self.reconnect_ms != 0 or self.second_socket is not None):
            raise ConfigError("fd= is invalid with reconnect-ms= and second-socket=: a connection that ends is gone")

    @property
    def contact(self) -> ListenAt | ConnectTo:
        """Where and how frontends come."""
        if self.server:
            return ListenAt(path=self.socket, mode=int(self.socket_mode, base=8), group=self.socket_group)
        return ConnectTo(path=self.socket, reconnect_ms=self.reconnect_ms, second_path=self.second_socket)

    def with_second_socket(self, path: str) -> Self:
        """This spec with a second address. ConfigError where it listens itself, or has one."""
        if self.server:
            raise ConfigError(f"device '{self.id}' listens: any number of VMMs connects to '{self.socket}'")
        if self.second_socket is not None:
            raise ConfigError(
                f"device '{self.id}' has two addresses, '{self.socket}' and '{self.second_socket}', which is the limit:"
                " take one back by device_socket_del"
            )
        return replace(self, second_socket=path)

    def without_socket(self, path: str) -> Self:
        """This spec with the other address alone. ConfigError where it has not both."""
        if self.second_socket is None or path not in (self.socket, self.second_socket):
            have = " and ".join(f"'{each}'" for each in (self.socket, self.second_socket) if each is not None)
            raise ConfigError(f"device '{self.id}' cannot give '{path}' up, it has {have}; device_del ends the device")
        left = self.socket if path == self.second_socket else self.second_socket
        return replace(self, socket=left, second_socket=None)

    def completed_by(self, theirs: Spec) -> Self:
        """This spec of a destination; a second address that the source was given at run time is taken over."""
        if self.second_socket is None and isinstance(theirs, VhostUserSpec) and not self.server:
            return replace(self, second_socket=theirs.second_socket)
        return self

    @property
    def stays_home(self) -> str | None:
        """What local-migration= says."""
        return "local-migration=off" if self.local_migration is False else None

    def arguments(self, context: BuildContext) -> dict[str, Any]:
        """What every `VhostUserDevice` is made with."""
        fd = None if self.fd is None else context.descriptor(descriptor_of(self.fd))
        return {
            "id": self.id,
            "socket": replace(self.contact, fd=fd),
            "local_migration": self.stays_home is None,
            "queues": context.queues,
            "tracer": context.tracer,
        }

    def claims(self) -> Iterator[tuple[str, Hashable]]:
        """Its addresses."""
        yield "socket", self.socket
        if self.second_socket is not None:
            yield "socket", self.second_socket
