"""What the specs of a daemon must be together: ids, references, and what only one can have.

Owns:        these checks; the order in which objects are built; whose descriptors stay home because of whom.
Never sees:  a particular type: each spec says what it refers to and what it claims.
Read next:   specs.py for references and claims; daemon/objects.py for what is built.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from localmig.errors import ConfigError, blamed
from localmig.options.address import IncomingSpec, UnixAddress
from localmig.options.process import MonitorSpec
from localmig.options.specs import KINDS, Spec, references_of


def check_together(
    specs: Iterable[Spec], *, monitor: MonitorSpec | None = None, incoming: IncomingSpec | None = None
) -> tuple[Spec, ...]:
    """The specs in the order in which they are built, each settled with those that it refers to.

    That is by kind, in the order in which they were given, but each after those that it refers to.

    Raises:
        ConfigError: the first thing that does not fit, in QEMU's words where it has them.
    """
    specs = tuple(specs)
    by_id: dict[str, Spec] = {}
    for spec in specs:
        # QEMU lets a netdev and a device share an id; here both are parts of a handover, told apart by id.
        if (other := by_id.setdefault(spec.id, spec)) is not spec:
            raise ConfigError(f"Duplicate ID '{spec.id}' for {spec.kind}, a {other.kind} has it already")
    _check_references(specs, by_id)
    settled: dict[str, Spec] = {}
    for spec in _ordered(specs, by_id):
        with blamed(f"{spec.kind} '{spec.id}': its type '{spec.type_name}' is wrong"):
            settled[spec.id] = spec.settled({each: settled[each] for each in references_of(spec)})
    _check_claims(specs, monitor, incoming)
    return tuple(settled.values())


def _check_references(specs: Sequence[Spec], by_id: Mapping[str, Spec]) -> None:
    users: dict[str, Spec] = {}
    for spec in specs:
        for wanted, reference in references_of(spec).items():
            kind = reference.kind
            if wanted not in by_id or by_id[wanted].kind != kind:
                have = ", ".join(f"'{each.id}'" for each in specs if each.kind == kind) or "none"
                raise ConfigError(f"{spec.kind} '{spec.id}': can't find {kind} '{wanted}', there is {have}")
            if reference.exclusive and (user := users.setdefault(wanted, spec)) is not spec:
                raise ConfigError(
                    f"{spec.kind} '{spec.id}': can't take {kind} '{wanted}', it's in use by {user.kind} '{user.id}'"
                )


def _ordered(specs: Sequence[Spec], by_id: Mapping[str, Spec]) -> list[Spec]:
    kinds = list(KINDS)
    placed: dict[str, Spec] = {}
    for first in sorted(specs, key=lambda spec: kinds.index(spec.kind)):
        # Depth first, without recursion: a chain of references may be as long as there are objects.
        path = [first]
        while path:
            spec = path[-1]
            missing = next((each for each in references_of(spec) if each not in placed), None)
            if missing is None:
                placed[spec.id] = spec
                path.pop()
            elif any(each.id == missing for each in path):
                raise ConfigError(f"{spec.kind} '{spec.id}' refers to '{missing}', which refers to it in turn")
            else:
                path.append(by_id[missing])
    return list(placed.values())


def _check_claims(specs: Sequence[Spec], monitor: MonitorSpec | None, incoming: IncomingSpec | None) -> None:
    claims: list[tuple[str, str, Hashable]] = []
    for spec in specs:
        with blamed(f"{spec.kind} '{spec.id}': its type '{spec.type_name}' is wrong"):
            claims += [(f"{spec.kind} '{spec.id}'", what, which) for what, which in dict.fromkeys(spec.claims())]
    if monitor is not None:
        claims.append(("--qmp", "socket", monitor.path))
    if isinstance(incoming, UnixAddress):
        claims.append(("--incoming", "socket", incoming.path))
    seen: dict[tuple[str, Hashable], str] = {}
    for owner, what, which in claims:
        if (other := seen.setdefault((what, which), owner)) != owner:
            raise ConfigError(f"{owner}: {what} '{which}' is used by {other} already")


def reasons_to_stay_home(specs: Iterable[Spec]) -> dict[str, str]:
    """Why objects leave their descriptors here in a local migration because of one that refers to them; by id.

    Args:
        specs: in the order in which they are built.
    """
    reasons: dict[str, str] = {}
    for spec in reversed(tuple(specs)):
        own = None if spec.stays_home is None else f"{spec.kind} '{spec.id}' has {spec.stays_home}"
        if (reason := own or reasons.get(spec.id)) is not None:
            for each in references_of(spec):
                reasons.setdefault(each, reason)
    return reasons
