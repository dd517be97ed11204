"""A handover's stream as a file, for `localmig analyze` and QEMU's scripts/analyze-migration.py.

Owns:        the file: its mode, that it is whole or not there, what it may replace.
Never sees:  what is in the stream, when it is written.
Read next:   outgoing.py, which keeps the pieces until the guest is served; analysis.py, which explains them.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from localmig.errors import ConfigError
from localmig.limits import PATH_BYTES_MAX


def check_path(path: str) -> None:
    """Raises ConfigError where `path` cannot be one."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ConfigError(f"Option record expects a path, and {path!r:.60} cannot be one") from error
    if b"\0" in encoded or len(encoded) > PATH_BYTES_MAX:
        raise ConfigError(f"Option record expects a path of at most {PATH_BYTES_MAX} bytes without NUL")


def write_recording(path: str, pieces: Iterable[bytes | bytearray]) -> None:
    """Writes the pieces of a stream, one after the other, with mode 0600. An earlier recording there is replaced.

    Raises:
        ConfigError: something other than a file has that path; it is left alone.
        OSError: it could not be written, and nothing is left of it.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ConfigError(f"'{path}' exists and is no file")
    # Beside the path first: who finds it there finds it whole.
    fd, unfinished = tempfile.mkstemp(prefix=".recording-", dir=os.path.dirname(path) or ".")
    try:
        with open(fd, "wb") as file:
            file.writelines(pieces)
        Path(unfinished).replace(path)
    except BaseException:
        Path(unfinished).unlink()
        raise
