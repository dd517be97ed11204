"""DPDK's testpmd as a process: a driver that sends and counts, or a backend between vhost-user and a TAP.

Owns:        its command line, its prompt.
Never sees:  what is measured.
Read next:   packet_rates.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from benchmarks.lines import read_until
from localmig.errors import ConfigError, PeerError, PeerLostError
from localmig.fds import OwnedFd

START_SECONDS_MAX: Final = 60.0
"""It sets its memory up and asks the backend a dozen questions: two seconds; a loaded machine takes more."""

ANSWER_SECONDS_MAX: Final = 20.0
"""A command is obeyed in milliseconds, `stop` after the packets in flight."""

_PROMPT: Final = b"testpmd> "
_RING_ENTRIES: Final = 1024


class Testpmd:
    """One testpmd, at its prompt.

    Args:
        vdevs: its virtual devices, as `--vdev` has them.
        cpus: for its prompt, and for its forwarding thread, which keeps one processor busy.
        queues: of each port.
        options: of its own, after all others, so that they replace what is said here.

    Raises:
        ConfigError: it is not installed.
        PeerError: it did not come to its prompt; the text has what it said.
    """

    def __init__(
        self, vdevs: Sequence[str], *, cpus: tuple[int, int], queues: int = 1, options: Sequence[str] = ()
    ) -> None:
        if shutil.which("dpdk-testpmd") is None:
            raise ConfigError("no dpdk-testpmd: on Debian, apt-get install dpdk dpdk-dev librte-meta-all")
        prompt_cpu, forward_cpu = cpus
        argv = ["dpdk-testpmd", "--lcores", f"0@{prompt_cpu},1@{forward_cpu}", "--no-pci", "--no-huge", "-m", "256"]
        # Its virtio driver says there which of its paths it chose.
        argv += ["--no-telemetry", "--log-level=pmd.net.virtio.init:info"]
        for vdev in vdevs:
            argv += ["--vdev", vdev]
        argv += ["--", "-i", "--no-mlockall", "--total-num-mbufs=16384"]
        argv += [f"--txd={_RING_ENTRIES}", f"--rxd={_RING_ENTRIES}", f"--txq={queues}", f"--rxq={queues}", *options]
        # It leaves files where it runs.
        self._folder = tempfile.TemporaryDirectory(prefix="localmig-bench-")
        environment = {**os.environ, "RUNTIME_DIRECTORY": self._folder.name}
        # Its output is a terminal: into a pipe it would write no answer before its buffer is full.
        self._terminal, terminal = (OwnedFd(fd) for fd in os.openpty())
        with terminal:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=terminal.fileno(), stderr=subprocess.STDOUT, env=environment
            )
        try:
            self._greeting = self._until_prompt(START_SECONDS_MAX)
        except PeerError:
            self.close()
            raise

    def path(self, way: str) -> str | None:
        """The path that its virtio driver chose for the first port, in its own words; None if it did not say.

        Args:
            way: `Rx` or `Tx`.
        """
        found = re.search(rf"using (.+) {way} path on port 0", self._greeting)
        return None if found is None else found[1]

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def command(self, *lines: str) -> str:
        """Obeys these lines; what it said to the last one. PeerError if it does not come back to its prompt."""
        said = ""
        for line in lines:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(f"{line}\n".encode())
                self._process.stdin.flush()
            except BrokenPipeError:
                raise PeerLostError("testpmd has ended") from None
            said = self._until_prompt(ANSWER_SECONDS_MAX)
        return said

    def received(self) -> int:
        """Packets its first port received so far."""
        return self.counters()["RX-packets"]

    def counters(self) -> dict[str, int]:
        """What its first port counted so far, by the names it has for that."""
        said = self.command("show port stats 0")
        counters = {name: int(count) for name, count in re.findall(r"([RT]X-[a-z]+): +(\d+)", said)}
        if "RX-packets" not in counters:
            raise PeerError(f"testpmd did not tell its counters: {said[-500:]}")
        return counters

    def close(self) -> None:
        """Kills it, if it lives; its ports have nothing that must be put in order. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._terminal.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _until_prompt(self, seconds: float) -> str:
        return read_until(self._terminal.fileno(), _PROMPT, seconds=seconds, who="testpmd")


class DpdkBackend:
    """DPDK between a vhost-user socket and a TAP.

    Args:
        folder: where its socket may be.
        cpus: as for `Testpmd`.
    """

    ifname: Final = "dtap0"

    def __init__(self, folder: Path, *, cpus: tuple[int, int]) -> None:
        self.socket = folder / "dpdk.sock"
        vdevs = (f"net_vhost0,iface={self.socket},queues=1", f"net_tap0,iface={self.ifname}")
        self._testpmd = Testpmd(vdevs, cpus=cpus)
        self.pid = self._testpmd.pid

    def start(self) -> None:
        """Forwards from now on. PeerError if it does not."""
        self._testpmd.command("set fwd io", "start")

    def close(self) -> None:
        """Ends it. Idempotent."""
        self._testpmd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
