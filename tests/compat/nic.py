"""The streams of a daemon with one TAP and one virtio-net device, from fixed states: what its vectors are made of.

Owns:        the states of daemons with a session, with two, without one, with packed rings, with two queue pairs, with
             server=off, with descriptors that stay home.
Never sees:  a live device.
Read next:   test_nic_vectors.py, vectors/README.md.

`python -m tests.compat.nic` writes the vectors that are not there yet.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.compat.synthetic import Pieces, open_descriptors, write_vector
from tests.compat.writing import begun

from localmig.contact import ListenerState
from localmig.dataplane import Counters, QueuePair
from localmig.device_api.device_state import DEVICE, ConnectionState, DeviceState, SocketState
from localmig.device_api.queues_state import ENGINE_KINDS, QUEUES, QUEUES_SETUP, QueuesSetup, QueuesState
from localmig.devices.virtio_net.heir import ANYONE, Heir, HeirKind
from localmig.devices.virtio_net.state import VIRTIO_NET, VirtioNetState
from localmig.fds import OwnedFd
from localmig.migration.stream import Section, section_name
from localmig.netdevs.state import TAP, TapDescriptors, TapState
from localmig.vhost_user.memory import MemoryRegion
from localmig.vhost_user.protocol import LogState, SessionState, VringState
from localmig.virtio import Feature
from localmig.virtio.net import OFFLOADS, NetConfig, NetFeature
from localmig.vmstate import Blob

VECTORS: Final = Path(__file__).parent / "vectors"

TAP_NAME: Final = section_name("net0", TAP)
DEVICE_NAME: Final = section_name("nic0", DEVICE)
NIC_NAME: Final = section_name("nic0", VIRTIO_NET)
QUEUES_SETUP_NAME: Final = section_name("*", QUEUES_SETUP)
QUEUES_NAME: Final = section_name("*", QUEUES)

FEATURES: Final = 0x1_7001_8008
"""VERSION_1, EVENT_IDX, INDIRECT_DESC, protocol features, STATUS, MRG_RXBUF, MTU."""

OFFERED: Final = FEATURES | OFFLOADS | NetFeature.MQ | Feature.RING_PACKED
"""More than the guest took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Daemon:
    """What a daemon's parts would save."""

    tap: TapState
    nic: VirtioNetState
    device: DeviceState
    queues: QueuesState
    waiting: OwnedFd | None

    @property
    def setup(self) -> list[Section]:
        """The sections that travel while the guest runs."""
        return [
            Section(name=TAP_NAME, description=TAP, state=self.tap),
            Section(name=NIC_NAME, description=VIRTIO_NET, state=self.nic),
            Section(name=DEVICE_NAME, description=DEVICE, state=self.device),
            Section(name=QUEUES_SETUP_NAME, description=QUEUES_SETUP, state=self._queues_setup),
        ]

    @property
    def _queues_setup(self) -> QueuesSetup:
        kind, pair_count = ENGINE_KINDS[QueuePair], len(self.queues.waiting) // 4
        return QueuesSetup.of(((f"nic0/{index}", kind, 2) for index in range(pair_count)), self.waiting)

    @property
    def switchover(self) -> list[Section]:
        """The sections that travel inside the downtime."""
        return [Section(name=QUEUES_NAME, description=QUEUES, state=self.queues)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A vector: its name and how many descriptors travel."""

    name: str
    descriptor_count: int

    @property
    def features(self) -> int:
        """What the guest acknowledged."""
        features = FEATURES | (Feature.RING_PACKED if self is PACKED else 0)
        return features | (NetFeature.MQ if self is WIDE else 0)

    @property
    def queue_pairs(self) -> int:
        """How many the NIC has."""
        return 2 if self is WIDE else 1

    @property
    def path(self) -> Path:
        """Where it is."""
        return VECTORS / f"{self.name}.hex"

    def daemon(self, fds: list[OwnedFd]) -> Daemon:
        """The states, with these descriptors."""
        take = iter(fds)
        return Daemon(
            tap=_tap(None if self is HOME else _descriptors(self.queue_pairs, take)),
            nic=VirtioNetState(
                mac=b"" if self is IDLE else bytes.fromhex("525400123456"),
                heirs=() if self is HOME else (_HEIRS[self is IDLE],) + (ANYONE,) * (self.queue_pairs - 1),
            ),
            device=DeviceState(
                features_acked=0 if self is IDLE else self.features,
                config=NetConfig(queue_pair_count_max=self.queue_pairs, mtu=9000).encode(),
                socket=None if self is HOME else _socket(self, take),
            ),
            queues=_queues((0, 0) if self is IDLE else (0x1234, 0xFFFF), queue_pairs=self.queue_pairs),
            waiting=None if self is HOME else next(take),
        )


_HEIRS: Final = (Heir(kind=HeirKind.RING, position=0xFFF0), Heir(kind=HeirKind.NOBODY))
"""Of a NIC with a session, and without."""

SESSION: Final = Sample(name="nic-session", descriptor_count=15)
IDLE: Final = Sample(name="nic-idle", descriptor_count=4)
HOME: Final = Sample(name="nic-home", descriptor_count=0)
CONNECTED: Final = Sample(name="nic-connected", descriptor_count=14)
PACKED: Final = Sample(name="nic-packed", descriptor_count=16)
WIDE: Final = Sample(name="nic-wide", descriptor_count=16)
TWO: Final = Sample(name="nic-two-sessions", descriptor_count=16)
SAMPLES: Final = (SESSION, IDLE, HOME, CONNECTED, PACKED, WIDE, TWO)


def _descriptors(queue_count: int, fds: Iterator[OwnedFd]) -> TapDescriptors:
    queues = tuple(next(fds) for _ in range(queue_count))
    attached = tuple(queue is queues[0] for queue in queues)
    return TapDescriptors(
        queues=queues,
        attached=attached,
        downscript="/etc/tap-down",
        netlink=next(fds),
        namespace=0xF0000098,
        ifname_opened="tap0",
        mtu_opened=1500,
        ifindex=7,
        bridge="br0",
        is_up=True,
        is_gone=False,
        has_carrier=True,
    )


def _tap(descriptors: TapDescriptors | None) -> TapState:
    return TapState(
        ifname="tap0", mtu=9000, vnet_header_length=12, offloads=0x0F, has_uso=True, descriptors=descriptors
    )


def _socket(sample: Sample, fds: Iterator[OwnedFd]) -> SocketState:
    listener = None
    if sample is not CONNECTED:
        listener = ListenerState(path="/run/vm1/nic0.sock", device=26, inode=1 << 33, fd=next(fds))
    if sample is IDLE:
        return SocketState(listener=listener, connections=(), opened_count=3, owner=0)
    connection, session, ledger = next(fds), _session_state(fds), None
    if sample is WIDE:
        session.features_acked = sample.features
        session.vrings += [VringState(), VringState()]  # a pair that the guest does not use
    if sample is PACKED:
        ledger = next(fds)
        session.features_acked = sample.features
        for vring, position in zip(session.vrings, (0x8012, 0x03F0), strict=True):
            vring.next_avail = position
    connections = [_connection(4, connection, session, ledger)]
    if sample is TWO:
        bare = SessionState(features_offered=OFFERED, vrings=[VringState(), VringState()])
        connections.append(_connection(5, next(fds), bare, None))
    return SocketState(listener=listener, connections=tuple(connections), opened_count=6, owner=4)


def _connection(number: int, connection: OwnedFd, session: SessionState, ledger: OwnedFd | None) -> ConnectionState:
    return ConnectionState(
        number=number,
        path="/run/vm1/nic0.sock",
        since_ns=1 << 40,
        was_succeeded=number == 5,
        connection=connection,
        session=session,
        ledger=ledger,
        in_flight=None,
    )


def _session_state(fds: Iterator[OwnedFd]) -> SessionState:
    """A session with something in every field, in the middle of a SET_VRING_CALL."""
    return SessionState(
        features_offered=OFFERED,
        protocol_features_offered=0x1_A22F,
        features_acked=FEATURES,
        protocol_features_acked=0x1_A02D,
        device_status=0x0F,
        mtu=9000,
        announced_mac=bytes.fromhex("525400123456"),
        regions=[
            MemoryRegion(guest_address=0, size=0xC000_0000, user_address=0x7F00_0000_0000, mmap_offset=0, fd=next(fds)),
            MemoryRegion(
                guest_address=1 << 32,
                size=1 << 30,
                user_address=0x7F00_C000_0000,
                mmap_offset=0xC000_0000,
                fd=next(fds),
            ),
        ],
        vrings=[
            VringState(
                size=256,
                descriptor_area=0x7F00_0010_0000,
                driver_area=0x7F00_0010_1000,
                device_area=0x7F00_0010_2000,
                next_avail=0x1200,
                started=True,
                enabled=True,
                is_logged=True,
                log_address=0x10_2000,
                kick=next(fds),
                call=next(fds),
                error=next(fds),
            ),
            VringState(
                size=1024,
                descriptor_area=0x7F00_0020_0000,
                driver_area=0x7F00_0020_4000,
                device_area=0x7F00_0020_5000,
                next_avail=0xFFF0,
                started=True,
                enabled=False,
                failed=True,
                kick=next(fds),
                # A guest that polls has no call eventfd.
                call=None,
                error=next(fds),
            ),
        ],
        vring_count_asked=8,
        was_served=True,
        backend_request_fd=next(fds),
        log=LogState(size=0x2_8000, mmap_offset=0x1000, fd=next(fds)),
        unparsed=bytes.fromhex("0d000000 09000000 08000000 0000"),
        unparsed_fds=[next(fds)],
        unsent=bytes.fromhex("01000000 05000000"),
    )


def _queues(next_avail: tuple[int, int], *, queue_pairs: int) -> QueuesState:
    idle = queue_pairs - 1
    counters = Counters(
        rx_packets=1 << 40,
        rx_bytes=3 << 50,
        rx_dropped_length=1,
        rx_dropped_stale=9,
        rx_dropped_error=10,
        rx_kicks=2,
        rx_calls=3,
        tx_packets=77,
        tx_bytes=7700,
        tx_dropped_interface=4,
        tx_dropped_header=5,
        tx_dropped_memory=6,
        tx_kicks=7,
        tx_calls=8,
    )
    return QueuesState(
        positions=struct.pack(">2H", *next_avail) + bytes(4 * idle),
        failed=b"\0\1" + bytes(2 * idle),
        waiting=bytes(4 * queue_pairs),
        counters=struct.pack(f">{len(counters)}Q", *counters) + bytes(8 * len(counters) * idle),
    )


@contextmanager
def written_stream(sample: Sample) -> Iterator[tuple[Blob, Pieces]]:
    """The setup piece with its descriptors, open for now, and all pieces, as today's code writes them."""
    with open_descriptors(sample.descriptor_count) as fds:
        daemon = sample.daemon(fds)
        stream, setup = begun(daemon.setup)
        description = stream.describe(daemon.switchover)
        switchover = stream.switchover(daemon.switchover)
        yield setup, Pieces(bytes(setup.data), bytes(switchover.data), description)


def main() -> None:
    """Writes the vectors that are not there yet: one that is there does not change."""
    for sample in SAMPLES:
        if not sample.path.exists():
            with written_stream(sample) as (_, pieces):
                write_vector(sample.path, pieces)


if __name__ == "__main__":
    main()
