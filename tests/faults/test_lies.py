"""Every lie one side of a handover can be told about the other: found, said why, and paid for by nobody's guest.

Two real daemons hand two NICs over, one with a guest that is pinged all the while, through somebody who lies about one
frame. Afterwards the source serves, what it holds is what it held, and both sides say what was wrong.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.faults.liar import (
    Hangup,
    Liar,
    Piece,
    Raw,
    Said,
    Sections,
    Tell,
    bytes_of,
    header,
    json_of,
    sections_of,
    state_of,
    vmdesc_of,
)
from tests.faults.test_handover_processes import give
from tests.kit.site import new_site

from localmig.fds import OwnedFd
from localmig.migration.channel import LENGTH_MAX, FrameKind
from localmig.testing.frontend import NetGuest

pytestmark = pytest.mark.xdist_group("lies")  # they share an honest source, and its descriptors are counted behind all

if TYPE_CHECKING:
    from tests.kit.processes import DaemonProcess
    from tests.kit.site import Site

SOURCE: Final = "source"
DESTINATION: Final = "destination"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lie:
    """One line of the table.

    Attributes:
        name: what is not so.
        teller: of whom it is said.
        kind: the frame that lies.
        tell: what is said in its place.
        reason: what both sides say, a regular expression.
        stops: whether it is found once rings stand still; else they never do. None: that depends on who is quicker.
        past_commit: whether the destination has the guest by then. It is killed for it, and need not have said why.
    """

    name: str
    teller: str
    kind: FrameKind
    tell: Tell
    reason: str
    stops: bool | None = False
    past_commit: bool = False

    def __str__(self) -> str:
        return f"{self.teller}-{self.kind.name}-{self.name}".replace(" ", "-")


def told_by_source(kind: FrameKind, *rows: tuple[str, Tell, str]) -> list[Lie]:
    return [
        Lie(
            name=name,
            teller=SOURCE,
            kind=kind,
            tell=tell,
            reason=why,
            stops=_stops(kind, tell),
            past_commit=kind is FrameKind.SWITCHOVER and tell is twice,
        )
        for name, tell, why in rows
    ]


def _stops(kind: FrameKind, tell: Tell) -> bool | None:
    if kind is FrameKind.SETUP and tell in (twice, described_again, changed_without_setup):
        return None  # the setup is acknowledged before what follows is looked at
    return kind >= FrameKind.SWITCHOVER


def told_by_destination(kind: FrameKind, *rows: tuple[str, Tell, str]) -> list[Lie]:
    return [
        Lie(
            name=name,
            teller=DESTINATION,
            kind=kind,
            tell=tell,
            reason=why,
            stops=kind >= FrameKind.READY,
            past_commit=kind is FrameKind.DONE,
        )
        for name, tell, why in rows
    ]


# -- what can be said -------------------------------------------------------------------------------------------


def instead(*pieces: Piece) -> Tell:
    def tell(said: Said) -> Iterable[Piece]:
        for _, fd in said.fds:
            fd.close()
        return pieces

    return tell


def besides(*pieces: Piece) -> Tell:
    return lambda said: (said, *pieces)


def first(*pieces: Piece) -> Tell:
    return lambda said: (*pieces, said)


def without_descriptors(said: Said) -> Iterable[Piece]:
    for _, fd in said.fds:
        fd.close()
    said.fds = []
    yield said


def with_descriptor(number: int, make: Callable[[], OwnedFd]) -> Tell:
    """One descriptor of a frame is another one."""

    def tell(said: Said) -> Iterable[Piece]:
        place, fd = said.fds[number]
        fd.close()
        said.fds[number] = place, make()
        yield said

    return tell


def without_one(number: int) -> Tell:
    def tell(said: Said) -> Iterable[Piece]:
        said.fds.pop(number)[1].close()
        yield said

    return tell


def twice(said: Said) -> Iterable[Piece]:
    yield Said(kind=said.kind, data=said.data, fds=[(place, fd.duplicate()) for place, fd in said.fds])
    yield said


def described_again(said: Said) -> Iterable[Piece]:
    """As if all that is described, rings and all, came once more."""
    assert said.description is not None
    again = said.description.data
    yield said
    yield Said(kind=FrameKind.DESCRIPTION, data=again)


def changed_without_setup(said: Said) -> Iterable[Piece]:
    """The description of a change, and the change does not follow."""
    yield said
    vmdesc = json.dumps({"devices": []}).encode()
    yield Said(kind=FrameKind.DESCRIPTION, data=b"\x06" + len(vmdesc).to_bytes(4, "big") + vmdesc)


def spoilt(kind: FrameKind, magic: bytes) -> Tell:
    return instead(Raw(header(kind, 0, magic=magic)))


def too_long(kind: FrameKind) -> Tell:
    return instead(Raw(header(kind, LENGTH_MAX[kind] + 1)))


def byte_at(offset: int, value: int) -> Tell:
    def change(data: bytearray) -> None:
        data[offset] = value

    return bytes_of(change)


def cut_by(count: int) -> Tell:
    def change(data: bytearray) -> None:
        del data[-count:]

    return bytes_of(change)


def longer(said: Said) -> Iterable[Piece]:
    said.data += b"\0"
    yield said


def setting(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    """A change of JSON: the value at `path`."""

    def change(fields: dict[str, Any]) -> None:
        at: Any = fields
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = to

    return change


def eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))


def null() -> OwnedFd:
    return OwnedFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))


def small_file() -> OwnedFd:
    return OwnedFd(os.memfd_create("small", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))


def small_sealed_file() -> OwnedFd:
    fd = small_file()
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def connection() -> OwnedFd:
    ours, theirs = socket.socketpair()
    theirs.close()
    return OwnedFd(ours.detach())


def made(make: Callable[[], OwnedFd]) -> Callable[[OwnedFd, object], OwnedFd]:
    """Another descriptor in place of the one that is there."""

    def replace(fd: OwnedFd, _: object) -> OwnedFd:
        with make() as other:
            os.dup2(other.fileno(), fd.fileno(), inheritable=False)
        return fd

    return replace


def that_of(name: str, *path: str | int) -> Callable[[OwnedFd, dict[str, Any]], OwnedFd]:
    """The descriptor that is at another place already, in place of the one that is there."""

    def replace(fd: OwnedFd, states: dict[str, Any]) -> OwnedFd:
        at: Any = states[name]
        for step in path:
            at = at[step] if isinstance(step, int) else getattr(at, step)
        os.dup2(at.fileno(), fd.fileno(), inheritable=False)
        return fd

    return replace


def section_twice(sections: Sections) -> None:
    sections.append((len(sections), sections[0][1]))


def section_missing(sections: Sections) -> None:
    sections.pop()


def sections_reversed(sections: Sections) -> None:
    sections.reverse()


def section_renamed(sections: Sections) -> None:
    number, section = sections[0]
    sections[0] = number, dataclasses.replace(section, name="net7/tap")


CHANGES_SIZE: Final = 8
"""Bytes in front of SETUP's sections."""

NIC: Final = "nic0/vhost-user-device"
OTHER_NIC: Final = "nic1/vhost-user-device"
NIC_OWN: Final = "nic0/virtio-net"
NET: Final = "net0/tap"
STREAM: Final = "net2/stream"
IN_HAND: Final = "net2/stream-in-hand"
QUEUES: Final = "*/queues"
QUEUES_SETUP: Final = "*/queues-setup"
SESSION: Final = "socket.connections[0].session"


def one_group_less(setup: Any) -> Any:
    """Rings that nobody hands over."""
    return dataclasses.replace(
        setup, groups=setup.groups[:-1], group_engines=setup.group_engines[:-1], ring_counts=setup.ring_counts[:-1]
    )


def without_last(size: int) -> Callable[[bytes, object], bytes]:
    """An array without its last bytes."""
    return lambda array, _: array[:-size]


def moved(source: str, destination: str, size: int) -> Callable[[Any, object], Any]:
    """As many bytes in all, of which some are in another array."""

    def change(state: Any, _: object) -> Any:
        less, more = getattr(state, source), getattr(state, destination)
        return state._replace(**{source: less[:-size], destination: more + bytes(size)})

    return change


def byte_of_array(place: int, value: int) -> Callable[[bytes, object], bytes]:
    """An array with another byte at `place`."""
    return lambda array, _: array[:place] + bytes((value,)) + array[place + 1 :]


def of_another_program(session: Any, _: object) -> Any:
    """A session that was offered, and took, what this program does not know."""
    session.features_offered |= 1 << 40
    session.features_acked |= 1 << 40
    return session


# -- the table --------------------------------------------------------------------------------------------------

LIES: Final = [
    *told_by_source(
        FrameKind.HELLO,
        ("another protocol", json_of(setting("protocol", to=1)), "handover protocol is 1 there and 2 here"),
        ("local off", json_of(setting("local", to=False)), "'local' is off in the source and on in the destination"),
        ("no JSON", instead(Said(kind=FrameKind.HELLO, data=b"{ ")), "HELLO is no JSON"),
        ("no objects", json_of(setting("objects", to=None)), "HELLO lacks .* or 'objects'"),
        ("unknown kind", json_of(setting("objects", 0, "kind", to="chardev")), "kind 'chardev'"),
        ("unknown option", json_of(setting("objects", 0, "options", "color", to="red")), "color"),
        ("bad value", json_of(setting("objects", 0, "options", "queues", to=-1)), "queues"),
        ("a device without netdev", json_of(setting("objects", 3, "options", "netdev", to="net7")), "net7"),
        ("no pidfd", without_descriptors, "does not pass descriptors"),
        ("an eventfd for a pidfd", with_descriptor(0, eventfd), "is no pidfd of another process: it is no pidfd"),
        ("a file for a revocation", with_descriptor(1, null), "behind the pidfd in HELLO is no eventfd"),
        ("a file for the changes", with_descriptor(2, null), "behind the pidfd in HELLO is no eventfd"),
        ("a descriptor less", without_one(1), "HELLO came with 2 descriptors, expected 3 at its end"),
        ("bad magic", spoilt(FrameKind.HELLO, b"QEVM"), "starts with 5145564d, expected 4c4d4947"),
        ("too long", too_long(FrameKind.HELLO), "HELLO frame has 4194305 bytes, limit is 4194304"),
        ("twice", twice, "HELLO came where DESCRIPTION was expected"),
    ),
    *told_by_source(
        FrameKind.DESCRIPTION,
        ("no JSON", byte_at(5, ord("[")), "description piece of the migration stream: is no JSON"),
        ("too short", cut_by(1), "description piece"),
        ("too long", longer, "description piece of the migration stream: 1 bytes are left over"),
        (
            "another version",
            vmdesc_of(setting("devices", 0, "version", to=9)),
            r'version 9 of section "net0/tap".*1\.\.1',
        ),
        (
            "a section missing",
            vmdesc_of(lambda v: v["devices"].pop()),
            'does not tell of section "\\*/queues"',
        ),
        ("a section twice", vmdesc_of(lambda v: v["devices"].append(v["devices"][0])), "tells of a section twice"),
        (
            "another section",
            vmdesc_of(setting("devices", 0, "name", to="net7/tap")),
            'does not tell of section "net0/tap"',
        ),
        ("one section more", vmdesc_of(lambda v: v["devices"].append({**v["devices"][0], "name": "x/tap"})), "x/tap"),
        (
            "another field",
            vmdesc_of(setting("devices", 0, "fields", 2, "name", to="mtu_max")),
            'section "net0/tap", as described: has a field "mtu_max", in version 1 there are ',
        ),
        (
            "a field of another size",
            vmdesc_of(setting("devices", 0, "fields", 2, "size", to=8)),
            'section "net0/tap", as described: field "mtu" is uint',
        ),
        (
            "no fields",
            vmdesc_of(setting("devices", 0, "fields", to={})),
            'section "net0/tap", as described: has no list of fields',
        ),
        (
            "a longer section",
            vmdesc_of(setting("devices", 0, "fields", 1, "size", to=77)),
            r'section "net0/tap" has \d+ bytes, described were \d+',
        ),
        ("left out", instead(), "SETUP came where DESCRIPTION was expected"),
        ("twice", twice, "DESCRIPTION came where SETUP was expected"),
        ("COMMIT", first(Said(kind=FrameKind.COMMIT, data=bytes(8))), "COMMIT came where DESCRIPTION was expected"),
        ("unknown frame", instead(Raw(header(77, 0))), "frame kind 77 is unknown, the last one known is 10"),
    ),
    *told_by_source(
        FrameKind.SETUP,
        (
            "bad magic",
            byte_at(CHANGES_SIZE, 0),
            "setup piece of the migration stream: starts with 0x0045564d, expected 0x5145564d",
        ),
        ("another stream version", byte_at(CHANGES_SIZE + 7, 4), "has version 4, expected 3"),
        ("too short", cut_by(1), "setup piece"),
        ("too long", longer, "setup piece of the migration stream: 1 bytes are left over"),
        ("a section twice", sections_of(section_twice), 'section "net0/tap" came twice'),
        ("a section missing", sections_of(section_missing), 'section "\\*/queues-setup" is missing'),
        ("sections out of order", sections_of(sections_reversed), "is number 7 instance 0, expected number 0"),
        ("an unknown section", sections_of(section_renamed), 'section "net7/tap" was not expected'),
        ("no descriptors", without_descriptors, "has no descriptor at offset"),
        ("one descriptor missing", without_one(3), "has no descriptor at offset"),
        ("twice", twice, "SETUP came where SWITCHOVER or DESCRIPTION was expected"),
        ("changes that nobody made", byte_at(CHANGES_SIZE - 1, 7), "SETUP knows of 7 changes, the source made 0"),
        (
            "no changes",
            instead(Said(kind=FrameKind.SETUP, data=b"1234567")),
            "SETUP has 7 bytes, at least 8 are needed",
        ),
        (
            "everything described again",
            described_again,
            r'tells of a section "net2/stream-in-hand" of .*, which was not expected',
        ),
        ("a change that never comes", changed_without_setup, "SWITCHOVER came where SETUP was expected"),
        ("SWITCHOVER", first(Said(kind=FrameKind.SWITCHOVER)), "SWITCHOVER came where SETUP was expected"),
        # What the descriptors are.
        (
            "no TAP",
            state_of(NET, "descriptors.queues[0]", made(null)),
            r"queues\[0\].* kind 'tap', what came is '/dev/null'",
        ),
        (
            "no stream",
            state_of(STREAM, "descriptors.connection", made(null)),
            "kind 'socket', what came is '/dev/null'",
        ),
        (
            "a listener for a stream",
            state_of(STREAM, "descriptors.connection", that_of(STREAM, "descriptors", "listener", "fd")),
            "kind 'socket', what came is 'listening-socket'",
        ),
        (
            "a stream for a listener",
            state_of(STREAM, "descriptors.listener.fd", made(connection)),
            "kind 'listening-socket', what came is 'socket'",
        ),
        (
            "no stream's listener",
            state_of(STREAM, "descriptors.listener", None),
            "netdev 'net2': server=on, and the source has no listening socket",
        ),
        (
            "no memory for what is in hand",
            state_of(STREAM, "descriptors.in_hand", made(eventfd)),
            "kind 'memory', what came is 'anon_inode:\\[eventfd\\]'",
        ),
        (
            "no listener",
            state_of(NIC, "socket.listener.fd", made(connection)),
            "kind 'listening-socket', what came is 'socket'",
        ),
        (
            "a listener for a connection",
            state_of(NIC, "socket.connections[0].connection", that_of(NIC, "socket", "listener", "fd")),
            "kind 'socket', what came is 'listening-socket'",
        ),
        (
            "no ledger",
            state_of(NIC, "socket.connections[0].ledger", made(eventfd)),
            "kind 'memory', what came is 'anon_inode:\\[eventfd\\]'",
        ),
        (
            "a queue twice",
            state_of(NET, "descriptors.queues[1]", that_of(NET, "descriptors", "queues", 0)),
            "netdev 'net0': queues 0 and 1 are one and the same",
        ),
        (
            "a queue of another interface",
            state_of(NET, "descriptors.queues[1]", that_of("net1/tap", "descriptors", "queues", 0)),
            "netdev 'net0': queue 1 is one of 'tap1', not of 'tap0'",
        ),
        (
            "one connection for two NICs",
            state_of(OTHER_NIC, "socket.connections[0]", lambda _, states: states[NIC].socket.connections[0]),
            'of section "nic0/vhost-user-device" and field .* of section "nic1/vhost-user-device" are one and the same',
        ),
        (
            "smaller guest memory",
            state_of(NIC, f"{SESSION}.regions[0].fd", made(small_sealed_file)),
            "which has 0x0 and is sealed against shrinking: it is another file",
        ),
        ("a small ledger", state_of(NIC, "socket.connections[0].ledger", made(small_file)), "ledger"),
        # What they are told to be.
        (
            "features that nobody can serve",
            state_of(NIC, "features_acked", 1 << 40),
            "features 0x10000000000, of which 0x10000000000 cannot be served here",
        ),
        (
            "features that the session was not offered",
            state_of(NIC, f"{SESSION}.features_acked", 1 << 40),
            "0x10000000000 are not among the offered",
        ),
        (
            "a session of a program that knows more",
            state_of(NIC, SESSION, of_another_program),
            "of which 0x10000000000 cannot be served here",
        ),
        ("a short address", state_of(NIC_OWN, "mac", b"\1\2\3"), "Ethernet address of 3 bytes, must be 6"),
        ("a short config", state_of(NIC, "config", b"\1\2\3"), "configuration space has 3 bytes, expected 24"),
        (
            "fewer vrings",
            state_of(NIC, f"{SESSION}.vrings", lambda v, _: v[:2]),
            "session has 2 vrings, the device has 5",
        ),
        ("a vring of no size", state_of(NIC, f"{SESSION}.vrings[0].size", 40000), "40000"),
        (
            "an owner that is not there",
            state_of(NIC, "socket.owner", 7),
            r"device 'nic0': session 7 is said to own, and the sessions that came are \[1\]",
        ),
        (
            "no number for a session",
            state_of(NIC, "socket.connections[0].number", 0),
            r"device 'nic0': sessions came with the numbers \[0\], must be from 1 to 1",
        ),
        (
            "more sessions than were opened",
            state_of(NIC, "socket.opened_count", 0),
            r"sessions came with the numbers \[1\], must be from 1 to 0",
        ),
        (
            "a session twice",
            state_of(NIC, "socket.connections", lambda each, _: (*each, *each)),
            "are one and the same socket",
        ),
        (
            "a short announced address",
            state_of(NIC, f"{SESSION}.announced_mac", b"\1\2"),
            "announced address has 2 bytes, must be 6",
        ),
        ("a ring without ledger", state_of(NIC, "socket.connections[0].ledger", None), "no ledger came"),
        ("a queue less", state_of(NET, "descriptors.queues", lambda q, _: q[:1]), "has queues=2 here and 1 there"),
        (
            "no queue attached",
            state_of(NET, "descriptors.attached", (False, True)),
            "its 2 queues cannot be attached as told",
        ),
        (
            "another interface",
            state_of(NET, "descriptors.ifname_opened", "tap7"),
            "has ifname=tap0 here and tap7 there",
        ),
        ("another name", state_of(NET, "ifname", "tap7"), "queue 0 is one of 'tap0', not of 'tap7'"),
        ("no interface's name", state_of(NET, "descriptors.ifname_opened", "a\0b"), "is no interface name"),
        ("no interface's number", state_of(NET, "descriptors.ifindex", 1 << 31), "2147483648 is no interface's number"),
        (
            "a netlink socket that is none",
            state_of(NET, "descriptors.netlink", made(small_file)),
            "is a descriptor of kind 'netlink'",
        ),
        ("a vnet header of 11 bytes", state_of(NET, "vnet_header_length", 11), "11"),
        (
            "a relative downscript",
            state_of(NET, "descriptors.downscript", "./down"),
            "downscript './down' is no absolute path",
        ),
        (
            "fewer groups of rings",
            state_of(QUEUES_SETUP, "", lambda state, _: one_group_less(state)),
            "the source has 4 groups of rings, this daemon has 5: the rest is the same",
        ),
        (
            "fewer groups than engines of groups",
            state_of(QUEUES_SETUP, "groups", ("nic0/0",)),
            "the source has 1 groups of rings, the engines of 5 and the ring counts of 5",
        ),
        (
            "another group of rings",
            state_of(QUEUES_SETUP, "groups[1]", "nic0/7"),
            "the source has 5 groups of rings, this daemon has 5: 'nic0/7' stands there for 'nic0/1' here",
        ),
        (
            "another ring count",
            state_of(QUEUES_SETUP, "ring_counts[3]", 3),
            "'nic1/0' has 3 rings there and 2 here",
        ),
        (
            "an engine that nobody told of",
            state_of(QUEUES_SETUP, "group_engines[2]", 2),
            "a group of rings has engine 2, the source has 2 of them",
        ),
        (
            "an engine that is none",
            state_of(QUEUES_SETUP, "engines[0].name", "steam"),
            "the source has an engine 'steam', this release has queue-pair, callbacks",
        ),
        (
            "another engine",
            state_of(QUEUES_SETUP, "engines[0].name", "callbacks"),
            "rings 'nic0/0' are served by 'callbacks' there and by 'queue-pair' here",
        ),
        ("memory that overlaps", state_of(NIC, f"{SESSION}.regions", lambda r, _: (*r, r[0])), "overlap|memory"),
    ),
    *told_by_source(
        FrameKind.SWITCHOVER,
        ("too short", cut_by(1), "switchover piece"),
        ("too long", longer, "switchover piece of the migration stream: 1 bytes are left over"),
        ("nothing", instead(Said(kind=FrameKind.SWITCHOVER)), "switchover piece"),
        (
            "an array too short",
            state_of(QUEUES, "counters", without_last(8)),
            r'section "\*/queues" has \d+ bytes, described were \d+',
        ),
        (
            "an array too long",
            state_of(QUEUES, "positions", lambda array, _: array + bytes(2)),
            r'section "\*/queues" has \d+ bytes, described were \d+',
        ),
        (
            "positions of two rings less",
            state_of(QUEUES, "", moved("positions", "waiting", 4)),
            "6 positions came, expected 8",
        ),
        (
            "positions of two rings more",
            state_of(QUEUES, "", moved("waiting", "positions", 4)),
            "10 positions came, expected 8",
        ),
        (
            "more rings that failed",
            state_of(QUEUES, "", moved("counters", "failed", 8)),
            "16 failed rings came, expected 8",
        ),
        (
            "more frames that wait",
            state_of(QUEUES, "", moved("counters", "waiting", 8)),
            "5 waiting frames came, expected 3",
        ),
        (
            "a position outside",
            state_of(QUEUES, "positions", byte_of_array(0, 0x7F)),
            r"'nic0/0': rx ring: position .* is outside the ring's",
        ),
        (
            "a ring that failed eight times",
            state_of(QUEUES, "failed", byte_of_array(0, 8)),
            "a ring has failed 8, which is 0 or 1",
        ),
        (
            "a frame that is too long",
            state_of(QUEUES, "waiting", byte_of_array(0, 1)),
            r"a frame that waits for its guest has 16777216 bytes, limit is \d+",
        ),
        (
            "a frame that is not there",
            state_of(QUEUES, "waiting", byte_of_array(3, 60)),
            "a frame that waits for its guest is not in its file",
        ),
        (
            "more in hand than can be",
            state_of(IN_HAND, "unsent", 1 << 20),
            "netdev 'net2': 1048576 bytes are in hand, limit is 135168",
        ),
        ("in hand what is not in its file", state_of(IN_HAND, "read", 100), "netdev 'net2': what is in hand is not in"),
        ("the end mark missing", byte_at(-1, 7), "goes on with 0x7|unknown|0x07"),
        (
            "left out",
            instead(Said(kind=FrameKind.COMMIT, data=bytes(8))),
            "COMMIT came where SWITCHOVER or DESCRIPTION was expected",
        ),
        ("twice", twice, "SWITCHOVER came where COMMIT was expected"),
        ("another section", sections_of(section_renamed), 'section "net7/tap" was not expected'),
    ),
    *told_by_destination(
        FrameKind.HELLO,
        ("another protocol", json_of(setting("protocol", to=1)), "handover protocol is 1 there and 2 here"),
        ("local off", json_of(setting("local", to=False)), "'local' is on here and off there"),
        ("no pidfd", without_descriptors, "does not pass descriptors"),
        ("an eventfd for a pidfd", with_descriptor(0, eventfd), "is no pidfd of another process: it is no pidfd"),
        ("no JSON", instead(Said(kind=FrameKind.HELLO, data=b"[ ")), "HELLO is no JSON"),
        ("READY", instead(Said(kind=FrameKind.READY)), "READY came where HELLO was expected"),
        ("DONE", instead(Said(kind=FrameKind.DONE, data=b"{}")), "DONE came where HELLO was expected"),
        ("unknown frame", instead(Raw(header(0, 0))), "frame kind 0 is unknown"),
        ("twice", twice, "HELLO came where SETUP_ACK was expected"),
        (
            "a refusal",
            instead(Said(kind=FrameKind.REFUSE, data=b"I \033[31m will not")),
            "the destination refused: I  .31m will not",
        ),
    ),
    *told_by_destination(
        FrameKind.SETUP_ACK,
        ("READY", instead(Said(kind=FrameKind.READY)), "READY came where SETUP_ACK was expected"),
        ("too long", too_long(FrameKind.SETUP_ACK), "SETUP_ACK frame has 1 bytes, limit is 0"),
        ("COMMIT", instead(Said(kind=FrameKind.COMMIT, data=bytes(8))), "COMMIT came where SETUP_ACK was expected"),
        ("a channel that ends", instead(Hangup()), "channel"),
    ),
    *told_by_destination(
        FrameKind.READY,
        ("DONE", instead(Said(kind=FrameKind.DONE, data=b"{}")), "DONE came where READY was expected"),
        ("HELLO", instead(Said(kind=FrameKind.HELLO, data=b"{}")), "HELLO came where READY was expected"),
        ("bad magic", spoilt(FrameKind.READY, b"LMIH"), "channel starts with 4c4d4948, expected 4c4d4947"),
        ("too long", too_long(FrameKind.READY), "READY frame has 1 bytes, limit is 0"),
        ("nothing", instead(), "did not say READY within downtime-limit"),
    ),
    *told_by_destination(
        FrameKind.DONE,
        ("no JSON", instead(Said(kind=FrameKind.DONE, data=b"{")), "killed after COMMIT, for DONE is no JSON"),
        ("no times", instead(Said(kind=FrameKind.DONE, data=b"{}")), "for DONE lacks 'serving-ns' or 'phases'"),
        ("READY", first(Said(kind=FrameKind.READY)), "for READY came where DONE was expected"),
        ("a refusal", instead(Said(kind=FrameKind.REFUSE, data=b"no")), "for the destination refused: no"),
        ("unknown frame", instead(Raw(header(99, 0))), "for frame kind 99 is unknown"),
    ),
]


# -- who hears it -----------------------------------------------------------------------------------------------


class Honest:
    """A daemon with two NICs that stays the source of every handover, and a guest that stays its guest."""

    def __init__(self, site: Site, ends: ExitStack) -> None:
        self.site = site
        self.objects = [
            *("--netdev", "tap,id=net0,ifname=tap0,queues=2"),
            *("--netdev", "tap,id=net1,ifname=tap1"),
            *("--netdev", f"stream,id=net2,server=on,addr.path={site.folder}/net2.sock"),
            *("--device", f"virtio-net,id=nic0,netdev=net0,socket={site.socket},packed=on"),
            *("--device", f"virtio-net,id=nic1,netdev=net1,socket={site.folder}/nic1.sock"),
        ]
        self.source = site.source(*self.objects)
        site.attach(queue_pairs=2, packed=True)
        ends.enter_context(NetGuest(f"{site.folder}/nic1.sock")).attach()
        self._ends = ends
        self._connect_stream()
        self.sockets_before = self.sockets()

    def _connect_stream(self) -> None:
        """Sees to a peer of the stream. A source that took back ends the connection, and the peer comes again."""
        if not self._has_peer():
            peer = self._ends.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            peer.connect(f"{self.site.folder}/net2.sock")
            while not self._has_peer():
                pass

    def _has_peer(self) -> bool:
        return bool(self.source.execute("query-netdevs")[2]["connected"])

    def hear(self, lie: Lie) -> None:
        site, source = self.site, self.source
        held = self.held()
        begun_ns = time.monotonic_ns()
        pinger = site.pinger()
        with Liar(lie.teller, lie.kind, lie.tell) as liar:
            number = liar.ours[DESTINATION].fileno()
            destination = site.daemon(
                *("--incoming", f"fd:{number}", "--migration-parameter", "local=on"), inherited=[number]
            )
            liar.ours[DESTINATION].close()
            asyncio.run(give(source, liar.ours[SOURCE]))
            liar.ours[SOURCE].close()
            source.execute("migrate", uri="fd:channel")
            info = source.wait_migration()
            assert info["status"] == "failed", f"{lie} was believed: {info}"
            assert destination.wait() in ((1, -signal.SIGKILL) if lie.past_commit else (1,)), site.log_of(destination)
        assert liar.has_lied
        report = pinger.stop()
        assert report.lost == 0, report
        assert report.received > 0
        reasons = {SOURCE: str(info.get("error-desc")), DESTINATION: last_line(site.log_of(destination))}
        assert (info["status"], source.execute("query-status")["status"]) == ("failed", "running"), reasons
        for side in (SOURCE,) if lie.past_commit else (SOURCE, DESTINATION):
            assert re.search(lie.reason, reasons[side]), reasons
        stopped = [fact for fact in source.facts if fact["event"] == "RingsStopped" and fact["at_ns"] > begun_ns]
        assert lie.stops is None or bool(stopped) == lie.stops
        self._connect_stream()
        assert self.held() == held

    def held(self) -> list[str]:
        """What the source has open, without its sockets: QMP clients come and go."""
        return sorted(target for target in self.site.descriptors(self.source) if not target.startswith("socket:"))

    def sockets(self) -> int:
        return sum(target.startswith("socket:") for target in self.site.descriptors(self.source))


def last_line(log: str) -> str:
    return log.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Honest]:
    with new_site(tmp_path_factory) as site, ExitStack() as ends:
        yield Honest(site, ends)


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_lie_is_found_and_named_and_the_guest_never_hears_of_it(honest: Honest, lie: Lie) -> None:
    honest.hear(lie)


def test_no_lie_left_a_socket_behind(honest: Honest) -> None:
    """Behind all of them: they share a source."""
    assert honest.sockets() <= honest.sockets_before + 2


def of_another_release(names: tuple[str, ...], _: object) -> tuple[str, ...]:
    return tuple("tx_frames" if name == "tx_packets" else name for name in names)


def test_a_release_that_counts_other_things_hands_over_what_both_know(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with new_site(tmp_path_factory) as site, ExitStack() as ends:
        source = Honest(site, ends).source
        before = counters_of(source)
        assert before["rx-packets"] > 0
        assert before["tx-packets"] > 0
        tell = state_of(QUEUES_SETUP, "engines[0].counters", of_another_release)
        info, destination = hand_over_told(site, source, FrameKind.SETUP, tell)
        assert info["status"] == "completed", info
        after = counters_of(destination)
        assert after["rx-packets"] >= before["rx-packets"]
        # It began at 0; the guest says a word by itself now and then, and was pinged ten times before.
        assert after["tx-packets"] < before["tx-packets"]


def counters_of(daemon: DaemonProcess) -> dict[str, int]:
    """What was counted of the first NIC."""
    device, _ = daemon.execute("query-devices")
    pairs = [pair["counters"] for pair in device["queue-pairs"]]
    return {name: sum(counters[name] for counters in pairs) for name in pairs[0]}


def hand_over_told(
    site: Site, source: DaemonProcess, kind: FrameKind, tell: Tell
) -> tuple[dict[str, Any], DaemonProcess]:
    """A handover in which one frame of the source's is another."""
    with Liar(SOURCE, kind, tell) as liar:
        number = liar.ours[DESTINATION].fileno()
        destination = site.daemon(
            *("--incoming", f"fd:{number}", "--migration-parameter", "local=on"), inherited=[number]
        )
        liar.ours[DESTINATION].close()
        asyncio.run(give(source, liar.ours[SOURCE]))
        liar.ours[SOURCE].close()
        source.execute("migrate", uri="fd:channel")
        return source.wait_migration(), destination


def one_further(told: bytes, _: object) -> bytes:
    """The receive ring of the last queue pair, which is a split one. The control queue stands behind it."""
    *before, rx, tx, control = struct.unpack(f">{len(told) // 2}H", told)
    return struct.pack(f">{len(told) // 2}H", *before, rx + 1, tx, control)


def test_a_position_that_guest_memory_contradicts_is_told_by_both_sides(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with new_site(tmp_path_factory) as site, ExitStack() as ends:
        source = Honest(site, ends).source
        pinger = site.pinger()
        tell = state_of(QUEUES, "positions", one_further)
        info, destination = hand_over_told(site, source, FrameKind.SWITCHOVER, tell)
        report = pinger.stop()
        assert (info["status"], report.lost) == ("completed", 0), info
        told = re.compile(
            r"device 'nic1': vring 0 \(rx\) goes on at (\d+), where its used index stands, and was told (\d+)"
        )
        for note in (info["local"]["note"], destination.wait_migration()["local"]["note"]):
            match = told.search(note)
            assert match is not None, note
            begun, said = map(int, match.groups())
            assert said == begun + 1
        assert told.search(site.log_of(destination))
