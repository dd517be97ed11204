"""The lab without localmig: where these fail, the machine or the lab is at fault."""

from __future__ import annotations

import random

from tests.guest.lab import Lab, tap_netdev


def test_a_guest_on_a_plain_tap_boots_and_echoes_what_it_is_sent(lab: Lab) -> None:
    lab.add_tap()
    lab.set_up()
    guest = lab.boot_qemu(tap_netdev())
    guest.wait_ready()
    data = random.Random(0).randbytes(1_000_000)
    assert guest.echo(data) == data
    assert guest.run("uname -s") == "Linux\n"
