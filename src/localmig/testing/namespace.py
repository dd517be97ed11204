"""Network namespaces: where TAPs are made and traffic flows without touching the machine's network.

Owns:        entering fresh user and network namespaces, what is configured inside them.
Never sees:  daemons, guests.
Read next:   guest.py, which lives in one.

`python -m localmig.testing.namespace COMMAND …` runs a command in fresh namespaces; without a command it says whether
the kernel allows them.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, Final, Self

from localmig.errors import KernelError, LocalmigError
from localmig.fds import OwnedFd

_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000

COMMAND_SECONDS_MAX: Final = 20
"""How long one `ip` call may take: it answers in milliseconds; a machine under load gets a thousand times that."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


class CommandError(LocalmigError):
    """A helper program failed.

    Attributes:
        argv: what was run.
        output: what it printed on stderr.
    """

    def __init__(self, argv: Sequence[str], output: str) -> None:
        super().__init__(f"'{' '.join(argv)}' failed: {output.strip() or 'it printed nothing'}")
        self.argv = tuple(argv)
        self.output = output


# -- entering ---------------------------------------------------------------------------------------------------


def isolate() -> None:
    """Moves this process into a fresh network namespace, and into a fresh user namespace where it takes one.

    Afterwards the process may configure its network as it likes, and nothing of it is left when it ends. Call it
    before any thread exists: the kernel gives a user namespace to single-threaded processes only.

    Raises:
        KernelError: the kernel does not allow it; the text says why. Nothing was changed.
    """
    number = _call_unshare(_CLONE_NEWNET)
    if number not in (0, errno.EPERM):
        raise KernelError(_refusal("network", number), errno=number) from OSError(number, os.strerror(number))
    if number == errno.EPERM:
        uid, gid = os.getuid(), os.getgid()
        number = _call_unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        if number:
            raise KernelError(_refusal("user", number), errno=number) from OSError(number, os.strerror(number))
        # A process without privileges may map only itself, and its group only once it gives up setgroups(2).
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    ip("link", "set", "lo", "up")


def _call_unshare(flags: int) -> int:
    """0, or the error number."""
    return 0 if _libc.unshare(flags) == 0 else ctypes.get_errno()


def _refusal(kind: str, number: int) -> str:
    said = f"cannot create a {kind} namespace: {os.strerror(number)}"
    match number:
        case errno.EINVAL:
            return f"{said}; this process has {len(list(Path('/proc/self/task').iterdir()))} threads, it may have one"
        case errno.ENOSPC:
            return f"{said}; the limit is /proc/sys/user/max_{kind}_namespaces, ask for more"
        case errno.EPERM:
            return f"{said}; this system keeps them from ordinary users (sysctl, AppArmor or a container), run as root"
    return said


@cache
def unavailable_reason() -> str | None:
    """Why no namespace with a TAP in it can be had here, None where it can. Tried once, in a process of its own."""
    argv = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired:
        return f"creating a namespace took longer than {COMMAND_SECONDS_MAX} s"
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


class NetworkNamespace:
    """A network namespace, held by a descriptor: it lasts until this is closed and the last process has left it."""

    def __init__(self, fd: OwnedFd) -> None:
        self._fd = fd

    @classmethod
    def create(cls) -> Self:
        """A fresh one, with its loopback up. This thread stays where it is.

        Raises:
            KernelError: this process may not create one (see `isolate`).
        """
        before = cls.here()
        try:
            number = _call_unshare(_CLONE_NEWNET)
            if number:
                raise KernelError(
                    f"cannot create a network namespace: {os.strerror(number)}; run as root, or in 'unshare -Urn'",
                    errno=number,
                ) from OSError(number, os.strerror(number))
            fresh = cls.here()
            try:
                ip("link", "set", "lo", "up")
            except LocalmigError:
                fresh.close()
                raise
            finally:
                _move_to(before)
        finally:
            before.close()
        return fresh

    @classmethod
    def here(cls) -> Self:
        """The one this thread is in."""
        return cls(OwnedFd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)))

    @classmethod
    def of_process(cls, pid: int) -> Self:
        """The one a process is in. OSError if there is no such process, or it is not ours to look at."""
        return cls(OwnedFd(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Lets this thread act inside: sockets it opens and programs it starts belong there. Other threads stay."""
        before = NetworkNamespace.here()
        _move_to(self)
        try:
            yield
        finally:
            _move_to(before)
            before.close()

    def start(
        self, argv: Sequence[str], *, stdout: int | IO[Any] | None = None, stderr: int | IO[Any] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a program inside; its output is text."""
        with self.entered():
            return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True)

    def close(self) -> None:
        """Lets go of it. Idempotent."""
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor that holds it, lent."""
        return self._fd.fileno()


def _move_to(namespace: NetworkNamespace) -> None:
    if _libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise KernelError(f"cannot enter a network namespace: {os.strerror(number)}", errno=number)


# -- configuring, in the namespace this thread is in ------------------------------------------------------------


def ip(*arguments: str) -> str:
    """Runs `ip` (iproute2) with these arguments; gives what it printed.

    Raises:
        CommandError: it failed, or is not installed.
    """
    argv = ("ip", *arguments)
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, check=False)
    except FileNotFoundError:
        raise CommandError(argv, "iproute2 is not installed: on Debian, apt-get install iproute2") from None
    if done.returncode != 0:
        raise CommandError(argv, done.stderr)
    return done.stdout


def create_tap(ifname: str) -> None:
    """Makes a persistent TAP with a vnet header, down and without an address. CommandError where it cannot be."""
    ip("tuntap", "add", ifname, "mode", "tap", "vnet_hdr")


def configure(
    ifname: str,
    *,
    address: str | None = None,
    mac: str | None = None,
    mtu: int | None = None,
    neighbors: Mapping[str, str] | None = None,
) -> None:
    """Sets what is given, keeps IPv6 off the interface and brings it up.

    IPv6 talks by itself (router solicitations, duplicate address detection): without it every packet is a test's own.

    Args:
        ifname: the interface.
        address: IPv4 address with prefix length, as `10.9.0.1/24`.
        mac: its own Ethernet address.
        mtu: in bytes.
        neighbors: Ethernet addresses of peers by IPv4 address, so that no ARP is spoken and none can be lost.

    Raises:
        CommandError: `ip` refused one of them; those before it are set.
    """
    _write_sysctl(f"ipv6/conf/{ifname}/disable_ipv6", "1")
    if mac is not None:
        ip("link", "set", ifname, "address", mac)
    if mtu is not None:
        ip("link", "set", ifname, "mtu", str(mtu))
    if address is not None:
        ip("address", "add", address, "dev", ifname)
    ip("link", "set", ifname, "up")
    for peer, peer_mac in (neighbors or {}).items():
        ip("neighbor", "replace", peer, "lladdr", peer_mac, "dev", ifname, "nud", "permanent")


def _write_sysctl(name: str, value: str) -> None:
    # A kernel without IPv6 has no such file, and nothing to keep quiet.
    path = Path("/proc/sys/net", name)
    if path.exists():
        path.write_text(value)


def link(ifname: str) -> dict[str, Any]:
    """What `ip -json -s -s link show` tells about an interface. CommandError if there is no such interface."""
    (facts,) = json.loads(ip("-json", "-s", "-s", "link", "show", "dev", ifname))
    assert isinstance(facts, dict), facts
    return facts


def carrier_changes(ifname: str) -> int:
    """How often the interface's link went up or down since it was made: a reconnect shows here."""
    changes = link(ifname)["stats64"]["tx"]["carrier_changes"]
    assert isinstance(changes, int), changes
    return changes


def main(argv: Sequence[str]) -> int:
    """Runs `argv` in fresh namespaces; with nothing to run, tries whether a TAP can be made there."""
    try:
        isolate()
        if argv:
            os.execvp(argv[0], list(argv))
        create_tap("tap0")
    except (LocalmigError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
