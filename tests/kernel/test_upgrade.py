"""`localmig upgrade` between real daemons with a real TAP: what it does, says and leaves, also where daemons die.

No guest is attached: what happens to packets is the guest tier's. Only the first daemon is started in a namespace of
its own; its successors open nothing, so they need not be there.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.kit.processes import localmig, start_ready

from localmig.testing.namespace import NetworkNamespace, ip, unavailable_reason
from localmig.testing.process import Process, Program

PATIENCE_S = 60
"""For one program to do its part: it takes a second, a machine under load gets much more."""

LOCALMIG = [sys.executable, "-P", "-m", "localmig.cli"]


@pytest.fixture(autouse=True, scope="module")
def _namespace() -> None:
    if reason := unavailable_reason():
        pytest.skip(reason)


class Machine:
    """One QMP path and the daemons behind it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.qmp = directory / "qmp.sock"
        self.started: list[Process] = []

    def start_from_file(self) -> Process:
        """As `start`; a file says what it serves."""
        file = self.directory.parent / "vm.toml"
        file.write_text(
            f"""\
            qmp = "unix:{self.qmp}"
            migration-parameters.downtime-limit = 250
            [[netdev]]
            type = "tap"
            id = "net0"
            [[device]]
            driver = "virtio-net"
            id = "nic0"
            netdev = "net0"
            socket = "{self.directory}/nic0.sock"
            """
        )
        return self._start(["--config", str(file)])

    def start(self, program: Path | None = None) -> Process:
        """The first daemon, in a namespace of its own, ready."""
        options = ["--netdev", "tap,id=net0,ifname=tap0"]
        options += ["--device", f"virtio-net,id=nic0,netdev=net0,socket={self.directory}/nic0.sock"]
        options += ["--qmp", f"unix:{self.qmp}", "--migration-parameter", "downtime-limit=250"]
        return self._start(options, program)

    def _start(self, options: list[str], program: Path | None = None) -> Process:
        def start(module: str, arguments: Sequence[str], **descriptors: Any) -> Process:
            descriptors["pass_fds"] = descriptors.pop("inherited")
            return Program([str(program), *arguments], **descriptors)

        with (
            open(self.directory / "first.log", "wb") as log,
            NetworkNamespace.create() as namespace,
            namespace.entered(),
        ):
            self.started.append(start_ready(options, start=start if program else None, stderr=log.fileno()))
        return self.started[-1]

    def wait_at(self, address: str) -> Process:
        """A daemon that waits for another one, ready."""
        return self._start(["--incoming", address, "--migration-parameter", "local=on", "--qmp", f"unix:{self.qmp}"])

    def localmig(self, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        return localmig(*words, folder=folder)

    def upgrade(self, *options: str) -> tuple[int, dict[str, Any], str]:
        """Exit status, report, stderr."""
        done = self.localmig("upgrade", "--json", str(self.qmp), *options)
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr

    def status(self) -> dict[str, Any]:
        done = self.localmig("status", "--json", str(self.qmp))
        assert done.returncode == 0, done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    def parameters(self) -> dict[str, Any]:
        done = self.localmig("qmp", str(self.qmp), "query-migrate-parameters")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def has_the_operators_parameters(self) -> bool:
        """Whether they are as `start` set them, or at their defaults."""
        operators = {"downtime-limit": 250, "local": False, "record": ""}
        return operators.items() <= self.parameters().items()

    def files(self) -> set[str]:
        return {entry.name for entry in self.directory.iterdir()}

    def program(self, name: str, body: str) -> Path:
        """A `localmig` of our own, that does `body` first."""
        path = self.directory.parent / name
        path.write_text(f"#!{sys.executable} -P\n{textwrap.dedent(body)}")
        path.chmod(0o700)
        return path

    def saboteur(self, name: str, *, phase: str, act: str) -> Path:
        """A `localmig` that does `act` once `phase` of a handover ended."""
        return self.program(
            name,
            f"""\
            import os, signal, sys
            from localmig import trace
            from localmig.cli import main

            emit = trace.Tracer.emit

            def sabotage(tracer, event):
                emit(tracer, event)
                if isinstance(event, trace.PhaseEnded) and event.name == {phase!r}:
                    {act}

            trace.Tracer.emit = sabotage
            sys.exit(main())
            """,
        )

    def stop(self) -> None:
        """Ends whatever of it runs."""
        done = self.localmig("qmp", str(self.qmp), "quit")
        for daemon in self.started:
            if done.returncode != 0:
                daemon.send_signal(signal.SIGKILL)
            daemon.wait(PATIENCE_S)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    directory = tmp_path / "vm"
    directory.mkdir()
    it = Machine(directory)
    yield it
    it.stop()


DIE = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("start", [Machine.start, Machine.start_from_file])
def test_the_new_daemon_serves_at_the_old_path_and_the_old_one_is_gone(
    machine: Machine, start: Callable[[Machine], Process]
) -> None:
    old = start(machine)
    code, report, said = machine.upgrade()
    assert code == 0, said
    assert report["outcome"] == "committed"
    assert report["old-pid"] == old.pid
    assert report["notes"] == []
    assert old.wait(PATIENCE_S) == 0
    facts = machine.status()
    assert facts["pid"] == report["new-pid"]
    assert facts["status"] == "running"
    assert [(each["id"], each["transfers"]) for each in facts["objects"]] == [("net0", True), ("nic0", True)]
    # The operator's settings are the successor's, and nothing of the upgrade is left.
    assert machine.has_the_operators_parameters()
    assert machine.files() == {"qmp.sock", "qmp.sock.log", "nic0.sock", "first.log"}


def test_what_the_host_did_to_the_interface_is_told_by_each_upgrade_and_undone_after_it(machine: Machine) -> None:
    with NetworkNamespace.of_process(machine.start().pid) as namespace, namespace.entered():
        ip("link", "set", "tap0", "name", "tap9")
        ip("link", "set", "tap9", "mtu", "9000", "down")
        for _ in range(2):
            code, report, said = machine.upgrade()
            assert code == 0, said
            renamed, down = report["notes"]
            assert renamed.startswith("netdev 'net0': 'tap0' was renamed to 'tap9': ")
            assert down == "netdev 'net0': 'tap9' is down: ip link set tap9 up"
        ip("link", "del", "tap9")
        for _ in range(2):
            code, report, said = machine.upgrade()
            assert code == 0, said
            (gone,) = report["notes"]
            assert gone == (
                "netdev 'net0': 'tap9' (it was 'tap0' when it was opened) was deleted: make it again and it is "
                f"attached by itself: ip tuntap add dev tap0 mode tap vnet_hdr user {os.geteuid()} && "
                "ip link set tap0 up"
            )
            (netdev,) = machine.status()["netdevs"]
            assert (netdev["interface"], netdev["ifname"]) == ("gone", "tap9")
        ip("tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr")
        ip("link", "set", "tap0", "up")
        code, report, said = machine.upgrade()
        assert (code, report["notes"]) == (0, []), said
        (netdev,) = machine.status()["netdevs"]
        assert (netdev["interface"], netdev["ifname"], netdev["mtu"], netdev["up"]) == ("here", "tap0", 1500, True)


def test_a_daemon_in_another_namespace_sees_the_interface_and_says_that_it_cannot_attach_one(machine: Machine) -> None:
    with NetworkNamespace.of_process(machine.start().pid) as namespace:
        for mtu in (2000, 3000):
            code, report, said = machine.upgrade()
            assert (code, report["notes"]) == (0, []), said
            with namespace.entered():
                ip("link", "set", "tap0", "mtu", str(mtu))
            assert machine.status()["netdevs"][0]["mtu"] == mtu
        with namespace.entered():
            ip("link", "del", "tap0")
            ip("tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr")
        (note,) = machine.status()["netdevs"][0]["notes"]
        assert note == (
            "'tap0' was deleted, and the one made again cannot be attached: it is in another network namespace than "
            "this daemon; hand over to one that is started there"
        )
        with namespace.entered():
            code, report, said = machine.upgrade()
            assert (code, report["notes"]) == (0, []), said
        assert machine.status()["netdevs"][0]["interface"] == "here"


def test_the_report_tells_phases_downtime_and_descriptors(machine: Machine) -> None:
    machine.start()
    code, report, said = machine.upgrade()
    assert code == 0, said
    migration = report["migration"]
    assert migration["status"] == "completed"
    assert migration["local"]["downtime-us"] > 0
    assert migration["local"]["descriptors"] > 0
    assert {"setup", "stop", "ready"} <= {phase["name"] for phase in migration["local"]["phases"]}


def test_what_moved_is_recorded_and_explained(machine: Machine) -> None:
    machine.start()
    done = machine.localmig("upgrade", "qmp.sock", "--record", "moved.stream", folder=machine.directory)
    assert done.returncode == 0, done.stderr
    recording = machine.directory / "moved.stream"
    assert stat.S_IMODE(recording.stat().st_mode) == 0o600
    explained = json.loads(machine.localmig("analyze", "--json", str(recording)).stdout)
    setup, switchover = explained["sections"][:2], explained["sections"][2:]
    assert [section["name"] for section in setup] == ["net0/tap", "nic0/virtio-net"]
    assert "queues" in {section["description"] for section in switchover}
    assert explained["descriptors"] == {"listening-socket": 1, "memory": 1, "netlink": 1, "tap": 1}
    tap = {field["name"]: field for field in explained["sections"][0]["fields"]}
    assert tap["ifname"]["text"] == "tap0"
    # For this upgrade only.
    assert machine.parameters()["record"] == ""


def test_a_recording_that_cannot_be_written_is_a_note_and_no_reason_to_fail(machine: Machine) -> None:
    machine.start()
    code, report, said = machine.upgrade("--record", str(machine.directory / "none/stream"))
    assert code == 0, said
    (note,) = report["notes"]
    assert note.startswith("the stream was not recorded: ")
    assert "No such file or directory" in note
    assert note in said


def test_an_upgrade_can_follow_an_upgrade_also_by_a_relative_path(machine: Machine) -> None:
    machine.start()
    assert machine.upgrade()[0] == 0
    done = machine.localmig("upgrade", "qmp.sock", folder=machine.directory)
    assert done.returncode == 0, done.stderr
    assert "committed: daemon" in done.stdout
    assert "downtime" in done.stdout
    assert "handover: completed" in done.stderr
    assert machine.status()["status"] == "running"


def test_more_options_reach_the_new_daemon(machine: Machine) -> None:
    machine.start()
    trace = machine.directory / "trace"
    assert machine.upgrade("--log", str(machine.directory / "other.log"), "--", "--trace", str(trace), "-v")[0] == 0
    events = [json.loads(line)["event"] for line in trace.read_text().splitlines()]
    assert {"PhaseEnded", "RunStateChanged"} <= set(events)
    assert "RunStateChanged" in (machine.directory / "other.log").read_text()


def test_a_daemon_migrates_to_one_that_waits(machine: Machine) -> None:
    old = machine.start()
    address = f"unix:{machine.directory}/migrate.sock"
    new = machine.wait_at(address)
    done = machine.localmig("migrate", str(machine.qmp), address, "--local", "--downtime-limit", "500")
    assert done.returncode == 0, done.stderr
    assert f"committed: the daemon at {address} serves in place of {old.pid}" in done.stdout
    assert "handover: completed" in done.stderr
    facts = machine.status()
    assert (facts["pid"], facts["status"]) == (new.pid, "running")
    again = machine.localmig("migrate", str(machine.qmp), address, "--local")
    assert again.returncode == 1
    assert "rolled back" in again.stderr
    assert machine.status()["status"] == "running"
    assert old.wait(PATIENCE_S) == 0


def served_on(machine: Machine, old: Process) -> None:
    """The old daemon is as it was, and nothing of the attempt is left."""
    facts = machine.status()
    assert (facts["pid"], facts["status"]) == (old.pid, "running")
    assert machine.has_the_operators_parameters()
    assert machine.files() == {"qmp.sock", "qmp.sock.log", "nic0.sock", "first.log"}


def test_a_program_that_does_not_start_changes_nothing_and_its_words_are_shown(machine: Machine) -> None:
    old = machine.start()
    Path(f"{machine.qmp}.log").write_text("of an earlier upgrade\n")
    broken = machine.program("broken", "import sys; sys.exit('out of order')")
    code, _, said = machine.upgrade("--exec", str(broken))
    assert code == 1
    assert said.endswith("the new daemon did not start, its log ends with:\n  out of order\n")
    served_on(machine, old)


def test_a_program_that_says_nothing_is_not_given_the_words_of_an_earlier_one(machine: Machine) -> None:
    old = machine.start()
    Path(f"{machine.qmp}.log").write_text("of an earlier upgrade\n")
    mute = machine.program("mute", "")
    code, _, said = machine.upgrade("--exec", str(mute))
    assert code == 1
    assert said.endswith("the new daemon did not start\n")
    served_on(machine, old)


def test_a_program_that_is_never_ready_is_given_up_in_time(machine: Machine) -> None:
    old = machine.start()
    idle = machine.program("idle", "import signal; signal.pause()")
    code, _, said = machine.upgrade("--exec", str(idle), "--timeout", "0.3")
    assert code == 1
    assert "the new daemon is not ready after 0.3 s" in said
    served_on(machine, old)


OLDER = """\
    import sys
    from localmig.monitor import schema
    from localmig.monitor.commands import migration

    KNOWN = ("--qmp", "--incoming", "--migration-parameter", "--log", "--ready-fd")
    for word in sys.argv[2:]:
        if word.startswith("--") and word not in KNOWN:
            sys.exit(f"unrecognized arguments: {word}")
    parameters = [each for each in schema.PARAMETERS.members if each.name in ("local", "downtime-limit")]
    object.__setattr__(schema.PARAMETERS, "members", tuple(parameters))
    schema.CAPABILITIES.pop("pause-before-switchover")
    status = [each for each in schema.CAPABILITY_STATUS.members if each.name != "capability"]
    word = schema.Member(name="capability", attribute="capability", type=schema.Enumeration(("events",)))
    object.__setattr__(schema.CAPABILITY_STATUS, "members", (word, *status))

    from localmig.cli import main
    sys.exit(main())
    """
"""A program that has fewer parameters, capabilities and options than this one."""


def test_an_older_program_is_told_nothing_that_stands_at_its_default(machine: Machine) -> None:
    machine.start()
    older = machine.program("older", OLDER)
    code, report, said = machine.upgrade("--exec", str(older))
    assert code == 0, said
    assert report["notes"] == []
    assert machine.parameters() == {"downtime-limit": 250, "local": False}
    # And back to this one.
    code, report, said = machine.upgrade()
    assert (code, report["notes"]) == (0, []), said
    assert machine.has_the_operators_parameters()


def test_what_an_older_program_does_not_take_is_a_note_and_the_rest_is_given_to_it(machine: Machine) -> None:
    machine.start()
    machine.localmig("qmp", str(machine.qmp), "migrate-set-parameters", "announce-rounds=3")
    code, report, said = machine.upgrade("--exec", str(machine.program("older", OLDER)))
    assert code == 0, said
    (note,) = report["notes"]
    assert note.endswith(
        "does not take 'announce-rounds' as it was set before: Parameter 'announce-rounds' is unexpected"
    )
    assert machine.parameters() == {"downtime-limit": 250, "local": False}


def test_an_older_program_that_lacks_what_the_handover_needs_does_not_start(machine: Machine) -> None:
    old = machine.start()
    machine.localmig("qmp", str(machine.qmp), "migrate-set-parameters", "commit-timeout=9000")
    code, _, said = machine.upgrade("--exec", str(machine.program("older", OLDER)))
    assert code == 1
    assert "Parameter 'commit-timeout' is unexpected" in said
    served_on(machine, old)
    assert machine.parameters()["commit-timeout"] == 9000


def test_a_source_that_came_by_a_handover_and_refuses_the_next_one_serves_on(machine: Machine) -> None:
    machine.start()
    code, report, _ = machine.upgrade()
    assert code == 0
    pid = report["new-pid"]
    code, report, said = machine.upgrade("--record", "x" * 5000)
    assert (code, report["outcome"], report["old-pid"]) == (1, "rolled-back", pid), said
    assert report["reason"].startswith("Option record expects a path")
    assert machine.status()["pid"] == pid


def test_a_program_that_is_not_there_is_named(machine: Machine) -> None:
    old = machine.start()
    code, _, said = machine.upgrade("--exec", "/nonexistent/localmig")
    assert (code, said.count("/nonexistent/localmig")) == (1, 1)
    assert machine.status()["pid"] == old.pid


def test_a_new_daemon_that_dies_in_setup_is_rolled_back(machine: Machine) -> None:
    old = machine.start()
    code, report, said = machine.upgrade("--exec", str(machine.saboteur("dies", phase="setup", act=DIE)))
    assert code == 1, said
    assert report["outcome"] == "rolled-back"
    assert report["reason"]
    assert f"rolled back: {report['reason']}" in said
    served_on(machine, old)


def test_an_interrupted_upgrade_is_rolled_back_and_a_hanging_new_daemon_is_ended(machine: Machine) -> None:
    old = machine.start()
    hang = machine.saboteur("hangs", phase="setup", act="os.kill(os.getpid(), signal.SIGSTOP)")
    with subprocess.Popen(
        [*LOCALMIG, "upgrade", "--json", str(machine.qmp), "--exec", str(hang)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as upgrade:
        assert upgrade.stderr is not None
        while "active" not in upgrade.stderr.readline():
            assert upgrade.poll() is None
        upgrade.send_signal(signal.SIGINT)
        report, said = upgrade.communicate(timeout=PATIENCE_S)
    assert upgrade.returncode == 1, said
    assert "interrupted" in said
    assert not Path(f"/proc/{json.loads(report)['new-pid']}").exists()
    served_on(machine, old)


def kill_upgrade(machine: Machine, at: str) -> None:
    """Begins an upgrade and kills it when it says that."""
    with subprocess.Popen(
        [*LOCALMIG, "upgrade", str(machine.qmp)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as upgrade:
        assert upgrade.stderr is not None
        while at not in upgrade.stderr.readline():
            assert upgrade.poll() is None
        upgrade.kill()


def test_an_upgrade_that_is_killed_in_the_middle_leaves_the_new_daemon_alone(machine: Machine) -> None:
    old = machine.start()
    kill_upgrade(machine, at="handover: ")
    # Nobody is left to end it, and nobody could: the new one has its QMP socket.
    assert old.wait(PATIENCE_S) == 0
    facts = machine.status()
    assert facts["pid"] != old.pid
    assert facts["status"] == "running"


def test_a_new_daemon_that_a_killed_upgrade_left_is_named_and_can_be_ended(machine: Machine) -> None:
    old = machine.start()
    left = machine.wait_at(f"unix:{machine.directory}/migrate.sock")
    code, _, said = machine.upgrade()
    assert code == 1
    assert f"end it with 'kill {left.pid}'" in said
    left.send_signal(signal.SIGTERM)
    assert left.wait(PATIENCE_S) == 0
    code, report, said = machine.upgrade()
    assert (code, report["old-pid"]) == (0, old.pid), said


def test_a_terminal_that_is_closed_in_the_middle_stops_neither_the_upgrade_nor_a_daemon(machine: Machine) -> None:
    old = machine.start()
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["setsid", "--ctty", *LOCALMIG, "upgrade", str(machine.qmp)], stdin=theirs, stdout=theirs, stderr=theirs
    ) as upgrade:
        os.close(theirs)
        said = b""
        while b"handover: active" not in said:
            said += os.read(ours, 4096)
        os.close(ours)
        assert upgrade.wait(PATIENCE_S) == 0
    assert old.wait(PATIENCE_S) == 0
    facts = machine.status()
    assert facts["status"] == "running"
    os.kill(facts["pid"], signal.SIGHUP)
    assert machine.status()["pid"] == facts["pid"]
    assert machine.has_the_operators_parameters()


def test_the_log_of_a_new_daemon_can_be_moved_away(machine: Machine) -> None:
    machine.start()
    _, report, _ = machine.upgrade()
    log = Path(f"{machine.qmp}.log")
    log.rename(f"{log}.1")
    os.kill(report["new-pid"], signal.SIGHUP)
    machine.status()
    assert "opened" in log.read_text()
    assert Path(f"/proc/{report['new-pid']}/fd/2").readlink() == log


def test_an_old_daemon_that_dies_in_the_middle_is_succeeded_all_the_same(machine: Machine) -> None:
    old = machine.start(machine.saboteur("old", phase="setup-ack", act=DIE))
    code, report, said = machine.upgrade()
    assert code == 0, said
    assert report["outcome"] == "committed"
    assert f"daemon {old.pid} died during the handover" in report["notes"]
    facts = machine.status()
    assert (facts["pid"], facts["status"]) == (report["new-pid"], "running")


def test_where_both_daemons_die_the_outcome_is_unknown(machine: Machine) -> None:
    old = machine.start()
    act = f"os.kill({old.pid}, signal.SIGKILL); {DIE}"
    code, report, said = machine.upgrade("--exec", str(machine.saboteur("murderer", phase="setup", act=act)))
    assert code == 3, said
    assert report["outcome"] == "unknown"
    assert f"the old daemon {old.pid} is gone" in said
    assert f"the new daemon {report['new-pid']} is gone" in said


def test_a_daemon_without_a_guest_to_hand_over_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    done = machine.localmig("upgrade", str(tmp_path / "nothing.sock"))
    assert done.returncode == 1
    assert "no daemon answers at" in done.stderr
