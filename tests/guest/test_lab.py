"""The lab without localmig: where these fail, the machine or the lab is at fault."""

from __future__ import annotations

from tests.guest.lab import EchoTransfer, Lab, finish_pings, tap_netdev


def test_a_guest_on_a_plain_tap_boots_and_echoes_what_it_is_sent(lab: Lab) -> None:
    lab.add_tap()
    lab.set_up()
    guest = lab.boot_qemu(tap_netdev())
    guest.wait_ready()
    assert guest.run("uname -s") == "Linux\n"
    pinger = lab.start_pinger()
    with EchoTransfer(guest) as transfer:
        transfer.wait_progress(5_000_000)
        stream = transfer.finish()
    pings = finish_pings(pinger)
    assert stream.intact
    assert pings.sent > 0
    assert pings.lost == 0
