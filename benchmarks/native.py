"""The benchmarks' programs in C: compiled when they are needed.

Owns:        the compiler's command line.
Never sees:  what the programs do.
Read next:   flood.c, bare_handover.c.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

from localmig.errors import ConfigError, LocalmigError

_SOURCES: Final = Path(__file__).parent
_BUILT: Final = _SOURCES.parent / "target" / "benchmarks"
_COMPILE_SECONDS_MAX: Final = 60.0
"""A file of some hundred lines takes a second; a loaded machine more."""


@cache
def program(name: str) -> Path:
    """The compiled `name`.c, newer than its source.

    Raises:
        ConfigError: there is no C compiler.
        LocalmigError: it does not compile; the text is the compiler's.
    """
    source, built = _SOURCES / f"{name}.c", _BUILT / name
    if built.exists() and built.stat().st_mtime > source.stat().st_mtime:
        return built
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise ConfigError("no C compiler: on Debian, apt-get install gcc libc6-dev")
    _BUILT.mkdir(parents=True, exist_ok=True)
    argv = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(built), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_COMPILE_SECONDS_MAX, check=False)
    if done.returncode != 0:
        raise LocalmigError(f"{source.name} does not compile: {done.stderr.strip()}")
    return built
