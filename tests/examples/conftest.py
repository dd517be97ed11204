"""Packages of devices as their users install them, and broken ones: by pip, into a folder that daemons find."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from tests.kit.processes import DaemonProcess
from tests.kit.site import Site, new_site

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"


def install(folder: Path, *packages: Path) -> None:
    """As `pip install` for whoever has `folder` in PYTHONPATH."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, *map(str, packages)], check=True)


def write_package(folder: Path, name: str, source: str, *types: str, version: str = "1.0") -> None:
    """A package of one module, installed: what pip would leave of it. Its types are attributes of the module."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    entries = "".join(f"{each} = {module}:{each.replace('-', '_').upper()}\n" for each in types)
    (info / "entry_points.txt").write_text(f"[localmig.objects]\n{entries}")


@contextmanager
def found(*folders: Path) -> Iterator[None]:
    """Daemons that are started now find what is in these folders."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = ":".join(map(str, folders))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the packages of examples/ are installed."""
    folder = tmp_path_factory.mktemp("examples")
    install(folder, *(path.parent for path in sorted(EXAMPLES.glob("*/pyproject.toml"))))
    return folder


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with new_site(tmp_path_factory) as made:
        yield made


def hand_over(site: Site, source: DaemonProcess, *, folders: Sequence[Path], fault: str | None = None) -> DaemonProcess:
    """Begins a handover to a daemon that finds `folders`, which it gives; the caller waits for the outcome."""
    with found(*folders):
        destination = site.destination(fault=fault)
    source.execute("migrate", uri=site.address)
    return destination


def moved(site: Site, source: DaemonProcess, *folders: Path) -> DaemonProcess:
    """A daemon that has taken over from `source`, which has ended."""
    destination = hand_over(site, source, folders=folders)
    info = source.wait_migration()
    assert info["status"] == "completed", (info, site.log_of(destination))
    assert destination.wait_migration()["status"] == "completed"
    destination.execute("migrate-set-parameters", local=True)
    source.quit()
    return destination
