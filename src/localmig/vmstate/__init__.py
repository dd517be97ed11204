"""Declared state: what travels is described once; saving, loading and explaining it follow from that.

Owns:        descriptions, fields and their bytes, descriptors inside state, the vmdesc of a section.
Never sees:  a device, a socket, the frame around a section.
Read next:   description.py for what an author writes, fields.py for the bytes; then migration/stream.py.

A whole example:

    @dataclass(frozen=True, kw_only=True, slots=True)
    class QueueState:
        size: int
        kick: OwnedFd | None

    @dataclass(frozen=True, kw_only=True, slots=True)
    class NicState:
        mac: bytes
        queues: tuple[QueueState, ...]
        mtu: int = 1500            # absent in version 1: the dataclass's default stands in
        announces_left: int = 0    # in a subsection: absent where nothing is pending

    QUEUE = Description(name="queue", version=1, oldest_version=1, state=QueueState, fields=(
        u16("size"),
        optional(fd("kick")),
    ))
    NIC = Description(name="nic", version=2, oldest_version=1, state=NicState, fields=(
        blob("mac", size_max=6),
        array("queues", QUEUE, count_max=256),
        u16("mtu", since=2),
    ), subsections=(
        Subsection(name="nic/announce", version=1, oldest_version=1,
                   needed=lambda nic: nic.announces_left > 0, fields=(u8("announces_left"),)),
    ))

    save(NIC, state, into=blob)                    # descriptors in `state` are lent
    state = load(NIC, version, Reader(data, fds))  # descriptors in `state` belong to the caller
"""

from __future__ import annotations

from localmig.vmstate.blob import Blob, Reader
from localmig.vmstate.comparison import check_explained
from localmig.vmstate.description import (
    NAME_SIZE_MAX,
    Description,
    FilePlace,
    Subsection,
    check_descriptors,
    check_distinct,
    close_descriptors,
    default_of,
    explain,
    files_of,
    load,
    save,
)
from localmig.vmstate.fields import Field, array, blob, boolean, fd, numbers, optional, struct, text, u8, u16, u32, u64

__all__ = [
    "NAME_SIZE_MAX",
    "Blob",
    "Description",
    "Field",
    "FilePlace",
    "Reader",
    "Subsection",
    "array",
    "blob",
    "boolean",
    "check_descriptors",
    "check_distinct",
    "check_explained",
    "close_descriptors",
    "default_of",
    "explain",
    "fd",
    "files_of",
    "load",
    "numbers",
    "optional",
    "save",
    "struct",
    "text",
    "u8",
    "u16",
    "u32",
    "u64",
]
