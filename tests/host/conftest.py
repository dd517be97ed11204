"""A host with a real systemd: a Debian root of its own, in namespaces of its own, with the program of this tree in it.

Owns:        that systemd's life, commands inside of it, its network.
Never sees:  what is being tested.
Read next:   test_systemd.py.

systemd is process 1 of a PID namespace. Its files are Debian's, unpacked into .lab/systemd by `make host-root`; what it
writes is gone with the mount namespace, for every folder that is written to is a tmpfs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.kit.processes import GuestProcess

from localmig.testing.guest import GuestSettings
from localmig.testing.namespace import NetworkNamespace
from localmig.testing.traffic import Pinger, PingReport

TREE: Final = Path(__file__).resolve().parents[2]
ROOT: Final = TREE / ".lab/systemd"

START_SECONDS_MAX: Final = 120.0
"""For systemd to have started its units: a few seconds, on a loaded machine a minute."""

COMMAND_SECONDS_MAX: Final = 120.0
"""For a command inside: systemd itself gives a reload up after ninety seconds."""

LOOK_AGAIN_S: Final = 0.05

GUEST: Final = "10.9.0.2"

BOOT: Final = """\
set -e
cd "$ROOT"
for folder in run tmp var/log etc/systemd/system etc/localmig sys; do mkdir -p "$folder"; done
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
for folder in run tmp var/log etc/systemd/system etc/localmig sys/fs/cgroup; do mount -t tmpfs tmpfs "$folder"; done
mkdir sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd systemd sys/fs/cgroup/systemd
for folder in "$TREE" "$PYTHON"; do
    mkdir -p ".$folder"
    mount --bind "$folder" ".$folder"
    mount -o remount,bind,ro ".$folder"
done
for unit in systemd-tmpfiles-setup.service systemd-tmpfiles-clean.timer; do
    ln -s /dev/null "etc/systemd/system/$unit"
done
export container=lab
exec chroot . /lib/systemd/systemd --unit=multi-user.target
"""
"""The folders of Debian's that only the root's own package manager writes to stay as they are. What is lent to the host
is read-only, and may be in one of the folders that systemd would clear when it starts."""


class Host:
    """A running systemd.

    Attributes:
        pid: systemd's process, seen from here.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = self._child_of(process.pid)
        self.network = NetworkNamespace.of_process(self.pid)
        self._wait(lambda: self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"))

    def path(self, path: str) -> Path:
        """A path of the host's, seen from here."""
        return Path(f"/proc/{self.pid}/root{path}")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """What a command inside prints, and how it ends."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd"]
        return subprocess.run(
            [*enter, *command], capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, check=False
        )

    def systemctl(self, *words: str) -> str:
        """What systemctl prints. It must not fail."""
        done = self.run("systemctl", *words)
        assert done.returncode == 0, (words, done.stderr, self.journal())
        return done.stdout

    def show(self, unit: str) -> dict[str, str]:
        """All that systemd knows of a unit."""
        return dict(line.split("=", 1) for line in self.systemctl("show", unit).splitlines())

    def wait(self, unit: str, **facts: str) -> dict[str, str]:
        """Waits until systemd says so of a unit."""
        self._wait(lambda: facts.items() <= self.show(unit).items())
        return self.show(unit)

    def processes_of(self, facts: dict[str, str]) -> list[str]:
        """The processes of a unit that systemd knows these facts of, by their numbers in the host."""
        group = f"/sys/fs/cgroup/systemd{facts['ControlGroup']}/cgroup.procs"
        return self.run("cat", group).stdout.split()

    def journal(self, *units: str) -> str:
        """What was logged, by these units or by all."""
        return self.run("journalctl", "--no-pager", "--output=cat", *(f"--unit={unit}" for unit in units)).stdout

    def attach(self, socket: str, **settings: object) -> GuestProcess:
        """A guest behind the NIC at that path, on the host's network."""
        with self.network.entered():
            path = str(self.path(socket))
            return GuestProcess(GuestSettings(socket=path, address=f"{GUEST}/24", **settings))  # type: ignore[arg-type]

    def pinger(self) -> Pinger:
        """Pings the guest each millisecond."""
        with self.network.entered():
            return Pinger(GUEST).start()

    def ping(self, count: int) -> PingReport:
        """Pings the guest so often."""
        with self.network.entered():
            pinger = Pinger(GUEST, count_max=count).start()
        assert pinger.wait(COMMAND_SECONDS_MAX)
        return pinger.stop()

    def close(self) -> None:
        """Ends it with all that it runs."""
        self.network.close()
        self._process.send_signal(signal.SIGKILL)  # process 1 of the namespace dies with its parent
        self._process.wait()

    def _wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not holds():
            assert time.monotonic() < deadline, self.journal()
            time.sleep(LOOK_AGAIN_S)

    @staticmethod
    def _child_of(pid: int) -> int:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(LOOK_AGAIN_S)
        return int(children[0])


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if not (ROOT / "lib/systemd/systemd").exists():
        pytest.skip("no systemd to test with: make host-root, as root")
    process = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--net", "bash", "-c", BOOT],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "ROOT": str(ROOT), "TREE": str(TREE), "PYTHON": sys.base_prefix},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    host = Host(process)
    try:
        yield host
    finally:
        host.close()
