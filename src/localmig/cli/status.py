"""`localmig status`: what a daemon serves and how it is.

Owns:        how that is shown; the table form, which other commands use too.
Never sees:  anything a QMP client could not ask.
Read next:   client.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from localmig.cli.client import connected

_EXAMPLES: Final = """\
examples:
  localmig status /run/vm1/qmp.sock
  localmig status --json /run/vm1/qmp.sock
"""


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "status",
        help="show what a daemon serves and how it is",
        description="Shows a daemon's run state, its last migration, and for each object whether a local migration "
        "would move its descriptors.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="QMP-SOCKET", help="path of the daemon's QMP socket")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    facts = asyncio.run(_ask(arguments.socket))
    print(json.dumps(facts, indent=2) if arguments.json else show(facts))
    return 0


async def _ask(path: str) -> dict[str, Any]:
    async with connected(path) as client:
        return {
            "pid": client.pid,
            "version": (await client.execute("query-version"))["package"],
            "status": (await client.execute("query-status"))["status"],
            "migration": await client.execute("query-migrate"),
            "objects": await client.execute("query-local-migration"),
        }


def show(facts: Mapping[str, Any]) -> str:
    """The facts as text for people."""
    lines = [
        f"daemon     process {facts['pid']}, {facts['version']}",
        f"run state  {facts['status']}",
        f"migration  {show_migration(facts['migration'])}",
    ]
    if facts["objects"]:
        rows = [
            (each["id"], each["type"], "would move" if each["transfers"] else f"stays home: {each['reason']}")
            for each in facts["objects"]
        ]
        lines += ["", table(("object", "type", "descriptors in a local migration"), rows)]
    return "\n".join(lines)


def show_migration(migration: Mapping[str, Any]) -> str:
    """What query-migrate returned, in one line."""
    if not migration:
        return "none yet"
    text = str(migration["status"])
    local = migration.get("local", {})
    if "downtime-us" in local:
        text += f", downtime {milliseconds(local['downtime-us'])}"
    if local.get("descriptors"):
        text += f", {local['descriptors']} descriptors"
    for reason in (migration.get("error-desc"), local.get("note")):
        text += f": {reason}" if reason else ""
    return text


def milliseconds(microseconds: int) -> str:
    """A duration as people read it."""
    return f"{microseconds / 1000:.3f} ms"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
    )
