"""What an object can be asked for with: one declared table of options per type, and everything derived from it.

Owns:        Spec and Option; reading, checking, help, the mapping that travels, the comparison of two specs.
Never sees:  a particular type, files, sockets: a spec that exists can still be impossible on this machine.
Read next:   values.py for the types in the tables, together.py for what several specs must be, registry.py for which
             types there are; netdevs/tap_options.py for a whole example.

A spec is its own table: each dataclass field is an option, its metadata says the rest. Whichever way a spec
is made (text, JSON, a mapping from another daemon, Python), the same checks run when it is constructed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Self, TypeVar

from localmig.errors import ConfigError, PeerError
from localmig.options.values import Identifier, Value, ValueType


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of object: `--netdev`, `--device`.

    Attributes:
        selector: the key that names an object's type in text and mappings, QEMU's word for it.
        summary: what such an object is, for help.
    """

    selector: str
    summary: str


KINDS: Final[Mapping[str, Kind]] = {
    "netdev": Kind(selector="type", summary="the host side of a NIC"),
    "device": Kind(selector="driver", summary="a device for a guest"),
}
"""All kinds, by the command line option that makes one, without the dashes. What others refer to comes first."""


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
class Reference:
    """What an option refers to.

    Attributes:
        kind: the kind of the object whose id it has.
        exclusive: whether that object can have one user only.
    """

    kind: str
    exclusive: bool


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
    reference: Reference | None = None

    def help_line(self) -> str:
        """The row as help prints it."""
        left = f"  {self.name}={self.value.word}"
        note = "" if self.unsaid is None else f" (default: {value_text(self.unsaid)})"
        return f"{left:<29} {self.help}{' (required)' if self.required else note}"


_METADATA: Final = "localmig.option"


def option(
    value: ValueType,
    help: str,  # noqa: A002 - what it is
    *,
    default: Value | dataclasses._MISSING_TYPE | None = dataclasses.MISSING,
    fit: Fit = Fit.ALWAYS,
    unsaid: Value | None = None,
    advice: str = "",
    name: str | None = None,
) -> Any:
    """A field of a spec that is an option.

    Args:
        value: its type, with its range.
        help: what it is for, in a line.
        default: its value where it was not given; without one it must be given.
        fit: when source and destination must agree.
        unsaid: for one whose default is None, because it makes a difference whether it was given: what that means.
        advice: what to do where the two do not fit.
        name: its name, if that is another one than the field's with '-' for '_'.
    """
    row = {"value": value, "help": help, "fit": fit, "unsaid": unsaid, "advice": advice, "name": name}
    return field(default=default, metadata={_METADATA: row})


def reference(
    kind: str,
    help: str,  # noqa: A002 - what it is
    *,
    exclusive: bool = False,
    default: dataclasses._MISSING_TYPE | None = dataclasses.MISSING,
) -> Any:
    """A field of a spec that has the id of another object: `str`, or `str | None` with `default=None`.

    The other object is built before this one and deleted after it.

    Args:
        kind: of the other object, one of `KINDS`.
        help: what it is for, in a line.
        exclusive: whether the other object can have one user only.
        default: None where it may be left out.
    """
    row = {"value": Identifier(), "help": help, "reference": Reference(kind=kind, exclusive=exclusive)}
    return field(default=default, metadata={_METADATA: row})


class Spec:
    """What all specs share: every option is checked when the spec is constructed.

    A spec of one's own is a frozen dataclass with slots and keywords only, whose fields are made by `option` and
    `reference`. It derives from the spec of its kind. Whoever has a `__post_init__` calls `Spec.__post_init__(self)`.

    Attributes:
        kind: the command line option that makes it, without the dashes.
        type_name: the name of the type.
        summary: what the type is, for help.
        id: the user's name for it.
    """

    __slots__ = ()

    kind: ClassVar[str]
    type_name: ClassVar[str]
    summary: ClassVar[str]
    id: str

    def __post_init__(self) -> None:
        for row in options_of(type(self)):
            value = getattr(self, row.attribute)
            # None is an option that was not given; no other value stands for that.
            if value is not None or row.required:
                row.value.check(row.name, value)

    def claims(self) -> Iterable[tuple[str, Hashable]]:
        """What only one object can have: what it is called for people (`interface`), and which one it is."""
        return ()

    @property
    def stays_home(self) -> str | None:
        """The option that leaves its descriptors here in a local migration, as `NAME=VALUE`. None: they move."""
        return None

    @property
    def program_at_end(self) -> str | None:
        """The option that has a program run once it is let go of, as `NAME=VALUE`. None: there is none."""
        return None

    def settled(self, referred: Mapping[str, Spec]) -> Self:
        """This spec with what follows from those that it refers to, which are settled; by id.

        Settling what is settled changes nothing.

        Raises:
            ConfigError: they cannot be together.
        """
        del referred
        return self

    def completed_by(self, theirs: Spec) -> Self:
        """This spec of a destination with what it takes over from the source's, which fits it."""
        del theirs
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class NetdevSpec(Spec):
    """What specs of netdevs share."""

    kind: ClassVar[str] = "netdev"

    id: str = option(Identifier(), "name of this netdev, for a device's netdev=")

    @property
    def local_migration_word(self) -> bool | None:
        """Whether a local migration moves the descriptors, as far as this netdev was told; None: the device says."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec(Spec):
    """What specs of devices share."""

    kind: ClassVar[str] = "device"

    id: str = option(Identifier(), "name of this device")

    def with_second_socket(self, path: str) -> Self:
        """This spec with one more address of frontends. ConfigError where there can be none."""
        raise ConfigError(f"device '{self.id}' has no address that could be given: '{path}'")

    def without_socket(self, path: str) -> Self:
        """This spec with one address of frontends less. ConfigError where it has not that one, or no other."""
        raise ConfigError(f"device '{self.id}' has no address that could be taken back: '{path}'")


SpecT = TypeVar("SpecT", bound=Spec)


def options_of(spec_type: type[Spec]) -> tuple[Option, ...]:
    """The table of a type, in the order help prints it. Made once: a handover reads it for each object.

    Raises:
        ConfigError: the spec is wrong, whatever was asked for: a field is no option.
    """
    if spec_type not in _tables:
        if not dataclasses.is_dataclass(spec_type):
            raise ConfigError(f"{spec_type.__qualname__} is no dataclass, which each spec is")
        _tables[spec_type] = tuple(map(_option_of, dataclasses.fields(spec_type)))
    return _tables[spec_type]


_tables: Final[dict[type[Spec], tuple[Option, ...]]] = {}


def _option_of(row: dataclasses.Field[Any]) -> Option:
    said = row.metadata.get(_METADATA)
    if said is None:
        raise ConfigError(f"field '{row.name}' is no option: give it its type and help by option() or reference()")
    required = row.default is dataclasses.MISSING
    default: Any = None if required else row.default
    return Option(
        name=said.get("name") or row.name.replace("_", "-"),
        attribute=row.name,
        value=said["value"],
        default=default,
        required=required,
        fit=said.get("fit", Fit.ALWAYS),
        help=said["help"],
        unsaid=said.get("unsaid") if default is None else default,
        advice=said.get("advice", ""),
        reference=said.get("reference"),
    )


def references_of(spec: Spec) -> dict[str, Reference]:
    """The ids of the objects that `spec` refers to."""
    return {
        getattr(spec, row.attribute): row.reference
        for row in options_of(type(spec))
        if row.reference is not None and getattr(spec, row.attribute) is not None
    }


# -- text and mappings -> spec ------------------------------------------------------------------------------


def read_texts(spec_type: type[Spec], texts: Mapping[str, str]) -> dict[str, object]:
    """Texts to values of the types the table says; a key that is not in it is left for `build_spec` to refuse."""
    rows = {row.name: row for row in options_of(spec_type)}
    return {key: rows[key].value.read(key, text) if key in rows else text for key, text in texts.items()}


def build_spec(spec_type: type[SpecT], values: Mapping[str, object]) -> SpecT:
    """The spec that `values` describe; each may be of any type and value. The key of the type is not among them.

    Raises:
        ConfigError: in QEMU's words where it has them.
    """
    rows = {row.name: row for row in options_of(spec_type)}
    values = dict(_flat(values, {name.partition(".")[0] for name in rows if "." in name}))
    for key in values:
        if key not in rows:
            raise ConfigError(f"Parameter '{key}' is unexpected, {spec_type.type_name} has: {', '.join(rows)}")
    for row in rows.values():
        if row.required and row.name not in values:
            raise ConfigError(f"Parameter '{row.name}' is missing")
        if row.name in values:
            # The spec checks again, but takes None for an option that was not given; here it is a wrong value.
            row.value.check(row.name, values[row.name])
    arguments: dict[str, Any] = {rows[key].attribute: value for key, value in values.items()}
    return spec_type(**arguments)


def _flat(values: Mapping[str, object], nested: AbstractSet[str]) -> Iterator[tuple[str, object]]:
    """QEMU nests in JSON, as TOML does, what has a dot in its name in text: `nested` is what stands before the dot."""
    for key, value in values.items():
        if key in nested and isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", each) for inner, each in value.items())
        else:
            yield key, value


def help_text(spec_type: type[Spec]) -> str:
    """The options of a type, for people."""
    return "\n".join([f"{spec_type.type_name} options:", *(row.help_line() for row in options_of(spec_type))])


# -- spec <-> mapping ---------------------------------------------------------------------------------------


def to_mapping(spec: Spec) -> dict[str, Value]:
    """The form that travels in HELLO, which is the JSON form of the command line too.

    Left out: what stands at its default (an older daemon need not know it then) and what is a matter of this
    process alone, such as a descriptor's number.
    """
    mapping: dict[str, Value] = {KINDS[spec.kind].selector: spec.type_name}
    for row in options_of(type(spec)):
        value = getattr(spec, row.attribute)
        if row.fit is not Fit.NEVER and value != row.default:
            mapping[row.name] = value
    return mapping


def check_travels(spec: Spec, mapping: Mapping[str, object]) -> None:
    """Raises PeerError where the other side's mapping, which `spec` was built from, has what does not travel."""
    for row in options_of(type(spec)):
        if row.fit is Fit.NEVER and row.name in mapping:
            raise PeerError(f"{spec.kind} '{spec.id}' of the other side: Parameter '{row.name}' does not travel")


def differences(ours: Spec, theirs: Spec, *, with_descriptors: bool) -> list[str]:
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
    for row in options_of(type(ours)):
        here, there = (
            row.unsaid if (value := getattr(spec, row.attribute)) is None else value for spec in (ours, theirs)
        )
        if row.fit in compared and here != there and here is not None and there is not None:
            texts.append(
                f"{ours.kind} '{ours.id}' has {row.name}={value_text(here)} here and {value_text(there)} there"
                f"{row.advice}"
            )
    return texts


def value_text(value: Value) -> str:
    """A value as the command line writes it."""
    match value:
        case bool():
            return "on" if value else "off"
        case _:
            return str(value)
