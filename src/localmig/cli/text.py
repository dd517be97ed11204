"""How numbers and tables are written on a terminal, which may be gone, and durations read from the command line.

Owns:        the forms.
Never sees:  what the numbers are of.
Read next:   status.py, its main user.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final, TextIO

_THOUSANDS: Final = ("", "k", "M", "G", "T", "P", "E")


def put(text: str, file: TextIO | None = None) -> None:
    """Prints `text` on `file`, stdout by default. If nobody reads that any more, this is no error."""
    stream = file or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        # What is buffered must not fail again when Python ends, and change the exit status.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def tell(line: str) -> None:
    """As `put`, on stderr: for people."""
    put(line, sys.stderr)


def seconds(text: str) -> float:
    """A duration on the command line."""
    value = float(text)
    if not value > 0:
        raise ValueError(text)
    return value


def milliseconds(microseconds: int) -> str:
    """A duration as people read it."""
    return f"{microseconds / 1000:.3f} ms"


def quantity(number: float, unit: str = "") -> str:
    """The first three digits of a number that is not negative, and its unit: `12.3 kB`."""
    thousands = 0
    # What rounds to a thousand is one.
    while number >= 999.5 and thousands < len(_THOUSANDS) - 1:
        number /= 1000
        thousands += 1
    if thousands == 0 and number == int(number):
        return f"{number:.0f} {unit}".rstrip()
    digits = f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f}"
    return f"{digits} {_THOUSANDS[thousands]}{unit}".rstrip()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
    )
