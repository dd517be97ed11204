"""Draws the state diagrams of docs/handover.md from the handover's tables: `make docs`. test_docs.py compares.

The diagrams are Mermaid's. The states that share a way out of a failure are drawn in a box with one arrow.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from localmig.migration.handover import (
    DESTINATION,
    DESTINATION_ENDED,
    DESTINATION_SERVES,
    SOURCE,
    SOURCE_ENDED,
    SOURCE_SERVES,
    DestinationState,
    SourceState,
)

PAGE: Final = Path(__file__).resolve().parents[2] / "docs/handover.md"

Table = Mapping[Any, StrEnum]
"""(state, event) to state, of either side."""

BOX: Final = "undone"
"""Around the states that go back to where everything was."""


FENCE: Final = "\n```\n"


def draw(states: Sequence[StrEnum], table: Table, serving: frozenset[StrEnum], ended: frozenset[StrEnum]) -> str:
    """A state diagram: every step of the table; those between the same two states, or out of the box, by one arrow."""
    sources: dict[tuple[StrEnum, StrEnum], tuple[StrEnum, ...]] = defaultdict(tuple)
    for (state, event), target in table.items():
        sources[target, event] += (state,)
    # The states that have most ways out in common.
    box, _ = Counter(begins for begins in sources.values() if len(begins) > 1).most_common(1)[0]
    arrows: dict[tuple[StrEnum | None, StrEnum], list[StrEnum]] = defaultdict(list)
    for (target, event), begins in sources.items():
        outside = [begin for begin in begins if begin not in box]
        for begin in (None, *outside) if set(box) <= set(begins) else begins:
            arrows[begin, target].append(event)

    def lines() -> Iterator[str]:
        yield "stateDiagram-v2"
        yield "    classDef serves fill:#bdf,color:#000"
        yield f"    [*] --> {_name(states[0])}"
        yield f"    state {BOX} {{"
        yield from (
            f"        {_arrow(begin, end, events)}"
            for (begin, end), events in arrows.items()
            if begin in box and end in box
        )
        yield "    }"
        yield from (
            f"    {_arrow(begin, end, events)}"
            for (begin, end), events in arrows.items()
            if not (begin in box and end in box)
        )
        yield from (f"    {_name(state)} --> [*]" for state in states if state in ended)
        yield f"    class {','.join(_name(state) for state in states if state in serving)} serves"

    return "\n".join(lines())


def _arrow(begin: StrEnum | None, end: StrEnum, events: Sequence[StrEnum]) -> str:
    return f"{BOX if begin is None else _name(begin)} --> {_name(end)}: {', '.join(events)}"


def _name(state: StrEnum) -> str:
    return state.replace("-", "_")


def drawn(page: str) -> str:
    """The page with its diagrams as the tables have them."""
    diagrams = {
        "source": draw(list(SourceState), SOURCE, SOURCE_SERVES, SOURCE_ENDED),
        "destination": draw(list(DestinationState), DESTINATION, DESTINATION_SERVES, DESTINATION_ENDED),
    }
    for side, diagram in diagrams.items():
        begin = f"<!-- {side}: drawn by make docs -->\n"
        assert page.count(begin) == 1, side
        head, rest = page.split(begin)
        _, rest = rest.split(FENCE, 1)
        page = f"{head}{begin}```mermaid\n{diagram}{FENCE}{rest}"
    return page


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))
