"""Trees to measure: this one, and another commit unpacked beside it, each with its own .venv and packet path.

Owns:        the folder of a commit, its `make setup`, programs that run in a tree and end with us.
Never sees:  what is measured.
Read next:   compare.py.

A commit is unpacked by `git archive`: a worktree would stay registered in the repository after `make clean`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from localmig.errors import ConfigError, LocalmigError
from localmig.testing.children import end_children

ROOT: Final = Path(__file__).resolve().parents[1]

UNPACKED: Final = ROOT / "target" / "benchmarks" / "trees"
"""A folder for each commit, by its hash. It is kept, so that the next comparison with a commit builds nothing."""

SETUP_SECONDS_MAX: Final = 1200.0
"""Tools are downloaded and Rust is compiled: a minute; a loaded machine and a slow network take more."""

END_SECONDS_MAX: Final = 30.0
"""A program that is asked to end first ends what it started: daemons, guests, testpmd."""

_GIT_SECONDS_MAX: Final = 60.0
"""Git reads one commit, tar writes some hundred files."""

_OF_ONE_TREE: Final = frozenset(
    (
        "VIRTUAL_ENV",
        "PYO3_PYTHON",
        "PYTHONPATH",
        "CARGO_TARGET_DIR",
        "MAKEFLAGS",
        "MFLAGS",
        "MAKELEVEL",
        "MAKEOVERRIDES",
    )
)
"""Variables that would lead a program of one tree to the files of another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """Files that can be measured.

    Attributes:
        root: their folder.
        description: what they are, for people.
    """

    root: Path
    description: str

    @classmethod
    def here(cls) -> Self:
        """This one, as its files are now. ConfigError if it is in no git repository."""
        changed = ", with uncommitted changes" if _is_changed() else ""
        return cls(root=ROOT, description=f"{_describe('HEAD')}{changed}")

    @classmethod
    def unpack(cls, revision: str | None) -> Self:
        """Another commit, unpacked where it is not yet.

        Args:
            revision: as git knows it; None: the commit before, which is HEAD if files were changed since, else HEAD~1.

        Raises:
            ConfigError: there is no such commit, or no git.
        """
        if revision is None:
            revision = "HEAD" if _is_changed() else "HEAD~1"
        commit = _run_git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
        root = UNPACKED / commit
        if not root.exists():
            partial = root.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            archive = root.with_suffix(".tar")
            _run_git("archive", f"--output={archive}", commit)
            _run("tar", "-xf", str(archive), "-C", str(partial))
            archive.unlink()
            partial.rename(root)
        return cls(root=root, description=_describe(commit))

    def set_up(self, log: Path) -> None:
        """Builds what is not built yet. LocalmigError if that fails; what make said is in `log`."""
        self.run(["make", "setup"], seconds=SETUP_SECONDS_MAX, log=log)

    def python(self, module: str, *arguments: str, seconds: float, log: Path) -> None:
        """Runs a module of this tree, as `run` does."""
        self.run([str(self.root / ".venv" / "bin" / "python"), "-m", module, *arguments], seconds=seconds, log=log)

    def run(self, argv: Sequence[str], *, seconds: float, log: Path) -> None:
        """Runs a program to its end; nothing that it started is left, whatever ends it.

        Call `adopt_orphans` before. If this is interrupted, the program is asked to end before it is killed.

        Args:
            argv: the program and its arguments.
            seconds: how long it may take.
            log: where it writes what it says.

        Raises:
            LocalmigError: it failed, or took longer; the text has the end of what it said.
        """
        environment = {name: value for name, value in os.environ.items() if name not in _OF_ONE_TREE}
        with open(log, "wb") as said:
            # In a session of its own: Ctrl-C at the terminal is ours, and we ask it once.
            process = subprocess.Popen(
                argv,
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise LocalmigError(f"'{' '.join(argv)}' took longer than {seconds:g} s, see {log}") from None
            finally:
                _end(process)
        if status != 0:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise LocalmigError(f"'{' '.join(argv)}' failed with {status}, see {log}: {'; '.join(lines[-3:])}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a program to end if it runs; kills what is left of it and of its children."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS_MAX)
    finally:
        end_children()


def _is_changed() -> bool:
    """Whether a file that git knows differs from HEAD."""
    return bool(_run_git("status", "--porcelain", "--untracked-files=no"))


def _describe(revision: str) -> str:
    return _run_git("log", "--max-count=1", "--format=%h %s", revision)


def _run_git(*arguments: str) -> str:
    return _run("git", "-C", str(ROOT), *arguments)


def _run(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_GIT_SECONDS_MAX, check=False)
    except FileNotFoundError:
        raise ConfigError(f"no {argv[0]}: on Debian, apt-get install {argv[0]}") from None
    if done.returncode != 0:
        raise ConfigError(f"'{' '.join(argv)}' failed: {done.stderr.strip()}")
    return done.stdout.strip()
