"""A recording is whole or not there, and only its owner's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmig.errors import ConfigError
from localmig.limits import PATH_BYTES_MAX
from localmig.migration.recording import check_path, write_recording


def test_an_earlier_recording_is_replaced_and_its_mode_with_it(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_text("an earlier one")
    path.chmod(0o644)
    write_recording(str(path), [b"setup", bytearray(b"switchover")])
    assert path.read_bytes() == b"setupswitchover"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_relative_path_is_the_process_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recording("stream", [b"setup"])
    assert (tmp_path / "stream").read_bytes() == b"setup"


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_what_is_no_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "stream"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to(os.devnull)
    before = path.lstat()
    with pytest.raises(ConfigError, match=f"'{path}' exists and is no file"):
        write_recording(str(path), [b"setup"])
    assert path.lstat() == before


def test_a_recording_that_fails_half_way_leaves_the_earlier_one(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"setup"
        raise OSError(28, "No space left on device")

    path = tmp_path / "stream"
    path.write_text("an earlier one")
    with pytest.raises(OSError, match="No space left"):
        write_recording(str(path), pieces())
    assert path.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["", "stream", "/tmp/\udcff", "x" * PATH_BYTES_MAX])
def test_a_path_may_be_anything_the_kernel_takes(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize("path", ["\0", "x" * (PATH_BYTES_MAX + 1), "\ud800"])
def test_what_cannot_be_a_path_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="Option record expects a path"):
        check_path(path)
