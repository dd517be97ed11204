"""Files whose server never answers, wherever a stranger can send one: nobody waits for it."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Final

import pytest
from tests.kernel.silent_fuse import SilentFuse
from tests.kernel.test_virtio_net import PATIENCE_S, Site, beside, frame, run

from localmig import fds
from localmig.errors import PeerError
from localmig.fd_kind import FdKind, is_of_kind
from localmig.fds import OwnedFd, close_foreign
from localmig.migration.channel import FrameBuffer
from localmig.migration.peer import Peer
from localmig.monitor.protocol import Session
from localmig.netdevs import tun
from localmig.testing.frontend import RX
from localmig.vhost_user.message import ProtocolFeature

pytestmark = pytest.mark.usefixtures("no_descriptor_is_lost")

SOON_S: Final = 2.0
"""In which nobody waited: the server would have to be asked for ever."""


@pytest.fixture
def file(silent_fuse: SilentFuse) -> int:
    return silent_fuse.file


def copy(file: int) -> OwnedFd:
    return OwnedFd(os.dup(file))


@pytest.mark.parametrize("kind", [kind for kind in FdKind if kind is not FdKind.TAP])
def test_what_a_descriptor_is_is_seen_without_its_server(silent_fuse: SilentFuse, kind: FdKind) -> None:
    assert not is_of_kind(silent_fuse.file, kind)
    assert silent_fuse.unanswered == []


def test_a_channel_for_requests_that_is_a_file_holds_up_nobody(tmp_path: Path, file: int) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        features = ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK
        await beside(guest.vmm.frontend.set_protocol_features, features)
        await beside(guest.vmm.frontend.set_backend_request_fd, file)
        # Not by a program, because a process that is forked would wait for the server.
        site.tap._opened().network.set_mtu(socket.if_nametoindex("tap0"), 2000)
        await site.changed(mtu=2000)
        await guest.talks()

    run(tmp_path, scenario)


def test_a_kick_descriptor_that_is_a_file_ends_its_session_unasked(tmp_path: Path, silent_fuse: SilentFuse) -> None:
    async def scenario(site: Site) -> None:
        guest = site.guest()
        await beside(guest.vmm.attach)
        with pytest.raises(PeerError):
            await beside(guest.vmm.frontend.set_vring_kick, RX, silent_fuse.file)
        await beside(guest.vmm.reconnect)
        site.machine.send(frame(1))
        assert (await beside(guest.near.recv, 4096))[guest.header :] == frame(1)

    run(tmp_path, scenario)
    assert set(silent_fuse.unanswered) <= {SilentFuse.FLUSH, SilentFuse.FORGET}, "the server was asked"


def test_files_of_silent_servers_take_few_threads_and_no_time(silent_fuse: SilentFuse) -> None:
    before, began_s = threading.active_count(), time.monotonic()
    for _ in range(3 * fds._CLOSING_THREADS_MAX):
        close_foreign((copy(silent_fuse.file),))
    assert time.monotonic() - began_s < SOON_S
    assert threading.active_count() == before + fds._CLOSING_THREADS_MAX
    # Those for which there was no thread are closed with the next ones.
    silent_fuse.close()
    close_foreign(())
    for thread in fds._closing:
        thread.join(PATIENCE_S)


def test_a_tap_and_memory_are_closed_at_once_and_by_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fds, "_close_beside", lambda: pytest.fail("a thread would close them"))
    descriptors = OwnedFd(tun.open_device()), OwnedFd(os.memfd_create("guest"))
    close_foreign(descriptors)
    assert not any(fd.is_open for fd in descriptors)


def test_what_the_other_side_of_a_handover_sends_is_closed_without_its_server(file: int) -> None:
    began_s = time.monotonic()
    buffer = FrameBuffer()
    buffer.feed(b"\x20", [copy(file)])
    buffer.close()
    with pytest.raises(PeerError, match="expected one"):
        buffer.feed(b"\x20", [copy(file), copy(file)])
    with pytest.raises(PeerError, match="no pidfd"):
        Peer.from_descriptor(copy(file))
    assert time.monotonic() - began_s < SOON_S


def test_what_a_client_sends_is_closed_without_its_server(file: int) -> None:
    began_s = time.monotonic()
    session = Session({}, lambda command, arguments: None)
    list(session.receive(b" ", [copy(file)]))
    list(session.receive(b" ", [copy(file)]))
    session.close()
    assert time.monotonic() - began_s < SOON_S
