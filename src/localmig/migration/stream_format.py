"""Numbers of QEMU's migration stream, version 3.

Owns:        the magic, the version, the marks in front of each part of a stream.
Never sees:  a stream.
Read next:   stream.py, which writes and reads localmig's; analysis.py, which explains any.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

MAGIC: Final = 0x5145564D
VERSION: Final = 3


class Mark(IntEnum):
    """QEMU_VM_…: what stands in front of each part of a stream. localmig writes some of them."""

    EOF = 0x00
    SECTION_START = 0x01
    SECTION_PART = 0x02
    SECTION_END = 0x03
    SECTION_FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    SECTION_FOOTER = 0x7E
