"""Packages of somebody else that add types of objects, installed into a folder as an installer leaves them.

Owns:        the metadata of a package, a device without rings that is such a package's.
Never sees:  how localmig finds it.
Read next:   unit/test_registry.py, protocol/test_added_types.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Final

COUNTER: Final = '''
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from localmig.device_api import (
    BuildContext, Description, DeviceSpec, Identifier, Member, Number, ObjectType, Part, Uint64, option, reference, u64
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterSpec(DeviceSpec):
    """A device that counts how often it was resumed."""

    type_name: ClassVar[str] = "counter"
    summary: ClassVar[str] = "counts"

    first: int = option(Number(lowest=0, highest=99, reason="two digits"), "where it begins", default=0)
    place: str | None = option(Identifier(), "what only one counter can have", default=None)
    after: str | None = reference("device", "a device that counts before this one", exclusive=True, default=None)

    def claims(self) -> Iterator[tuple[str, Hashable]]:
        if self.place is not None:
            yield "place", self.place


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterState:
    count: int


class Counter(Part):
    setup = Description(name="counter", version=1, oldest_version=1, state=CounterState, fields=(u64("count"),))

    def __init__(self, spec: CounterSpec, context: BuildContext) -> None:
        self.id = spec.id
        self.count = spec.first
        self.before = context.part(spec.after) if spec.after is not None else None

    def info(self) -> "Counter":
        return self

    def resume(self) -> None:
        self.count += 1

    def save_setup(self, *, with_descriptors: bool) -> CounterState:
        return CounterState(count=self.count)

    def adopt_setup(self, state: CounterState) -> None:
        self.count = state.count

    def check_setup(self, state: CounterState) -> None: ...
    def open(self) -> None: ...
    def stop(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def close(self) -> None: ...
    def release(self) -> None: ...
    def recover(self) -> None: ...
    def discard(self) -> None: ...


OBJECT = ObjectType(spec=CounterSpec, build=Counter, info=(Member(name="count", attribute="count", type=Uint64()),))
'''
"""A module of a package's that adds the device `counter`."""


def install(
    folder: Path, name: str, version: str, types: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> None:
    """Installs a package.

    Args:
        folder: where modules are imported from.
        name: the distribution's.
        version: its.
        types: entry points of the group `localmig.objects`: "module:OBJECT" by the type's name.
        modules: the text of each module.
    """
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{type_name} = {where}" for type_name, where in types.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[localmig.objects]", *lines, ""]))
    for module, text in (modules or {}).items():
        (folder / f"{module}.py").write_text(textwrap.dedent(text))


def entry_points(folder: Path) -> list[EntryPoint]:
    """What packages in a folder add."""
    return [
        each
        for distribution in distributions(path=[str(folder)])
        for each in distribution.entry_points
        if each.group == "localmig.objects"
    ]
