"""The pages say what the code says: states, steps and waits of the handover, messages, the version, links."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Final

import pytest
from tests.kit.cases import each_case
from tests.unit import reference
from tests.unit.diagrams import drawn

from localmig.migration import exchange, incoming, outgoing, transport
from localmig.migration.channel import FrameKind
from localmig.migration.handover import (
    DESTINATION,
    DESTINATION_SERVES,
    DESTINATION_STATUS,
    SOURCE,
    SOURCE_SERVES,
    SOURCE_STATUS,
    DestinationState,
    SourceState,
)

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = (*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"))
DEVICES: Final = (ROOT / "docs/devices.md").read_text()
SECURITY: Final = (ROOT / "docs/security.md").read_text()
HANDOVER: Final = (ROOT / "docs/handover.md").read_text()
OPERATING: Final = (ROOT / "docs/operating.md").read_text()


def rows(page: str, heads: str) -> Iterator[list[str]]:
    """The cells of every row of the first table in `page` that begins with `heads`."""
    lines = iter(page[page.index(heads) :].splitlines())
    next(lines)
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def steps(page: str) -> list[tuple[str, str, str]]:
    """(state, event, next state) for each combination of what the cells of the first such table list."""
    return [
        (state, event, target)
        for states, events, target in rows(page, "| in state |")
        for state in states.split(", ")
        for event in events.split(", ")
    ]


@pytest.mark.parametrize(
    ("heading", "table"),
    [("## The source", SOURCE), ("## The destination", DESTINATION)],
    ids=["source", "destination"],
)
def test_the_handover_page_has_every_step_once_and_no_other(
    heading: str, table: Mapping[tuple[StrEnum, StrEnum], StrEnum]
) -> None:
    page = HANDOVER[HANDOVER.index(heading) :]
    expected = [(str(state), str(event), str(target)) for (state, event), target in table.items()]
    assert sorted(steps(page)) == sorted(expected)


@pytest.mark.parametrize(
    ("heads", "states", "status", "serving"),
    [
        ("| source state |", SourceState, SOURCE_STATUS, SOURCE_SERVES),
        ("| destination state |", DestinationState, DESTINATION_STATUS, DESTINATION_SERVES),
    ],
    ids=["source", "destination"],
)
def test_the_handover_page_tells_status_and_owner_of_every_state(
    heads: str, states: type[StrEnum], status: Mapping[StrEnum, str], serving: frozenset[StrEnum]
) -> None:
    told = [tuple(row[:3]) for row in rows(HANDOVER, heads)]
    assert told == [(str(state), status[state], "yes" if state in serving else "no") for state in states]


def test_the_diagrams_of_the_handover_page_are_drawn_from_the_tables() -> None:
    assert drawn(HANDOVER) == HANDOVER, "make docs draws them anew"


def test_the_reference_for_authors_is_made_of_the_docstrings() -> None:
    assert reference.PAGE.read_text() == reference.write(), "make docs writes it again"


def test_the_glossary_has_each_word_once_in_order_and_one_sentence_for_it() -> None:
    told = list(rows((ROOT / "docs/glossary.md").read_text(), "| word |"))
    words = [word.split(",")[0].lower() for word, _ in told]
    assert words == sorted(set(words))
    assert [word for word, sentence in told if not re.fullmatch(r"[^.]+(?:\.(?=\w)[^.]+)*\.", sentence)] == []


def test_the_ways_that_failures_take_are_those_of_the_tables() -> None:
    _, rest = HANDOVER.split("## When something fails\n")
    section, _ = rest.split("\n## ", 1)
    ways = re.findall(r"^    (source|destination) +(.+)$", section, re.MULTILINE)
    assert {side for side, _ in ways} == {"source", "destination"}
    for side, way in ways:
        state, *moves = way.split(" ─ ")
        table, machine = (SOURCE, SourceState) if side == "source" else (DESTINATION, DestinationState)
        present: StrEnum = machine(state)
        for move in moves:
            event, target = move.split(" ─▶ ")
            following: Mapping[tuple[str, str], StrEnum] = table  # type: ignore[assignment]  # members are their texts
            present = following[present, event]
            assert present == target, way


def test_the_waits_of_the_handover_page_are_those_of_the_code() -> None:
    modules = {"exchange": exchange, "incoming": incoming, "outgoing": outgoing, "transport": transport}
    waits = {
        f"`{module}.{name}`": f"{value:g} s"
        for module, names in modules.items()
        for name, value in vars(names).items()
        if name.isupper()
        and name.endswith("_S")
        and not (module in ("incoming", "outgoing") and hasattr(exchange, name))
    }
    assert {wait: duration for wait, duration, _ in rows(HANDOVER, "| wait |")} == waits


def test_each_promise_of_the_security_page_names_tests_that_there_are() -> None:
    promises = list(rows(SECURITY, "| who | cannot |"))
    assert promises
    for *_, shown in promises:
        for part in shown.split("; "):
            file, *names = re.findall(r"`(.+?)`", part)
            source = (ROOT / file).read_text()
            assert names, part
            assert [name for name in names if f"def {name}(" not in source] == [], file


def bound(where: str) -> str:
    """A number of the code as the page writes it, by what its first cell says of it."""
    place, *names = re.findall(r"`(.+?)`", where)
    if names:  # of Rust
        found = re.search(rf"const {names[0]}: \w+ = ([0-9_]+)(?: << (\d+))?;", (ROOT / place).read_text())
        assert found is not None, where
        return f"{int(found[1]) << int(found[2] or 0):,}"
    module, name, kind = re.fullmatch(r"([a-z_.]+)\.([A-Z_]+)(?:\[([A-Z]+)\])?", place).groups()  # type: ignore[union-attr]
    value = getattr(import_module(f"localmig.{module}"), name)
    return f"{value[FrameKind[kind]] if kind else value:,}".removesuffix(".0")


@pytest.mark.parametrize("page", [SECURITY, DEVICES], ids=["security", "devices"])
def test_the_bounds_of_a_page_are_those_of_the_code(page: str) -> None:
    told = {where: number for where, number, *_ in rows(page, "| bound | is |")}
    assert told == {where: bound(where) for where in told}


def spoken() -> Iterator[str]:
    """What the program may say, with … for what it fills in: Python's texts without docstrings, Rust's files."""
    given = re.compile(r"\{[^{}\n]*\}|%[ds]")
    for file in (ROOT / "src/localmig").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield given.sub("…", node.value)
    for file in ROOT.glob("rust/*/src/**/*.rs"):
        yield given.sub("…", re.sub(r"\\\n\s*", "", file.read_text()))


def test_the_symptoms_are_quoted_as_the_program_says_them() -> None:
    _, rest = OPERATING.split("\n## Symptoms\n")
    section, _ = rest.split("\n## ", 1)
    seen = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    quoted = [text for cell in seen for text in re.findall(r"`(.+?)`", cell)]
    assert quoted
    texts = "\n".join(spoken())
    assert [text for text in quoted if text.strip("… ") not in texts] == []


def test_the_changelog_begins_with_the_present_version() -> None:
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


@each_case("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
