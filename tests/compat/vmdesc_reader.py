"""Reads a captured stream by its own vmdesc alone, as a person with nothing but the file would.

Owns:        finding the JSON, walking the bytes by it.
Never sees:  localmig: whatever it shared with the writer, it could not find wrong.
Read next:   test_stream_vector.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Values = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Walk:
    """What a walk over a stream found.

    Attributes:
        data: the stream.
        position: the next byte.
        sections: each section's values by name; what occurs more than once is a list.
        descriptors: offsets of the fields of type "fd".
    """

    data: bytes
    position: int = 0
    sections: dict[str, Values] = field(default_factory=dict)
    descriptors: list[int] = field(default_factory=list)

    def number(self, size: int) -> int:
        """The next `size` bytes as an integer."""
        return int.from_bytes(self.take(size))

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        taken = self.data[self.position : self.position + size]
        assert len(taken) == size, f"the stream ends at {len(self.data)}, inside {size} bytes at {self.position}"
        self.position += size
        return taken


def find_vmdesc(data: bytes) -> Any:
    """The JSON at the end of a stream: behind the last NUL, from the first brace on."""
    start = data.index(b"{", data.rindex(b"\0"))
    assert data[start - 5] == 0x06, f"no vmdesc before offset {start}"
    size = int.from_bytes(data[start - 4 : start])
    assert start + size == len(data), (start, size, len(data))
    return json.loads(data[start:])


def walk(data: bytes) -> Walk:
    """Reads every section of a stream."""
    vmdesc = find_vmdesc(data)
    devices = {(device["name"], device["instance_id"]): device for device in vmdesc["devices"]}
    walked = Walk(data=data)
    assert walked.take(8) == b"QEVM\0\0\0\3"
    assert walked.number(1) == 0x07
    walked.sections["configuration"] = _fields(walked, vmdesc["configuration"])
    while (marker := walked.number(1)) != 0x00:
        assert marker == 0x04, hex(marker)
        section_id = walked.number(4)
        name = walked.take(walked.number(1)).decode()
        device = devices.pop((name, walked.number(4)))
        assert walked.number(4) == device["version"]
        walked.sections[name] = _fields(walked, device)
        assert walked.number(1) == 0x7E
        assert walked.number(4) == section_id
    assert not devices, f"described, but not there: {devices}"
    return walked


def _fields(walked: Walk, described: Any) -> Values:
    values: Values = {}
    for line in described["fields"]:
        for _ in range(line.get("array_len", 1)):
            _add(values, line["name"], _value(walked, line))
    for subsection in described.get("subsections", ()):
        assert walked.number(1) == 0x05
        assert walked.take(walked.number(1)).decode() == subsection["vmsd_name"]
        assert walked.number(4) == subsection["version"]
        values[subsection["vmsd_name"]] = _fields(walked, subsection)
    return values


def _value(walked: Walk, line: Any) -> Any:
    start = walked.position
    match line["type"]:
        case "struct":
            values = _fields(walked, line["struct"])
            assert walked.position - start == line["size"], line
            return values
        case "fd":
            assert walked.take(1) == b" ", line
            assert line["size"] == 1, line
            walked.descriptors.append(start)
            return "fd"
        case "bool":
            return bool(walked.number(line["size"]))
        case "buffer":
            return walked.take(line["size"])
        case kind:
            assert kind == f"uint{line['size'] * 8}", line
            return walked.number(line["size"])


def _add(values: Values, name: str, value: Any) -> None:
    if name not in values:
        values[name] = value
    elif isinstance(values[name], list):
        values[name].append(value)
    else:
        values[name] = [values[name], value]
