"""JSON as QEMU reads it: strings, names of members among them, may stand in single quotes, and `\\'` may stand in any.

Owns:        what QEMU adds to JSON's syntax (qobject/json-parser.c).
Never sees:  what a value means.
Read next:   keyval.py and monitor/wire.py, which read such text.
"""

from __future__ import annotations

import re
from typing import Final

_STRING: Final = re.compile(r"""("|')([^"'\\]*(?:(?:\\.|(?!\1)["'])[^"'\\]*)*)\1""", re.DOTALL)
"""A string in either quotes, of which the other kind may stand inside."""

_CHARACTER: Final = re.compile(r"""\\.|["']""", re.DOTALL)
"""What may have to be written in another way."""

_WRITTEN: Final = {"\\'": "'", '"': '\\"'}


def standard_json(text: str) -> str:
    """The same in JSON's own syntax. Text that is no JSON stays none, and is otherwise as it was."""
    return _STRING.sub(_in_double_quotes, text) if "'" in text else text


def _in_double_quotes(string: re.Match[str]) -> str:
    content = _CHARACTER.sub(lambda character: _WRITTEN.get(character[0], character[0]), string[2])
    return f'"{content}"'
