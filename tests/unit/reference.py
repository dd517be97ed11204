"""Writes docs/device-api.md from the docstrings of localmig.device_api: `make docs`. test_docs.py compares.

A class has its docstring, then each method that its bases in the reference do not have.
"""

from __future__ import annotations

import ast
import enum
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from localmig import device_api

PAGE: Final = Path(__file__).resolve().parents[2] / "docs/device-api.md"

HEAD: Final = """\
# The API for authors of devices

Written by `make docs` from the docstrings of `localmig.device_api`; change it there.
[devices.md](devices.md) shows how to use it. Everything here is imported from `localmig.device_api`.
"""

SECTIONS: Final = {
    "Devices whose rings are served by Python": "CallbackDevice Chain callback_members",
    "Types": "ObjectType BuildContext",
    "Options": "Spec DeviceSpec VhostUserSpec option reference Fit Number Switch Choice Identifier FilePath SocketPath "
    "MacAddress",
    "What is shown": "Member Struct Array String Boolean Uint64 Enumeration",
    "State": "Description Subsection u8 u16 u32 u64 boolean numbers blob text array struct optional fd OwnedFd",
    "Errors": "ConfigError PeerError KernelError",
    "Any device": "VhostUserDevice DeviceHooks Offer Event MtuSet RarpRequested DeviceInfo device_members RingGroup "
    "CallbackGroup Layout Queues",
    "Parts and netdevs": "Part Announces RunsPrograms HasSessions Netdev NetdevObserver NetdevSpec Offload",
}
"""In the order in which a reader needs them."""

_GOOGLE: Final = re.compile(r"^(Args|Attributes|Returns|Raises):\n((?:[ ]{4}.*\n|\n)*)", re.MULTILINE)


def write() -> str:
    assert sorted(" ".join(SECTIONS.values()).split()) == sorted(device_api.__all__)
    return "\n".join([HEAD, *_lines()])


def _lines() -> Iterator[str]:
    listed = [getattr(device_api, name) for names in SECTIONS.values() for name in names.split()]
    for heading, names in SECTIONS.items():
        yield f"## {heading}\n"
        for name in names.split():
            thing = getattr(device_api, name)
            yield f"### {name}\n"
            if not inspect.isclass(thing):
                yield f"```python\n{name}{_signature(thing)}\n```\n"
                yield _text(thing)
                continue
            bases = [base for base in thing.__mro__[1:] if base in listed]
            if bases:
                yield f"Derives from {', '.join(f'[{each.__name__}](#{each.__name__.lower()})' for each in bases)}.\n"
            yield _text(thing)
            if issubclass(thing, enum.Enum):
                yield f"Members: {', '.join(f'`{name}`' for name in thing.__members__)}.\n"
            else:
                yield from _methods(thing, bases)


def _methods(thing: type[Any], bases: list[type[Any]]) -> Iterator[str]:
    for name, method in vars(thing).items():
        function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
        is_new = not name.startswith("_") and not any(hasattr(base, name) for base in bases)
        is_attribute = name in getattr(thing, "__dataclass_fields__", ())  # a default may be a function
        if is_new and not is_attribute and inspect.isfunction(function):
            shown = name if isinstance(method, property) else f"{name}{_signature(function)}"
            yield f"- `{shown}`\n\n{textwrap.indent(_text(function), '  ')}"


def _signature(function: Any) -> str:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    assert node.returns is not None, function
    if node.args.args[:1] and node.args.args[0].arg in ("self", "cls"):
        del node.args.args[0]
    return f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"


def _text(thing: Any) -> str:
    return _GOOGLE.sub(_list, (inspect.getdoc(thing) or "") + "\n").rstrip("\n") + "\n"


def _list(match: re.Match[str]) -> str:
    entries = re.sub(r"\n {8,}", " ", match[2].strip()).splitlines()
    lines = [re.sub(r"^(\w+(?:, \w+)*): ", r"`\1`: ", entry.strip()) for entry in entries]
    return f"*{match[1]}*\n\n" + "".join(f"- {line}\n" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write())
