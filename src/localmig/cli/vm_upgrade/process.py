"""The QEMU that runs, as the kernel and its own QMP tell of it.

Owns:        what is read of /proc, which questions are asked.
Never sees:  what follows from the answers.
Read next:   plan.py, which decides by them.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localmig.cli.client import Client
from localmig.cli.vm_upgrade.command_line import parse
from localmig.cli.vm_upgrade.plan import Running
from localmig.errors import ConfigError, KernelError

_NAMESPACES: Final = ("mnt", "net", "pid", "user")

_VERSION_TIMEOUT_S: Final = 20.0
"""For `--version` of a large program with many libraries; a busy machine takes a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """What /proc tells of a process.

    Attributes:
        pid: its number.
        program: its executable file.
        words: its command line, without the program's name.
        environment: its variables.
        directory: its working directory.
    """

    pid: int
    program: str
    words: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str

    def real_path(self, path: str) -> str:
        """What a path in its command line leads to. A link as the last part is not followed."""
        whole = os.path.join(self.directory, path)
        return os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))


def look_at(client: Client) -> Process:
    """The process that answers.

    Raises:
        ConfigError: a successor would not run where it runs, or not as the same user.
        KernelError: the kernel does not tell.
    """
    if client.uid != os.geteuid():
        raise ConfigError(
            f"{client.name} runs as user id {client.uid} and its successor would run as {os.geteuid()}: "
            f"do this as user id {client.uid}"
        )
    folder = Path(f"/proc/{client.pid}")
    try:
        for name in _NAMESPACES:
            if (folder / "ns" / name).readlink() != Path("/proc/self/ns", name).readlink():
                raise ConfigError(
                    f"{client.name} is in another namespace ({name}) than this program: do this inside, with "
                    f"'nsenter --target {client.pid} --mount --net --pid --user'"
                )
        if not (folder / "root").samefile("/"):
            raise ConfigError(f"{client.name} has another root directory than this program: do this inside of it")
        words = _strings(folder / "cmdline")
        environment = dict(text.split("=", 1) for text in _strings(folder / "environ") if "=" in text)
        return Process(
            pid=client.pid,
            program=_program(folder),
            words=tuple(words[1:]),
            environment=environment,
            directory=str((folder / "cwd").readlink()),
        )
    except OSError as error:
        raise KernelError(
            f"cannot see {client.name}: {error.strerror}; is it in another PID namespace?",
            errno=error.errno or errno.EIO,
        ) from error


def _strings(path: Path) -> list[str]:
    # A process may have written over its arguments; an empty one at the end is no argument.
    return [os.fsdecode(text) for text in path.read_bytes().split(b"\0")[:-1]]


def _program(folder: Path) -> str:
    """Where its executable file is. An update replaces files: then it is the file that is there now."""
    return str((folder / "exe").readlink()).removesuffix(" (deleted)")


def version_of(program: str) -> tuple[int, int]:
    """The version of the QEMU that is installed at `program`. ConfigError where there is none."""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"'{program}' does not run: {error}") from error
    numbers = re.search(r"version (\d+)\.(\d+)", done.stdout)
    if numbers is None:
        said = (done.stdout + done.stderr).strip()[:200] or "nothing"
        raise ConfigError(f"'{program}' is no QEMU: asked for its version it said: {said}")
    return int(numbers[1]), int(numbers[2])


async def ask(client: Client, process: Process) -> Running:
    """What a QEMU tells of itself. PeerError where it does not answer."""
    version = (await client.execute("query-version"))["qemu"]
    machine = await client.execute("qom-get", {"path": "/machine", "property": "type"})
    devices = await client.execute("qom-list", {"path": "/machine/peripheral"})
    anonymous = await client.execute("qom-list", {"path": "/machine/peripheral-anon"})
    objects = await client.execute("qom-list", {"path": "/objects"})
    return Running(
        program=process.program,
        words=process.words,
        version=(version["major"], version["minor"]),
        machine=machine.removesuffix("-machine"),
        run_state=(await client.execute("query-status"))["status"],
        blocked_reasons=(await client.execute("query-migrate")).get("blocked-reasons", ()),
        devices=_children(devices),
        anonymous_devices=len(_children(anonymous)),
        objects=_children(objects),
        chardevs=[chardev["label"] for chardev in await client.execute("query-chardev")],
        folders=_folders(process),
    )


def _children(properties: list[Mapping[str, str]]) -> list[str]:
    return [each["name"] for each in properties if each["type"].startswith("child<")]


def _folders(process: Process) -> frozenset[str]:
    try:
        options = parse(process.words)
    except ValueError:
        return frozenset()  # the plan refuses it
    paths = {option.properties.get("mem-path") for option in options if option.name == "object"}
    return frozenset(path for path in paths if path is not None and Path(process.real_path(path)).is_dir())
