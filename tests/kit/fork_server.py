"""The fork server: one process has imported localmig, and forks each `python -m MODULE ARGUMENTS` that a test asks for.

Owns:        the server's process, the requests to it, what a forked process begins with.
Never sees:  what the processes are for.
Read next:   processes.py, which starts daemons, guests and commands here.

Python takes a third of a second of processor time to start and to import localmig; a fork takes a few milliseconds.
A forked process begins as a program does: it has the arguments, the environment, the folder and the network namespace
of the thread that asks, the streams and descriptors that it is given and no others, default signal handlers and one
thread. When it ends, threads are joined and exit handlers run. It differs from a program in four things: its command
line and executable in /proc are the server's; so are its limits and its umask; of the variables that Python reads when
it starts, only PYTHONPATH counts; at its end the kernel frees its memory, and Python does not first take every module
apart, which would cost five times as much as the start. A test that is about one of these starts a program.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NoReturn

from localmig.errors import PeerError
from localmig.fds import OwnedFd

_ROOT: Final = Path(__file__).resolve().parents[2]

_ANSWER_SECONDS_MAX: Final = 60.0
"""For the server to import localmig, once, on a loaded machine; a fork takes milliseconds."""

_END_SECONDS_MAX: Final = 20.0
"""For the server to kill what it forked."""

_RUN_SECONDS_MAX: Final = 60.0
"""For a command to do its part: most take milliseconds, `localmig upgrade` starts a program."""

_REQUEST_BYTES_MAX: Final = 192 * 1024
"""A daemon's arguments for 512 NICs and an environment; the kernel's limit of one message is 208 KiB."""

_FDS_MAX: Final = 64
"""Descriptors of one request: a namespace, three streams, and what a process inherits, at most a dozen."""

_IMPORTED: Final = (
    *("localmig.cli", "localmig.devices.virtio_net", "localmig.netdevs.tap", "localmig.netdevs.stream"),
    *("localmig.netdevs.macvtap", "localmig.testing.frontend", "localmig.testing.namespace", "qemu.qmp"),
)
"""What most processes need. Modules that are run, as `localmig.testing.guest`, are missing here: Python warns of one
that was imported before."""

_CLONE_NEWNET: Final = 0x40000000


class ForkedProcess:
    """A process from the server, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, server: ForkServer, pid: int, pidfd: OwnedFd) -> None:
        self._server = server
        self._pidfd = pidfd
        self._lock = threading.Lock()
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; the exit status, negative for a signal. TimeoutExpired after `timeout` seconds."""
        if self.returncode is None and not self._poll(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        with self._lock:
            if self.returncode is None:
                self.returncode, _ = self._server.ask({"ask": "status", "pid": self.pid})
                self._pidfd.close()
            return self.returncode

    def _poll(self, timeout: float | None) -> bool:
        """Whether it ends in that time."""
        poll = select.poll()
        with self._lock:
            if self.returncode is not None:
                return True
            poll.register(self._pidfd.fileno(), select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def wait_stopped(self, timeout: float) -> None:
        """Waits until SIGSTOP has stopped it, or it has ended. TimeoutExpired after `timeout` seconds."""
        if self.returncode is None and not self._server.ask({"ask": "stopped", "pid": self.pid, "seconds": timeout})[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it has not ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd.fileno(), number)

    def terminate(self) -> None:
        """Asks it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kills it."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The server, seen from a test. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_SECONDS_MAX)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.kit.fork_server", str(theirs.fileno())],
                cwd=_ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        inherited: Sequence[int] = (),
        folder: Path | None = None,
    ) -> ForkedProcess:
        """A process that runs `python -m MODULE ARGUMENTS` in the network namespace of this thread.

        Args:
            module: what it runs.
            arguments: what follows.
            stdin: a descriptor; None: /dev/null.
            stdout: a descriptor; None: ours.
            stderr: a descriptor; None: ours.
            inherited: descriptors of ours it has too, under the same numbers.
            folder: where it runs; None: where we do.
        """
        request = {
            "ask": "start",
            "module": module,
            "arguments": list(arguments),
            "environment": dict(os.environ),
            "folder": str(folder or Path.cwd()),
            "numbers": [0, 1, 2, *inherited],
        }
        with (
            OwnedFd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as namespace,
            OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as nothing,
        ):
            streams = [nothing.fileno() if stdin is None else stdin, 1 if stdout is None else stdout]
            streams.append(2 if stderr is None else stderr)
            pid, fds = self.ask(request, [namespace.fileno(), *streams, *inherited])
        return ForkedProcess(self, pid, OwnedFd(fds[0]))

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        timeout: float = _RUN_SECONDS_MAX,
        folder: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run`: waits for the end, captures both outputs as text. TimeoutExpired; it is killed then."""
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            process = self.start(module, arguments, stdout=stdout.fileno(), stderr=stderr.fileno(), folder=folder)
            try:
                status = process.wait(timeout)
            finally:
                process.kill()
                process.wait()
            stdout.seek(0)
            stderr.seek(0)
            command = [module, *arguments]
            return subprocess.CompletedProcess(command, status, stdout.read().decode(), stderr.read().decode())

    def ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> tuple[int, list[int]]:
        """What the server answers: a number and, to "start", the pidfd of the process."""
        data = json.dumps(request).encode()
        assert len(data) <= _REQUEST_BYTES_MAX, len(data)
        with self._lock:
            socket.send_fds(self._socket, [data], list(fds))
            answer, passed, _, _ = socket.recv_fds(self._socket, 64, 1, socket.MSG_CMSG_CLOEXEC)
        if not answer:
            raise PeerError(f"the fork server {self.pid} ended: its stderr says why")
        for fd in passed:
            os.set_inheritable(fd, False)  # Python before 3.13.5 ignores the flags
        return int(answer), passed

    def close(self) -> None:
        """Ends the server and everything that it forked."""
        self._socket.close()
        self._process.wait(_END_SECONDS_MAX)


@cache
def fork_server() -> ForkServer:
    """The server of this process, which lives as long as it."""
    server = ForkServer()
    atexit.register(server.close)
    return server


# -- the server -------------------------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> str | None:
    """Answers until nobody asks any more. Returns again in each forked process, with the module that it is to run."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    # The terminal's Ctrl-C is for the tests; when they end, so does the server.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: set[int] = set()
    while True:
        data, fds, _, _ = socket.recv_fds(control, _REQUEST_BYTES_MAX, _FDS_MAX)
        if not data:
            break
        request = json.loads(data)
        match request["ask"]:
            case "start":
                pid = os.fork()
                if pid == 0:
                    control.close()
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                    return _begin(request, fds)
                children.add(pid)
                for fd in fds:
                    os.close(fd)
                with OwnedFd(os.pidfd_open(pid)) as pidfd:
                    socket.send_fds(control, [str(pid).encode()], [pidfd.fileno()])
            case "status":
                _, status = os.waitpid(request["pid"], 0)
                children.discard(request["pid"])
                control.send(str(os.waitstatus_to_exitcode(status)).encode())
            case "stopped":
                control.send(str(int(_wait_stopped(request["pid"], request["seconds"]))).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def _wait_stopped(pid: int, seconds: float) -> bool:
    """Whether a child stops, or ends, in time."""
    deadline = time.monotonic() + seconds
    while not os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG):
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        signal.sigtimedwait({signal.SIGCHLD}, left)
    return True


def _begin(request: dict[str, Any], fds: list[int]) -> str:
    """Gives this process what a program would begin with; returns the module that it is to run."""
    namespace, *streams = fds
    if os.fstat(namespace).st_ino != Path("/proc/self/ns/net").stat().st_ino:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
    _place(streams, request["numbers"])
    os.chdir(request["folder"])
    servers = _package_folders()
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:] = [*_package_folders(), *(folder for folder in sys.path[1:] if folder not in servers)]
    importlib.invalidate_caches()
    sys.argv = [request["module"], *request["arguments"]]
    module: str = request["module"]
    return module


def _package_folders() -> list[str]:
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(":") if folder]


def _place(fds: Sequence[int], numbers: Sequence[int]) -> None:
    """Moves descriptors to the numbers that they are to have, whichever of them are taken by others of them."""
    above = max(*fds, *numbers) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number, inheritable=True)
        os.close(fd)


def _run(module: str) -> NoReturn:
    """Runs a module as a program, to the end of this process."""
    status = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:  # noqa: BLE001 - Python, too, prints what nobody catches
        traceback.print_exc()
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status & 0xFF)


def _main() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    module = _serve(socket.socket(fileno=int(sys.argv[1])))
    if module is not None:
        _run(module)


if __name__ == "__main__":
    _main()
