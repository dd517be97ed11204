"""A setup piece of a stream from sections, written at once as a source writes it part by part."""

from __future__ import annotations

from collections.abc import Sequence

from localmig.migration.stream import OutgoingStream, Section
from localmig.vmstate import Blob


def begun(sections: Sequence[Section]) -> tuple[OutgoingStream, Blob]:
    """A stream, and its setup piece, whose descriptors are lent by the sections."""
    stream = OutgoingStream()
    piece = stream.start()
    for section in sections:
        stream.write(section, piece)
    return stream, piece
