"""What docs/devices.md says of a real guest: QEMU takes these options, and Linux reads from the device."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import ROOT
from tests.examples.conftest import EXAMPLES, found, install
from tests.guest.lab import Lab, tap_netdev
from tests.kit.processes import DaemonProcess

READ = "dd if=/dev/hwrng bs=16 count=1 2>/dev/null | sha256sum"


def test_a_linux_guest_draws_from_the_example_before_and_after_a_handover(lab: Lab, tmp_path: Path) -> None:
    page = (ROOT / "docs/devices.md").read_text()
    options = re.search(r"(-chardev) (\S+) \\\n +(-device) (vhost-user-rng-pci\S+)\n", page)
    assert options is not None
    # vectors=0: QEMU 7.2 under TCG crashes with MSI-X and a vhost-user backend.
    rng = [*(option.replace("/run/vm1", str(lab.folder)) for option in options.groups()[:3]), f"{options[4]},vectors=0"]
    install(tmp_path, EXAMPLES / "virtio-rng")
    lab.add_tap()
    lab.set_up()
    migrate = f"unix:{lab.folder}/migrate.sock"
    incoming = ["--incoming", migrate, "--migration-parameter", "local=on"]
    device = ["--device", f"virtio-rng,id=rng0,socket={lab.folder}/rng0.sock"]
    with (
        found(tmp_path),
        DaemonProcess(device, qmp=lab.folder / "source.qmp") as source,
        DaemonProcess(incoming, qmp=lab.folder / "destination.qmp") as destination,
    ):
        guest = lab.boot_qemu([*tap_netdev(), *rng])
        guest.wait_ready()
        assert guest.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
        before = {guest.run(READ) for _ in range(3)}
        source.execute("migrate-set-parameters", local=True)
        source.execute("migrate", uri=migrate)
        assert source.wait_migration()["status"] == "completed"
        assert destination.wait_migration()["status"] == "completed"
        source.quit()
        after = {guest.run(READ) for _ in range(3)}
        assert len(before | after) == 6
        (shown,) = destination.execute("query-devices")
        assert shown["rings"][0]["counters"]["chains"] > 0
