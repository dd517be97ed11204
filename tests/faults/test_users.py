"""Users: a daemon that was root, one that never was, strangers, and what all of them gave up. Real users, real TAPs."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.kit.processes import DaemonProcess, as_user, start_as
from tests.kit.site import Site

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.testing.frontend import NetGuest
from localmig.testing.namespace import NetworkNamespace, unavailable_reason

USER = 4242
OTHER = 4243
"""Users without an entry anywhere, which the kernel does not mind."""

CAP_SYS_RESOURCE = 1 << 24
KEPT = 1 << 23 | 1 << 12 | 1 << 5 | 1 << 3 | 1 << 1 | 1 << 0
"""SYS_NICE, where the limit of real-time priorities cannot be raised; NET_ADMIN, KILL, FOWNER, DAC_OVERRIDE and CHOWN
(linux/capability.h)."""

PATIENCE_S = 60


@pytest.fixture
def site() -> Iterator[Site]:
    """A site whose folder belongs to USER, and which others may look into."""
    if reason := unavailable_reason():
        pytest.skip(f"needs network namespaces: {reason}")
    if os.geteuid() != 0 or Path("/proc/self/uid_map").read_text().split()[2] == "1":
        pytest.skip("needs root, and other users to become")
    with ExitStack() as ends:
        folder = Path(tempfile.mkdtemp(prefix="u"))
        ends.callback(shutil.rmtree, folder)
        os.chown(folder, USER, USER)
        folder.chmod(0o755)
        namespace = ends.enter_context(NetworkNamespace.create())
        yield Site(folder, namespace, ends)


def status(daemon: DaemonProcess) -> list[dict[str, str]]:
    """What the kernel tells of each thread of a daemon."""
    return [status_of(f"{daemon.pid}/task/{task.name}") for task in Path(f"/proc/{daemon.pid}/task").iterdir()]


def status_of(process: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())


def localmig(user: int, *words: str, tun_mode: int = 0o666) -> subprocess.CompletedProcess[str]:
    """The program, as that user."""
    return subprocess.run(
        [*as_user(user, tun_mode=tun_mode), sys.executable, "-P", "-m", "localmig.cli", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def wait_successor(done: subprocess.CompletedProcess[str]) -> None:
    """Waits for the end of the daemon that an upgrade started, which is nobody's child here."""
    with (
        contextlib.suppress(ProcessLookupError),
        OwnedFd(os.pidfd_open(int(done.stdout.partition("daemon ")[2].split()[0]))) as pidfd,
    ):
        poll = select.poll()
        poll.register(pidfd.fileno(), select.POLLIN)
        assert poll.poll(PATIENCE_S * 1000)


def hand_over(site: Site, source: DaemonProcess, destination: DaemonProcess) -> None:
    source.execute("migrate", uri=site.address)
    assert source.wait_migration()["status"] == "completed"
    destination.wait_event("RunStateChanged", state="running")
    assert source.quit() == 0


def test_a_tap_that_root_opened_goes_from_user_to_user_and_through_an_upgrade(site: Site) -> None:
    first = site.source(*site.objects(), "--runas", f"{USER}:{USER}", start=start_as(0))
    for thread in status(first):
        assert thread["Uid"].split() == thread["Gid"].split() == [str(USER)] * 4
        assert thread["Groups"].split() == []
        assert {int(thread[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {0}
    if int(status_of("self")["CapEff"], 16) & CAP_SYS_RESOURCE:
        assert "Max realtime priority     1 " in Path(f"/proc/{first.pid}/limits").read_text()
    assert {path.stat().st_uid for path in site.folder.iterdir() if path.is_socket()} == {USER}
    site.attach()
    pinger = site.pinger()
    second = site.destination(start=start_as(USER))
    hand_over(site, first, second)
    third = site.destination("--runas", f"{USER}:{USER}", start=start_as(0))
    hand_over(site, second, third)
    assert {thread["Uid"] for thread in status(third)} == {"\t".join(["", *[str(USER)] * 4])}
    assert third.qmp is not None
    done = localmig(USER, "upgrade", str(third.qmp))
    assert done.returncode == 0, done.stderr
    report = pinger.stop()
    assert (report.lost, report.sent > 0) == (0, True)
    assert site.ping().lost == 0
    third.execute("quit")
    wait_successor(done)
    assert [path.name for path in site.folder.iterdir() if path.is_socket()] == []


def test_a_daemon_that_changed_its_user_upgrades_as_that_user(site: Site) -> None:
    first = site.source(*site.objects(), "--runas", f"{USER}:{USER}", start=start_as(0))
    site.attach()
    assert first.qmp is not None
    done = localmig(USER, "upgrade", str(first.qmp))
    assert done.returncode == 0, done.stderr
    assert first.wait() == 0
    assert site.ping().lost == 0
    first.execute("quit")
    wait_successor(done)


def test_a_daemon_without_privileges_is_given_interfaces_that_were_made_for_its_user(site: Site) -> None:
    daemon = site.source(*site.objects(), "--runas", f"{USER}:{USER}", start=start_as(0))
    (served,) = daemon.execute("query-netdevs")
    with pytest.raises(PeerError, match=f"do it with CAP_NET_ADMIN: ip link set {served['ifname']} down"):
        daemon.execute("set_link", name=served["id"], up=False)
    for word in ("made", "up"):  # each refusal says what root is to do
        with pytest.raises(PeerError, match=f"{word} beforehand: ip ") as caught:
            daemon.execute("netdev_add", type="tap", id="late", ifname="late0")
        with site.namespace.entered():
            subprocess.run(str(caught.value).partition("beforehand: ")[2].split(), check=True)
    daemon.execute("netdev_add", type="tap", id="late", ifname="late0")
    path = site.folder / "late.sock"
    daemon.execute("device_add", driver="virtio-net", id="nic7", netdev="late", socket=str(path))
    assert path.stat().st_uid == USER
    with NetGuest(str(path)) as guest:
        guest.attach()
    daemon.execute("device_del", id="nic7")
    daemon.execute("netdev_del", id="late")
    assert [each["id"] for each in daemon.execute("query-netdevs")] == [served["id"]]


def test_a_log_that_root_opened_goes_on_where_the_user_may_not_open_it_again(site: Site) -> None:
    folder = site.folder / "log"
    folder.mkdir()
    log = folder / "vm.log"
    daemon = site.source(*site.objects(), "--runas", f"{USER}:{USER}", "--log", str(log), start=start_as(0))
    log.rename(f"{log}.1")
    daemon.send_signal(signal.SIGHUP)
    daemon.execute("query-status")
    old = Path(f"{log}.1").read_text()
    assert f"--log {log}: Permission denied; lines go on into '{log}.1': let user id {USER} write to '{log}'" in old
    # What logrotate's `create` does.
    log.touch()
    os.chown(log, USER, USER)
    daemon.send_signal(signal.SIGHUP)
    daemon.execute("query-status")
    assert f"opened {log} again" in log.read_text()


@dataclass(frozen=True, kw_only=True)
class Taking:
    """A daemon of USER that wants a socket at `path`."""

    path: Path
    user: int
    options: tuple[str, ...]


def takings(site: Site) -> list[Taking]:
    """One for each kind of socket that a daemon listens at."""
    other = site.folder / "other"
    objects = ("--netdev", "tap,id=net0", "--device", f"virtio-net,id=nic0,netdev=net0,socket={site.socket}")
    return [
        Taking(path=other, user=USER, options=(*objects, "--qmp", f"unix:{other}")),
        Taking(path=other, user=USER, options=("--incoming", f"unix:{other}")),
        Taking(path=site.socket, user=0, options=(*objects, "--runas", f"{USER}:{USER}")),
    ]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["qmp", "migration", "device"])
def test_a_socket_of_another_user_is_stale_or_in_use_as_it_really_is(site: Site, kind: int) -> None:
    taking = takings(site)[kind]

    def refusal() -> str:
        with site.namespace.entered():
            done = localmig(taking.user, "run", *taking.options)
        assert done.returncode == 1
        return done.stderr

    path, names = taking.path, f"socket '{taking.path}'"
    with site.namespace.entered(), socket.socket(socket.AF_UNIX) as held:
        # As a path that was claimed by a rename: the name that it was bound by is another one.
        held.bind(f"{path}.incoming")
        Path(f"{path}.incoming").rename(path)
        path.chmod(0o600)
        assert f"{names} is in use by a living process of user 'root': end it" in refusal()
    stale = f"{names} of user 'root' is stale, no process of this network namespace has it; remove it as that user"
    assert stale in refusal()
    assert path.is_socket()
    # One that lets everybody see that its process is dead is replaced, where the directory is ours,
    path.chmod(0o666)
    site.folder.chmod(0o1777)
    os.chown(site.folder, 0, 0)
    # and named where it cannot be.
    assert f"{names} was left by a dead process of user 'root' and cannot be removed" in refusal()


def test_whoever_may_not_ask_a_daemon_is_told_who_may(site: Site) -> None:
    daemon = site.source()
    done = localmig(OTHER, "status", str(daemon.qmp))
    assert done.returncode == 1
    assert "Permission denied; be root or the daemon's user, which lets others in by --allow-user" in done.stderr


def test_a_directory_that_the_user_may_not_write_to_is_named(site: Site) -> None:
    os.chown(site.folder, 0, 0)
    done = localmig(USER, "run", "--incoming", f"unix:{site.folder}/m")
    assert "Permission denied; this process's user must be able to write to its directory" in done.stderr


def connected_as(user: int, path: Path) -> socket.socket:
    """A connection of a process of that user."""
    ours, theirs = socket.socketpair()
    code = (
        "import socket, sys; c = socket.socket(socket.AF_UNIX); c.connect(sys.argv[1]);"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b' '], [c.fileno()])"
    )
    with ours, theirs:
        subprocess.run(
            [*as_user(user), sys.executable, "-c", code, str(path), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            timeout=PATIENCE_S,
            check=True,
        )
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    connection = socket.socket(fileno=fd)
    connection.settimeout(PATIENCE_S)
    return connection


def test_a_stranger_is_turned_away_at_both_sockets_and_the_daemon_waits_on(site: Site) -> None:
    source = site.source(*site.objects())
    site.attach()
    destination = site.destination("--socket-mode", "0666")
    assert destination.qmp is not None
    for path in (destination.qmp, Path(site.address.removeprefix("unix:"))):
        with connected_as(OTHER, path) as stranger:
            assert stranger.recv(1) == b""
    hand_over(site, source, destination)
    assert site.ping().lost == 0


def test_users_who_list_each_other_hand_over_and_others_do_not(site: Site) -> None:
    source = site.source(*site.objects(), "--runas", f"{USER}:{USER}", "--allow-user", str(OTHER), start=start_as(0))
    site.attach()
    site.folder.chmod(0o777)
    stranger = site.destination("--socket-mode", "0666", start=start_as(OTHER))
    source.execute("migrate", uri=site.address)
    # It lets nobody in but root and its own user, so the channel ends before it says anything.
    assert source.wait_migration()["status"] == "failed"
    assert stranger.is_alive
    listed = site.destination("--socket-mode", "0666", "--allow-user", str(USER), start=start_as(OTHER))
    hand_over(site, source, listed)
    assert site.ping().lost == 0


def test_a_source_hands_over_to_no_listener_of_a_user_it_does_not_list(site: Site) -> None:
    source = site.source(*site.objects())
    site.attach()
    site.folder.chmod(0o777)
    destination = site.destination("--socket-mode", "0666", start=start_as(OTHER))
    source.execute("migrate", uri=site.address)
    info = source.wait_migration()
    assert info["status"] == "failed"
    assert f"has user id {OTHER}, here only 0 may: --allow-user lists others" in info["error-desc"]
    assert destination.is_alive
    assert site.ping().lost == 0


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (0o666, "Operation not permitted; run with CAP_NET_ADMIN, or have it made beforehand"),
        (0o600, "cannot open /dev/net/tun: Permission denied; give this user access to it"),
    ],
)
def test_a_daemon_of_a_user_says_what_it_cannot_open(site: Site, mode: int, said: str) -> None:
    with site.namespace.entered():
        done = localmig(USER, "run", *site.objects(), tun_mode=mode)
    assert done.returncode == 1
    assert said in done.stderr
    assert list(site.folder.iterdir()) == []


def test_a_user_whom_nobody_can_become_is_refused(site: Site) -> None:
    done = localmig(OTHER, "run", "--runas", f"{USER}:{USER}", *site.objects())
    assert done.returncode == 1
    assert f"this process has user id {OTHER} and cannot become {USER}: start it as root" in done.stderr


def test_all_threads_of_a_daemon_are_in_the_sandbox_which_the_operator_can_see(site: Site) -> None:
    source = site.source(*site.objects())
    site.attach()
    threads = status(source)
    assert len(threads) > 1
    for thread in threads:
        assert (thread["NoNewPrivs"].strip(), thread["Seccomp"].strip()) == ("1", "2")
        assert capabilities(thread) & ~KEPT == 0
    assert source.execute("query-security")["sandbox"] == {"option": "on", "enabled": True, "spawn": False}
    destination = site.destination()
    assert source.execute("query-security") | {"sandbox": None} == destination.execute("query-security") | {
        "sandbox": None
    }
    assert destination.execute("query-security")["sandbox"]["spawn"]
    hand_over(site, source, destination)
    # Which scripts came with the TAP was not known before; its own end of the migration it tells a moment later.
    destination.wait_event("MigrationStatusChanged", status="completed")
    assert not destination.execute("query-security")["sandbox"]["spawn"]
    assert {thread["Seccomp"].strip() for thread in status(destination)} == {"2"}


def test_a_downscript_is_run_in_the_sandbox_by_whoever_serves_last(site: Site) -> None:
    script, told = site.folder / "down", site.folder / "told"
    script.write_text(f"#!/bin/sh\ngrep -E 'NoNewPrivs|Seccomp:' /proc/self/status > {told}; ip link set $1 down\n")
    script.chmod(0o755)
    source = site.source(*site.objects(netdev=f",downscript={script}"))
    destination = site.destination()
    hand_over(site, source, destination)
    assert destination.execute("query-security")["sandbox"] == {"option": "on", "enabled": True, "spawn": True}
    assert destination.quit() == 0
    assert told.read_text().split() == ["NoNewPrivs:", "1", "Seccomp:", "2"]


def test_a_sandbox_that_is_off_leaves_everything(site: Site) -> None:
    (thread, *_) = status(site.source(*site.objects(), "--sandbox", "off"))
    assert (thread["NoNewPrivs"].strip(), thread["Seccomp"].strip()) == ("0", "0")
    assert capabilities(thread) == capabilities(status_of("self"))


def capabilities(thread: dict[str, str]) -> int:
    return int(thread["CapEff"], 16)


def test_a_destination_that_its_source_may_not_kill_keeps_the_guest_when_it_wakes_up(site: Site) -> None:
    source = site.source(*site.objects(), "--runas", f"{USER}:{USER}", "--allow-user", str(OTHER), start=start_as(0))
    site.attach()
    site.folder.chmod(0o777)
    source.execute("migrate-set-parameters", commit_timeout=100)
    destination = site.destination(
        "--socket-mode", "0666", "--allow-user", str(USER), start=start_as(OTHER), fault="after-receive:COMMIT=stop"
    )
    source.execute("migrate", uri=site.address)
    info = source.wait_migration()
    assert info["status"] == "completed"
    assert "cannot be killed: look whether it serves" in info["local"]["note"]
    assert source.execute("query-status") == {"status": "postmigrate", "running": False}
    destination.wait_stopped()
    assert site.ping(20).received == 0
    destination.send_signal(signal.SIGCONT)
    destination.wait_event("RunStateChanged", state="running")
    assert site.ping().lost == 0
    assert source.quit() == 0
    assert site.ping().lost == 0
