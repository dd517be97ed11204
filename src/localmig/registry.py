"""Which types of objects there are: those of this program, then those that installed packages add.

Owns:        the list of built-in types; finding a type by its name; what is said of a type that cannot be had.
Never sees:  objects. No type is imported before somebody asks for it.
Read next:   device_api/objects.py for what a type is.

A package's code is its author's: whatever it raises becomes an error that names the package, for whoever asked for that
type. Objects of other types are served.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, Final

from localmig.device_api import Part
from localmig.device_api.netdev import Netdev
from localmig.device_api.objects import BuildContext, ObjectType
from localmig.errors import ConfigError, PeerError, blamed
from localmig.migration.hello import Origin, program_version
from localmig.options.keyval import is_json, parse_json, parse_keyval
from localmig.options.specs import KINDS, Spec, build_spec, check_travels, help_text, options_of, read_texts
from localmig.qapi import Member
from localmig.vmstate import Description

ENTRY_POINT_GROUP: Final = "localmig.objects"
"""Of a package's entry points; each is named as its type and leads to an ObjectType."""

_BUILT_IN: Final[Mapping[str, Mapping[str, str]]] = {
    "netdev": {
        "tap": "localmig.netdevs.tap:OBJECT",
        "macvtap": "localmig.netdevs.macvtap:OBJECT",
        "stream": "localmig.netdevs.stream:OBJECT",
    },
    "device": {"virtio-net": "localmig.devices.virtio_net:OBJECT"},
}
"""By kind and name, where a type is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredType:
    """A type and where it comes from."""

    object_type: ObjectType[Any]
    origin: Origin

    @property
    def spec(self) -> type[Spec]:
        """Its table of options."""
        spec: type[Spec] = self.object_type.spec
        return spec

    @property
    def is_built_in(self) -> bool:
        """Whether it is a part of this program."""
        return self.origin.distribution == "localmig"

    def __str__(self) -> str:
        where = "" if self.is_built_in else f" (from {self.origin})"
        return f"{self.spec.kind} type '{self.spec.type_name}'{where}"

    def build(self, spec: Spec, context: BuildContext) -> Part:
        """Makes an object.

        Raises:
            ConfigError, KernelError: it cannot be, or its code is wrong.
        """
        with blamed(f"{self} cannot build {spec.kind} '{spec.id}'"):
            part = self.object_type.build(spec, context)
        needed = Netdev if spec.kind == "netdev" else Part
        if needed not in type(part).__mro__:
            raise ConfigError(
                f"{self} cannot build {spec.kind} '{spec.id}': it returned {type(part).__name__}, which is no "
                f"{needed.__name__} of localmig.device_api"
            )
        if not isinstance(getattr(part, "setup", None), Description):
            raise ConfigError(f"{self} cannot build {spec.kind} '{spec.id}': its state ('setup') is no Description")
        if part.id != spec.id:
            raise ConfigError(f"{self} cannot build {spec.kind} '{spec.id}': what it returned has the id '{part.id}'")
        return part


class Registry:
    """The types that can be had.

    Args:
        entry_points: gives those of `ENTRY_POINT_GROUP`; None: the installed packages'.
    """

    def __init__(self, entry_points: Callable[[], Iterable[EntryPoint]] | None = None) -> None:
        self._list = entry_points or _installed
        self._entry_points: dict[str, list[EntryPoint]] | None = None
        self._loaded: dict[tuple[str, str], RegisteredType] = {}
        program_version()  # while the files are this program's

    # -- types --------------------------------------------------------------------------------------------------

    def look_up(self) -> None:
        """Finds out which types packages add, without importing any. Done once, at the latest when one is wanted."""
        if self._entry_points is None:
            self._entry_points = {}
            for entry_point in self._list():
                self._entry_points.setdefault(entry_point.name, []).append(entry_point)

    def load_built_in(self) -> None:
        """Imports the built-in types: for a daemon that learns by HELLO which ones it needs, and is waited for then."""
        for kind, names in _BUILT_IN.items():
            for name in names:
                self.find(kind, name)

    def find(self, kind: str, name: str) -> RegisteredType:
        """The type of that kind and name, imported if it was not before.

        Raises:
            ConfigError: there is none, or it cannot be had.
        """
        if (kind, name) not in self._loaded:
            found = _load_built_in(kind, name) if name in _BUILT_IN[kind] else self._load_added(kind, name)
            self._loaded[kind, name] = found
        return self._loaded[kind, name]

    def type_of(self, spec: Spec) -> RegisteredType:
        """The type of an object."""
        return self.find(spec.kind, spec.type_name)

    def known(self, kind: str) -> list[RegisteredType]:
        """The built-in types of a kind, and those of packages that were asked for so far."""
        for name in _BUILT_IN[kind]:
            self.find(kind, name)
        return [found for (of, _), found in self._loaded.items() if of == kind]

    def _load_added(self, kind: str, name: str) -> RegisteredType:
        self.look_up()
        assert self._entry_points is not None
        found = self._entry_points.get(name, [])
        if not found:
            more = f"; 'localmig run --{kind} help' lists those of packages too" if self._entry_points else ""
            raise ConfigError(
                f"Parameter '{KINDS[kind].selector}' does not accept value '{name}', one of: "
                f"{', '.join(_BUILT_IN[kind])}{more}"
            )
        loaded = _load(found)
        if loaded.spec.kind != kind:
            raise ConfigError(
                f"Parameter '{KINDS[kind].selector}' does not accept value '{name}': this is a "
                f"{loaded.spec.kind} type, from {loaded.origin}"
            )
        return loaded

    # -- text and mappings -> specs -----------------------------------------------------------------------------

    def parse(self, kind: str, text: str) -> Spec:
        """Reads what a command line option takes.

        Args:
            kind: the option, without its dashes.
            text: what the user gave to it.

        Raises:
            ConfigError: with the option it is about, its text, and what is wrong.
        """
        try:
            if is_json(text):
                return self.read(kind, parse_json(text))
            texts = parse_keyval(text, KINDS[kind].selector)
            found, rest = self._select(kind, texts)
            with blamed(f"{found} cannot read its options"):
                values = read_texts(found.spec, rest)
            return self._build(found, values)
        except ConfigError as error:
            raise ConfigError(f"--{kind} {text}: {error}") from error

    def read(self, kind: str, values: Mapping[str, object]) -> Spec:
        """The object that a mapping in the JSON form describes. ConfigError where it describes none."""
        return self._build(*self._select(kind, values))

    def read_theirs(self, kind: str, mapping: Mapping[str, object], origin: Origin) -> Spec:
        """The object that another daemon described. Nothing of `mapping` is trusted.

        Raises:
            PeerError: it describes no such object of ours, or of a type that this daemon does not have.
        """
        if kind not in KINDS:
            raise PeerError(f"the source has an object of kind '{kind}', this release knows {' and '.join(KINDS)}")
        name = mapping.get("id")
        # Cut: it comes from the other side and may have any length.
        whose = f"'{name[:64]}'" if isinstance(name, str) else "without id"
        type_name = mapping.get(KINDS[kind].selector)
        self.look_up()
        assert self._entry_points is not None
        if isinstance(type_name, str) and type_name not in (*_BUILT_IN[kind], *self._entry_points):
            raise PeerError(f"the source has {kind} {whose} of type '{type_name[:64]}': {_advice(origin)}")
        try:
            spec = self.read(kind, mapping)
        except ConfigError as error:
            raise PeerError(f"{kind} {whose} of the other side: {error}") from error
        check_travels(spec, mapping)
        return spec

    def _select(self, kind: str, values: Mapping[str, Any]) -> tuple[RegisteredType, dict[str, Any]]:
        """The type that `values` name, and the rest of them."""
        selector = KINDS[kind].selector
        if selector not in values:
            raise ConfigError(f"Parameter '{selector}' is missing, one of: {', '.join(_BUILT_IN[kind])}")
        name = values[selector]
        if not isinstance(name, str):
            raise ConfigError(f"Invalid parameter type for '{selector}', expected: string")
        return self.find(kind, name), {key: value for key, value in values.items() if key != selector}

    def _build(self, found: RegisteredType, values: Mapping[str, object]) -> Spec:
        with blamed(f"{found} cannot take these options"):
            return build_spec(found.spec, values)

    # -- help ---------------------------------------------------------------------------------------------------

    def help_for(self, kind: str, text: str) -> str | None:
        """The help that `text` asks for (`help`, `?`, or `TYPE,help`), None where it asks for none.

        None as well where there is no such type, or it cannot be had: `parse` says why.
        """
        name, _, rest = text.partition(",")
        if name in ("help", "?"):
            return "\n".join([f"{kind} types:", *self._help_lines(kind)])
        if is_json(text) or not {"help", "?"} & set(rest.split(",")):
            return None
        try:
            return help_text(self.find(kind, name).spec)
        except ConfigError:
            return None

    def _help_lines(self, kind: str) -> Iterator[str]:
        for name in _BUILT_IN[kind]:
            yield f"  {name:<27} {self.find(kind, name).spec.summary}"
        self.look_up()
        assert self._entry_points is not None
        for name, entry_points in sorted(self._entry_points.items()):
            if name in _BUILT_IN[kind]:
                yield f"  {name:<27} (hidden by the built-in type: {_names(entry_points)})"
                continue
            try:
                loaded = _load(entry_points)
            except ConfigError as error:
                yield f"  {name:<27} ({error})"
                continue
            if loaded.spec.kind == kind:
                yield f"  {name:<27} {loaded.spec.summary} ({loaded.origin})"


def _installed() -> Iterable[EntryPoint]:
    # A fifth of the time that a start takes.
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINT_GROUP)


# -- loading --------------------------------------------------------------------------------------------------------


def _load_built_in(kind: str, name: str) -> RegisteredType:
    module, _, attribute = _BUILT_IN[kind][name].partition(":")
    object_type = getattr(importlib.import_module(module), attribute)
    return RegisteredType(object_type=object_type, origin=Origin.own())


def _load(entry_points: list[EntryPoint]) -> RegisteredType:
    """The type that packages add by one name. ConfigError where it cannot be had."""
    entry_point, *others = entry_points
    name = entry_point.name
    if others:
        raise ConfigError(f"type '{name}' is in more than one package: {_names(entry_points)}: uninstall all but one")
    origin = _origin(entry_point)
    try:
        object_type = entry_point.load()
    except (Exception, SystemExit) as error:  # a module may do anything when it is imported
        raise ConfigError(
            f"type '{name}' of {origin} cannot be imported from '{entry_point.value}': {type(error).__name__}: {error}"
        ) from error
    try:
        _check(object_type, name)
    except ConfigError as error:
        raise ConfigError(f"type '{name}' of {origin} is wrong: '{entry_point.value}': {error}") from error
    except Exception as error:  # its attributes may be anything
        raise ConfigError(f"type '{name}' of {origin} is wrong: {type(error).__name__}: {error}") from error
    return RegisteredType(object_type=object_type, origin=origin)


def _check(object_type: object, name: str) -> None:
    """Raises ConfigError where it is no type by that name whose objects this program can handle."""
    if not isinstance(object_type, ObjectType):
        raise ConfigError(f"this is of type {type(object_type).__name__}, expected localmig.device_api.ObjectType")
    spec = object_type.spec
    if not issubclass(spec, Spec):
        raise ConfigError("its spec is no class derived from DeviceSpec or NetdevSpec")
    if (kind := getattr(spec, "kind", None)) not in KINDS:
        raise ConfigError(f"its spec has the kind '{kind}', this release knows {' and '.join(KINDS)}")
    if (type_name := getattr(spec, "type_name", None)) != name:
        raise ConfigError(f"its spec has the type name '{type_name}', and its entry point '{name}'")
    if not _is_text(getattr(spec, "summary", None)):
        raise ConfigError("its spec has no summary, which help shows")
    rows = options_of(spec)
    for row in rows:
        if not _is_text(row.help):
            raise ConfigError(f"option '{row.name}' has no help")
        if not all(hasattr(row.value, each) for each in ("word", "qapi", "read", "check")):
            raise ConfigError(f"option '{row.name}' has {type(row.value).__name__} for its type, expected a ValueType")
        if row.name == KINDS[spec.kind].selector:
            raise ConfigError(f"option '{row.name}' has the name of what selects the type")
        if row.reference is not None and row.reference.kind not in KINDS:
            raise ConfigError(f"option '{row.name}' refers to the kind '{row.reference.kind}', which there is not")
    if "id" not in {row.attribute for row in rows if row.required}:
        raise ConfigError("its spec has no option 'id' that is required")
    if not callable(object_type.build):
        raise ConfigError("its build cannot be called")
    if not all(isinstance(member, Member) for member in object_type.info):
        raise ConfigError("its info has something else than Members")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _origin(entry_point: EntryPoint) -> Origin:
    if entry_point.dist is None:
        return Origin(distribution="a package without a name", version="unknown")
    return Origin(distribution=entry_point.dist.name, version=entry_point.dist.version)


def _names(entry_points: list[EntryPoint]) -> str:
    return " and ".join(str(_origin(each)) for each in entry_points)


def _advice(origin: Origin) -> str:
    """What to do about a type of the source's that is not here."""
    if origin.distribution == "localmig":
        return f"it is a part of localmig {origin.version}, and this is {program_version()}; hand over to that release"
    return f"install {origin} for '{sys.executable}'"
