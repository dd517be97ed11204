"""What can be said of any device that is served over vhost-user.

Owns:        VhostUserSpec: its socket, and whether it moves.
Never sees:  a particular device; a socket.
Read next:   options/specs.py for what a spec is; devices/virtio_net/options.py for one with options of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from localmig.contact import ConnectTo, ListenAt
from localmig.device_api.contact_options import check_contact, reconnect_option, server_option
from localmig.device_api.objects import BuildContext
from localmig.errors import ConfigError
from localmig.options.specs import DeviceSpec, Fit, Spec, option
from localmig.options.values import FileMode, GroupName, SocketPath, Switch


@dataclass(frozen=True, kw_only=True, slots=True)
class VhostUserSpec(DeviceSpec):
    """A device served over vhost-user."""

    socket: str = option(SocketPath(), "UNIX socket of the vhost-user connection", fit=Fit.WITH_DESCRIPTORS)
    server: bool = server_option("VMM", default=True)
    reconnect_ms: int = reconnect_option("VMM")
    socket_mode: str = option(
        FileMode(), "with server=on, the socket's mode: who may connect", fit=Fit.WITH_DESCRIPTORS, default="0600"
    )
    socket_group: str | None = option(
        GroupName(), "with server=on, the socket's group, by name or number", fit=Fit.WITH_DESCRIPTORS, default=None
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
        if not self.server and (self.socket_group is not None or self.socket_mode != "0600"):
            raise ConfigError("socket-mode= and socket-group= are invalid with server=off: the VMM makes the socket")

    @property
    def contact(self) -> ListenAt | ConnectTo:
        """Where and how frontends come."""
        if self.server:
            return ListenAt(path=self.socket, mode=int(self.socket_mode, base=8), group=self.socket_group)
        return ConnectTo(path=self.socket, reconnect_ms=self.reconnect_ms)

    @property
    def stays_home(self) -> str | None:
        """What local-migration= says."""
        return "local-migration=off" if self.local_migration is False else None

    def arguments(self, context: BuildContext) -> dict[str, Any]:
        """What every `VhostUserDevice` is made with."""
        return {
            "id": self.id,
            "socket": self.contact,
            "local_migration": self.stays_home is None,
            "queues": context.queues,
            "tracer": context.tracer,
        }

    def claims(self) -> Iterator[tuple[str, Hashable]]:
        """Its socket."""
        yield "socket", self.socket
