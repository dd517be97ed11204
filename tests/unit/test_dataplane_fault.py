"""SIGBUS: guest memory that goes away costs nothing but itself, and any other fault is what it was."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from localmig.dataplane import GuestMemory

ELSEWHERE = """\
import ctypes, faulthandler, mmap, os, signal, sys
from localmig.dataplane import GuestMemory
if sys.argv[2] == "faulthandler":
    faulthandler.enable()
fd = os.memfd_create("guest")
os.ftruncate(fd, 8192)
memory = GuestMemory([(0, 4096, 0, 0, fd)])
view = mmap.mmap(fd, 4096, offset=4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(view))
os.ftruncate(fd, 0)
try:
    memory.read(0, 1)
except OSError:
    print("survived", flush=True)
if sys.argv[1] == "touch":
    ctypes.string_at(address, 1)
os.kill(os.getpid(), signal.SIGBUS)
"""


@pytest.fixture
def file() -> int:
    return os.memfd_create("guest")


def test_a_file_that_shrinks_is_an_error_of_the_access_and_no_crash(file: int) -> None:
    os.ftruncate(file, 8192)
    memory = GuestMemory([(0x1000, 8192, 0, 0, file)])
    memory.write(0x1000, b"hello")
    os.ftruncate(file, 4096)
    assert memory.read(0x1000, 5) == b"hello"
    with pytest.raises(OSError, match="guest memory at 0x1000, 0x2000 bytes, is lost") as caught:
        memory.read(0x2000, 5)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError, match="is lost"):
        memory.write(0x1000, b"hello")
    assert memory.populate(10.0) == 8192
    os.close(file)


@pytest.mark.parametrize("how", ["touch", "kill"])
@pytest.mark.parametrize("previous", ["default", "faulthandler"])
def test_a_fault_elsewhere_ends_the_process_as_it_always_did(how: str, previous: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, how, previous], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "survived\n"
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == (previous == "faulthandler")
