"""Daemons that may have 64 descriptors: they serve, hand over and take over what fits, and say what to raise."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
from tests.kit.processes import DaemonProcess

from localmig.testing.frontend import NetGuest
from localmig.testing.process import start_program

if TYPE_CHECKING:
    from tests.kit.site import Site

LIMIT: Final = 64
LOWER: Final = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
os.execv(sys.argv[1], sys.argv[1:])
"""
LIMITED: Final = (sys.executable, "-c", LOWER)


def daemon(site: Site, name: str, *arguments: str, limited: bool) -> DaemonProcess:
    with site.namespace.entered():
        return DaemonProcess(
            [*arguments, "--migration-parameter", "local=on"],
            qmp=site.folder / f"{name}.qmp",
            log=site.folder / f"{name}.log",
            start=partial(start_program, launcher=LIMITED) if limited else None,
        )


@pytest.mark.parametrize(
    ("nics", "limits", "fits"),
    [(2, (True, True), True), (8, (False, True), False)],
    ids=["two-nics-fit", "eight-nics-do-not-fit"],
)
def test_what_fits_moves_and_what_does_not_is_told(
    site: Site, nics: int, limits: tuple[bool, bool], fits: bool
) -> None:
    address = f"unix:{site.folder}/m"
    with ExitStack() as ends:
        objects = []
        for index in range(nics):
            objects += ["--netdev", f"tap,id=net{index}"]
            objects += ["--device", f"virtio-net,id=nic{index},netdev=net{index},socket={site.folder}/{index}"]
        source = ends.enter_context(daemon(site, "source", *objects, limited=limits[0]))
        guests = [ends.enter_context(NetGuest(f"{site.folder}/{index}")) for index in range(nics)]
        for guest in guests:
            guest.attach()
        destination = ends.enter_context(daemon(site, "destination", "--incoming", address, limited=limits[1]))
        source.execute("migrate", uri=address)
        info = source.wait_migration()
        if fits:
            assert info["status"] == "completed", info
            destination.wait_event("MigrationStatusChanged", status="completed")
            serving = destination
        else:
            assert info["status"] == "failed"
            assert f"raise RLIMIT_NOFILE of process {destination.pid}, which is {LIMIT} now" in info["error-desc"]
            assert destination.wait() == 1
            serving = source
        assert serving.execute("query-status")["status"] == "running"
        assert not any(guest.frontend.is_lost() for guest in guests)
