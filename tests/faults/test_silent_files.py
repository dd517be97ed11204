"""A file whose server never answers, which a frontend sends, in a handover."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.test_handover_processes import hand_over
from tests.faults.test_waiting_frames import await_that
from tests.kernel.silent_fuse import SilentFuse

from localmig.testing.frontend import Frontend
from localmig.vhost_user.message import HEADER_SIZE, Request, VringFile, encode_request

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kit.site import Site


def test_it_moves_in_the_middle_of_a_message_and_holds_nobody_up(site: Site, tmp_path: Path) -> None:
    # Before the file is open, because a process that is forked would wait for the server.
    source, destination = site.source(), site.destination()
    folder = tmp_path / "fuse"
    folder.mkdir()
    silent = SilentFuse(folder)
    try:
        with Frontend.connect(str(site.socket)) as frontend:
            request = encode_request(Request.SET_VRING_CALL, VringFile(index=0, has_fd=True))
            frontend.send(request[:HEADER_SIZE], [silent.file])
            await_that(lambda: any(target.endswith("/fuse/file") for target in site.descriptors(source)))
            assert hand_over(site, source, destination)["status"] == "completed"
            frontend.send(request[HEADER_SIZE:])
            assert frontend.get_features()
    finally:
        silent.close()
