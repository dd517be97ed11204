"""The pages for authors of devices, carried out: each block in turn, as a reader would, and its output compared.

A block of `console` has commands and what they print, one of `pycon` a Python session, which lasts for the page. A
block after a line that is a file's name is that file. One of `python` without a name is part of an
example. "…" is anything.
"""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from tests.conftest import ROOT

from localmig.fds import OwnedFd
from localmig.testing.driver import Driver
from localmig.testing.process import is_ready

COMMAND_SECONDS_MAX: Final = 120
"""For an installation by pip, which downloads what it builds with."""

SOCKETS: Final = "/run/vm1"
"""Where the pages have their sockets."""

BLOCK: Final = re.compile(
    r"(?:^`(?P<file>\S+)`:\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Reader:
    """Somebody who does what a page says, with an installation of localmig of their own."""

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self.folder = folder
        self._ends = ends
        self._python = _install(folder / "venv")
        self._environment = {**os.environ, "PATH": f"{folder}/venv/bin:{os.environ['PATH']}", "PYTHONWARNINGS": ""}
        self._session: dict[str, Any] = {}
        self.sockets = folder / "s"
        self.sockets.mkdir()
        self.ran = 0
        # Not their build folders: two tests may install the same example.
        built = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=built)
        ends.callback(self._end_daemons)

    def follow(self, page: Path) -> None:
        """Carries out each block."""
        for block in BLOCK.finditer(page.read_text()):
            text = block["text"].replace(SOCKETS, str(self.sockets))
            match block["file"], block["language"]:
                case None, "console":
                    for command, printed in _commands(text):
                        self._run(command, printed)
                case None, "pycon":
                    self._converse(text, f"{page.name}: {block['text']}")
                case None, "python":
                    files = [_plain(file.read_text()) for file in self.folder.glob("examples/*/*.py")]
                    assert any(_plain(text) in file for file in files), f"no example has this:\n{text}"
                case None, "sh":
                    pass  # it boots a guest: tests/guest/test_devices_page.py
                case str(file), _:
                    self._write(self.folder / file, block["text"])
                case language:
                    raise AssertionError(f"a reader does not know what to do with {language}")
            self.ran += 1

    def _write(self, path: Path, text: str) -> None:
        if path.exists():
            assert path.read_text() == text, f"{path.name} is another one than the page says"
        path.write_text(text)

    def _run(self, command: str, printed: str) -> None:
        if command.endswith("&"):
            self._start(command.removesuffix("&"))
            return
        ended = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
        )
        said = f"$ {command}\n{ended.stdout}"
        assert (ended.returncode != 0) is ("error:" in printed), said
        if printed:
            wanted = ".*".join(map(re.escape, printed.strip().split("…")))
            assert re.fullmatch(wanted, ended.stdout.strip(), re.DOTALL), f"{said}\nthe page has:\n{printed}"

    def _start(self, command: str) -> None:
        """Starts a daemon, and waits until it is ready."""
        reader, writer = (OwnedFd(fd) for fd in os.pipe())
        with reader, open(self.folder / "daemon.log", "ab") as log:
            with writer:
                process = subprocess.Popen(
                    ["bash", "-c", f"exec {command} --ready-fd {writer.fileno()}"],
                    cwd=self.folder,
                    env=self._environment,
                    pass_fds=(writer.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            self._ends.callback(_kill, process)
            assert is_ready(reader), f"{command}\n{(self.folder / 'daemon.log').read_text()}"

    def _converse(self, text: str, name: str) -> None:
        said: list[str] = []
        example = doctest.DocTestParser().get_doctest(text, self._session, name, None, None)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
        failed, _ = runner.run(example, out=said.append, clear_globs=False)
        self._session = example.globs
        assert not failed, "".join(said)

    def _end_daemons(self) -> None:
        for value in self._session.values():
            if isinstance(value, Driver):
                value.close()
        for socket in self.sockets.glob("*qmp.sock"):
            command = [str(self._python), "-m", "localmig.cli", "qmp", str(socket), "quit"]
            subprocess.run(
                command, env=self._environment, capture_output=True, timeout=COMMAND_SECONDS_MAX, check=False
            )


def _install(folder: Path) -> Path:
    """An environment that has localmig, and what packages are installed into. Gives its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(f"{ROOT / 'src'}\n{sysconfig.get_path('purelib')}\n")
    for name, command in (
        ("localmig", f'exec "{python}" -m localmig.cli "$@"'),
        ("pip", f'exec "{sys.executable}" -m pip --disable-pip-version-check --python "{python}" "$@"'),
    ):
        script = folder / "bin" / name
        script.unlink(missing_ok=True)
        script.write_text(f"#!/bin/sh\n{command}\n")
        script.chmod(0o755)
    return python


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a block, and what it prints as the page has it."""
    _, *pieces = re.split(r"^\$ ", text, flags=re.MULTILINE)
    for piece in pieces:
        command, printed = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n(.*)", piece, re.DOTALL).groups()  # type: ignore[union-attr]
        yield command.strip(), printed


def _plain(code: str) -> str:
    """Without indentation and blank lines, which the formatter sets anew in a page."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with ExitStack() as ends:
        yield Reader(tmp_path_factory.mktemp("g"), ends)


@pytest.mark.timeout(900)  # a dozen daemons, one after the other, and pip
@pytest.mark.parametrize("page", ["devices", "testing-kit"])
def test_what_the_page_says_can_be_done(reader: Reader, page: str) -> None:
    if shutil.which("patch") is None:
        pytest.skip("needs patch: apt-get install patch")
    reader.follow(ROOT / "docs" / f"{page}.md")
    assert reader.ran
