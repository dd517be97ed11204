"""Section rates: packets a second through the packet path, both ways, beside DPDK's vhost with a TAP and passt.

Owns:        the backends side by side, the loads on them, the tables.
Never sees:  how a program is told to forward.
Read next:   cpu.py for what is divided by; testpmd.py, flood.py and iperf.py for what drives the packets.

    up     guest ─ frontend ═ vhost-user ═ backend ─ TAP ─ host's kernel, which counts and drops
    down   host ─ TAP ─ backend ═ vhost-user ═ frontend, which counts
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.cpu import Rate, measure
from benchmarks.flood import Flood, WayCounts
from benchmarks.guests import Guests
from benchmarks.iperf import BULK, GATEWAY, SMALL, WHOLE, passt, pasta, through
from benchmarks.report import NONE, Findings, Table, rate_text, ratio_text
from benchmarks.site import NicSite, namespace
from benchmarks.sizes import Sizes
from benchmarks.testpmd import DpdkBackend, Testpmd
from localmig.errors import LocalmigError
from localmig.testing.daemon import DaemonProcess
from localmig.testing.guest import GuestProcess, GuestSettings
from localmig.testing.namespace import NetworkNamespace, configure, link

FRAME_SIZES: Final = (64, 1500)

VIRTIO_USER: Final = "DPDK virtio-user"
VIRTIO_USER_OPTIONS: Final = {VIRTIO_USER: "", f"{VIRTIO_USER}, in_order=0": ",in_order=0"}
"""Options of DPDK's frontend beside those that each backend needs. Its driver takes other paths if it acknowledges
VIRTIO_F_IN_ORDER, and many drivers never do."""

KIT: Final = "the kit's frontend"
IPERF: Final = "iperf3"

PEER: Final = "DPDK vhost + TAP"
STREAM: Final = "localmig, stream to passt"

IN_ORDER: Final = "VIRTIO_F_IN_ORDER"
"""As `query-devices` names it."""

PASTA_MTU: Final = 65520
"""What pasta gives its namespace: a guest on a stream to passt gets the same."""

HOST_ADDRESS: Final = "10.9.0.1/24"
GUEST_ADDRESS: Final = "10.9.0.2/24"


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What serves a vhost-user socket on a TAP.

    Attributes:
        socket: where the frontend connects.
        ifname: the TAP.
        pids: its processes.
        features: names of the features that its frontend acknowledged; None if it cannot be asked.
    """

    socket: Path
    ifname: str
    pids: tuple[int, ...]
    features: Callable[[], list[str]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A backend as it is set up, and what the frontend must ask of it.

    Attributes:
        name: in the tables.
        open: starts it, in a namespace of its own.
        queue_pairs: of the frontend.
        packed: whether the frontend asks for packed rings.
        offloads: whether a guest may leave checksums and segmentation to it.
    """

    name: str
    open: Callable[[], AbstractContextManager[Backend]]
    queue_pairs: int = 1
    packed: bool = False
    offloads: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Paths:
    """What DPDK's driver made of a backend.

    Attributes:
        transmit: the path it sends by, in its own words; None if it did not say.
        receive: the path it receives by.
        features: names of the features it acknowledged; None if the backend does not say.
    """

    transmit: str | None
    receive: str | None
    features: list[str] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One backend under one load. `up` and `down` are None where it could not be done, `failure` says why."""

    driver: str
    backend: str
    load: str
    up: Rate | None = None
    down: Rate | None = None
    paths: Paths | None = None
    failure: str | None = None

    def is_peer_of(self, other: Row) -> bool:
        """Whether this is what the other one is compared with."""
        return (self.driver, self.backend, self.load) == (other.driver, PEER, other.load)


def run(findings: Findings, sizes: Sizes) -> None:
    """Measures, and fills in what it found."""
    rows: list[Row] = []
    seconds = sizes.rate_seconds
    kinds = [
        Kind(name="localmig", open=_localmig, offloads=True),
        Kind(name="localmig, packed rings", open=partial(_localmig, packed=True), packed=True),
        Kind(name="localmig, 2 queue pairs", open=partial(_localmig, queue_pairs=2), queue_pairs=2),
        Kind(name=PEER, open=_dpdk),
        Kind(name=f"{PEER}, packed rings", open=_dpdk, packed=True),
    ]
    try:
        for kind in kinds:
            for driver in VIRTIO_USER_OPTIONS:
                _try(rows, driver, kind, partial(_drive_with_testpmd, driver=driver), seconds)
        for kind in kinds:
            if kind.name in ("localmig", PEER):
                _try(rows, KIT, kind, _drive_with_flood, seconds)
        for kind in kinds:
            if kind.name in ("localmig", PEER):
                _try(rows, IPERF, kind, _drive_with_iperf, seconds)
        _try(rows, IPERF, Kind(name="passt (pasta)", open=_no_backend), _drive_pasta, seconds)
        _try(rows, IPERF, Kind(name=STREAM, open=_localmig_on_passt), _drive_through_passt, seconds)
    finally:
        findings.samples["rows"] = [asdict(row) for row in rows]
        findings.tables += [_packets(rows), _bits(rows), _paths(rows)]
        _note(findings, rows)


Drive = Callable[[Backend, Kind, float], Iterator[Row]]


def _try(rows: list[Row], driver: str, kind: Kind, drive: Drive, seconds: float) -> None:
    sys.stderr.write(f"  {driver}: {kind.name}\n")
    try:
        with namespace(), kind.open() as backend:
            rows.extend(drive(backend, kind, seconds))
    except (LocalmigError, OSError) as error:
        rows.append(Row(driver=driver, backend=kind.name, load=NONE, failure=str(error)))


# -- backends ---------------------------------------------------------------------------------------------------


def _cpus() -> tuple[int, int]:
    """Processors for what keeps one busy: the frontend's and the backend's, the same one where there is but one."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[1 % len(usable)]


@contextmanager
def _localmig(*, queue_pairs: int = 1, packed: bool = False) -> Iterator[Backend]:
    with NicSite(1, queue_pairs=queue_pairs, packed=packed) as site:
        site.start()
        yield Backend(
            socket=site.nics["tap0"],
            ifname="tap0",
            pids=(site.daemon.pid,),
            features=partial(_acknowledged, site.daemon),
        )


def _acknowledged(daemon: DaemonProcess) -> list[str]:
    features: list[str] = daemon.execute("query-devices")[0]["session"]["features"]
    return features


@contextmanager
def _dpdk() -> Iterator[Backend]:
    frontend_cpu, backend_cpu = _cpus()
    with (
        tempfile.TemporaryDirectory(prefix="localmig-bench-") as folder,
        DpdkBackend(Path(folder), cpus=(frontend_cpu, backend_cpu)) as dpdk,
    ):
        dpdk.start()
        configure(dpdk.ifname)
        yield Backend(socket=dpdk.socket, ifname=dpdk.ifname, pids=(dpdk.pid,))


@contextmanager
def _localmig_on_passt() -> Iterator[Backend]:
    with tempfile.TemporaryDirectory(prefix="localmig-bench-") as name:
        folder = Path(name)
        with passt(folder, address=GUEST_ADDRESS) as (passt_pid, peer):
            netdev = f"stream,id=net0,addr.type=unix,addr.path={peer},mtu={PASTA_MTU}"
            device = f"virtio-net,id=nic0,netdev=net0,socket={folder}/nic0.sock"
            daemon = DaemonProcess(["--netdev", netdev, "--device", device], qmp=folder / "qmp.sock")
            try:
                yield Backend(socket=folder / "nic0.sock", ifname="", pids=(daemon.pid, passt_pid))
            finally:
                daemon.kill()


@contextmanager
def _no_backend() -> Iterator[Backend]:
    """Pasta has no vhost-user socket: `_drive_pasta` starts it."""
    yield Backend(socket=Path(), ifname="", pids=())


# -- loads ------------------------------------------------------------------------------------------------------


def _drive_with_testpmd(backend: Backend, kind: Kind, seconds: float, *, driver: str) -> Iterator[Row]:
    frontend_cpu, backend_cpu = _cpus()
    vdev = f"net_virtio_user0,path={backend.socket},queues={kind.queue_pairs},queue_size=1024"
    vdev += f",mac=52:54:00:12:34:56{',packed_vq=1' if kind.packed else ''}{VIRTIO_USER_OPTIONS[driver]}"
    with Testpmd([vdev], cpus=(backend_cpu, frontend_cpu), queues=kind.queue_pairs) as testpmd:
        features = backend.features() if backend.features is not None else None
        paths = Paths(transmit=testpmd.path("Tx"), receive=testpmd.path("Rx"), features=features)
        for size in FRAME_SIZES:
            testpmd.command(f"set txpkts {size}", "set fwd txonly", "start")
            up = measure(lambda: _arrived(backend.ifname), pids=backend.pids, seconds=seconds)
            testpmd.command("stop", "set fwd rxonly", "start")
            with Flood({backend.ifname: -1}, rate=0, frame_size=size):
                down = measure(testpmd.received, pids=backend.pids, seconds=seconds)
            testpmd.command("stop")
            yield Row(driver=driver, backend=kind.name, load=f"{size} bytes", up=up, down=down, paths=paths)


def _arrived(ifname: str) -> int:
    """Frames that came out of a TAP into the host's network."""
    return int(link(ifname)["stats64"]["rx"]["packets"])


def _drive_with_flood(backend: Backend, kind: Kind, seconds: float) -> Iterator[Row]:
    with Guests({backend.ifname: backend.socket}, queue_size=256) as guests:
        for size in FRAME_SIZES:
            with Flood(guests.ends, rate=0, frame_size=size) as flood:
                up, down = (
                    measure(partial(_received, flood, way), pids=backend.pids, seconds=seconds)
                    for way in ("up", "down")
                )
            yield Row(driver=KIT, backend=kind.name, load=f"{size} bytes", up=up, down=down)


def _received(flood: Flood, way: str) -> int:
    """Frames that came out so far; floods this way alone from now on."""
    counts: WayCounts = getattr(flood.only(way), way)
    return counts.received


def _drive_with_iperf(backend: Backend, kind: Kind, seconds: float) -> Iterator[Row]:
    configure(backend.ifname, address=HOST_ADDRESS)
    settings = GuestSettings(socket=str(backend.socket), address=GUEST_ADDRESS, offloads=kind.offloads)
    with GuestProcess(settings) as guest:
        yield from _iperf_rows(kind, backend.pids, guest.namespace, HOST_ADDRESS.partition("/")[0], seconds)


def _drive_through_passt(backend: Backend, kind: Kind, seconds: float) -> Iterator[Row]:
    settings = GuestSettings(socket=str(backend.socket), address=GUEST_ADDRESS, mtu=PASTA_MTU)
    with GuestProcess(settings) as guest:
        yield from _iperf_rows(kind, backend.pids, guest.namespace, GATEWAY, seconds)


def _drive_pasta(_backend: Backend, kind: Kind, seconds: float) -> Iterator[Row]:
    with pasta() as (process, inside, address):
        yield from _iperf_rows(kind, (process,), inside, address, seconds)


def _iperf_rows(
    kind: Kind, pids: Sequence[int], inside: NetworkNamespace, address: str, seconds: float
) -> Iterator[Row]:
    for load in (SMALL, WHOLE, BULK):
        measure_way = partial(through, load, inside=inside, address=address, pids=pids, seconds=seconds)
        up, down = measure_way(down=False), measure_way(down=True)
        yield Row(driver=IPERF, backend=kind.name, load=load.name, up=up, down=down)


# -- what is shown ----------------------------------------------------------------------------------------------


def _packets(rows: Sequence[Row]) -> Table:
    return _table("Packets a second", [row for row in rows if row.load != BULK.name], rate_text)


def _bits(rows: Sequence[Row]) -> Table:
    def gigabits(a_second: float | None) -> str:
        return NONE if a_second is None else f"{a_second / 1e9:.2f}"

    return _table("Gbit/s of one TCP stream", [row for row in rows if row.load == BULK.name], gigabits)


def _paths(rows: Sequence[Row]) -> Table:
    columns = ("driven by", "backend", "acknowledged in-order", "transmit path", "receive path")
    table = Table(title="What DPDK's driver made of it", columns=columns)
    # The loads do not matter here: a driver chooses before it knows them.
    chosen = {(row.driver, row.backend): row.paths for row in rows if row.paths is not None}
    for (driver, backend), paths in chosen.items():
        in_order = NONE if paths.features is None else "yes" if IN_ORDER in paths.features else "no"
        table.add(driver, backend, in_order, paths.transmit or NONE, paths.receive or NONE)
    return table


def _table(title: str, rows: Sequence[Row], text: Callable[[float | None], str]) -> Table:
    way_columns = ("cores", "a core", "to DPDK")
    columns = ("driven by", "backend", "load", "up", *way_columns, "down", *way_columns)
    table = Table(title=title, columns=columns)
    for row in rows:
        peer = next((each for each in rows if each.is_peer_of(row)), None)
        cells = [*_way(row.up, peer.up if peer else None, text), *_way(row.down, peer.down if peer else None, text)]
        table.add(row.driver, row.backend, row.load, *cells)
    return table


def _way(rate: Rate | None, peer: Rate | None, text: Callable[[float | None], str]) -> list[str]:
    """One way: how many, the processors busy, how many for each of them, and that as a multiple of the peer's."""
    if rate is None:
        return [NONE] * 4
    peer_a_core = peer.a_core_second if peer else None
    ratio = ratio_text(rate.a_core_second, peer_a_core)
    return [text(rate.a_second), f"{rate.cores:.2f}", text(rate.a_core_second), ratio]


def _note(findings: Findings, rows: Sequence[Row]) -> None:
    findings.note(
        "Counted where they arrive: up in the host's network behind the TAP, down in the frontend; with iperf3, in the "
        "program that receives. Cores: processors the backend's process kept busy, the kernel on its behalf included. "
        "A core: the rate divided by that; to DPDK: this as a multiple of DPDK vhost + TAP's under the same load."
    )
    findings.note(
        "DPDK's frontend and backend poll, each keeps a processor busy whether packets come or not; localmig and passt "
        "sleep. With fewer processors than the frontend, the backend, and who sends down together, they share them."
    )
    findings.note(
        "Down is sent by packet sockets as fast as one thread can, and what the TAP's queue has no room for is dropped."
    )
    findings.note(
        "passt has no vhost-user socket in the version that Debian 12 has, so it is measured as pasta, which has a TAP "
        "in the guest's namespace where the others have vhost-user and a driver: the same forwarding, less of a way."
    )
    findings.note(
        f"{STREAM}: a NIC on `--netdev stream`, whose socket leads to passt; MTU and forwarding are pasta's. Cores are "
        "those of both processes together."
    )
    findings.note(
        "TCP: localmig carries 64 KiB segments for a guest that leaves segmentation to it, at MTU 1500; pasta gives "
        "its namespace an MTU of 65520; testpmd forwards between vhost and TAP without offloads."
    )
    findings.note(
        f"DPDK's driver acknowledges {IN_ORDER} if the backend offers it and `in_order=0` is not said; the paths are "
        "named as the driver names them."
    )
    for row in rows:
        if row.failure is not None:
            findings.note(f"**{row.backend}, {row.driver}**: {row.failure}")
