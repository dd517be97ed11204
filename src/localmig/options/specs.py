"""The objects a user asks for: one declared table of options per type, and everything derived from it.

Owns:        the specs, their options (type, range, default, help), their text, mapping and help forms.
Never sees:  files, sockets, interfaces: a spec that exists can still be impossible on this machine.
Read next:   values.py for the types in the tables, daemon/ for what is built from a spec.

A spec is its own table: each dataclass field is an option, its metadata says the rest. Whichever way a spec
is made (text, JSON, a mapping from another daemon, Python), the same checks run when it is constructed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeVar

from localmig.errors import ConfigError, PeerError
from localmig.options.address import IncomingSpec, UnixAddress
from localmig.options.keyval import is_json, parse_json, parse_keyval
from localmig.options.values import (
    FD_MAX,
    FD_MIN,
    Choice,
    Descriptors,
    FileMode,
    FilePath,
    GroupName,
    Identifier,
    InterfaceName,
    MacAddress,
    Number,
    SocketPath,
    Switch,
    Value,
    ValueType,
)
from localmig.unix_socket import check_path

MTU_MIN: Final = 68
"""Smallest MTU of IPv4 (RFC 791) and of a TAP; virtio names the same bound for the MTU a device gives."""

MTU_MAX: Final = 65521
"""Largest MTU the kernel lets a TAP have: 65535 less the Ethernet header."""

QUEUE_COUNT_MAX: Final = 128
"""vhost-user has 8 bits for the number of a vring, and a queue pair has two; the kernel has 256 for a TAP."""


RECONNECT_MS_MAX: Final = 60_000
"""Longest pause between two attempts to connect: a VMM that came back is not left waiting for longer."""

SNDBUF_MAX: Final = 2**31 - 1
"""TUNSETSNDBUF takes an int."""


class Fit(enum.Enum):
    """When an option of the destination must agree with the source's."""

    ALWAYS = "always"
    WITH_DESCRIPTORS = "with-descriptors"
    """Only where descriptors move: without them the destination opens its own."""
    OURS = "ours"
    """Each side may have its own: it is not compared, but travels for a destination that was given no options."""
    NEVER = "never"
    """It is a matter of one process: it is not compared and does not travel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One row of a type's table."""

    name: str
    attribute: str
    value: ValueType
    default: Value | None
    required: bool
    fit: Fit
    help: str
    advice: str = ""
    """What to do where source and destination do not fit."""
    unsaid: Value | None = None
    """What it means where it was not given: its default, if it has one."""

    def help_line(self) -> str:
        """The row as help prints it."""
        left = f"  {self.name}={self.value.word}"
        note = "" if self.unsaid is None else f" (default: {_text(self.unsaid)})"
        return f"{left:<29} {self.help}{' (required)' if self.required else note}"


def _option(
    value: ValueType,
    help_text: str,
    *,
    fit: Fit = Fit.ALWAYS,
    unsaid: Value | None = None,
    advice: str = "",
    name: str | None = None,
) -> dict[str, Any]:
    """The metadata of a field that is an option. The option's name is `name`, or the field's, with '-' for '_'.

    `unsaid` is for one whose default is None, because it makes a difference whether it was given.
    """
    return {"value": value, "help": help_text, "fit": fit, "unsaid": unsaid, "advice": advice, "name": name}


def _offload(help_text: str) -> Any:
    """A field that switches an offload. QEMU writes these names with '_', as nothing else.

    Each side may have its own: a session goes on with what it was offered, and the TAP leaves to a guest what both the
    guest and the options allow.
    """
    return field(default=True, metadata=_option(Switch(), help_text, fit=Fit.OURS) | {"is_offload": True})


class Spec:
    """What all specs share: every option is checked when the spec is constructed.

    Attributes:
        kind: the command line option that makes it, without the dashes.
        selector: the key that names the type in text and mappings, QEMU's word for it.
        type_name: the value of that key.
        summary: what the type is, for help.
    """

    __slots__ = ()

    kind: ClassVar[str]
    selector: ClassVar[str]
    type_name: ClassVar[str]
    summary: ClassVar[str]

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            value = getattr(self, option.attribute)
            # None is an option that was not given; no other value stands for that.
            if value is not None or option.required:
                option.value.check(option.name, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class TapSpec(Spec):
    """`--netdev tap,…`: the host side of a NIC, a TAP interface.

    Neither `ifname` nor `fd`: the kernel chooses a name, or what arrives by migration decides.
    """

    kind: ClassVar[str] = "netdev"
    selector: ClassVar[str] = "type"
    type_name: ClassVar[str] = "tap"
    summary: ClassVar[str] = "a TAP interface of this machine"

    id: str = field(metadata=_option(Identifier(), "name of this netdev, for a device's netdev="))
    ifname: str | None = field(
        default=None,
        metadata=_option(
            InterfaceName(),
            "interface to open, created where it does not exist; without it the kernel chooses a name",
            fit=Fit.WITH_DESCRIPTORS,
        ),
    )
    script: str = field(
        default="no",
        metadata=_option(FilePath(), "program to run with the name of the interface once it is open", fit=Fit.NEVER),
    )
    downscript: str = field(
        default="no",
        metadata=_option(
            FilePath(), "program to run with the name of the interface before it is closed", fit=Fit.NEVER
        ),
    )
    mtu: int | None = field(
        default=None,
        metadata=_option(
            Number(lowest=MTU_MIN, highest=MTU_MAX, reason="what the kernel lets a TAP have"),
            "MTU to give the interface; without it the interface keeps its own",
        ),
    )
    queues: int = field(
        default=1,
        metadata=_option(
            Number(lowest=1, highest=QUEUE_COUNT_MAX, reason="vhost-user can name 256 vrings, two for each queue"),
            "queues of the interface, and queue pairs of the device on it; more than one need a VMM that serves the "
            "control queue itself, as QEMU does: without one the guest's driver refuses the device",
            advice="; end the daemon and start it with another number",
        ),
    )
    fd: int | None = field(
        default=None,
        metadata=_option(
            Number(lowest=FD_MIN, highest=FD_MAX, reason="a descriptor beyond the standard streams"),
            "an open TAP with a vnet header, inherited from the parent process, in place of ifname",
            fit=Fit.NEVER,
        ),
    )
    fds: str | None = field(
        default=None,
        metadata=_option(
            Descriptors(),
            "as fd=, for an interface of several queues: a descriptor for each, in place of ifname and queues",
            fit=Fit.NEVER,
        ),
    )

    sndbuf: int = field(
        default=0,
        metadata=_option(
            Number(lowest=0, highest=SNDBUF_MAX, reason="an int of the kernel's"),
            "bytes a queue may have on their way into the network before it takes no more, 0 for no limit",
            fit=Fit.WITH_DESCRIPTORS,
        ),
    )
    br: str | None = field(
        default=None,
        metadata=_option(
            InterfaceName(),
            "bridge to put the interface into; one that arrives by migration is left where it is",
            fit=Fit.WITH_DESCRIPTORS,
        ),
    )
    guest_carrier: bool = field(
        default=False,
        metadata=_option(
            Switch(),
            "whether the interface has a carrier only while a driver serves the NIC; off: always",
            fit=Fit.OURS,
        ),
    )
    local_migration_supported: bool | None = field(
        default=None,
        metadata=_option(
            Switch(),
            "QEMU's place for local-migration= of the device on this netdev",
            # As the device's.
            fit=Fit.NEVER,
        ),
    )

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        given = "fd=" if self.fds is None else "fds="
        has_script = self.script != "no" or self.downscript != "no"
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
            if count > QUEUE_COUNT_MAX:
                raise ConfigError(f"Parameter 'fds' has {count} descriptors, limit is {QUEUE_COUNT_MAX}")
            # What the other side is told, and what is compared with it.
            object.__setattr__(self, "queues", count)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What fd= or fds= names; empty where the interface is opened by name."""
        if self.fds is not None:
            return tuple(map(int, self.fds.split(":")))
        return () if self.fd is None else (self.fd,)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSpec(Spec):
    """`--netdev stream,…`: the host side of a NIC, a UNIX stream socket on which each frame follows its length."""

    kind: ClassVar[str] = "netdev"
    selector: ClassVar[str] = "type"
    type_name: ClassVar[str] = "stream"
    summary: ClassVar[str] = "a UNIX stream socket, to passt or to QEMU's -netdev stream"

    id: str = field(metadata=_option(Identifier(), "name of this netdev, for a device's netdev="))
    addr_path: str = field(
        metadata=_option(SocketPath(), "path of the socket", fit=Fit.WITH_DESCRIPTORS, name="addr.path")
    )
    addr_type: str = field(
        default="unix",
        metadata=_option(Choice(("unix",)), "kind of the socket", fit=Fit.WITH_DESCRIPTORS, name="addr.type"),
    )
    server: bool = field(
        default=False,
        metadata=_option(
            Switch(),
            "whether the daemon listens on the socket and the peer connects; off: the other way round",
            fit=Fit.WITH_DESCRIPTORS,
        ),
    )
    reconnect_ms: int = field(
        default=0,
        metadata=_option(
            Number(lowest=0, highest=RECONNECT_MS_MAX, reason="a peer that came back waits a minute at most"),
            "with server=off, milliseconds between two attempts to connect to the peer; 0: one attempt, at the start",
            fit=Fit.OURS,
        ),
    )
    mtu: int = field(
        default=1500,
        metadata=_option(
            Number(lowest=MTU_MIN, highest=MTU_MAX, reason="a TAP's, and with it no frame is longer than passt takes"),
            "MTU that the guest is told, and the longest packet that is sent for it",
        ),
    )

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        if self.server and self.reconnect_ms:
            raise ConfigError("'reconnect-ms' option is incompatible with socket in server listen mode")


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtioNetSpec(Spec):
    """`--device virtio-net,…`: the guest side of a NIC, served over vhost-user."""

    kind: ClassVar[str] = "device"
    selector: ClassVar[str] = "driver"
    type_name: ClassVar[str] = "virtio-net"
    summary: ClassVar[str] = "a virtio NIC, served to a VMM over vhost-user"

    id: str = field(metadata=_option(Identifier(), "name of this device"))
    netdev: str = field(metadata=_option(Identifier(), "id of the netdev that is its host side"))
    socket: str = field(
        metadata=_option(
            SocketPath(),
            "UNIX socket of the vhost-user connection",
            fit=Fit.WITH_DESCRIPTORS,
        )
    )
    server: bool = field(
        default=True,
        metadata=_option(
            Switch(),
            "whether the daemon listens on the socket and the VMM connects; off: the other way round",
            fit=Fit.WITH_DESCRIPTORS,
        ),
    )
    reconnect_ms: int = field(
        default=0,
        metadata=_option(
            Number(lowest=0, highest=RECONNECT_MS_MAX, reason="a VMM that came back waits a minute at most"),
            "with server=off, milliseconds between two attempts to connect to the VMM; 0: one attempt, at the start",
            fit=Fit.OURS,
        ),
    )
    socket_mode: str = field(
        default="0600",
        metadata=_option(FileMode(), "with server=on, the socket's mode: who may connect", fit=Fit.WITH_DESCRIPTORS),
    )
    socket_group: str | None = field(
        default=None,
        metadata=_option(
            GroupName(), "with server=on, the socket's group, by name or number", fit=Fit.WITH_DESCRIPTORS
        ),
    )
    local_migration: bool | None = field(
        default=None,
        metadata=_option(
            Switch(),
            "whether a local migration moves this device's descriptors; off: its plain state only",
            fit=Fit.WITH_DESCRIPTORS,
            unsaid=True,
        ),
    )
    mac: str | None = field(
        default=None,
        metadata=_option(
            MacAddress(),
            "the guest's Ethernet address, for who asks the device: User-Mode Linux does, QEMU has its own",
        ),
    )
    packed: bool = field(
        default=False,
        metadata=_option(
            Switch(),
            "whether packed rings are offered; the VMM must know them: QEMU with packed=on does, User-Mode Linux not",
            fit=Fit.OURS,
        ),
    )
    csum: bool = _offload("let the guest leave checksums to the host")
    guest_csum: bool = _offload("let the host leave checksums to the guest")
    host_tso4: bool = _offload("let the guest leave segmentation to the host: TCP over IPv4")
    host_tso6: bool = _offload("TCP over IPv6")
    host_ecn: bool = _offload("TCP with explicit congestion notification")
    host_uso: bool = _offload("UDP, where the kernel has it (Linux 6.2)")
    guest_tso4: bool = _offload("let the host leave segmentation to the guest: TCP over IPv4")
    guest_tso6: bool = _offload("TCP over IPv6")
    guest_ecn: bool = _offload("TCP with explicit congestion notification")
    guest_uso4: bool = _offload("UDP over IPv4, together with guest_uso6, where the kernel has it")
    guest_uso6: bool = _offload("UDP over IPv6, together with guest_uso4, where the kernel has it")

    @property
    def stays_home(self) -> bool:
        """Whether a local migration leaves its descriptors behind."""
        return self.local_migration is False

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        if self.server and self.reconnect_ms:
            raise ConfigError("'reconnect-ms' option is incompatible with socket in server listen mode")
        if not self.server and (self.socket_group is not None or self.socket_mode != "0600"):
            raise ConfigError("socket-mode= and socket-group= are invalid with server=off: the VMM makes the socket")


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorSpec:
    """`--qmp unix:PATH`: where the daemon answers QMP."""

    path: str

    def __post_init__(self) -> None:
        check_path(self.path)


NetdevSpec = TapSpec | StreamSpec
DeviceSpec = VirtioNetSpec
AnySpec = NetdevSpec | DeviceSpec

SpecT = TypeVar("SpecT", bound=AnySpec)

_TYPES: Final[Mapping[str, type[AnySpec]]] = {
    spec_type.type_name: spec_type for spec_type in (TapSpec, StreamSpec, VirtioNetSpec)
}


def options_of(spec_type: type[Spec]) -> tuple[Option, ...]:
    """The table of a type, in the order help prints it. Made once: a handover reads it for each object."""
    if spec_type not in _tables:
        rows = dataclasses.fields(spec_type)  # type: ignore[arg-type]  # every Spec is a dataclass
        _tables[spec_type] = tuple(map(_option_of, rows))
    return _tables[spec_type]


_tables: Final[dict[type[Spec], tuple[Option, ...]]] = {}


def _option_of(row: dataclasses.Field[Any]) -> Option:
    required = row.default is dataclasses.MISSING
    default: Any = None if required else row.default
    return Option(
        name=row.metadata["name"] or (row.name if row.metadata.get("is_offload") else row.name.replace("_", "-")),
        attribute=row.name,
        value=row.metadata["value"],
        default=default,
        required=required,
        fit=row.metadata["fit"],
        help=row.metadata["help"],
        unsaid=row.metadata["unsaid"] if default is None else default,
        advice=row.metadata["advice"],
    )


OFFLOADS: Final = tuple(row.name for row in dataclasses.fields(VirtioNetSpec) if row.metadata.get("is_offload"))
"""The options that switch an offload, each the name of virtio's feature in small letters."""


# -- text -> spec -------------------------------------------------------------------------------------------


def parse_netdev(text: str) -> NetdevSpec:
    """Reads what `--netdev` takes.

    Raises:
        ConfigError: with the option it is about, its text, and what is wrong.
    """
    return _parse("netdev", text, read_netdev)


def parse_device(text: str) -> DeviceSpec:
    """Reads what `--device` takes.

    Raises:
        ConfigError: with the option it is about, its text, and what is wrong.
    """
    return _parse("device", text, read_device)


def parse_monitor(text: str) -> MonitorSpec:
    """Reads what `--qmp` takes: `unix:PATH`. QEMU's `,server=on,wait=off` may follow: so it always is.

    Raises:
        ConfigError: it is something else.
    """
    try:
        return read_monitor(text)
    except ConfigError as error:
        raise ConfigError(f"--qmp {text}: {error}") from error


def read_netdev(values: Mapping[str, object]) -> NetdevSpec:
    """The netdev that a mapping in the JSON form describes. ConfigError where it describes none."""
    spec = _build("netdev", values)
    assert isinstance(spec, NetdevSpec), spec
    return spec


def read_device(values: Mapping[str, object]) -> DeviceSpec:
    """The device that a mapping in the JSON form describes. ConfigError where it describes none."""
    spec = _build("device", values)
    assert isinstance(spec, DeviceSpec), spec
    return spec


def help_for(kind: str, text: str) -> str | None:
    """The help that `text` asks for (`help`, `?`, or `TYPE,help`), None where it asks for none.

    Args:
        kind: "netdev" or "device".
        text: what the user gave to that option.
    """
    name, _, rest = text.partition(",")
    if name in ("help", "?"):
        return "\n".join([f"{kind} types:", *(f"  {t.type_name:<27} {t.summary}" for t in _types(kind).values())])
    spec_type = _types(kind).get(name)
    if spec_type is None or not {"help", "?"} & set(rest.split(",")):
        return None
    return "\n".join([f"{name} options:", *(option.help_line() for option in options_of(spec_type))])


def read_monitor(text: str) -> MonitorSpec:
    """As `parse_monitor`; what is wrong does not name the option."""
    values = parse_keyval(text, "address")
    address = values.pop("address", "")
    protocol, _, path = address.partition(":")
    if protocol != "unix":
        raise ConfigError(f"'{address}' is no UNIX socket, expected unix:PATH")
    for key, value in values.items():
        if (key, value) not in (("server", "on"), ("wait", "off")):
            raise ConfigError(f"Parameter '{key}={value}' is unexpected, only server=on and wait=off may be there")
    return MonitorSpec(path=path)


def _parse(kind: str, text: str, read: Callable[[Mapping[str, object]], SpecT]) -> SpecT:
    try:
        if is_json(text):
            return read(parse_json(text))
        return read(_read(kind, parse_keyval(text, _selector(kind))))
    except ConfigError as error:
        raise ConfigError(f"--{kind} {text}: {error}") from error


def _read(kind: str, texts: Mapping[str, str]) -> dict[str, object]:
    """Texts to values of the types the table says; a key in no table is left for `_build` to refuse."""
    spec_type = _types(kind).get(texts.get(_selector(kind), ""))
    options = {option.name: option for option in options_of(spec_type)} if spec_type else {}
    return {key: options[key].value.read(key, text) if key in options else text for key, text in texts.items()}


def _build(kind: str, values: Mapping[str, object]) -> AnySpec:
    """The spec that `values` describe; each may be of any type and value.

    Raises:
        ConfigError: in QEMU's words where it has them.
    """
    selector = _selector(kind)
    types = _types(kind)
    if selector not in values:
        raise ConfigError(f"Parameter '{selector}' is missing, one of: {', '.join(types)}")
    type_name = values[selector]
    if not isinstance(type_name, str):
        raise ConfigError(f"Invalid parameter type for '{selector}', expected: string")
    if type_name not in types:
        raise ConfigError(f"Parameter '{selector}' does not accept value '{type_name}', one of: {', '.join(types)}")
    options = {option.name: option for option in options_of(types[type_name])}
    values = dict(_flat(values, {name.partition(".")[0] for name in options if "." in name}))
    for key in values:
        if key != selector and key not in options:
            raise ConfigError(f"Parameter '{key}' is unexpected, {type_name} has: {', '.join(options)}")
    for option in options.values():
        if option.required and option.name not in values:
            raise ConfigError(f"Parameter '{option.name}' is missing")
        if option.name in values:
            # The spec checks again, but takes None for an option that was not given; here it is a wrong value.
            option.value.check(option.name, values[option.name])
    arguments: dict[str, Any] = {options[key].attribute: value for key, value in values.items() if key != selector}
    return types[type_name](**arguments)


def _flat(values: Mapping[str, object], nested: AbstractSet[str]) -> Iterator[tuple[str, object]]:
    """QEMU nests in JSON, as TOML does, what has a dot in its name in text: `nested` is what stands before the dot."""
    for key, value in values.items():
        if key in nested and isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", each) for inner, each in value.items())
        else:
            yield key, value


def _types(kind: str) -> dict[str, type[AnySpec]]:
    return {name: spec_type for name, spec_type in _TYPES.items() if spec_type.kind == kind}


def _selector(kind: str) -> str:
    return next(iter(_types(kind).values())).selector


# -- spec <-> mapping ---------------------------------------------------------------------------------------


def to_mapping(spec: AnySpec) -> dict[str, Value]:
    """The form that travels in HELLO, which is the JSON form of the command line too.

    Left out: what stands at its default (an older daemon need not know it then) and what is a matter of this
    process alone, such as a descriptor's number.
    """
    mapping: dict[str, Value] = {spec.selector: spec.type_name}
    for option in options_of(type(spec)):
        value = getattr(spec, option.attribute)
        if option.fit is not Fit.NEVER and value != option.default:
            mapping[option.name] = value
    return mapping


def from_mapping(kind: str, mapping: Mapping[str, object]) -> AnySpec:
    """The spec another daemon sent. Nothing of `mapping` is trusted.

    Args:
        kind: "netdev" or "device".
        mapping: what `to_mapping` gave over there.

    Raises:
        PeerError: it describes no such object of ours.
    """
    try:
        spec = _build(kind, mapping)
    except ConfigError as error:
        raise PeerError(f"{kind} {_name(mapping)} of the other side: {error}") from error
    for option in options_of(type(spec)):
        if option.fit is Fit.NEVER and option.name in mapping:
            raise PeerError(f"{kind} '{spec.id}' of the other side: Parameter '{option.name}' does not travel")
    return spec


def differences(ours: AnySpec, theirs: AnySpec, *, with_descriptors: bool) -> list[str]:
    """Where two specs of one object do not fit, each as a text that names the option and both values.

    An option that one side left out fits every value: the state is checked later against what really is.

    Args:
        ours: the spec given to this daemon.
        theirs: the spec the other daemon sent.
        with_descriptors: whether the object's descriptors move.
    """
    if type(ours) is not type(theirs):
        return [f"{ours.kind} '{ours.id}' is a {ours.type_name} here and a {theirs.type_name} there"]
    compared = {Fit.ALWAYS, Fit.WITH_DESCRIPTORS} if with_descriptors else {Fit.ALWAYS}
    texts = []
    for option in options_of(type(ours)):
        here, there = (
            option.unsaid if (value := getattr(spec, option.attribute)) is None else value for spec in (ours, theirs)
        )
        if option.fit in compared and here != there and here is not None and there is not None:
            texts.append(
                f"{ours.kind} '{ours.id}' has {option.name}={_text(here)} here and {_text(there)} there{option.advice}"
            )
    return texts


def _name(mapping: Mapping[str, object]) -> str:
    identifier = mapping.get("id")
    # Cut: it comes from the other side and may have any length.
    return f"'{identifier[:64]}'" if isinstance(identifier, str) else "without id"


def _text(value: Value) -> str:
    match value:
        case bool():
            return "on" if value else "off"
        case _:
            return str(value)


# -- all specs of a daemon ----------------------------------------------------------------------------------


def check_together(
    netdevs: Sequence[NetdevSpec],
    devices: Sequence[DeviceSpec],
    *,
    monitor: MonitorSpec | None = None,
    incoming: IncomingSpec | None = None,
) -> None:
    """Checks what no spec can know alone: ids, references, and names that only one can have.

    Raises:
        ConfigError: the first thing that does not fit, in QEMU's words where it has them.
    """
    specs: list[AnySpec] = [*netdevs, *devices]
    seen: dict[str, AnySpec] = {}
    for spec in specs:
        # QEMU lets a netdev and a device share an id; here both are parts of a handover, told apart by id.
        if (other := seen.setdefault(spec.id, spec)) is not spec:
            raise ConfigError(f"Duplicate ID '{spec.id}' for {spec.kind}, a {other.kind} has it already")
    users: dict[str, str] = {}
    for device in devices:
        if device.netdev not in {netdev.id for netdev in netdevs}:
            have = ", ".join(f"'{netdev.id}'" for netdev in netdevs) or "none"
            raise ConfigError(f"device '{device.id}': can't find netdev '{device.netdev}', there is {have}")
        if (user := users.setdefault(device.netdev, device.id)) != device.id:
            raise ConfigError(
                f"device '{device.id}': can't take netdev '{device.netdev}', it's in use by device '{user}'"
            )
    _check_local_migration(netdevs, devices)
    taps = [netdev for netdev in netdevs if isinstance(netdev, TapSpec)]
    _check_distinct("interface", [(f"netdev '{tap.id}'", tap.ifname) for tap in taps])
    _check_distinct("descriptor", [(f"netdev '{tap.id}'", number) for tap in taps for number in tap.descriptors])
    _check_distinct(
        "socket",
        [
            *((f"netdev '{netdev.id}'", netdev.addr_path) for netdev in netdevs if isinstance(netdev, StreamSpec)),
            *((f"device '{device.id}'", device.socket) for device in devices),
            ("--qmp", monitor.path if monitor else None),
            ("--incoming", incoming.path if isinstance(incoming, UnixAddress) else None),
        ],
    )


def _check_local_migration(netdevs: Sequence[NetdevSpec], devices: Sequence[DeviceSpec]) -> None:
    """Raises ConfigError where a device and its netdev were given different values."""
    said = {netdev.id: netdev.local_migration_supported for netdev in netdevs if isinstance(netdev, TapSpec)}
    for device in devices:
        ours, netdevs_word = device.local_migration, said.get(device.netdev)
        if ours is not None and netdevs_word is not None and ours != netdevs_word:
            raise ConfigError(
                f"device '{device.id}' has local-migration={_text(ours)} and its netdev '{device.netdev}' has "
                f"local-migration-supported={_text(netdevs_word)}: they are one switch, leave one out"
            )


def settle_local_migration(netdevs: Sequence[NetdevSpec], devices: Sequence[DeviceSpec]) -> tuple[DeviceSpec, ...]:
    """The devices with their netdevs' word on local migration as their own: off, or not said."""
    home = {
        netdev.id for netdev in netdevs if isinstance(netdev, TapSpec) and netdev.local_migration_supported is False
    }
    return tuple(
        dataclasses.replace(device, local_migration=False if device.stays_home or device.netdev in home else None)
        for device in devices
    )


def _check_distinct(what: str, claims: Sequence[tuple[str, str | int | None]]) -> None:
    seen: dict[str | int, str] = {}
    for owner, name in claims:
        if name is not None and (other := seen.setdefault(name, owner)) != owner:
            raise ConfigError(f"{owner}: {what} '{name}' is used by {other} already")
