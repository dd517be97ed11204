"""A real guest keeps talking while the QEMU that runs it is replaced by another one."""

from __future__ import annotations

import os
import re
import signal
from typing import Any, Final

import pytest
from tests.guest.lab import Lab
from tests.guest.service import Service, converse
from tests.guest.vmm import (
    KINDS,
    MOVE_SECONDS_MAX,
    Kind,
    Vmm,
    begin_migration,
    migration_ended,
    monitor,
    report_in,
    undisturbed,
)

from localmig.testing.qemu import MEMORY_BYTES, vhost_user_netdev

MOVES: Final = int(os.environ.get("LOCALMIG_VMM_MOVES", "1"))
"""In a row, for each kind of move. `make vmm` wants ten, and every shape of NIC with every kind."""

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "split": {},
    "packed": {"packed": True},
    "two-pairs": {"queue_pairs": 2},
    "with-state": {},
}

OPTIONS: Final = {"packed": ",packed=on", "with-state": ",device-state=on"}
"""Of the device, for some shapes. QEMU from 10.0 on takes the NIC's state along where that is on."""


def shapes_of(kind: str) -> list[str]:
    if MOVES > 1:
        return list(SHAPES)
    # One shape for each kind, and each shape with one.
    return {"copy-newer": ["packed", "with-state"], "shared-older": ["two-pairs"]}.get(kind, ["split"])


@pytest.mark.alone
@pytest.mark.timeout(120 + 60 * MOVES)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [pytest.param(KINDS[kind], shape, id=f"{kind}-{shape}") for kind in KINDS for shape in shapes_of(kind)],
)
def test_moves_lose_no_packet_and_change_no_link(lab: Lab, kind: Kind, shape: str) -> None:
    service = Service(lab)
    nic = SHAPES[shape]
    service.start(*service.objects(device=OPTIONS.get(shape, ""), netdev=f",queues={nic.get('queue_pairs', 1)}"))
    lab.set_up("tap0")
    vmm = Vmm(lab, kind)
    guest = vmm.boot(service, **nic)
    guest.wait_ready()
    with undisturbed(lab, service, guest) as transfer:
        for _ in range(MOVES):
            report = vmm.move()
            assert report["outcome"] == "committed"
            assert report["way"] == kind.way
            transfer.wait_progress(500_000)


FAILURES: Final = {
    "killed-at-its-start": ("starts, way", signal.SIGKILL, "the new QEMU"),
    "killed-while-memory-moves": ("migration: active", signal.SIGKILL, "the migration failed"),
    "interrupted-at-the-setup": ("migration: setup", signal.SIGINT, "interrupted"),
    "interrupted-while-memory-moves": ("migration: active", signal.SIGINT, "interrupted"),
}


def failures_of(kind: str) -> list[str]:
    if MOVES > 1:
        return list(FAILURES)
    return {"copy-older": ["killed-while-memory-moves"], "shared-newer": ["interrupted-while-memory-moves"]}[kind]


@pytest.mark.alone
@pytest.mark.parametrize(
    ("kind", "at", "number", "reason"),
    [
        pytest.param(KINDS[kind], *FAILURES[failure], id=f"{failure}-{kind}")
        for kind in ("copy-older", "shared-newer")
        for failure in failures_of(kind)
    ],
)
def test_a_move_that_fails_leaves_the_guest_where_it_is(
    lab: Lab, kind: Kind, at: str, number: signal.Signals, reason: str
) -> None:
    service = Service(lab)
    service.start(*service.objects())
    lab.set_up("tap0")
    vmm = Vmm(lab, kind)
    guest = vmm.boot(service)
    guest.wait_ready()
    with undisturbed(lab, service, guest) as transfer:
        move = vmm.start_move()
        started = move.wait_for("starts, way", seconds_max=MOVE_SECONDS_MAX)
        (new_pid,) = map(int, re.findall(r"QEMU (\d+) starts", started))
        move.wait_for(at, seconds_max=MOVE_SECONDS_MAX)
        # Stopped, the new QEMU cannot take the guest before the signal comes.
        os.kill(new_pid, signal.SIGSTOP)
        os.kill(new_pid if number == signal.SIGKILL else move.pid, number)
        assert move.wait(seconds_max=MOVE_SECONDS_MAX) == 1
        move.stop()
        report = report_in(move.log.read_text())
        assert report["outcome"] == "rolled-back"
        assert reason in report["reason"]
        transfer.wait_progress(500_000)
        # Nothing of the attempt is in the way of the next one.
        assert vmm.move()["outcome"] == "committed"


def test_a_copy_into_the_guests_own_memory_is_refused(lab: Lab) -> None:
    service = Service(lab)
    service.start(*service.objects())
    lab.set_up("tap0")
    vmm = Vmm(lab, KINDS["shared-older"])
    guest = vmm.boot(service)
    guest.wait_ready()
    move = vmm.start_move("--way", "copy")
    assert move.wait(seconds_max=MOVE_SECONDS_MAX) == 1
    move.stop()
    assert "would write old pages over the running guest" in move.log.read_text()
    other = f"memory-backend-file,id=ram0,size={MEMORY_BYTES},mem-path={vmm.memory}2,share=on"
    assert vmm.move("--way", "copy", "--", "-object", other)["way"] == "copy"
    assert guest.run("echo alive") == "alive\n"


@pytest.mark.alone
def test_a_vmm_that_goes_on_after_its_guest_moved_is_not_served(lab: Lab) -> None:
    service = Service(lab)
    service.start(*service.objects())
    lab.set_up("tap0")
    vmm = Vmm(lab, KINDS["copy-older"])
    guest = vmm.boot(service)
    guest.wait_ready()
    arrived_qmp = lab.folder / "arrived.sock"
    netdev = vhost_user_netdev(service.socket)
    arrived = lab.boot_qemu(netdev, more=["-qmp", f"unix:{arrived_qmp},server=on,wait=off", "-incoming", "defer"])

    async def go_on_twice() -> None:
        async with monitor(vmm.qmp) as source, monitor(arrived_qmp) as destination:
            uri = f"unix:{lab.folder / 'migrate.sock'}"
            await destination.execute("migrate-incoming", {"uri": uri})
            with source.listener("MIGRATION") as events:
                await begin_migration(source, uri)
                assert await migration_ended(events) == "completed"
            # An operator's mistake: the guest runs in the other one.
            await source.execute("cont")

    with undisturbed(lab, service, guest):
        converse(go_on_twice())
        roles = {session["pid"]: session["role"] for session in service.nic()["sessions"]}
        assert roles == {guest.process.pid: "held", arrived.process.pid: "owns"}
