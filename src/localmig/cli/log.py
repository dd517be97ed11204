"""The log of a daemon: where it goes, and how much of the same it takes.

Owns:        the handler, the bound on floods.
Never sees:  what is logged.
Read next:   appended.py for the file; run.py, its user.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from localmig.cli.appended import AppendedFile, write_to_stderr

LINES_BURST: Final = 30
"""Lines of one kind that come as they happen: one thing gone wrong has fewer, and a person reads no more of them."""

LINE_INTERVAL_S: Final = 10.0
"""From one line to the next of a kind in a flood: what a guest or frontend brings about again and again fills less than
two megabytes a day, and the log goes on telling that it does."""

KIND_COUNT_MAX: Final = 1024
"""Kinds that are told apart: each place in the code, for each of hundreds of devices that have something to say."""


@dataclass(kw_only=True, slots=True)
class _Kind:
    due_s: float = 0.0
    """When its last line was due, had they all come at their interval."""
    left_out_count: int = 0


class FloodFilter(logging.Filter):
    """Leaves out lines of a kind that comes too often, and tells with the next one how many.

    A kind is a place in the code and what it first tells of, a device as a rule: one guest's flood hides no other's
    line. What was asked for by --verbose is all there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: OrderedDict[tuple[str, int, str], _Kind] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        if record.levelno <= logging.DEBUG:
            return True
        kind = self._kind_of(record)
        now_s = time.monotonic()
        if max(kind.due_s, now_s) + LINE_INTERVAL_S > now_s + LINES_BURST * LINE_INTERVAL_S:
            kind.left_out_count += 1
            return False
        kind.due_s = max(kind.due_s, now_s) + LINE_INTERVAL_S
        if kind.left_out_count:
            record.msg = f"{record.getMessage()} ({kind.left_out_count} lines like this one were left out)"
            record.args = None
            kind.left_out_count = 0
        return True

    def _kind_of(self, record: logging.LogRecord) -> _Kind:
        subject = record.args[0] if isinstance(record.args, tuple) and record.args else None
        # Numbers and errors differ from line to line; an id has at most 63 characters, a path 107.
        key = (record.name, record.lineno, subject if isinstance(subject, str) else "")
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if len(self._kinds) > KIND_COUNT_MAX:
            self._kinds.popitem(last=False)
        return kind


class LogHandler(logging.Handler):
    """Hands each record, as one text, to `write`, and goes on if that raises OSError.

    A full disk or a closed terminal is no reason to stop serving, and there is nowhere to say it.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record."""
        try:
            self._write(self.format(record))
        except OSError:
            pass
        except Exception:  # noqa: BLE001 - a line that cannot be written as it is must not end what logs it
            self.handleError(record)


def set_up_log(path: str | None, level: int) -> AppendedFile | None:
    """Lets this process log to the file at `path`, which is returned, else to stderr. KernelError where it cannot."""
    file = AppendedFile("--log", path, mode=0o666) if path else None
    handler = LogHandler(file.write if file else write_to_stderr)
    handler.addFilter(FloodFilter())
    logging.basicConfig(handlers=[handler], format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("localmig").setLevel(level)
    return file
