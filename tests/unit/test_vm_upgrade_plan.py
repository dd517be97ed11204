"""Whether a guest can move to a new QEMU, which way, and with which command line."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import pytest

from localmig.cli.vm_upgrade.plan import Plan, Running, Way, Wishes, make
from localmig.errors import ConfigError

MEMFD = "-M q35,memory-backend=ram0,aux-ram-share=on -object memory-backend-memfd,id=ram0,size=256M,share=on"
NAMED = "-M q35,memory-backend=ram0 -object memory-backend-file,id=ram0,size=256M,mem-path=/dev/shm/vm,share=on"
NIC = "-chardev socket,id=c0,path=/run/nic0 -netdev vhost-user,id=n0,chardev=c0 -device virtio-net,id=nic0,netdev=n0"
QMP = "-qmp unix:/run/qemu.sock,server=on,wait=off"

RUNNING = Running(program="/usr/bin/qemu", words=(), version=(11, 1), machine="pc-q35-11.1", run_state="running")
WISHES = Wishes(program="/usr/bin/qemu", version=(11, 1), qmp_socket="/run/qemu.sock")


def plan(
    command: str, *, changes: str = "", without: tuple[str, ...] = (), way: Way | None = None, **facts: Any
) -> Plan:
    wishes = dataclasses.replace(WISHES, changes=shlex.split(changes), without=without, way=way)
    return make(dataclasses.replace(RUNNING, words=shlex.split(command), **facts), wishes)


def refusal(command: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        plan(command, **more)
    return str(refused.value)


@pytest.mark.parametrize(
    ("command", "facts", "way"),
    [
        pytest.param(MEMFD, {}, Way.CPR, id="a-memfd-is-handed-over"),
        pytest.param(MEMFD, {"version": (9, 2)}, Way.COPY, id="an-older-qemu-copies-a-memfd"),
        pytest.param(MEMFD.replace(",aux-ram-share=on", ""), {}, Way.COPY, id="and-one-without-aux-ram-share"),
        pytest.param(NAMED, {}, Way.SHARED, id="a-named-file-is-shared"),
        pytest.param(NAMED, {"folders": frozenset({"/dev/shm/vm"})}, Way.COPY, id="a-file-in-a-folder-has-no-name"),
        pytest.param(NAMED.replace("share=on", "share=off"), {}, Way.COPY, id="a-private-file-is-copied"),
        pytest.param("-M q35 -m 256", {}, Way.COPY, id="anonymous-memory-is-copied"),
    ],
)
def test_the_way_follows_from_the_memory(command: str, facts: dict[str, Any], way: Way) -> None:
    assert plan(f"{command} {QMP}", **facts).way is way


def test_a_copy_into_the_same_named_file_is_refused_and_into_another_one_is_not() -> None:
    said = refusal(f"{NAMED} {QMP}", way=Way.COPY)
    assert "way 'copy' is not open: memory 'ram0' is the file '/dev/shm/vm'" in said
    assert "would write old pages over the running guest" in said
    other = "-object memory-backend-file,id=ram0,size=256M,mem-path=/dev/shm/other,share=on"
    assert plan(f"{NAMED} {QMP}", changes=other).way is Way.COPY
    assert "is to be in another file" in refusal(f"{NAMED} {QMP}", changes=other, way=Way.SHARED)


def test_a_way_that_is_asked_for_and_not_open_is_refused_with_what_it_needs() -> None:
    assert "11.0 does not know it, 10.0" not in refusal(f"{NAMED} {QMP}", way=Way.CPR)
    assert "needs aux-ram-share=on" in refusal(f"{NAMED} {QMP}", way=Way.CPR)
    assert "no memory of it is a named file" in refusal(f"{MEMFD} {QMP}", way=Way.SHARED)
    assert "QEMU 7.2 does not know it, 10.0 is the first" in refusal(f"{MEMFD} {QMP}", way=Way.CPR, version=(7, 2))


def test_the_new_command_line_has_paths_of_its_own_that_get_the_old_names() -> None:
    made = plan(f"{MEMFD} {NIC} {QMP} -pidfile vm.pid -monitor unix:/run/hmp,server,nowait -S -daemonize")
    assert made.qmp_socket == "/run/qemu.sock.moved1"
    assert made.renames == {
        "/run/qemu.sock.moved1": "/run/qemu.sock",
        "vm.pid.moved1": "vm.pid",
        "/run/hmp.moved1": "/run/hmp",
    }
    assert made.resumes
    command = shlex.join(made.argv)
    assert "unix:/run/qemu.sock.moved1,server=on,wait=off" in command
    assert "-pidfile vm.pid.moved1" in command
    assert "-S" not in made.argv
    assert "-daemonize" not in made.argv
    # The NIC is the daemon's, whose socket both connect to.
    assert "socket,id=c0,path=/run/nic0 " in command


def test_a_guest_that_moved_moves_again() -> None:
    again = plan(f"{MEMFD} -qmp unix:/run/qemu.sock.moved1,server=on,wait=off -incoming defer -S")
    assert again.renames == {"/run/qemu.sock.moved2": "/run/qemu.sock"}
    assert "-incoming" not in again.argv


def test_a_listener_does_not_wait_for_a_client() -> None:
    made = plan(f"{MEMFD} {QMP} -chardev socket,id=s,path=/run/s,server=on -serial unix:/run/t,server")
    assert "socket,id=s,path=/run/s.moved1,server=on,wait=off" in made.argv
    assert "unix:/run/t.moved1,server,wait=off" in made.argv


def test_the_machine_is_called_by_its_version() -> None:
    for machine in ("-M q35,accel=kvm", "-machine type=q35,accel=kvm", "-M accel=kvm", ""):
        assert "pc-q35-11.1" in shlex.join(plan(f"{machine} {QMP}").argv)


def test_logs_go_on() -> None:
    argv = plan(f"-M q35 {QMP} -chardev file,id=f,path=/l -chardev stdio,id=s,logfile=/m").argv
    assert "file,id=f,path=/l,append=on" in argv
    assert "stdio,id=s,logfile=/m,logappend=on" in argv


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("-vnc :1", "leave it out with --without vnc"),
        ("-vnc 127.0.0.1:1,password=on", "listens at '127.0.0.1:1'"),
        ("-spice port=5900", "listens at ':5900'"),
        ("-s", "--without s"),
        ("-gdb tcp::1234", "--without gdb"),
        ("-serial telnet:127.0.0.1:4321,server=on,wait=off", "listens at 'telnet:127.0.0.1:4321'"),
        ("-chardev socket,id=t,host=127.0.0.1,port=4444,server=on", "--without chardev:t"),
        ("-netdev user,id=n1,hostfwd=tcp::2222-:22", "forwards a port"),
        ("-nic user,hostfwd=tcp::2222-:22", "forwards a port"),
        ("-netdev tap,id=n1,ifname=tap1", "a second QEMU cannot open"),
        ("-netdev tap,id=n1,fd=7", "a descriptor that whoever started QEMU gave it"),
        ("-add-fd fd=3,set=1", "under libvirt, let libvirt migrate"),
        ("-chardev socket,id=x,fd=5", "is a descriptor"),
        ("-drive file=/dev/fdset/1", "is a descriptor"),
        ("-netdev stream,id=n1,server=on,addr.type=unix,addr.path=/x", "listens"),
        ("-netdev socket,id=n1,listen=:1234", "listens"),
        ("-device vfio-pci,host=01:00.0", "cannot be in two processes"),
        ("-snapshot", "commit them"),
        ("-readconfig /etc/vm.cfg", "options in a file"),
        ("-runas nobody", "what the process may do"),
        ("-display curses", "the terminal"),
        ("-chardev socket,id=c1,path=/v,server=on -netdev vhost-user,id=n1,chardev=c1", "QEMU listens for its backend"),
    ],
)
def test_what_cannot_be_in_two_processes_is_refused_with_what_to_do(option: str, said: str) -> None:
    assert said in refusal(f"{MEMFD} {QMP} {option}")


def test_what_is_refused_may_be_left_out_or_given_anew() -> None:
    listening = "-vnc :1 -chardev socket,id=t,host=127.0.0.1,port=4444,server=on -netdev tap,id=n1"
    made = plan(
        f"{MEMFD} {QMP} {listening}", without=("chardev:t",), changes="-vnc :7 -netdev vhost-user,id=n1,chardev=c0"
    )
    assert ":7" in made.argv
    assert ":1" not in made.argv
    assert "tap,id=n1" not in made.argv


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"devices": ["nic0", "disk7"]}, "device 'disk7' was plugged in later"),
        ({"anonymous_devices": 1}, "it has 1 devices without an id and its command line makes 0"),
        ({"objects": ["ram0", "ram1", "pc.ram"]}, "object 'ram1' was made later"),
        ({"chardevs": ["c0", "compat_monitor0", "late"]}, "character device 'late' was made later"),
        ({"run_state": "postmigrate"}, "its run state is 'postmigrate'"),
        ({"version": (12, 0)}, "is QEMU 11.1, older than the 12.0 that runs"),
    ],
)
def test_what_the_running_qemu_tells_may_be_in_the_way(facts: dict[str, Any], said: str) -> None:
    assert said in refusal(f"{MEMFD} {NIC} {QMP}", **facts)


def test_a_guest_that_qemu_does_not_migrate_may_be_moved_by_its_memorys_descriptor() -> None:
    blocked: dict[str, Any] = {"blocked_reasons": ["the backend lacks LOG_SHMFD"]}
    assert plan(f"{MEMFD} {QMP}", **blocked).way is Way.CPR
    assert "QEMU refuses to migrate this guest: the backend lacks LOG_SHMFD" in refusal(f"{NAMED} {QMP}", **blocked)


def test_every_reason_is_told_at_once() -> None:
    said = refusal(f"{MEMFD} {QMP} -vnc :1 -snapshot", run_state="shutdown")
    assert said.count("\n  - ") == 3


def test_a_socket_that_no_option_opens_is_refused() -> None:
    assert "no option of it opens '/run/qemu.sock'" in refusal(f"{MEMFD} -qmp unix:/elsewhere,server=on")


def test_a_paused_guest_stays_paused() -> None:
    assert not plan(f"{MEMFD} {QMP}", run_state="paused").resumes
