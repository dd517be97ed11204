"""Option text as QEMU writes it: `type,key=value,…`, or a JSON object.

Owns:        the two syntaxes.
Never sees:  which keys and values there are.
Read next:   specs.py, which knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from localmig.errors import ConfigError
from localmig.options.json_text import standard_json

_KEY: Final = re.compile(r"[A-Za-z][A-Za-z0-9_\-.]*", re.ASCII)


def is_json(text: str) -> bool:
    """Whether `text` is the JSON form, which QEMU tells by its first character too."""
    return text.startswith("{")


def parse_keyval(text: str, implied_key: str) -> dict[str, str]:
    """Reads `value,key=value,…`. A first item without `=` is the value of `implied_key`; `,,` is a comma.

    Raises:
        ConfigError: an item has no `=`, its key cannot be one, or a key is there twice.
    """
    values: dict[str, str] = {}
    for number, item in enumerate(_split(text)):
        key, equals, value = item.partition("=")
        if not equals and number == 0:
            key, value = implied_key, item
        elif not equals:
            raise ConfigError(f"Expected '=' after parameter '{item}'")
        if not _KEY.fullmatch(key):
            raise ConfigError(f"Invalid parameter '{key}'")
        if key in values:
            raise ConfigError(f"Parameter '{key}' is there twice, as '{values[key]}' and '{value}'")
        values[key] = value
    return values


def parse_json(text: str) -> dict[str, Any]:
    """Reads a JSON object, as QEMU writes it too: in single quotes.

    Raises:
        ConfigError: it is not JSON, no object, or a key is there twice.
    """
    try:
        return json.loads(standard_json(text), object_pairs_hook=_object)  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"JSON parse error, {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ConfigError(f"Parameter '{key}' is there twice, as '{values[key]}' and '{value}'")
        values[key] = value
    return values


def _split(text: str) -> Iterator[str]:
    """The items between single commas, with `,,` read as one comma. A comma at the end opens no new item."""
    item = ""
    for piece in re.split(r"(,,|,)", text):
        if piece == ",":
            yield item
            item = ""
        else:
            item += "," if piece == ",," else piece
    if item or not text:
        yield item
