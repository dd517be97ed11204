"""The guest lab: real Linux guests in real VMMs, in a network namespace of their own.

Owns:        the namespace, every process started in it, their logs, the folder with their sockets.
Never sees:  what is being tested: a test gives the network backend's arguments or socket.
Read next:   image.py for what a guest boots, conftest.py for the fixtures.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from tests.guest.image import LabError, busybox, qemu_image, uml_image

HOST_ADDRESS: Final = "10.9.0.1"
GUEST_ADDRESS: Final = "10.9.0.2"
PREFIX: Final = "/24"

BOOT_SECONDS_MAX: Final = 60
"""A guest boots in 3 s here; a busy machine without KVM may take ten times that."""

COMMAND_SECONDS_MAX: Final = 30
"""For one command in the guest or the namespace, all of them short."""

STOP_SECONDS_MAX: Final = 10
"""From SIGTERM to the end of a process that behaves; then SIGKILL."""

ECHO_PORT: Final = 7
SHELL_PORT: Final = 9
"""Services of guest-init."""


class Process:
    """A process whose output is read into a log as it comes, so that a test can wait for a line."""

    def __init__(self, argv: Sequence[str], *, log: Path, pass_fds: Sequence[int] = ()) -> None:
        self.log = log
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        # With the tests gone, however they ended, nobody needs it any more.
        self._popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
        )
        self.pid = self._popen.pid
        self._reader = threading.Thread(target=self._read, name=f"log of {log.name}")
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self.log.open("a", buffering=1) as log:
            for line in self._popen.stdout:
                log.write(line)
                with self._changed:
                    self._lines.append(line.strip())
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, text: str, *, seconds_max: float) -> str:
        """The first line that contains `text`, once there is one.

        Raises:
            AssertionError: The process ended or the time passed without such a line.
        """

        def found() -> str | None:
            return next((line for line in self._lines if text in line), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._ended, timeout=seconds_max)
            line = found()
            state = "ended" if self._ended else f"ran {seconds_max} s"
            assert line is not None, f"{self.log.name}: {state} without saying {text!r}: {self._lines[-5:]}"
            return line

    def wait(self, *, seconds_max: float) -> int:
        """The exit status, once the process has ended."""
        return self._popen.wait(timeout=seconds_max)

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._popen.poll() is None

    def kill(self) -> None:
        """End it at once, as a crash would, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait()

    def stop(self) -> None:
        """End it, if it still runs, and wait until it is gone."""
        if self.is_running():
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.wait(timeout=STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._reader.join()
        assert self._popen.stdout is not None
        self._popen.stdout.close()


class Guest:
    """A booted guest, and what a test may ask of it over its network."""

    def __init__(self, lab: Lab, process: Process) -> None:
        self._lab = lab
        self.process = process

    def wait_ready(self) -> None:
        """Wait until its network is up and its services listen."""
        self.process.wait_for("guest: ready", seconds_max=BOOT_SECONDS_MAX)

    def run(self, command: str) -> str:
        """What shell `command`, run in the guest, prints."""
        return self._talk(SHELL_PORT, command.encode()).decode()

    def echo(self, data: bytes) -> bytes:
        """What comes back when `data` goes through the guest's TCP."""
        return self._talk(ECHO_PORT, data)

    def carrier_changes(self) -> int:
        """How often the guest saw its link change since boot: a reconnect of the backend shows here."""
        return int(self.run("cat /sys/class/net/eth0/carrier_changes"))

    def _talk(self, port: int, data: bytes) -> bytes:
        return self._lab.run([str(busybox()), "nc", GUEST_ADDRESS, str(port)], stdin=data)


class Lab:
    """A network namespace with the processes of one test, all of them ended by `close`."""

    def __init__(self) -> None:
        # A short path: a UNIX socket's may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self._processes: list[Process] = []
        self._guest_count = 0
        new_namespace = (
            ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
        )
        # It lives as long as its standard input is open here, so it cannot outlive the tests.
        self._holder = subprocess.Popen(
            [*new_namespace, "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            raise LabError(f"no network namespace for the lab: {' '.join(new_namespace)} failed")
        self._enter = ["nsenter", f"--target={self._holder.pid}", "--net"]
        if os.geteuid() != 0:
            self._enter += ["--user", "--preserve-credentials"]
        self.run(["ip", "link", "set", "lo", "up"])

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", seconds_max: float = COMMAND_SECONDS_MAX
    ) -> bytes:
        """What a command in the namespace prints.

        Raises:
            AssertionError: It failed; with what it said.
            subprocess.TimeoutExpired: It took too long and was killed.
        """
        finished = subprocess.run(
            [*self._enter, *argv], input=stdin, capture_output=True, timeout=seconds_max, check=False
        )
        assert finished.returncode == 0, (
            f"{' '.join(argv)}: {finished.returncode}: {finished.stderr.decode()}"
        )
        return finished.stdout

    def start(self, argv: Sequence[str], *, name: str, pass_fds: Sequence[int] = ()) -> Process:
        """Start a process in the namespace; its output goes to `name`.log in the lab's folder."""
        # The parent-death signal is set last: entering a user namespace would clear it.
        process = Process(
            [*self._enter, "setpriv", "--pdeathsig", "TERM", *argv],
            log=self.folder / f"{name}.log",
            pass_fds=pass_fds,
        )
        self._processes.append(process)
        return process

    def add_tap(self, ifname: str = "tap0") -> None:
        """Make a persistent TAP with a vnet header, as an operator would beforehand."""
        self.run(["ip", "tuntap", "add", ifname, "mode", "tap", "vnet_hdr"])

    def set_up(self, ifname: str = "tap0") -> None:
        """Give a TAP the host's address and bring it up."""
        self.run(["sysctl", "-qw", f"net.ipv6.conf.{ifname}.disable_ipv6=1"])  # no chatter in the counters
        self.run(["ip", "address", "add", HOST_ADDRESS + PREFIX, "dev", ifname])
        self.run(["ip", "link", "set", ifname, "up"])

    def boot_qemu(self, netdev: Sequence[str]) -> Guest:
        """Boot a guest under QEMU with one virtio-net on netdev "n0", which the arguments `netdev` define."""
        image = qemu_image(self.folder)
        argv = [_qemu(), "-M", "q35,accel=tcg,memory-backend=ram0", "-cpu", "max", "-smp", "1", "-m", "256"]
        # vhost-user needs guest memory it can map.
        argv += ["-object", "memory-backend-memfd,id=ram0,size=256M,share=on"]
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
        argv += ["-kernel", str(image.kernel), "-initrd", str(image.initramfs)]
        # no_timer_check: on a loaded machine an emulated timer may come too late, and the boot would hang.
        argv += ["-append", _kernel_words("console=ttyS0 no_timer_check ipv6.disable=1")]
        argv += netdev
        # vectors=0: QEMU 7.2 under TCG crashes with MSI-X and a vhost-user backend.
        argv += ["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,vectors=0,romfile="]
        return self._booting(argv)

    def boot_uml(self, device: str | None) -> Guest:
        """Boot a guest under User-Mode Linux, its NIC served at the vhost-user socket `device`."""
        image = uml_image(self.folder)
        argv = [str(image.kernel), "mem=256M", f"initrd={image.initramfs}", f"uml_dir={self.folder}/"]
        argv += ["con=null", "con0=null,fd:1", *_kernel_words("").split()]
        if device is not None:
            argv.append(f"virtio_uml.device={device}:1")  # 1: virtio's id of a NIC
        return self._booting(argv)

    def _booting(self, argv: Sequence[str]) -> Guest:
        self._guest_count += 1
        return Guest(self, self.start(argv, name=f"guest{self._guest_count}"))

    def logs(self) -> list[tuple[str, str]]:
        """Name and text of every process's log so far."""
        return [
            (process.log.name, process.log.read_text()) for process in self._processes if process.log.exists()
        ]

    def close(self) -> None:
        """End every process, newest first, and remove the folder."""
        for process in reversed(self._processes):
            process.stop()
        for stream in (self._holder.stdin, self._holder.stdout):
            assert stream is not None
            stream.close()
        self._holder.wait()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def tap_netdev(ifname: str = "tap0") -> list[str]:
    """QEMU's own TAP backend: a guest without localmig."""
    return ["-netdev", f"tap,id=n0,ifname={ifname},script=no,downscript=no"]


def vhost_user_netdev(socket: Path) -> list[str]:
    """A vhost-user backend at `socket`, to which QEMU reconnects every second when it goes away."""
    return ["-chardev", f"socket,id=c0,path={socket},reconnect=1", "-netdev", "vhost-user,id=n0,chardev=c0"]


def _kernel_words(words: str) -> str:
    return f"quiet {words} guestip={GUEST_ADDRESS}{PREFIX}"


def _qemu() -> str:
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise LabError("no qemu-system-x86_64: on Debian, apt-get install qemu-system-x86")
    return found
