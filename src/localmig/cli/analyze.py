"""`localmig analyze`: a recorded migration stream as text for people, or as JSON.

Owns:        reading the file, how sections and values are shown.
Never sees:  a daemon; what the values mean.
Read next:   migration/analysis.py, which explains the bytes.
"""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

from localmig.cli.text import table
from localmig.errors import KernelError, PeerError
from localmig.migration.analysis import STREAM_SIZE_MAX, Analysis, Field, Section, analyze

_EXAMPLES: Final = """\
examples:
  record a handover, and look at what moved:
    localmig upgrade /run/vm1/qmp.sock --record /tmp/handover.stream
    localmig analyze /tmp/handover.stream

  one value of it:
    localmig analyze --json /tmp/handover.stream |
        jq '.sections[] | select(.name == "net0/tap") | .fields[] | select(.name == "mtu").value'
"""

_SHOWN_BYTES_MAX: Final = 64
_SHOWN_ELEMENTS_MAX: Final = 16
"""What one line can show; --json has all."""

_HEXADECIMAL_FROM: Final = 0x1000
"""From here on a number is an address or a set of bits as often as a count, so it is shown both ways."""


def add_parser(commands: Any) -> None:
    """Adds this command to `commands`, what argparse's `add_subparsers` gave."""
    parser = commands.add_parser(
        "analyze",
        help="print a recorded migration stream",
        description="Prints a recorded migration stream by its own description: sections, fields with types and "
        "values, descriptors by kind. Streams of other releases, and QEMU's, are explained as well.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", metavar="FILE", help="what migration parameter 'record' wrote, or QEMU's 'migrate file:'"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    data = _read(arguments.file)
    try:
        analysis = analyze(data)
    except PeerError as error:
        # What is wrong with a stream is told in words of that stream, which a terminal must not obey.
        raise PeerError(f"'{arguments.file}' {printable(str(error))}") from error
    print(json.dumps(to_json(analysis), indent=2) if arguments.json else show(analysis))
    return 0


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(STREAM_SIZE_MAX + 1)
    except OSError as error:
        raise KernelError(f"cannot read '{path}': {error.strerror}", errno=error.errno or errno.EIO) from error


def printable(text: str) -> str:
    """`text` with what a terminal would act on escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


# -- for people -----------------------------------------------------------------------------------------------------


def show(analysis: Analysis) -> str:
    """The stream as text."""
    descriptors = analysis.descriptors()
    kinds = ", ".join(f"{count} {printable(kind)}" for kind, count in sorted(descriptors.items()))
    lines = [
        f"stream       {analysis.size} bytes, {analysis.vmdesc_size} of them its description",
        f"descriptors  {sum(descriptors.values())}{f': {kinds}' if kinds else ''}",
    ]
    if analysis.configuration:
        lines += ["", f"configuration\n{_rows(analysis.configuration)}"]
    for section in analysis.sections:
        lines += ["", _heading(section)]
        if section.fields:
            lines.append(_rows(section.fields))
    return "\n".join(lines)


def _heading(section: Section) -> str:
    heading = printable(section.name)
    heading += f" instance {section.instance}" if section.instance else ""
    heading += f" ({section.part})" if section.part != "full" else ""
    description = f"{printable(section.description)} " if section.description is not None else ""
    return f"{heading}: {description}version {section.version}, {section.size} bytes at {section.offset:#x}"


def _rows(fields: Sequence[Field]) -> str:
    # Without heads: `table` makes as many columns of the same width.
    rows = list(_lines(fields, "  "))
    return table(rows[0], rows[1:])


def _lines(fields: Sequence[Field], indent: str) -> Iterator[tuple[str, str, str]]:
    for field in fields:
        name = f"{indent}{printable(field.name)}"
        match field.value:
            case tuple(inside) if field.type == "array" and not any(isinstance(each.value, tuple) for each in inside):
                yield name, _array_type(inside), _show_elements(inside)
            case tuple(inside):
                yield name, _array_type(inside) if field.type == "array" else printable(field.type), ""
                yield from _lines(inside, indent + "  ")
            case _:
                yield name, printable(field.type), show_value(field)


def _array_type(elements: Sequence[Field]) -> str:
    types = sorted({printable(element.type) for element in elements})
    return f"{len(elements)} x {' or '.join(types)}" if elements else "array"


def _show_elements(elements: Sequence[Field]) -> str:
    if not elements:
        return "none"
    shown = "  ".join(show_value(element) for element in elements[:_SHOWN_ELEMENTS_MAX])
    more = len(elements) - _SHOWN_ELEMENTS_MAX
    return f"{shown}  … {more} more" if more > 0 else shown


def show_value(field: Field) -> str:
    """One value, on one line."""
    match field.value:
        case None:
            return "none"
        case _ if field.type == "fd":
            return printable(field.kind or "unknown")
        case bool(value):
            return "yes" if value else "no"
        case int(value):
            return str(value) if abs(value) < _HEXADECIMAL_FROM else f"{value} ({value:#x})"
        case bytes(value):
            return _show_bytes(value)
        case _:
            raise AssertionError(field)


def _show_bytes(value: bytes) -> str:
    text = _as_text(value)
    if not value:
        return "empty"
    if len(value) > _SHOWN_BYTES_MAX:
        return f"{value[:_SHOWN_BYTES_MAX].hex()} … {len(value) - _SHOWN_BYTES_MAX} bytes more"
    return f'"{text}"' if text is not None else value.hex()


def _as_text(value: bytes) -> str | None:
    """The text that `value` is, None where it is none."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None


# -- for programs ---------------------------------------------------------------------------------------------------


def to_json(analysis: Analysis) -> dict[str, Any]:
    """The stream as JSON has it; bytes are hexadecimal, with their text beside them where they are one."""
    return {
        "size": analysis.size,
        "vmdesc-size": analysis.vmdesc_size,
        "descriptors": analysis.descriptors(),
        "configuration": [_field_to_json(field) for field in analysis.configuration],
        "sections": [
            {
                "name": section.name,
                "instance": section.instance,
                "part": section.part,
                "version": section.version,
                "description": section.description,
                "offset": section.offset,
                "size": section.size,
                "fields": [_field_to_json(field) for field in section.fields],
            }
            for section in analysis.sections
        ],
    }


def _field_to_json(field: Field) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": field.name, "type": field.type, "offset": field.offset}
    if field.kind is not None:
        shown["kind"] = field.kind
    match field.value:
        case tuple(inside):
            shown["value"] = [_field_to_json(each) for each in inside]
        case bytes(value):
            shown["value"] = value.hex()
            if (text := _as_text(value)) is not None:
                shown["text"] = text
        case value:
            shown["value"] = value
    return shown
