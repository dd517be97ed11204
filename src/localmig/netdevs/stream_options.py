"""What can be said of a stream: the options of `--netdev stream`, in QEMU's words.

Owns:        StreamSpec.
Never sees:  a socket.
Read next:   options/specs.py for what a spec is, stream.py for what is made of this one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from localmig.device_api.contact_options import check_contact, reconnect_option, server_option
from localmig.limits import MTU_MAX, MTU_MIN
from localmig.options.specs import Fit, NetdevSpec, Spec, option
from localmig.options.values import Choice, Number, SocketPath

MTU: Final = 1500
"""An Ethernet's, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSpec(NetdevSpec):
    """`--netdev stream,…`: the host side of a NIC, a UNIX stream socket on which each frame follows its length."""

    type_name: ClassVar[str] = "stream"
    summary: ClassVar[str] = "a UNIX stream socket, to passt or to QEMU's -netdev stream"

    addr_path: str = option(SocketPath(), "path of the socket", fit=Fit.WITH_DESCRIPTORS, name="addr.path")
    addr_type: str = option(
        Choice(("unix",)), "kind of the socket", fit=Fit.WITH_DESCRIPTORS, name="addr.type", default="unix"
    )
    server: bool = server_option("peer", default=False)
    reconnect_ms: int = reconnect_option("peer")
    mtu: int = option(
        Number(lowest=MTU_MIN, highest=MTU_MAX, reason="a TAP's, and with it no frame is longer than passt takes"),
        "MTU that the guest is told, and the longest packet that is sent for it",
        default=MTU,
    )

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        check_contact(server=self.server, reconnect_ms=self.reconnect_ms)

    def claims(self) -> Iterator[tuple[str, Hashable]]:
        """The socket: a peer serves one NIC."""
        yield "socket", self.addr_path
