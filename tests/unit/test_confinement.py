"""What a process gives up: each call that is forbidden, and what goes on working. In processes of their own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from localmig.confinement import RunAs, Sandbox
from localmig.errors import ConfigError
from localmig.options import RunAsSpec, SandboxSpec

X86_64_CALLS = {
    "ptrace": 101,
    "personality": 135,
    "syslog": 103,
    "setuid": 105,
    "setgroups": 116,
    "setresuid": 117,
    "pivot_root": 155,
    "chroot": 161,
    "settimeofday": 164,
    "mount": 165,
    "umount2": 166,
    "swapon": 167,
    "reboot": 169,
    "iopl": 172,
    "init_module": 175,
    "clock_settime": 227,
    "kexec_load": 246,
    "add_key": 248,
    "keyctl": 250,
    "unshare": 272,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "finit_module": 313,
    "kexec_file_load": 320,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
}


def in_sandbox(code: str, *, spec: str = "SandboxSpec()") -> Any:
    """What `code` leaves in `found`, run by a process whose sandbox is closed."""
    program = f"""
import ctypes, errno, json, os, signal, socket, subprocess, threading
from localmig.confinement import Sandbox
from localmig.options import SandboxSpec
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    libc.syscall(number, *map(ctypes.c_ulong, arguments))
    return errno.errorcode.get(ctypes.get_errno(), "")
def errno_of(what):
    try:
        what()
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""
sandbox = Sandbox({spec})
sandbox.close()
{textwrap.dedent(code)}
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are x86-64's")
def test_each_call_that_no_daemon_needs_fails_and_kills_nobody() -> None:
    numbers = json.dumps(X86_64_CALLS)
    # All arguments are bad as well: nothing would happen without the sandbox either.
    found = in_sandbox(f"found = {{name: call(number, 2**64 - 1) for name, number in {numbers}.items()}}")
    assert found == dict.fromkeys(X86_64_CALLS, "EPERM")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are x86-64's")
def test_calls_that_no_filter_can_read_are_as_on_a_kernel_without_them() -> None:
    assert in_sandbox("found = [call(435, 0, 0), call(0x40000000 | 101, 0)]") == ["ENOSYS", "ENOSYS"]


def test_sockets_are_of_the_families_that_a_daemon_has_a_use_for() -> None:
    found = in_sandbox(
        """
        families = "AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_PACKET AF_VSOCK AF_ALG".split()
        kinds = {"AF_NETLINK": socket.SOCK_RAW, "AF_PACKET": socket.SOCK_RAW, "AF_ALG": socket.SOCK_SEQPACKET}
        found = {
            name: errno_of(lambda: socket.socket(getattr(socket, name), kinds.get(name, socket.SOCK_STREAM)).close())
            for name in families
        }
        """
    )
    forbidden = dict.fromkeys(("AF_PACKET", "AF_VSOCK", "AF_ALG"), "EPERM")
    allowed = dict.fromkeys(("AF_UNIX", "AF_INET", "AF_NETLINK"), "")
    # A machine may have no IPv6.
    assert found.pop("AF_INET6") in ("", "EAFNOSUPPORT")
    assert found == forbidden | allowed


def test_namespaces_cannot_be_made_and_threads_and_programs_can() -> None:
    found = in_sandbox(
        """
        CLONE_NEWUSER, SYS_clone = 0x10000000, {"x86_64": 56}.get(os.uname().machine, 220)
        told = []
        thread = threading.Thread(target=told.append, args=("thread",))
        thread.start()
        thread.join()
        told.append(subprocess.run(["true"]).returncode)
        found = [call(SYS_clone, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0), *told]
        """
    )
    assert found == ["EPERM", "thread", 0]


@pytest.mark.parametrize("spec", ["SandboxSpec()", "SandboxSpec(spawn=False)"])
def test_past_the_second_step_no_program_can_be_run_and_threads_can(spec: str) -> None:
    found = in_sandbox(
        """
        sandbox.forbid_programs()
        told = []
        thread = threading.Thread(target=told.append, args=("thread",))
        thread.start()
        thread.join()
        found = [
            errno_of(lambda: subprocess.run(["true"])),
            errno_of(os.fork),
            errno_of(lambda: os.execv("/bin/true", ["true"])),
            sandbox.state.spawn,
            *told,
        ]
        """,
        spec=spec,
    )
    assert found == ["EPERM", "EPERM", "EPERM", False, "thread"]


def test_the_operator_may_keep_programs() -> None:
    code = "sandbox.forbid_programs(); found = [subprocess.run(['true']).returncode, sandbox.state.spawn]"
    assert in_sandbox(code, spec="SandboxSpec(spawn=True)") == [0, True]


def test_a_child_can_be_killed_by_its_pidfd_as_fencing_does() -> None:
    found = in_sandbox(
        """
        with subprocess.Popen(["sleep", "60"]) as child:
            signal.pidfd_send_signal(os.pidfd_open(child.pid), signal.SIGKILL)
            found = child.wait()
        """
    )
    assert found == -9


def test_a_kernel_without_filters_is_told_of_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: object = None) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("localmig.dataplane.keep_capabilities", refuse)
    monkeypatch.setattr("localmig.confinement._allow_realtime_priority", lambda: True)
    sandbox = Sandbox(SandboxSpec())
    sandbox.close()
    sandbox.forbid_programs()
    assert not sandbox.state.enabled
    assert sandbox.state.spawn
    assert sandbox.state.reason == "this kernel has no such sandbox: Function not implemented"
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (RunAsSpec(user="nobody-at-all"), "there is no such user on this machine; UID:GID needs no entry"),
        (RunAsSpec(user="root"), "this is root; name another user"),
        (RunAsSpec(user="0", group_id=7), "this is root; name another user"),
        (RunAsSpec(user="65534", group_id=7), "65534 stands for every user of a container"),
    ],
)
def test_a_user_who_cannot_be_is_refused(spec: RunAsSpec, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        RunAs.resolve(spec)


def test_a_user_brings_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "getgrouplist", lambda name, group: [group, 12345])
    found = RunAs.resolve(RunAsSpec(user="daemon"))
    assert (found.user_id, found.group_ids) == (1, (found.group_id, 12345))
    assert RunAs.resolve(RunAsSpec(user="5", group_id=7)) == RunAs(name="5", user_id=5, group_id=7)
