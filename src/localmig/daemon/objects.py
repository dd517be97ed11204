"""From specs to parts: the object graph, and what of it travels in HELLO.

Owns:        the specs of a daemon together; what is built of them, in which order; the comparison of our specs with the
             source's.
Never sees:  a channel, the run state, a particular type.
Read next:   registry.py for how a type is found, device_api/objects.py for what it says of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from localmig.device_api import Part, Queues
from localmig.device_api.objects import BuildContext, inherited
from localmig.errors import ConfigError, NotFoundError, PeerError, StateError
from localmig.migration.hello import HandoverObject, Hello, Origin
from localmig.options import (
    Spec,
    check_together,
    differences,
    reasons_to_stay_home,
    to_mapping,
)
from localmig.options.specs import references_of
from localmig.registry import RegisteredType, Registry
from localmig.trace import Tracer


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """The specs of a daemon, checked together.

    Attributes:
        specs: in the order in which they are built: each after those that it refers to.
        registry: knows their types.
    """

    specs: tuple[Spec, ...] = ()
    registry: Registry = field(compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "specs", check_together(self.specs))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked for."""
        return not self.specs

    def __getitem__(self, id: str) -> Spec:  # noqa: A002 - the user's word
        return next(spec for spec in self.specs if spec.id == id)

    def find(self, id: str, *kinds: str) -> Spec:  # noqa: A002
        """The spec of that id and one of these kinds. NotFoundError where there is none."""
        among = [spec for spec in self.specs if spec.kind in kinds]
        for spec in among:
            if spec.id == id:
                return spec
        have = ", ".join(f"'{spec.id}'" for spec in among) or "none"
        raise NotFoundError(f"Device '{id}' not found, there is {have}")

    def added(self, spec: Spec) -> Objects:
        """All of them with one more. ConfigError where it does not fit the others."""
        return replace(self, specs=(*self.specs, spec))

    def changed(self, spec: Spec) -> Objects:
        """All of them, with `spec` in place of the one of its id. ConfigError where it does not fit the others."""
        return replace(self, specs=tuple(spec if each.id == spec.id else each for each in self.specs))

    def without(self, kind: str, id: str) -> Objects:  # noqa: A002
        """All but one.

        Raises:
            NotFoundError: there is none of that kind and id.
            StateError: another one refers to it.
        """
        self.find(id, kind)
        for spec in self.specs:
            if id in references_of(spec):
                raise StateError(f"{kind} '{id}' is in use by {spec.kind} '{spec.id}': delete that one first")
        return replace(self, specs=tuple(spec for spec in self.specs if spec.id != id))

    def for_hello(self) -> tuple[HandoverObject, ...]:
        """What HELLO tells of them."""
        objects = []
        for spec in self.specs:
            found = self.registry.type_of(spec)
            origin = None if found.is_built_in else found.origin
            objects.append(HandoverObject(kind=spec.kind, options=dict(to_mapping(spec)), origin=origin))
        return tuple(objects)

    def fit(self, hello: Hello) -> Objects:
        """What the destination builds: its own specs where it has any, filled up with what the source says.

        Raises:
            PeerError: the source's objects cannot be, or do not fit ours; the text has both sides' values.
        """
        theirs = self._read(hello)
        if self.is_empty:
            return theirs
        ours_by_id = {spec.id: spec for spec in self.specs}
        theirs_by_id = {spec.id: spec for spec in theirs.specs}
        problems = [
            *(f"'{each}' is here but not in the source" for each in ours_by_id.keys() - theirs_by_id.keys()),
            *(f"'{each}' is in the source but not here" for each in theirs_by_id.keys() - ours_by_id.keys()),
        ]
        home = {*reasons_to_stay_home(theirs.specs), *(spec.id for spec in theirs.specs if spec.stays_home is not None)}
        for each in ours_by_id.keys() & theirs_by_id.keys():
            problems += differences(
                ours_by_id[each], theirs_by_id[each], with_descriptors=hello.local and each not in home
            )
        if problems:
            raise PeerError("options do not fit: " + "; ".join(sorted(problems)))
        # In the source's order: rings are counted through.
        return replace(self, specs=tuple(ours_by_id[spec.id].completed_by(spec) for spec in theirs.specs))

    def _read(self, hello: Hello) -> Objects:
        own = Origin(distribution=Origin.own().distribution, version=hello.version)
        specs = [self.registry.read_theirs(each.kind, each.options, each.origin or own) for each in hello.objects]
        try:
            return replace(self, specs=tuple(specs))
        except ConfigError as error:
            raise PeerError(f"the source's objects cannot be: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltObject:
    """An object and what it is made of.

    Attributes:
        spec: what was asked for.
        type: knows what to show of it.
        part: the object.
    """

    spec: Spec
    type: RegisteredType
    part: Part


class Assembly:
    """The parts of a daemon, and what they have together."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._queues = Queues(tracer)
        self._shared: dict[type[Any], Any] = {}
        self._objects: dict[str, BuiltObject] = {}
        self._parts: dict[str, Part] = {}
        self._home: dict[str, str] = {}
        """Whose descriptors stay home because of whom."""

    @classmethod
    def of(cls, objects: Objects, tracer: Tracer) -> Assembly:
        """Builds all of `objects`: frozen, stopped, with nothing opened.

        Raises:
            ConfigError, KernelError: one of them cannot be built.
        """
        assembly = cls(tracer)
        for spec in objects.specs:
            assembly.add(spec, objects.registry.type_of(spec))
        assembly.arrange(objects.specs)
        return assembly

    def add(
        self,
        spec: Spec,
        type: RegisteredType,  # noqa: A002
        descriptor: Callable[[int | str], int] = inherited,
    ) -> BuiltObject:
        """Builds one more object, whose references are there. As `of`; `arrange` follows, also where this raises.

        Args:
            spec: of the object.
            type: of the object.
            descriptor: as `BuildContext`'s.
        """
        context = BuildContext(
            tracer=self._tracer,
            queues=self._queues,
            stays_home=lambda: self._home.get(spec.id),
            parts=self._parts,
            shared_by_all=self._shared,
            descriptor=descriptor,
        )
        built = BuiltObject(spec=spec, type=type, part=type.build(spec, context))
        self._objects[spec.id] = built
        self._parts[spec.id] = built.part
        return built

    def arrange(self, specs: Iterable[Spec]) -> None:
        """Keeps the objects of `specs`, in this order, which is the order in which they travel."""
        specs = tuple(specs)
        self._objects = {spec.id: self._objects[spec.id] for spec in specs}
        self._parts = {spec.id: self._objects[spec.id].part for spec in specs}
        self._home = reasons_to_stay_home(specs)
        self._queues.arrange([spec.id for spec in specs])

    def change(self, spec: Spec) -> None:
        """The object of that id became what `spec` says."""
        self._objects[spec.id] = replace(self._objects[spec.id], spec=spec)

    @property
    def objects(self) -> list[BuiltObject]:
        """All of them, in the order in which they travel."""
        return list(self._objects.values())

    def built(self, id: str) -> BuiltObject:  # noqa: A002 - the user's word
        """The object of that id."""
        return self._objects[id]

    def built_of(self, part: Part) -> BuiltObject | None:
        """The object that a part belongs to, None for what all objects have together."""
        return self._objects.get(part.id)

    def parts_opened_with_privileges(self) -> list[Part]:
        """Those whose `open` needs what the process gives up."""
        return [each.part for each in self._objects.values() if each.type.object_type.opens_with_privileges]

    def parts(self) -> list[Part]:
        """Everything that a handover moves: the objects, each after its own parts, then the rings of all devices."""
        return [*(each for part in self._parts.values() for each in (*part.own_parts, part)), self._queues]
