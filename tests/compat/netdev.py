"""The streams of a netdev `stream`, as a daemon writes them: the bytes that a release saved stay readable.

Owns:        the samples; `python -m tests.compat.netdev` writes the vectors that are not there yet.
Never sees:  a daemon, a device.
Read next:   vectors/README.md, test_netdev_vectors.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.compat.synthetic import Pieces, open_descriptors, write_vector
from tests.compat.writing import begun

from localmig.contact import ListenerState
from localmig.fds import OwnedFd
from localmig.migration.stream import Section, section_name
from localmig.netdevs.stream import IN_HAND, STREAM, InHand, StreamDescriptors, StreamState
from localmig.vmstate import Blob

SETUP_NAME: Final = section_name("net0", STREAM)
SWITCHOVER_NAME: Final = section_name("net0", IN_HAND)
HAND: Final = InHand(read=70_000, unsent=1234)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a stream can be when it is handed over; `descriptor_count` is how many come with it."""

    name: str
    descriptor_count: int

    @property
    def path(self) -> Path:
        """Of its vector."""
        return Path(__file__).with_name("vectors") / f"{self.name}.hex"

    def state(self, fds: Sequence[OwnedFd]) -> StreamState:
        """With these descriptors."""
        if self is HOME:
            return StreamState(descriptors=None)
        if self is CLIENT:
            return StreamState(descriptors=StreamDescriptors(listener=None, connection=fds[0], in_hand=fds[1]))
        listener = ListenerState(path="/run/vm1/net0.sock", device=26, inode=1 << 33, fd=fds[0])
        return StreamState(descriptors=StreamDescriptors(listener=listener, connection=None, in_hand=fds[1]))


CLIENT: Final = Sample(name="stream-client", descriptor_count=2)
SERVER: Final = Sample(name="stream-server", descriptor_count=2)
HOME: Final = Sample(name="stream-home", descriptor_count=0)
SAMPLES: Final = (CLIENT, SERVER, HOME)


@contextmanager
def written_stream(sample: Sample) -> Iterator[tuple[Blob, Pieces]]:
    """The setup piece with its descriptors, open for now, and all pieces, as today's code writes them."""
    with open_descriptors(sample.descriptor_count) as fds:
        stream, setup = begun([Section(name=SETUP_NAME, description=STREAM, state=sample.state(fds))])
        switchover = [Section(name=SWITCHOVER_NAME, description=IN_HAND, state=HAND)]
        description = stream.describe(switchover)
        yield setup, Pieces(bytes(setup.data), bytes(stream.switchover(switchover).data), description)


def main() -> None:
    """Writes the vectors that are not there yet: one that is there does not change."""
    for sample in SAMPLES:
        if not sample.path.exists():
            with written_stream(sample) as (_, pieces):
                write_vector(sample.path, pieces)


if __name__ == "__main__":
    main()
