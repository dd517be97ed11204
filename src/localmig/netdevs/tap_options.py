"""What can be said of a TAP: the options of `--netdev tap`.

Owns:        TapSpec.
Never sees:  an interface, /dev/net/tun.
Read next:   options/specs.py for what a spec is, tap.py for what is made of this one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from localmig.errors import ConfigError
from localmig.limits import MTU_MAX, MTU_MIN, QUEUE_PAIR_COUNT_MAX
from localmig.netdevs.script import NO_SCRIPT
from localmig.options.specs import Fit, NetdevSpec, Spec, option
from localmig.options.values import Descriptor, Descriptors, FilePath, InterfaceName, Number, Switch, descriptor_of

SNDBUF_MAX: Final = 2**31 - 1
"""TUNSETSNDBUF takes an int; no packet is ever held back by this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TapSpec(NetdevSpec):
    """`--netdev tap,…`: the host side of a NIC, a TAP interface.

    Neither `ifname` nor `fd`: the kernel chooses a name, or what arrives by migration decides.
    """

    type_name: ClassVar[str] = "tap"
    summary: ClassVar[str] = "a TAP interface of this machine"

    ifname: str | None = option(
        InterfaceName(),
        "interface to open, created where it does not exist; without it the kernel chooses a name",
        fit=Fit.WITH_DESCRIPTORS,
        default=None,
    )
    script: str = option(
        FilePath(), "program to run with the name of the interface once it is open", fit=Fit.NEVER, default=NO_SCRIPT
    )
    downscript: str = option(
        FilePath(),
        "program to run with the name of the interface before it is closed",
        fit=Fit.NEVER,
        default=NO_SCRIPT,
    )
    mtu: int | None = option(
        Number(lowest=MTU_MIN, highest=MTU_MAX, reason="what the kernel lets a TAP have"),
        "MTU to give the interface; without it the interface keeps its own",
        default=None,
    )
    queues: int = option(
        Number(lowest=1, highest=QUEUE_PAIR_COUNT_MAX, reason="vhost-user can name 256 vrings, two for each queue"),
        "queues of the interface, and queue pairs of the device on it",
        advice="; end the daemon and start it with another number",
        default=1,
    )
    fd: str | None = option(
        Descriptor(),
        "an open TAP with a vnet header, in place of ifname: inherited from the parent process, or given by getfd",
        fit=Fit.NEVER,
        default=None,
    )
    fds: str | None = option(
        Descriptors(),
        "as fd=, for an interface of several queues: a descriptor for each, in place of ifname and queues",
        fit=Fit.NEVER,
        default=None,
    )

    sndbuf: int = option(
        Number(lowest=0, highest=SNDBUF_MAX, reason="an int of the kernel's"),
        "bytes a queue may have on their way into the network before it takes no more, 0 for no limit",
        fit=Fit.WITH_DESCRIPTORS,
        default=0,
    )
    br: str | None = option(
        InterfaceName(),
        "bridge to put the interface into; one that arrives by migration is left where it is",
        fit=Fit.WITH_DESCRIPTORS,
        default=None,
    )
    guest_carrier: bool = option(
        Switch(),
        "whether the interface has a carrier only while a driver serves the NIC; off: always",
        fit=Fit.OURS,
        default=False,
    )
    local_migration_supported: bool | None = option(
        Switch(),
        "QEMU's place for local-migration= of the device on this netdev",
        # As the device's.
        fit=Fit.NEVER,
        default=None,
    )

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        given = "fd=" if self.fds is None else "fds="
        has_script = self.script != NO_SCRIPT or self.downscript != NO_SCRIPT
        if self.descriptors and (self.ifname is not None or has_script or self.br is not None):
            raise ConfigError(
                f"ifname=, script=, downscript= and br= are invalid with {given}: who opened the TAP set it up"
            )
        if self.br is not None and has_script:
            raise ConfigError("script= and downscript= are invalid with br=: say one way to connect the interface")
        if self.fd is not None and self.fds is not None:
            raise ConfigError("fd= is invalid with fds=: give every descriptor in fds=")
        if self.fd is not None and self.queues != 1:
            raise ConfigError(f"queues={self.queues} is invalid with fd=: give a descriptor for each queue in fds=")
        if self.fds is not None:
            count = len(self.descriptors)
            if self.queues not in (1, count):
                raise ConfigError(f"queues={self.queues} is invalid with fds=, which has {count} descriptors")
            if count > QUEUE_PAIR_COUNT_MAX:
                raise ConfigError(f"Parameter 'fds' has {count} descriptors, limit is {QUEUE_PAIR_COUNT_MAX}")
            # What the other side is told, and what is compared with it.
            object.__setattr__(self, "queues", count)

    @property
    def descriptors(self) -> tuple[int | str, ...]:
        """What fd= or fds= says, each a number or a name; empty where the interface is opened by its name."""
        if self.fds is not None:
            return tuple(map(descriptor_of, self.fds.split(":")))
        return () if self.fd is None else (descriptor_of(self.fd),)

    def claims(self) -> Iterator[tuple[str, Hashable]]:
        """The interface, and each descriptor."""
        if self.ifname is not None:
            yield "interface", self.ifname
        for descriptor in self.descriptors:
            yield "descriptor", descriptor

    @property
    def local_migration_word(self) -> bool | None:
        """What local-migration-supported= says."""
        return self.local_migration_supported

    @property
    def program_at_end(self) -> str | None:
        """The downscript."""
        return None if self.downscript == NO_SCRIPT else f"downscript={self.downscript}"

    def completed_by(self, theirs: Spec) -> TapSpec:
        """The interface's name, where ours has neither that nor descriptors."""
        assert isinstance(theirs, TapSpec), theirs
        return self if self.ifname or self.descriptors else replace(self, ifname=theirs.ifname)
