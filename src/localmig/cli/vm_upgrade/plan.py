"""What is to be done to move a guest to a new QEMU, decided before anything is done.

Owns:        whether a move can work, the way it goes, the new command line, which paths change hands afterwards.
Never sees:  processes, sockets, files: it is told what runs.
Read next:   command_line.py for options, listeners.py for what QEMU listens on; move.py, which carries a plan out.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from localmig.cli.vm_upgrade import command_line, listeners
from localmig.cli.vm_upgrade.command_line import Option
from localmig.errors import ConfigError

CPR_SINCE: Final = (10, 0)
"""The first release of QEMU that has the migration mode cpr-transfer."""

_RUN_STATES: Final = ("running", "paused")

_OWN_NAMES: Final = re.compile(
    r"(compat_monitor|serial|parallel|debugcon|gdb)\d*$|(.*\.)?ram$|mem$|mon\d+$|isa-debug|virtcon"
)
"""What QEMU calls objects and character devices that an option without an id made, or none."""

_LEFT_OUT: Final = frozenset({"daemonize", "incoming", "loadvm", "S"})
"""Options about how the old process began, which is not how the new one begins."""

_OWN_NETDEVS: Final = {
    "tap": "is a TAP of QEMU's own, which a second QEMU cannot open",
    "bridge": "is a TAP of QEMU's own, which a second QEMU cannot open",
    "vhost-vdpa": "is a device of the machine's, which a second QEMU cannot open",
    "l2tpv3": "binds an address, which a second QEMU cannot",
    "af-xdp": "binds a queue of an interface, which a second QEMU cannot",
}

_ANONYMOUS_DEVICES: Final = ("device", "drive", "usbdevice", "virtfs", "watchdog")
"""Options that may make a device without an id."""

_DESCRIPTOR_KEYS: Final = frozenset({"fd", "fds", "fdset", "sockfd", "vhostfd", "vhostfds"})


class Way(enum.Enum):
    """How a guest's memory comes to the new QEMU."""

    CPR = "cpr-transfer"
    """The memory file itself is handed over, by its descriptor."""
    SHARED = "shared"
    """Both map the same named file; everything else is copied."""
    COPY = "copy"
    """Each page is copied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """What is known of the QEMU that runs.

    Attributes:
        program: its executable file.
        words: its command line, without the program's name.
        version: major and minor number.
        machine: the machine's type, with its version.
        run_state: what query-status calls it.
        blocked_reasons: why it would refuse an ordinary migration.
        devices: ids of devices that have one.
        anonymous_devices: how many have none.
        objects: ids of objects.
        chardevs: labels of character devices.
        folders: those mem-paths that are folders.
    """

    program: str
    words: Sequence[str]
    version: tuple[int, int]
    machine: str
    run_state: str
    blocked_reasons: Sequence[str] = ()
    devices: Sequence[str] = ()
    anonymous_devices: int = 0
    objects: Sequence[str] = ()
    chardevs: Sequence[str] = ()
    folders: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the operator asked for.

    Attributes:
        program: the new QEMU.
        version: its major and minor number.
        qmp_socket: where the old QEMU answers, and the new one will.
        changes: options in place of old ones.
        without: options to leave out: a name, or a name and an id with a colon between.
        way: the way to go, None for the best one.
    """

    program: str
    version: tuple[int, int]
    qmp_socket: str
    changes: Sequence[str] = ()
    without: Sequence[str] = ()
    way: Way | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A move that can work, as far as can be told beforehand.

    Attributes:
        way: how the memory comes to the new QEMU.
        argv: the new QEMU's command line, without what makes it wait for the guest.
        qmp_socket: where it answers until the move is over.
        renames: paths of the new QEMU, and what each is called once the old one has ended.
        resumes: whether the guest is to run afterwards.
        notes: what the operator should know.
    """

    way: Way
    argv: Sequence[str]
    qmp_socket: str
    renames: Mapping[str, str]
    resumes: bool
    notes: Sequence[str]


def make(running: Running, wishes: Wishes, *, real_path: Callable[[str], str] = str) -> Plan:
    """How to move the guest.

    Args:
        running: what runs.
        wishes: what is asked for.
        real_path: what a path in the old command line leads to.

    Raises:
        ConfigError: it cannot work, or not in the way asked for; the text names every reason and what to do.
    """
    try:
        old = command_line.parse(running.words)
        changes = command_line.parse(wishes.changes)
    except ValueError as error:
        raise ConfigError(f"the command line cannot be read: {error}") from error
    kept = [option for option in old if option.name not in _LEFT_OUT and not _is_left_out(option, wishes.without)]
    options = command_line.replaced(kept, changes)
    reasons = [*_not_now(running, wishes), *_added_later(running, old)]
    for option in options:
        reasons += _refusals(option, is_changed=option in changes)
    reasons += _backends_that_connect(options)
    renames: dict[str, str] = {}
    notes: list[str] = []
    rewritten = []
    for option in options:
        own, option = listeners.moved(option) if option not in changes else ({}, option)
        renames |= own
        rewritten.append(_appending(option))
        notes += _notes(option)
    answers_at = {real_path(path): following for following, path in renames.items()}.get(wishes.qmp_socket)
    if answers_at is None:
        reasons.append(
            f"no option of it opens '{wishes.qmp_socket}': say the path as its -qmp or -chardev does; the new QEMU "
            "is to answer there"
        )
    way = _way(running, wishes, old, options, reasons)
    if reasons:
        raise ConfigError("this guest cannot be moved:\n" + "\n".join(f"  - {reason}" for reason in reasons))
    assert way is not None
    assert answers_at is not None
    return Plan(
        way=way,
        argv=[wishes.program, *command_line.to_words(_with_machine(rewritten, running.machine))],
        qmp_socket=answers_at,
        renames=renames,
        resumes=running.run_state == "running",
        notes=notes,
    )


# -- reasons against it ---------------------------------------------------------------------------------------------


def _not_now(running: Running, wishes: Wishes) -> Iterator[str]:
    if running.run_state not in _RUN_STATES:
        states = " or ".join(f"'{state}'" for state in _RUN_STATES)
        yield f"its run state is '{running.run_state}', and only one that is {states} is moved"
    if wishes.version < running.version:
        new, old = _dotted(wishes.version), _dotted(running.version)
        yield f"'{wishes.program}' is QEMU {new}, older than the {old} that runs: a guest moves to the same or a newer"


def _added_later(running: Running, options: Sequence[Option]) -> Iterator[str]:
    ids = {option.id for option in options}
    for name in running.devices:
        if name not in ids:
            yield (
                f"device '{name}' was plugged in later and is not in the command line: unplug it (device_del), or add "
                "it behind '--'"
            )
    makers = sum(option.name in _ANONYMOUS_DEVICES and option.id is None for option in options)
    if running.anonymous_devices > makers:
        yield (
            f"it has {running.anonymous_devices} devices without an id and its command line makes {makers} at most: "
            "one was plugged in later; unplug it"
        )
    for name in running.objects:
        if name not in ids and not _OWN_NAMES.match(name):
            yield f"object '{name}' was made later (object-add) and is not in the command line: delete it"
    for name in running.chardevs:
        if name not in ids and not _OWN_NAMES.match(name):
            yield f"character device '{name}' was made later (chardev-add) and is not in the command line: remove it"


def _refusals(option: Option, *, is_changed: bool) -> Iterator[str]:
    properties = option.properties
    kind = properties.get("type", "")
    if any(key in _DESCRIPTOR_KEYS for key in properties) or (
        re.search(r"(^|=)(fd:|/dev/fdset/|/dev/fd/|/proc/self/fd/)", option.value or "") or option.name == "add-fd"
    ):
        yield (
            f"'{option}' is a descriptor that whoever started QEMU gave it: under libvirt, let libvirt migrate the "
            "guest; else move it as it was started, see docs/vmm-upgrade.md"
        )
    match option.name:
        case "device" if properties.get("driver", "").startswith("vfio-"):
            yield f"'{option}' gives it a device of the machine's, which cannot be in two processes: unplug it first"
        case "netdev" | "nic" | "net" if kind in _OWN_NETDEVS and not is_changed:
            yield f"'{option}' {_OWN_NETDEVS[kind]}: let localmig serve it"
        case "netdev" | "nic" if kind == "user" and ("hostfwd" in (option.value or "")):
            yield f"'{option}' forwards a port, which is taken while both run: give it again behind '--' without"
        case "netdev" if properties.get("server") == "on" or "listen" in properties:
            yield f"'{option}' listens, and only one of two QEMUs can: give the netdev again behind '--'"
        case "display" if kind == "curses":
            yield f"'{option}' draws on the terminal that the old process has: start it with another display"
        case "snapshot":
            yield "'-snapshot' keeps the disks' changes in files without a name: commit them and start it without"
        case "readconfig":
            yield f"'{option}' has options in a file, which is not read: start it with all of them as words"
        case "chroot" | "runas" | "run-with":
            yield f"'{option}' changes what the process may do later, which is not repeated here: start it without"
    if not is_changed and (address := listeners.tcp_address(option)) is not None:
        yield (
            f"'{option}' listens at '{address}', which is taken while both run: give another address behind '--', or "
            f"leave it out with --without {option.name}" + (f":{option.id}" if option.id else "")
        )


def _backends_that_connect(options: Sequence[Option]) -> Iterator[str]:
    listening = {o.id for o in options if o.name == "chardev" and o.properties.get("server") == "on"}
    for option in options:
        if option.name == "netdev" and option.properties.get("type") == "vhost-user":
            chardev = option.properties.get("chardev")
            if chardev in listening:
                yield (
                    f"'{option}': QEMU listens for its backend at chardev '{chardev}', and the backend connects "
                    "to one path only: let the backend listen (without server=off) from the next start on"
                )


# -- the way ----------------------------------------------------------------------------------------------------------


def _way(
    running: Running, wishes: Wishes, old: Sequence[Option], new: Sequence[Option], reasons: list[str]
) -> Way | None:
    """The way to go; None where `reasons` got one against every way, or against the one asked for."""
    possible: dict[Way, str | None] = {
        Way.CPR: _against_cpr(running, wishes, new),
        # What QEMU tells is true of these two; of the third it tells when it is asked to migrate.
        Way.SHARED: _against_shared(running, old, new) or _blocked(running),
        Way.COPY: _against_copy(running, old, new) or _blocked(running),
    }
    if wishes.way is not None:
        if (reason := possible[wishes.way]) is not None:
            reasons.append(f"way '{wishes.way.value}' is not open: {reason}")
            return None
        return wishes.way
    for way, reason in possible.items():
        if reason is None:
            return way
    reasons += [f"way '{way.value}' is not open: {reason}" for way, reason in possible.items()]
    return None


def _memories(options: Sequence[Option]) -> list[dict[str, str]]:
    """The guest's memories, as far as options make them."""
    return [
        option.properties
        for option in options
        if option.name == "object" and option.properties.get("qom-type", "").startswith("memory-backend-")
    ]


def _named(running: Running, options: Sequence[Option]) -> list[dict[str, str]]:
    """The memories that are one file for all who open it. In a folder QEMU makes a file without a name."""
    return [
        memory
        for memory in _memories(options)
        if memory.get("qom-type") == "memory-backend-file"
        and memory.get("share") == "on"
        and memory.get("mem-path") not in running.folders
    ]


def _against_cpr(running: Running, wishes: Wishes, options: Sequence[Option]) -> str | None:
    for version in (running.version, wishes.version):
        if version < CPR_SINCE:
            return f"QEMU {_dotted(version)} does not know it, {_dotted(CPR_SINCE)} is the first that does"
    memories = _memories(options)
    if not memories:
        return "it needs memory that is shared: -object memory-backend-memfd,share=on"
    for memory in memories:
        if memory.get("share") != "on":
            return f"memory '{memory.get('id')}' has share={memory.get('share', 'off')}, it needs share=on"
    if not any(o.name in ("M", "machine") and o.properties.get("aux-ram-share") == "on" for o in options):
        return "the machine needs aux-ram-share=on, from its start on"
    return None


def _blocked(running: Running) -> str | None:
    reasons = running.blocked_reasons
    return f"QEMU refuses to migrate this guest: {'; '.join(reasons)}" if reasons else None


def _against_shared(running: Running, old: Sequence[Option], new: Sequence[Option]) -> str | None:
    named = _named(running, old)
    if not named:
        return "no memory of it is a named file with share=on"
    paths = {memory.get("mem-path") for memory in _named(running, new)}
    for memory in named:
        if memory.get("mem-path") not in paths:
            return f"memory '{memory.get('id')}' is to be in another file than '{memory.get('mem-path')}'"
    return None


def _against_copy(running: Running, old: Sequence[Option], new: Sequence[Option]) -> str | None:
    paths = {memory.get("mem-path") for memory in _named(running, new)}
    for memory in _named(running, old):
        if memory.get("mem-path") in paths:
            return (
                f"memory '{memory.get('id')}' is the file '{memory.get('mem-path')}', and a copy into the same file "
                "would write old pages over the running guest: give the object another mem-path behind '--'"
            )
    return None


# -- the new command line ---------------------------------------------------------------------------------------------


def _is_left_out(option: Option, without: Sequence[str]) -> bool:
    return option.name in without or f"{option.name}:{option.id}" in without


def _with_machine(options: Sequence[Option], machine: str) -> list[Option]:
    """The machine by its full name: an alias means another version of it in another QEMU."""
    renamed = []
    for option in options:
        if option.name in ("M", "machine") and "type" in option.properties:
            option = option.with_property("type", machine)
        renamed.append(option)
    if not any(option.name in ("M", "machine") and "type" in option.properties for option in renamed):
        renamed.append(Option("machine", f"type={machine}"))
    return renamed


def _appending(option: Option) -> Option:
    """A log goes on: QEMU empties a file that it opens for its output otherwise."""
    if option.name == "chardev":
        properties = option.properties
        if properties.get("backend") == "file" and "append" not in properties:
            option = option.with_property("append", "on")
        if "logfile" in properties and "logappend" not in properties:
            option = option.with_property("logappend", "on")
    return option


def _notes(option: Option) -> Iterator[str]:
    value = option.value or ""
    if option.name == "nographic" or "stdio" in value.split(",")[0].split(":"):
        yield f"'{option}': what it printed on a terminal goes to the new QEMU's log, and nothing is read"
    if option.name in listeners.LEGACY_CHARDEVS and value.removeprefix("mon:").startswith("file:"):
        yield f"'{option}': the file begins afresh"
    if option.name in ("netdev", "nic") and option.properties.get("type") == "user":
        yield f"'{option}': connections that the guest has through it end"


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
