"""QMP's wire: JSON values back to back, as QEMU reads them, in bytes that may be cut anywhere.

Owns:        where one value ends and the next begins, the limits of a value.
Never sees:  sockets, what a value means.
Read next:   protocol.py, which gives values their meaning.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Final

from localmig.errors import PeerError
from localmig.options.json_text import standard_json

VALUE_BYTES_MAX: Final = 64 * 1024
"""Bytes of one value. The longest command, a migrate with every kind of channel, has less than one kilobyte."""

DEPTH_MAX: Final = 64
"""Arrays and objects inside each other. The deepest command has six; a decoder spends C stack on each level."""

DIGITS_MAX: Final = 309
"""Digits of a number. The largest double has so many; reading a number takes time that grows with their square."""

_BLANK: Final = b" \t\r\n"
_STRUCTURE: Final = re.compile(rb"""["'{}\[\]]""")
_STRING_EVENTS: Final = {quote: re.compile(rb"[\\" + quote + rb"]") for quote in (b'"', b"'")}
"""A string in either quotes ends with those it began with."""
_SCALAR_END: Final = re.compile(rb"""[ \t\r\n{\["']""")


class JsonSyntaxError(PeerError):
    """One value was no JSON; what follows it can be read."""


class Decoder:
    """Cuts a stream of bytes into JSON values.

    `feed` bytes as they come, then iterate over `values`. What is buffered never exceeds `VALUE_BYTES_MAX` and what
    one `feed` added.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._quote = b""
        """What ends the string that the scan is in; empty outside of strings."""

    def feed(self, data: bytes) -> None:
        """Adds bytes from the stream."""
        self._buffer += data

    def values(self) -> Iterator[object]:
        """Each value that is complete, and a `JsonSyntaxError` in place of each that is none.

        Raises:
            PeerError: a value is too long or too deep. Where the next one begins cannot be told: close the connection.
        """
        while (end := self._find_end()) is not None:
            text = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._scanned, self._depth, self._quote = 0, 0, b""
            yield _decode(text)
        if len(self._buffer) > VALUE_BYTES_MAX:
            raise PeerError(f"JSON value has more than {VALUE_BYTES_MAX} bytes, which is the limit")

    def _find_end(self) -> int | None:
        """Where the first value ends, None while it has no end yet. Scans no byte twice."""
        if self._scanned == 0:
            blank = len(self._buffer) - len(self._buffer.lstrip(_BLANK))
            del self._buffer[:blank]
        if not self._buffer:
            return None
        if self._buffer[0] not in b"""{["'""":
            # A number, a word or rubbish, which no command is: its end is where something else begins.
            end = _SCALAR_END.search(self._buffer, max(self._scanned, 1))
            self._scanned = len(self._buffer)
            return end.start() if end else None
        while True:
            pattern = _STRING_EVENTS[self._quote] if self._quote else _STRUCTURE
            mark = pattern.search(self._buffer, self._scanned)
            if mark is None:
                self._scanned = len(self._buffer)
                return None
            if mark[0] == b"\\":
                if mark.end() == len(self._buffer):
                    # The escaped byte is not here yet; look at the backslash again when it is.
                    self._scanned = mark.start()
                    return None
                self._scanned = mark.end() + 1
                continue
            self._scanned = mark.end()
            if mark[0] in _STRING_EVENTS:
                self._quote = b"" if self._quote else mark[0]
            else:
                self._depth += 1 if mark[0] in b"{[" else -1
            if self._depth > DEPTH_MAX:
                raise PeerError(f"JSON nesting depth limit exceeded, it is {DEPTH_MAX}")
            if self._depth <= 0 and not self._quote:
                return self._scanned


def encode(message: object) -> bytes:
    """One message as a line, as QEMU ends them."""
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\r\n"


def _decode(text: bytes) -> object:
    if len(text) > VALUE_BYTES_MAX:
        return JsonSyntaxError(f"JSON value has {len(text)} bytes, limit is {VALUE_BYTES_MAX}")
    try:
        value = json.loads(
            standard_json(text.decode("utf-8")),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
        # Half a surrogate pair passes the decoder, but is no character that could be a path or be echoed as UTF-8.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        return JsonSyntaxError("JSON parse error, invalid UTF-8 or Unicode character")
    except json.JSONDecodeError as error:
        return JsonSyntaxError(f"JSON parse error, {error.msg} at character {error.pos}")
    except JsonSyntaxError as error:
        return error
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise JsonSyntaxError("JSON parse error, duplicate key")
    return members


def _constant(word: str) -> object:
    raise JsonSyntaxError(f"JSON parse error, invalid keyword '{word}'")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS_MAX:
        raise JsonSyntaxError(f"JSON parse error, number has {len(digits)} digits, limit is {DIGITS_MAX}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    # JSON has no way to write it, so an id of this value could not be echoed.
    if math.isinf(value):
        raise JsonSyntaxError("JSON parse error, number is out of range")
    return value
