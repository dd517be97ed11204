"""HELLO, DONE and the reasons, which are JSON and text, and what SETUP begins with. No I/O.

Owns:        their fields, their encoding, the check of what a hostile other side wrote.
Never sees:  sockets, parts, what an object's options mean.
Read next:   daemon/objects.py, which reads the objects' options.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

from localmig.errors import PeerError
from localmig.fds import OwnedFd
from localmig.migration.channel import Frame
from localmig.service_manager import ServiceManager
from localmig.vmstate import Blob

PROTOCOL: Final = 2
"""Version of the handover protocol: frames, their order, what they promise."""

OBJECT_COUNT_MAX: Final = 20_000
"""Objects one daemon may hand over: 10,000 NICs with a netdev each."""

_CHANGES: Final = struct.Struct(">Q")

REASON_LENGTH_MAX: Final = 4096
"""Characters of a reason that are kept: some lines for people; the rest is noise."""

NOTES_MAX: Final = 10
"""Notes in a DONE. A fault that hits one ring of a guest mostly hits many, and ten lines show what it is."""

NOTE_LENGTH_MAX: Final = 256
"""Characters of a note that are kept: a line for people."""


@functools.cache
def program_version() -> str:
    """This program's version. A daemon asks when it starts: its files may be another release's later."""
    return metadata.version("localmig")


_ORIGIN_LENGTH_MAX: Final = 128
"""Letters of a package's name or version that are kept: what is longer helps nobody to install it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The distribution, as `pip install` names it, that a type of objects comes from."""

    distribution: str
    version: str

    @classmethod
    def own(cls) -> Origin:
        """This program."""
        return cls(distribution="localmig", version=program_version())

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class HandoverObject:
    """A netdev or a device; untrusted when it arrived.

    Attributes:
        kind: what it is.
        options: its options, in the form of the command line's JSON.
        origin: where its type comes from; None: it is a part of the program that said HELLO.
    """

    kind: str
    options: dict[str, object]
    origin: Origin | None = None

    def as_json(self) -> dict[str, object]:
        """Its form in HELLO."""
        fields: dict[str, object] = {"kind": self.kind, "options": self.options}
        if self.origin is not None:
            fields |= {"distribution": self.origin.distribution, "distribution-version": self.origin.version}
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """What each side says of itself first.

    Attributes:
        version: the program's version, for people: the stream's sections carry their own.
        local: the side's `local` parameter.
        running: whether the guest's rings run (source), or will run (destination: as the source).
        objects: what is handed over; the destination says none.
        service_manager: who watches the source's process, and is to watch the destination's; None for nobody.
    """

    version: str
    local: bool
    running: bool
    objects: tuple[HandoverObject, ...] = ()
    service_manager: ServiceManager | None = None

    def encode(self) -> bytes:
        """The frame's payload, without the descriptor's byte."""
        fields: dict[str, object] = {
            "protocol": PROTOCOL,
            "version": self.version,
            "local": self.local,
            "running": self.running,
            "objects": [each.as_json() for each in self.objects],
        }
        if self.service_manager is not None:
            fields["notify-socket"] = self.service_manager.address
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """What the other side said of itself.

        Raises:
            PeerError: another protocol version, or no HELLO at all.
        """
        fields = _read_object(data, "HELLO")
        if fields.get("protocol") != PROTOCOL:
            raise PeerError(
                f"handover protocol is {str(fields.get('protocol'))[:32]} there and {PROTOCOL} here: "
                "hand over between releases that share one"
            )
        version, local, running = (fields.get(name) for name in ("version", "local", "running"))
        objects = fields.get("objects")
        if not (
            isinstance(version, str)
            and isinstance(local, bool)
            and isinstance(running, bool)
            and isinstance(objects, list)
        ):
            raise PeerError("HELLO lacks 'version', 'local', 'running' or 'objects'")
        if len(objects) > OBJECT_COUNT_MAX:
            raise PeerError(f"HELLO has {len(objects)} objects, limit is {OBJECT_COUNT_MAX}")
        return cls(
            version=version[:64],
            local=local,
            running=running,
            objects=tuple(_read_handover_object(each) for each in objects),
            service_manager=ServiceManager.checked(manager) if (manager := fields.get("notify-socket")) else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What the destination reports once it serves.

    Attributes:
        serving_ns: CLOCK_MONOTONIC when the last ring ran again; of no use to a source on another machine.
        phases: (name, nanoseconds) of the destination's steps.
        notes: what an operator should know of how the guest goes on there. More than `NOTES_MAX` are counted only.
    """

    serving_ns: int
    phases: tuple[tuple[str, int], ...]
    notes: Sequence[str] = ()

    def encode(self) -> bytes:
        """The frame's payload."""
        notes = [note[:NOTE_LENGTH_MAX] for note in self.notes[:NOTES_MAX]]
        if more := len(self.notes) - len(notes):
            notes.append(f"{more} more of these are in the log of the destination")
        return json.dumps({"serving-ns": self.serving_ns, "phases": self.phases, "notes": notes}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Done:
        """Reads it. Raises PeerError if it is none."""
        fields = _read_object(data, "DONE")
        # A release from before has no notes.
        serving_ns, phases, notes = fields.get("serving-ns"), fields.get("phases"), fields.get("notes", [])
        if not (
            isinstance(serving_ns, int)
            and isinstance(notes, list)
            and all(isinstance(note, str) for note in notes)
            and isinstance(phases, list)
            and all(
                isinstance(phase, list) and len(phase) == 2 and isinstance(phase[0], str) and isinstance(phase[1], int)
                for phase in phases
            )
        ):
            raise PeerError("DONE lacks 'serving-ns' or 'phases', or has them or 'notes' in another form")
        return cls(
            serving_ns=serving_ns,
            phases=tuple((name[:64], ns) for name, ns in phases),
            notes=tuple(_printable(note[:NOTE_LENGTH_MAX]) for note in notes[: NOTES_MAX + 1]),
        )


def setup_payload(changes: int, blob: Blob) -> tuple[bytes, list[tuple[int, int]]]:
    """SETUP's payload: how many changes the sections of `blob` know of (see `peer.Changes`), then the sections.

    Returns the bytes and the descriptors, lent, each with its offset in them.
    """
    data = _CHANGES.pack(changes) + blob.data
    return data, [(offset + _CHANGES.size, fd) for offset, fd in blob.fds]


def read_setup(frame: Frame) -> tuple[int, bytes, list[tuple[int, OwnedFd]]]:
    """What `setup_payload` wrote: the changes, the sections, the descriptors; those are the caller's.

    Raises:
        PeerError: it is too short. Its descriptors are closed.
    """
    if len(frame.data) < _CHANGES.size:
        frame.close()
        raise PeerError(f"SETUP has {len(frame.data)} bytes, at least {_CHANGES.size} are needed")
    (changes,) = _CHANGES.unpack_from(frame.data)
    return changes, frame.data[_CHANGES.size :], [(offset - _CHANGES.size, fd) for offset, fd in frame.fds]


def encode_reason(reason: str) -> bytes:
    """A reason as the payload of REFUSE or CANCEL."""
    return reason[:REASON_LENGTH_MAX].encode(errors="replace")


def decode_reason(data: bytes) -> str:
    """The reason in REFUSE or CANCEL, fit to be shown."""
    return _printable(data.decode(errors="replace")[:REASON_LENGTH_MAX])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _read_object(data: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PeerError(f"{name} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise PeerError(f"{name} is no JSON object")
    return fields


def _read_handover_object(fields: object) -> HandoverObject:
    if not isinstance(fields, dict):
        raise PeerError("HELLO has an object that is no JSON object")
    kind, options = fields.get("kind"), fields.get("options")
    if not (isinstance(kind, str) and isinstance(options, dict)):
        raise PeerError("HELLO has an object without 'kind' or 'options'")
    return HandoverObject(kind=kind[:64], options=options, origin=_read_origin(fields))


def _read_origin(fields: dict[str, object]) -> Origin | None:
    distribution, version = fields.get("distribution"), fields.get("distribution-version")
    if distribution is None and version is None:
        return None
    if not (isinstance(distribution, str) and isinstance(version, str)):
        raise PeerError("HELLO has an object whose 'distribution' or 'distribution-version' is no string")
    return Origin(
        distribution=_printable(distribution[:_ORIGIN_LENGTH_MAX]), version=_printable(version[:_ORIGIN_LENGTH_MAX])
    )
