"""A liar between a source and a destination: passes on what they say, but for the one frame it lies about.

Owns:        the relay, its socket pairs; how a frame is taken apart, changed and put together again.
Never sees:  which lies there are.
Read next:   test_lies.py.

Both daemons are real ones and honest; what one of them hears the other say is not. Descriptors pass, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from localmig.device_api.device_state import DEVICE
from localmig.device_api.queues_state import QUEUES, QUEUES_SETUP
from localmig.devices.virtio_net.state import VIRTIO_NET
from localmig.errors import LocalmigError
from localmig.fds import OwnedFd, close_all
from localmig.migration import stream as stream_module
from localmig.migration.channel import Channel, Frame, FrameKind
from localmig.migration.hello import read_setup, setup_payload
from localmig.migration.stream import IncomingStream, Section, section_name
from localmig.migration.stream_format import MAGIC, VERSION, Mark
from localmig.netdevs.state import TAP
from localmig.netdevs.stream import IN_HAND, STREAM
from localmig.vmstate import Blob, Description, close_descriptors, explain, save

PATIENCE_S: Final = 20.0
"""No daemon takes so long for anything here."""

HEADER: Final = struct.Struct(">4sB3xI")
_VMDESC_HEADER: Final = struct.Struct(">BI")

SETUP_SECTIONS: Final = {
    section_name(part_id, description): description
    for part_id, description in (
        *(("net0", TAP), ("net1", TAP), ("net2", STREAM)),
        *(("nic0", VIRTIO_NET), ("nic0", DEVICE), ("nic1", VIRTIO_NET), ("nic1", DEVICE)),
        ("*", QUEUES_SETUP),
    )
}
SWITCHOVER_SECTIONS: Final[dict[str, Description[Any]]] = {
    section_name("net2", IN_HAND): IN_HAND,
    section_name("*", QUEUES): QUEUES,
}


@dataclass(kw_only=True, slots=True)
class Said:
    """A frame to be said; `fds` are this object's. A SETUP has the DESCRIPTION that was said before it."""

    kind: FrameKind
    data: bytes = b""
    fds: list[tuple[int, OwnedFd]] = field(default_factory=list)
    description: Said | None = None


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes to be sent as they are, which may be no frame."""

    data: bytes


class Hangup:
    """The channel ends here, both ways."""


Piece = Said | Raw | Hangup
Tell = Callable[[Said], Iterable[Piece]]
"""What is said in a frame's place."""


class Liar:
    """Stands between the two until one of them ends the channel.

    Args:
        teller: whose frames are changed.
        kind: which of them; the first one of that kind.
        tell: what is said in its place.

    Attributes:
        ours: for the source and for the destination, to be given to them and closed.
    """

    def __init__(self, teller: str, kind: FrameKind, tell: Tell) -> None:
        self._teller, self._kind, self._tell = teller, kind, tell
        self.has_lied = False
        source, near = socket.socketpair()
        destination, far = socket.socketpair()
        self.ours = {"source": source, "destination": destination}
        for sock in (near, far):
            sock.setblocking(False)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(near, far)), name="liar")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in self.ours.values():
            sock.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    async def _run(self, near: socket.socket, far: socket.socket) -> None:
        channels = Channel(near), Channel(far)
        ways = [
            asyncio.create_task(self._pass_on("source", *channels)),
            asyncio.create_task(self._pass_on("destination", *reversed(channels))),
        ]
        # What one side said last still arrives: its own way ends when it closes its end.
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for channel in channels:
            channel.close()

    async def _pass_on(self, teller: str, hear: Channel, say: Channel) -> None:
        description: Said | None = None
        with contextlib.suppress(LocalmigError):
            while True:
                frame = await hear.receive(timeout_s=None)
                heard = Said(kind=frame.kind, data=frame.data, fds=frame.fds)
                pieces: list[Piece] = [heard]
                if (self._kind, frame.kind) == (FrameKind.SETUP, FrameKind.DESCRIPTION):
                    description = heard  # it may have to fit the lie
                    continue
                if not self.has_lied and (teller, frame.kind) == (self._teller, self._kind):
                    self.has_lied = True
                    heard.description = description
                    pieces = list(self._tell(heard))
                if description is not None:
                    pieces.insert(0, description)
                    description = None
                for piece in pieces:
                    if isinstance(piece, Hangup):
                        return
                    # Who is gone hears nothing more, and may have said something that is on its way.
                    with contextlib.suppress(LocalmigError, OSError):
                        await _say(say, piece)


async def _say(channel: Channel, piece: Said | Raw) -> None:
    if isinstance(piece, Raw):
        await asyncio.get_running_loop().sock_sendall(channel._sock, piece.data)
        return
    try:
        lent = [(offset, fd.fileno()) for offset, fd in piece.fds]
        await channel.send(piece.kind, piece.data, lent, timeout_s=PATIENCE_S)
    finally:
        close_all(fd for _, fd in piece.fds)


# -- frames taken apart -----------------------------------------------------------------------------------------


def header(kind: int, length: int, *, magic: bytes = b"LMIG") -> bytes:
    return HEADER.pack(magic, kind, length)


def frame(said: Said) -> bytes:
    """All bytes of a frame, without its descriptors."""
    return header(said.kind, len(said.data)) + said.data


def json_of(change: Callable[[dict[str, Any]], None]) -> Tell:
    """A frame whose payload is JSON (HELLO, with the bytes of its descriptors at its end), changed."""

    def tell(said: Said) -> Iterable[Piece]:
        fields = json.loads(said.data)
        change(fields)
        data = json.dumps(fields).encode()
        said.fds = list(enumerate((fd for _, fd in said.fds), len(data)))
        said.data = data + b" " * len(said.fds)
        yield said

    return tell


def vmdesc_of(change: Callable[[dict[str, Any]], None]) -> Tell:
    """A DESCRIPTION whose JSON is changed."""

    def tell(said: Said) -> Iterable[Piece]:
        _describe_anew(said, change)
        yield said

    return tell


def _describe_anew(description: Said, change: Callable[[dict[str, Any]], None]) -> None:
    vmdesc = json.loads(description.data[_VMDESC_HEADER.size :])
    change(vmdesc)
    encoded = json.dumps(vmdesc).encode()
    description.data = _VMDESC_HEADER.pack(Mark.VMDESCRIPTION, len(encoded)) + encoded


Sections = list[tuple[int, Section]]
"""Each with its number."""


def sections_of(change: Callable[[Sections], None]) -> Tell:
    """A SETUP or SWITCHOVER put together from other sections than it had. A SETUP is described as it is then."""

    def tell(said: Said) -> Iterable[Piece]:
        stream = IncomingStream(setup=SETUP_SECTIONS, switchover=SWITCHOVER_SECTIONS)
        changes = 0
        if said.kind is FrameKind.SETUP:
            changes, data, fds = read_setup(Frame(kind=said.kind, data=said.data, fds=said.fds))
            arrived = stream.setup(data, fds)
            first = 0
        else:
            stream._numbers = {name: number for number, name in enumerate(SETUP_SECTIONS)}
            arrived = stream.switchover(said.data)
            first = len(SETUP_SECTIONS)
        sections = list(enumerate(arrived, first))
        change(sections)
        if said.description is not None:
            _describe_anew(said.description, lambda vmdesc: _explain_again(vmdesc, sections))
        yield _put_together(said.kind, changes, sections)
        for section in arrived:
            close_descriptors(section.description, section.state)

    return tell


def _explain_again(vmdesc: dict[str, Any], sections: Sections) -> None:
    states = {section.name: explain(section.description, section.state) for _, section in sections}
    for device in vmdesc["devices"]:
        device.update(states.get(device["name"], {}))


def _put_together(kind: FrameKind, changes: int, sections: Sections) -> Said:
    piece = Blob()
    if kind is FrameKind.SETUP:
        piece.data += struct.pack(">IIB", MAGIC, VERSION, Mark.CONFIGURATION)
        machine = stream_module._Configuration(machine=stream_module.MACHINE)
        save(stream_module._CONFIGURATION_SECTION, machine, piece)
    for number, section in sections:
        stream_module._append([section], piece, number)
    if kind is FrameKind.SWITCHOVER:
        piece.data.append(Mark.EOF)
    data, lent = setup_payload(changes, piece) if kind is FrameKind.SETUP else (bytes(piece.data), piece.fds)
    # The states own them and are sent with these copies.
    return Said(kind=kind, data=data, fds=[(offset, OwnedFd(os.dup(number))) for offset, number in lent])


def state_of(name: str, path: str, value: Any) -> Tell:
    """A SETUP or SWITCHOVER whose section `name` has `value` at `path` (`socket.listener.fd`, `queues[1]`).

    A function is called with what is there, and with the states of all sections.
    """

    def change(sections: Sections) -> None:
        states = {section.name: section.state for _, section in sections}
        for index, (number, section) in enumerate(sections):
            if section.name == name:
                state = _replaced(section.state, re.findall(r"\w+", path), value, states)
                sections[index] = number, dataclasses.replace(section, state=state)

    return sections_of(change)


def _replaced(state: Any, path: Sequence[str], value: Any, states: dict[str, Any]) -> Any:
    if not path:
        return value(state, states) if callable(value) else value
    name, *rest = path
    if name.isdigit():
        index = int(name)
        return (*state[:index], _replaced(state[index], rest, value, states), *state[index + 1 :])
    inner = _replaced(getattr(state, name), rest, value, states)
    replace = dataclasses.replace if dataclasses.is_dataclass(state) else type(state)._replace
    return replace(state, **{name: inner})


def bytes_of(change: Callable[[bytearray], None]) -> Tell:
    """A frame whose payload is changed where no descriptor stands behind it."""

    def tell(said: Said) -> Iterable[Piece]:
        data = bytearray(said.data)
        change(data)
        said.data = bytes(data)
        yield said

    return tell
