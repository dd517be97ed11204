"""Fixtures of the kernel tier.

Owns:        the network namespace of a test, the count of its descriptors, a file whose server is silent.
Never sees:  what is being tested.
Read next:   any test here; guest_side.py for what queue pairs are tested with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kernel.silent_fuse import SilentFuse
from tests.kit.fork_server import fork_server

from localmig.errors import KernelError
from localmig.testing.namespace import NetworkNamespace


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    """A network namespace of the test's own, in which it runs."""
    try:
        fresh = NetworkNamespace.create()
    except KernelError as error:
        pytest.skip(str(error))
    with fresh, fresh.entered():
        ipv6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
        if ipv6.exists():
            # A new interface speaks IPv6 by itself; here only the tests speak.
            ipv6.write_text("1")
        yield fresh


@pytest.fixture
def no_descriptor_is_lost(namespace: NetworkNamespace) -> Iterator[None]:
    """At the end the process has the descriptors it had before."""
    fork_server()  # which has one of its own, from the first test on that starts a process
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.fixture
def silent_fuse(tmp_path: Path) -> Iterator[SilentFuse]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse")
    folder = tmp_path / "fuse"
    folder.mkdir()
    fuse = SilentFuse(folder)
    try:
        yield fuse
    finally:
        fuse.close()
