"""The options that both commands have: how much is measured, which sections, where results go.

Owns:        these options, their help.
Never sees:  what a command does with them.
Read next:   __main__.py and compare.py, which add theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def new_parser(*, prog: str, description: str, sections: Sequence[str], results: Path) -> argparse.ArgumentParser:
    """A parser whose result has `size`, a name in `sizes.SIZES`, `only`, a list of sections, and `results`, a folder.

    Args:
        prog: the command, as its help shows it.
        description: what it does.
        sections: those there are.
        results: the default folder.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="size", const="quick", help="a few minutes; no use for p99")
    size.add_argument("--smoke", action="store_const", dest="size", const="smoke", help="shows only that it runs")
    parser.set_defaults(size="full")
    known = ", ".join(sections)
    only = _sections(sections)
    parser.add_argument("--only", type=only, default=list(sections), metavar="SECTION,…", help=f"of {known}")
    parser.add_argument("--results", type=Path, default=results, metavar="FOLDER", help="default: %(default)s")
    return parser


def _sections(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is not a section; the sections are {', '.join(known)}")
        return names

    return parse
