"""Everything that takes bytes from outside, each as one function that any bytes may be given to.

Owns:        the targets, their seeds, what must hold for every input.
Never sees:  how inputs are found: __main__.py has a fuzzer, test_targets.py a fixed number of mutations.
Read next:   capture.py, for the seeds that are a real session's bytes.

A target names the errors that may come out by catching them. Anything else is a finding: another exception, an
assertion, a descriptor that is open afterwards or was dropped without being closed.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.compat import nic, synthetic
from tests.compat.nic import SAMPLES
from tests.compat.synthetic import read_vector
from tests.compat.vmdesc_reader import walk
from tests.compat.writing import begun

from localmig.cli.analyze import printable, show, to_json
from localmig.device_api.device_state import DEVICE
from localmig.device_api.queues_state import (
    ENGINE_KINDS,
    QUEUES,
    QUEUES_SETUP,
    Arriving,
    QueuesState,
    check_same_groups,
    check_setup,
)
from localmig.devices.virtio_net.state import VIRTIO_NET
from localmig.errors import ConfigError, PeerError
from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd, close_all
from localmig.migration.analysis import analyze
from localmig.migration.channel import FrameBuffer, FrameKind
from localmig.migration.hello import Done, HandoverObject, Hello, Origin, decode_reason, encode_reason
from localmig.migration.stream import IncomingStream, Section
from localmig.monitor.commands import COMMANDS
from localmig.monitor.protocol import Session
from localmig.monitor.schema import Command
from localmig.monitor.wire import Decoder, JsonSyntaxError
from localmig.netdevs.state import TAP
from localmig.options import KINDS, Spec, parse_config, parse_incoming, parse_monitor, to_mapping
from localmig.options.specs import Fit, options_of
from localmig.registry import Registry
from localmig.vhost_user.description import SESSION
from localmig.vhost_user.message import HEADER_SIZE, VRING_INDEX_MAX, Header, ProtocolFeature, decode_reply
from localmig.vhost_user.ownership import Ownership, Standing
from localmig.vhost_user.protocol import Backend, Offer, SessionState, check_state
from localmig.virtio import Feature
from localmig.vmstate import Blob, Description, Reader, check_descriptors, close_descriptors, load, save

REGISTRY: Final = Registry(entry_points=list)

SEEDS: Final = Path(__file__).parent / "seeds"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One door.

    Attributes:
        run: takes any bytes; whatever it raises is a finding.
        seeds: inputs that get far inside.
    """

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def open_descriptors() -> set[str]:
    """The numbers that are open in this process, the one it looks with among them."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def check(target: Target, data: bytes) -> None:
    """Gives `data` to `target`. AssertionError where a descriptor stays open."""
    before = open_descriptors()
    target.run(data)
    after = open_descriptors()
    assert after == before, f"descriptors {sorted(after ^ before)} were leaked or lost"


def _made_up(count: int) -> list[OwnedFd]:
    return [OwnedFd(os.eventfd(0, os.EFD_CLOEXEC)) for _ in range(count)]


def _files(folder: str) -> Iterator[bytes]:
    return (path.read_bytes() for path in sorted((SEEDS / folder).iterdir()))


def _lines(name: str) -> Iterator[bytes]:
    return iter((SEEDS / name).read_bytes().splitlines())


# -- vhost-user -----------------------------------------------------------------------------------------------------

OFFER: Final = Offer(
    features=Feature.VERSION_1 | Feature.RING_EVENT_IDX | Feature.RING_PACKED | 1 << 15,
    vring_count=4,
    vring_size_max=1024,
    region_count_max=10,
    drained_vrings={3: 1},
)
"""The bit 15 is VIRTIO_NET_F_MRG_RXBUF, without which the kit's frontend does not go on."""

CONFIG: Final = bytes(24)

FD_COUNT_MASK: Final = 0x0F
CUT: Final = 0x10
REFUSE: Final = 0x20
MOVE: Final = 0x40
CHANGE: Final = 0x80
"""Bits of the byte before each message: how many descriptors come with it, whether it comes in two pieces, whether the
device says no, whether the session moves to another process in its middle, whether the configuration space changes
before it."""


@dataclass(kw_only=True, slots=True)
class _Served:
    """A session in the process that it is in now."""

    backend: Backend


MOVED_AND_REFUSED: Final = (
    bytes([0x01 | MOVE]) + struct.pack("=IIIII", 13, 1, 8, 0, 0) + bytes([MOVE]) + bytes(HEADER_SIZE)
)
"""SET_VRING_CALL, and then a message of no kind, each with a handover in its middle."""


def vhost_user(data: bytes) -> None:
    """A whole session: messages, each behind a byte that says how it comes."""
    served = _Served(backend=Backend(OFFER, config=CONFIG))
    try:
        while data:
            control, data = data[0], data[1:]
            size = HEADER_SIZE
            if len(data) >= HEADER_SIZE:
                size += struct.unpack_from("=I", data, 8)[0]
            message, data = data[:size], data[size:]
            before = served.backend, _plain(served.backend.state)
            if control & CHANGE:
                _change_config(served.backend)
            try:
                _receive(served, message, control)
            except PeerError:
                # One that moved in between has descriptors of other numbers.
                if served.backend is before[0]:
                    assert _plain(served.backend.state) == before[1], "a refused message changed the session"
                return
            state = served.backend.state
            check_state(state, OFFER)
            assert all(vring.is_configured and vring.kick for vring in state.vrings if vring.started)
    finally:
        served.backend.close()


LEAVE: Final = 0x80
"""Bit of the byte before the control byte of each message of `sessions`: the session ends instead. The lowest two bits
are its number."""


def sessions(data: bytes) -> None:
    """Several sessions of a device: at most one owns, and nobody takes rings from one that runs."""
    served: dict[int, _Served] = {}
    ownership = Ownership()
    try:
        while data:
            number = data[0] & 3
            before = None if ownership.owner is None else _standing(served[ownership.owner])
            former, left = ownership.owner, None
            size = 1
            if data[0] & LEAVE:
                if (gone := served.pop(number, None)) is not None:
                    left = _standing(gone) if number == former else None
                    gone.backend.close()
            elif len(data) > 1:
                size = _message_size(data[1:]) + 1
                there = served.setdefault(number, _Served(backend=Backend(OFFER)))
                try:
                    _receive(there, data[2:size], data[1] & ~MOVE)
                except PeerError:
                    left = _standing(there) if number == former else None
                    served.pop(number).backend.close()
            data = data[size:]
            standings = {each: _standing(there) for each, there in served.items()}
            ownership.decide(standings, left=left)
            wanting = {each for each, standing in standings.items() if standing.wants}
            assert set(ownership.held) == wanting - {ownership.owner}
            assert ownership.owner is None or ownership.owner in served
            if before is not None and before.wants and former != ownership.owner:
                assert number == former, "rings that ran were taken away"
            assert not wanting or ownership.owner is not None, "rings wait for nobody"
    finally:
        for there in served.values():
            there.backend.close()


def _standing(served: _Served) -> Standing:
    return Standing.of(served.backend.state, OFFER)


def _message_size(data: bytes) -> int:
    """Of a control byte and the message after it."""
    size = 1 + HEADER_SIZE
    return size + struct.unpack_from("=I", data, 9)[0] if len(data) >= size else size


SET_UP_MESSAGES: Final = 60
"""Of a captured session: the set-up of its rings, and some changes after that."""


def _session_seeds() -> Iterator[bytes]:
    """What was captured of one frontend, said by two in turns; then the first one leaves."""
    for name in ("split", "packed"):
        captured = (SEEDS / "vhost-user" / name).read_bytes()
        said = b""
        for _ in range(SET_UP_MESSAGES):
            size = _message_size(captured)
            said += b"".join(bytes([number]) + captured[:size] for number in (0, 1))
            captured = captured[size:]
        yield said + bytes([LEAVE])


def _change_config(backend: Backend) -> None:
    """A frontend is told of it if it can hear, and once."""
    config = bytes(byte ^ 1 for byte in backend.config)
    listens = ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
    hears = not listens & ~ProtocolFeature(backend.state.protocol_features_acked)
    told = backend.change_config(config)
    assert bool(told) == (hears and backend.state.backend_request_fd is not None)
    assert backend.change_config(config) == b""


def _receive(served: _Served, message: bytes, control: int) -> None:
    fds = _made_up(control & FD_COUNT_MASK)
    middle = len(message) // 2 if control & (CUT | MOVE) else 0
    for piece in (message[:middle], message[middle:]):
        while piece:
            size = served.backend.bytes_wanted
            event = served.backend.receive(piece[:size], fds)
            piece, fds = piece[size:], []
            if event is None:
                continue
            if control & REFUSE and event.refusable:
                served.backend.refuse()
            else:
                served.backend.complete()
        if control & MOVE:
            served.backend = _moved(served.backend)
    for fd in fds:
        fd.close()
    reply = served.backend.data_to_send()
    if reply:
        header = Header.decode(reply[:HEADER_SIZE])
        decode_reply(header, reply[HEADER_SIZE:])
        assert len(reply) == HEADER_SIZE + header.size
    served.backend.data_sent(len(reply))


def _plain(state: SessionState) -> tuple[object, ...]:
    """All but the message that is under way."""
    return (
        state.features_offered,
        state.protocol_features_offered,
        state.features_acked,
        state.protocol_features_acked,
        state.device_status,
        state.mtu,
        tuple(state.regions),
        tuple(repr(vring) for vring in state.vrings),
        state.vring_count_asked,
        state.was_served,
        state.backend_request_fd,
        state.log,
        state.unsent,
    )


def _moved(backend: Backend) -> Backend:
    """The session after a handover: saved, loaded, the old one closed."""
    saved = Blob()
    save(SESSION, backend.state, saved)
    fds = [(offset, OwnedFd(os.dup(fd))) for offset, fd in saved.fds]
    state = load(SESSION, SESSION.version, Reader(saved.data, fds))
    again = Blob()
    save(SESSION, state, again)
    assert again.data == saved.data
    backend.close()
    try:
        return Backend.from_state(state, OFFER, config=CONFIG)
    except PeerError as error:
        state.close()
        raise AssertionError(f"a session that was served cannot move: {error}") from error


# -- the migration stream -------------------------------------------------------------------------------------------

_STREAM_HEADER: Final = struct.Struct(">BBHH")
_OFFSET: Final = struct.Struct(">H")

_EXPECTED: Final[tuple[tuple[Mapping[str, Description[Any]], Mapping[str, Description[Any]]], ...]] = (
    (
        {nic.TAP_NAME: TAP, nic.NIC_NAME: VIRTIO_NET, nic.DEVICE_NAME: DEVICE, nic.QUEUES_SETUP_NAME: QUEUES_SETUP},
        {nic.QUEUES_NAME: QUEUES},
    ),
    ({synthetic.SETUP_NAME: synthetic.NIC}, {synthetic.RINGS_NAME: synthetic.NIC_RINGS}),
)


def stream_input(which: int, pieces: synthetic.Pieces) -> bytes:
    """A stream as `stream` takes it."""
    offsets = walk(b"".join(pieces)).descriptors
    header = _STREAM_HEADER.pack(which, len(offsets), len(pieces.setup), len(pieces.switchover))
    return b"".join((header, *map(_OFFSET.pack, offsets), *pieces))


def stream(data: bytes) -> None:
    """A stream: which one is expected, where descriptors are, how long the pieces are, and the pieces."""
    if len(data) < _STREAM_HEADER.size:
        return
    which, fd_count, setup_size, switchover_size = _STREAM_HEADER.unpack_from(data)
    start = _STREAM_HEADER.size + fd_count * _OFFSET.size
    if len(data) < start:
        return
    offsets = {offset for (offset,) in _OFFSET.iter_unpack(data[_STREAM_HEADER.size : start])}
    setup, rest = data[start : start + setup_size], data[start + setup_size :]
    switchover, description = rest[:switchover_size], rest[switchover_size:]
    # The channel gives descriptors in ascending order, each at a byte 0x20.
    places = [offset for offset in sorted(offsets) if setup[offset : offset + 1] == b"\x20"]
    expected = _EXPECTED[which % len(_EXPECTED)]
    sections: list[Section] = []
    incoming = IncomingStream(setup=expected[0], switchover=expected[1])
    try:
        incoming.description(description)
        sections = incoming.setup(setup, zip(places, _made_up(len(places)), strict=True))
        rings = incoming.switchover(switchover)
        _check_written_again(expected, sections, rings)
        incoming.description_again(description)
        sections += incoming.setup_again(setup)
        if expected is _EXPECTED[0]:
            _check_queues(sections, rings[0].state)
    except PeerError:
        pass
    finally:
        for section in sections:
            close_descriptors(section.description, section.state)


def _check_queues(sections: Sequence[Section], queues: QueuesState) -> None:
    """What a destination asks of the rings' numbers, if its own rings are those that came."""
    setup = next(section.state for section in sections if section.description is QUEUES_SETUP)
    check_setup(setup)
    if max(setup.ring_counts, default=0) > VRING_INDEX_MAX + 1:
        return  # no device here has so many
    check_same_groups(setup, setup)
    arriving = Arriving(setup)
    arriving.check(queues)
    counters = arriving.counters(queues.counters)
    kinds = {kind.name: kind for kind in ENGINE_KINDS.values()}
    groups = zip(setup.group_engines, setup.ring_counts, strict=True)
    counted = ((kinds[setup.engines[engine].name], ring_count) for engine, ring_count in groups)
    assert len(counters) == 8 * sum(len(kind.counters) * kind.counter_sets(rings) for kind, rings in counted)


def _check_written_again(expected: Any, sections: list[Section], rings: list[Section]) -> None:
    """What was read can be written, and that reads as the same."""
    outgoing, setup = begun(sections)
    description = outgoing.describe(rings)
    switchover = outgoing.switchover(rings)
    incoming = IncomingStream(setup=expected[0], switchover=expected[1])
    incoming.description(description)
    copies = incoming.setup(bytes(setup.data), [(offset, OwnedFd(os.dup(fd))) for offset, fd in setup.fds])
    try:
        _, piece = begun(copies)
        assert piece.data == setup.data
        assert repr(incoming.switchover(bytes(switchover.data))) == repr(rings)
    finally:
        for section in copies:
            close_descriptors(section.description, section.state)


# -- frames of a handover -------------------------------------------------------------------------------------------


def frames(data: bytes) -> None:
    """What arrives on the channel: pieces, each behind its size and the number of its descriptors."""
    buffer = FrameBuffer()
    try:
        while len(data) >= 2:
            size, fd_count, data = data[0] + 1, data[1] % 4, data[2:]
            # fds.receive never gives descriptors without a byte.
            piece, data = data[:size], data[size:]
            if not piece:
                return
            buffer.feed(piece, _made_up(fd_count if fd_count < 3 else 0))
            while (frame := buffer.next_frame()) is not None:
                try:
                    _read_frame(frame.kind, frame.data)
                finally:
                    frame.close()
    except PeerError:
        pass
    finally:
        buffer.close()


def _read_frame(kind: FrameKind, data: bytes) -> None:
    match kind:
        case FrameKind.HELLO:
            hello = Hello.decode(data)
            assert Hello.decode(hello.encode()) == hello
            for each in hello.objects:
                if each.kind in KINDS:
                    _check_travels(REGISTRY.read_theirs(each.kind, each.options, each.origin or Origin.own()))
        case FrameKind.DONE:
            done = Done.decode(data)
            assert Done.decode(done.encode()) == done
        case FrameKind.REFUSE | FrameKind.CANCEL:
            reason = decode_reason(data)
            assert reason.isprintable()
            assert decode_reason(encode_reason(reason)) == reason
        case _:
            pass


def _check_travels(spec: Spec) -> None:
    there = REGISTRY.read_theirs(spec.kind, json.loads(json.dumps(to_mapping(spec))), Origin.own())
    for option in options_of(type(spec)):
        if option.fit is not Fit.NEVER:
            assert getattr(there, option.attribute) == getattr(spec, option.attribute), option.name


def _frame_seeds() -> Iterator[bytes]:
    options: dict[str, dict[str, object]] = {
        "netdev": {"type": "tap", "id": "net0", "ifname": "tap0"},
        "device": {"driver": "virtio-net", "id": "nic0", "netdev": "net0", "socket": "/run/vm1/nic0.sock"},
    }
    objects = tuple(HandoverObject(kind=kind, options=each) for kind, each in options.items())
    hello = Hello(version="0.1.0", local=True, running=True, objects=objects).encode()
    done = Done(serving_ns=1 << 40, phases=(("adopt", 1000), ("resume", 2000))).encode()
    yield _cut(_frame(FrameKind.HELLO, hello)) + b"\x00\x01\x20" + _cut(_frame(FrameKind.DONE, done))
    yield _cut(_frame(FrameKind.REFUSE, encode_reason("no such device ✓")) + _frame(FrameKind.READY, b""))
    # A descriptor in its place: byte 0x20 alone, inside a frame.
    yield _cut(_frame(FrameKind.SETUP, b"ab \n")[:-2]) + b"\x00\x01\x20" + b"\x00\x00\n"


def _frame(kind: FrameKind, payload: bytes) -> bytes:
    return struct.pack(">4sB3xI", b"LMIG", kind, len(payload)) + payload


def _cut(data: bytes) -> bytes:
    pieces = (data[start : start + 256] for start in range(0, len(data), 256))
    return b"".join(bytes([len(piece) - 1, 0]) + piece for piece in pieces)


# -- descriptors that arrive ----------------------------------------------------------------------------------------

KIND_MASK: Final = 0x0F
MISSING: Final = 0x10
DOUBLED: Final = 0x20
ELSEWHERE: Final = 0x40
"""Bits of the byte for each place: what comes there (0 is what belongs there), and how."""


def _listening_socket() -> OwnedFd:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("")  # the kernel chooses an abstract name
        sock.listen()
        return OwnedFd(sock.detach())


def _pipe() -> OwnedFd:
    reader, writer = os.pipe()
    os.close(writer)
    return OwnedFd(reader)


def _null() -> OwnedFd:
    return OwnedFd(os.open(os.devnull, os.O_RDWR))


_MAKERS: Final[Mapping[str, Callable[[], OwnedFd]]] = {
    FdKind.TAP: lambda: OwnedFd(os.open("/dev/net/tun", os.O_RDWR)),  # which no interface belongs to yet
    FdKind.SOCKET: lambda: OwnedFd(socket.socket(socket.AF_UNIX).detach()),
    FdKind.LISTENING_SOCKET: _listening_socket,
    FdKind.MEMORY: lambda: OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)),
    "eventfd": lambda: OwnedFd(os.eventfd(0)),
    "pidfd": lambda: OwnedFd(os.pidfd_open(os.getpid())),
    "pipe": _pipe,
    "directory": lambda: OwnedFd(os.open("/", os.O_RDONLY)),
    "datagrams": lambda: OwnedFd(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()),
    "internet": lambda: OwnedFd(socket.socket(socket.AF_INET).detach()),
    "null": _null,
}

_CAN_BE_MADE: Final = {name: name != FdKind.TAP or os.access("/dev/net/tun", os.R_OK | os.W_OK) for name in _MAKERS}

_KINDS: Final = tuple(_MAKERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Places:
    """A setup piece, and what each of its descriptors is declared as, by offset."""

    data: bytes
    declared: Mapping[int, FdKind | str | None]


def _places_of(sample: nic.Sample) -> _Places:
    with synthetic.open_descriptors(sample.descriptor_count) as fds:
        sections = sample.daemon(fds).setup
        _, piece = begun(sections)
        kinds = {
            placed.fd.fileno(): placed.kind
            for section in sections
            for layout in (section.description.layout, *(each.layout for each in section.description.subsections))
            for placed in layout.descriptors(section.state)
        }
        return _Places(data=bytes(piece.data), declared={offset: kinds[number] for offset, number in piece.fds})


_PLACES: Final = tuple(_places_of(sample) for sample in SAMPLES)


def descriptors(data: bytes) -> None:
    """The descriptors of a setup: the first byte says of which, then a byte for each place what comes there."""
    if not data:
        return
    places = _PLACES[data[0] % len(_PLACES)]
    arriving: dict[int, list[OwnedFd]] = {}
    is_right = True
    try:
        for (offset, declared), order in zip(
            places.declared.items(), data[1:].ljust(len(places.declared), b"\0"), strict=False
        ):
            belongs = declared if declared in _MAKERS else "null"
            name = _KINDS[order % len(_KINDS)] if order & KIND_MASK else belongs
            make = _MAKERS[name] if name and _CAN_BE_MADE[name] else _null
            at = places.data.find(b"\x20", offset + 1) if order & ELSEWHERE else offset
            if at < 0 or order & MISSING:
                at, count = offset, 0
            else:
                count = 2 if order & DOUBLED else 1
            arriving.setdefault(at, []).extend(make() for _ in range(count))
            is_right &= at == offset and count == 1
            is_right &= not isinstance(declared, FdKind) or (name == declared and _CAN_BE_MADE[declared])
        assert _arrives(places.data, arriving) == is_right, (is_right, data)
    finally:
        close_all(fd for fds in arriving.values() for fd in fds)


def _arrives(piece: bytes, arriving: Mapping[int, list[OwnedFd]]) -> bool:
    """Whether a setup frame is taken, when it comes in the pieces in which a channel sends it."""
    buffer = FrameBuffer()
    sections: list[Section] = []
    try:
        buffer.feed(_frame(FrameKind.SETUP, piece)[: -len(piece)])
        position = 0
        for at, fds in sorted(arriving.items()):
            buffer.feed(piece[position:at])
            buffer.feed(piece[at : at + 1], fds)
            position = at + 1
        buffer.feed(piece[position:])
        frame = buffer.next_frame()
        assert frame is not None
        sections = IncomingStream(setup=_EXPECTED[0][0], switchover={}).setup(frame.data, frame.fds)
        for section in sections:
            check_descriptors(section.description, section.state, section=section.name)
    except PeerError:
        return False
    finally:
        for section in sections:
            close_descriptors(section.description, section.state)
        buffer.close()
    return True


def _descriptor_seeds() -> Iterator[bytes]:
    for index, places in enumerate(_PLACES):
        count = len(places.declared)
        yield bytes([index, *bytes(count)])
        for order in (MISSING, DOUBLED, ELSEWHERE, 4):
            yield bytes([index, *bytes(count // 2), order, *bytes(count - count // 2)])


# -- localmig analyze -----------------------------------------------------------------------------------------------


def analysis(data: bytes) -> None:
    """A file that `localmig analyze` is shown."""
    try:
        found = analyze(data)
    except PeerError as error:
        printable(str(error)).encode()
        return
    assert all(line.isprintable() for line in show(found).split("\n"))
    json.dumps(to_json(found)).encode("ascii")
    ends = [section.offset + section.size for section in found.sections]
    assert all(start >= end for start, end in zip([s.offset for s in found.sections[1:]], ends, strict=False))


# -- QMP ------------------------------------------------------------------------------------------------------------


def qmp(data: bytes) -> None:
    """What a QMP client sends: the first byte says where it is cut and how many descriptors come."""
    if not data:
        return
    control, data = data[0], data[1:]
    whole = _answers((data,), fd_count=control & 0x03)
    size = (control >> 2) + 1
    cut = _answers((data[at : at + size] for at in range(0, len(data), size)), fd_count=0)
    if not control & 0x03:
        assert whole == cut, "answers depend on where the kernel cuts what a client sends"


def _answers(pieces: Iterable[bytes], *, fd_count: int) -> list[bytes]:
    session = Session(COMMANDS, _execute)
    answers: list[bytes] = []
    try:
        for piece in pieces:
            answers += session.receive(piece, _made_up(fd_count))
    except PeerError as error:
        answers.append(str(error).encode())
    finally:
        session.close()
    for answer in answers[:-1]:
        assert answer.endswith(b"\r\n")
        reader = Decoder()
        reader.feed(answer)
        (value,) = reader.values()
        assert not isinstance(value, JsonSyntaxError), answer
    return answers


def _execute(command: Command, values: Mapping[str, object]) -> object:
    for value in values.values():
        if isinstance(value, OwnedFd):
            value.close()
    return {}


# -- options --------------------------------------------------------------------------------------------------------


def options(data: bytes) -> None:
    """What stands on a command line: the option, a blank, its text as Python gives what is not UTF-8."""
    name, _, text = os.fsdecode(data).partition(" ")
    try:
        match name:
            case "--netdev" | "--device":
                kind = name.removeprefix("--")
                REGISTRY.help_for(kind, text)
                _check_travels(REGISTRY.parse(kind, text))
            case "--qmp":
                parse_monitor(text)
            case "--incoming":
                address = parse_incoming(text)
                assert parse_incoming(str(address)) == address
    except ConfigError as error:
        os.fsencode(str(error))


def config(data: bytes) -> None:
    """A file that describes a daemon."""
    try:
        read = parse_config(data.decode(), REGISTRY.read)
    except (ConfigError, UnicodeDecodeError):
        return
    for spec in read.objects:
        _check_travels(spec)


# -- all of them ----------------------------------------------------------------------------------------------------

_VECTORS: Final = tuple(sample.path for sample in SAMPLES)

TARGETS: Final[Mapping[str, Target]] = {
    "vhost-user": Target(run=vhost_user, seeds=(*_files("vhost-user"), MOVED_AND_REFUSED)),
    "sessions": Target(run=sessions, seeds=tuple(_session_seeds())),
    "stream": Target(
        run=stream,
        seeds=(
            *(stream_input(0, read_vector(path)) for path in _VECTORS),
            stream_input(1, read_vector(synthetic.VECTOR)),
        ),
    ),
    "frames": Target(run=frames, seeds=tuple(_frame_seeds())),
    "descriptors": Target(run=descriptors, seeds=tuple(_descriptor_seeds())),
    "analysis": Target(
        run=analysis, seeds=tuple(b"".join(read_vector(path)) for path in (*_VECTORS, synthetic.VECTOR))
    ),
    "qmp": Target(run=qmp, seeds=tuple(b"\x50" + line for line in _lines("qmp"))),
    "options": Target(run=options, seeds=tuple(_lines("options"))),
    "config": Target(run=config, seeds=tuple(_files("config"))),
}
