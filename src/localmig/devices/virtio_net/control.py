"""The control queue of a NIC (virtio 1.2, section 5.1.6.5): what a driver asks for while it runs.

Owns:        the commands that are served, and their answers.
Never sees:  a ring; a netdev.
Read next:   device.py, which does what is asked.

QEMU and Cloud Hypervisor serve this queue themselves. User-Mode Linux, crosvm and generic frontends hand it over.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class _Class(IntEnum):
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5


_ANNOUNCE_ACK: Final = 0
_MQ_VQ_PAIRS_SET: Final = 0
_GUEST_OFFLOADS_SET: Final = 0

_HEADER: Final = struct.Struct("<BB")
_PAIRS: Final = struct.Struct("<H")
_OFFLOADS: Final = struct.Struct("<Q")

OK: Final = b"\0"
ERROR: Final = b"\1"
"""The byte that a driver finds behind its command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsSet:
    """The driver uses this many queue pairs, the first ones."""

    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadsSet:
    """The driver takes over no more than these GUEST_ features from now on."""

    features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Announced:
    """The driver has told the network where it is, as it was asked to."""


Command = PairsSet | OffloadsSet | Announced


def read_command(data: bytes) -> Command | None:
    """What a driver wrote; None for a command that no feature of ours brings, or for none at all."""
    if len(data) < _HEADER.size:
        return None
    header, rest = _HEADER.unpack_from(data), data[_HEADER.size :]
    if header == (_Class.MQ, _MQ_VQ_PAIRS_SET) and len(rest) == _PAIRS.size:
        return PairsSet(count=_PAIRS.unpack(rest)[0])
    if header == (_Class.GUEST_OFFLOADS, _GUEST_OFFLOADS_SET) and len(rest) == _OFFLOADS.size:
        return OffloadsSet(features=_OFFLOADS.unpack(rest)[0])
    if header == (_Class.ANNOUNCE, _ANNOUNCE_ACK) and not rest:
        return Announced()
    return None
