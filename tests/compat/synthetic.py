"""A made-up NIC that uses every kind of field, and its stream: what the format's own tests and vector are made of.

Owns:        the descriptions, one full state, the writing of its vector.
Never sees:  a real device.
Read next:   test_stream_vector.py, vectors/README.md.

`python -m tests.compat.synthetic` writes the vector; with `--capture FILE` it writes the same stream as one binary
file, the form in which QEMU's scripts/analyze-migration.py reads it:

    python -m tests.compat.synthetic --capture /tmp/stream && analyze-migration.py -f /tmp/stream
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tests.compat.writing import begun

from localmig.fds import OwnedFd, close_all
from localmig.migration.stream import Section, section_name
from localmig.vmstate import (
    Blob,
    Description,
    Subsection,
    array,
    blob,
    boolean,
    fd,
    optional,
    struct,
    text,
    u8,
    u16,
    u32,
    u64,
)

VECTOR: Final = Path(__file__).parent / "vectors" / "synthetic.hex"


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    guest_address: int
    size: int
    file: OwnedFd


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    size: int
    enabled: bool
    kick: OwnedFd | None
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    speed: int
    is_up: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NicSetup:
    features: int
    mac: bytes
    regions: tuple[Region, ...]
    queues: tuple[Queue, ...]
    link: Link
    vlans: tuple[int, ...]
    socket: OwnedFd | None
    mtu: int = 1500
    announces_left: int = 0
    announce_text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RingPosition:
    next_avail: int
    used_wrap: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NicRings:
    rings: tuple[RingPosition, ...]
    rx_packets: int
    tx_packets: int


REGION: Final = Description(
    name="region",
    version=1,
    oldest_version=1,
    state=Region,
    fields=(u64("guest_address"), u64("size"), fd("file", kind="memory")),
)
QUEUE: Final = Description(
    name="queue",
    version=1,
    oldest_version=1,
    state=Queue,
    fields=(u16("size"), boolean("enabled"), optional(fd("kick", kind="eventfd")), text("label", size_max=16)),
)
LINK: Final = Description(name="link", version=1, oldest_version=1, state=Link, fields=(u32("speed"), boolean("is_up")))
NIC: Final = Description(
    name="synthetic-nic",
    version=2,
    oldest_version=1,
    state=NicSetup,
    fields=(
        u64("features"),
        blob("mac", size_max=6),
        array("regions", REGION, count_max=8),
        array("queues", QUEUE, count_max=4),
        struct("link", LINK),
        array("vlans", u16, count_max=4),
        optional(fd("socket")),
        u16("mtu", since=2),
    ),
    subsections=(
        Subsection(
            name="synthetic-nic/announce",
            version=1,
            oldest_version=1,
            needed=lambda nic: nic.announces_left > 0,
            fields=(u8("announces_left"), text("announce_text", size_max=32)),
        ),
    ),
)
RING_POSITION: Final = Description(
    name="ring-position",
    version=1,
    oldest_version=1,
    state=RingPosition,
    fields=(u16("next_avail"), boolean("used_wrap")),
)
NIC_RINGS: Final = Description(
    name="synthetic-nic-rings",
    version=1,
    oldest_version=1,
    state=NicRings,
    fields=(array("rings", RING_POSITION, count_max=8), u64("rx_packets"), u64("tx_packets")),
)

SETUP_NAME: Final = section_name("nic0", NIC)
RINGS_NAME: Final = section_name("nic0", NIC_RINGS)

DESCRIPTOR_COUNT: Final = 4


def setup_state(fds: list[OwnedFd]) -> NicSetup:
    """A state with something in every field; takes `DESCRIPTOR_COUNT` descriptors."""
    file0, file1, kick, sock = fds
    return NicSetup(
        features=0x1_3000_8028,
        mac=bytes.fromhex("525400123456"),
        regions=(
            Region(guest_address=0, size=0xC000_0000, file=file0),
            Region(guest_address=1 << 32, size=1 << 30, file=file1),
        ),
        queues=(
            Queue(size=256, enabled=True, kick=kick, label="rx"),
            Queue(size=1024, enabled=False, kick=None, label="tx ✓"),
        ),
        link=Link(speed=10_000, is_up=True),
        vlans=(1, 5, 4094),
        socket=sock,
        mtu=9000,
        announces_left=3,
        announce_text="moved",
    )


def setup_section(fds: list[OwnedFd]) -> Section:
    """The section that travels while the guest runs."""
    return Section(name=SETUP_NAME, description=NIC, state=setup_state(fds))


def rings_section(*, next_avail: int = 0x1234) -> Section:
    """The section that travels inside the downtime."""
    rings = (
        RingPosition(next_avail=next_avail, used_wrap=False),
        RingPosition(next_avail=5, used_wrap=True),
    )
    state = NicRings(rings=rings, rx_packets=1 << 40, tx_packets=77)
    return Section(name=RINGS_NAME, description=NIC_RINGS, state=state)


@contextmanager
def open_descriptors(count: int) -> Iterator[list[OwnedFd]]:
    """Different files that do nothing; closed in the end."""
    fds = [OwnedFd(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) for _ in range(count)]
    try:
        yield fds
    finally:
        close_all(fds)


@contextmanager
def written_stream() -> Iterator[tuple[Blob, Pieces]]:
    """The setup piece with its descriptors, open for now, and all pieces, as today's code writes them."""
    with open_descriptors(DESCRIPTOR_COUNT) as fds:
        stream, setup = begun([setup_section(fds)])
        description = stream.describe([rings_section(next_avail=0)])
        switchover = stream.switchover([rings_section()])
        yield setup, Pieces(bytes(setup.data), bytes(switchover.data), description)


class Pieces(NamedTuple):
    """The pieces of a stream in the order in which they stand in it."""

    setup: bytes
    switchover: bytes
    description: bytes


def read_vector(path: Path) -> Pieces:
    """The pieces of a vector."""
    return Pieces(*map(bytes.fromhex, path.read_text().split("\n\n")))


def write_vector(path: Path, pieces: Pieces) -> None:
    """Writes the pieces as lines of 32 bytes, an empty line between them."""
    path.write_text("\n\n".join("\n".join(_lines(piece.hex())) for piece in pieces) + "\n")


def _lines(digits: str) -> Iterator[str]:
    for start in range(0, len(digits), 64):
        yield digits[start : start + 64]


def main() -> None:
    """Writes the vector, or a capture."""
    parser = argparse.ArgumentParser(description="Writes the synthetic stream.")
    parser.add_argument("--capture", type=Path, help="write one binary file instead of the vector")
    arguments = parser.parse_args()
    with written_stream() as (_, pieces):
        if arguments.capture:
            arguments.capture.write_bytes(b"".join(pieces))
        else:
            write_vector(VECTOR, pieces)


if __name__ == "__main__":
    main()
