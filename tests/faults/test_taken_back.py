"""A destination that dies past COMMIT has done something already; the source that takes its guests back undoes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.faults.test_handover_processes import assert_undisturbed, hand_over

if TYPE_CHECKING:
    from tests.kit.site import Site


@pytest.mark.parametrize(("local", "device"), [(True, ""), (True, ",local-migration=off"), (False, "")])
def test_a_source_that_took_a_guest_back_is_found_by_the_next_frontend(site: Site, local: bool, device: str) -> None:
    source, destination = (
        site.source(*site.objects(device=device), local=local),
        site.destination(local=local, fault="before-send:DONE=kill"),
    )
    guest = site.attach()
    info = hand_over(site, source, destination)
    assert info["error-desc"] == "the destination died after COMMIT: this daemon serves again"
    assert site.ping().lost == 0
    assert guest.stop()["reason"] is None
    site.attach()
    assert_undisturbed(site)


def test_a_nic_that_stays_home_is_served_also_where_the_source_lets_go_late(site: Site) -> None:
    objects = site.objects(device=",local-migration=off")
    # The source has not heard whether the destination serves, and holds the TAP until it is sure.
    source, destination = site.source(*objects), site.destination(fault="before-send:DONE=raise")
    site.attach(reconnect_ms=100)
    assert hand_over(site, source, destination)["status"] == "completed"
    assert site.guest is not None
    site.guest.wait_for("reconnected", 20)
    site.address_tap()
    assert site.ping().lost == 0
