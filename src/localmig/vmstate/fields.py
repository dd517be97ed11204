"""The kinds of field, each with its bytes in both directions and its line in the vmdesc.

Owns:        the encoding: big endian throughout, QEMU's wherever QEMU has one.
Never sees:  sections, versions on the wire, whose state it is.
Read next:   description.py, which puts fields together.

    kind          bytes                                     in the state        in the vmdesc
    u8 … u64      1 … 8                                     int                 uint8 … uint64
    boolean       0 or 1                                    bool                bool
    text          u32 size, UTF-8                           str                 uint32, buffer
    blob          u32 size, bytes                           bytes               uint32, buffer
    fd            0x20, the descriptor travels with it      OwnedFd             fd
    struct        its fields                                its state           struct
    array         u32 count, elements                       tuple               uint32, each element
    numbers       u32 count, integers of one size           bytes, as sent      uint32, each integer
    optional      0, or 1 and the field                     as the field|None   bool, the field

What stands in front of a value (its size, count, presence) is a vmdesc field of its own, called `name.size`,
`name.count`, `name.present`: no attribute can have such a name. Elements of one size are explained once, with
their number as `array_len`. What a descriptor is of stands at its field as `kind`, a key that QEMU's tools pass over.
"""
# ruff: noqa: ARG002 - every kind of field answers the same calls, also where it has no use for an argument

from __future__ import annotations

import functools
import itertools
import struct as packing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from localmig.fd_kind import FdKind
from localmig.fds import OwnedFd
from localmig.vmstate.blob import Blob, MalformedError, Reader, UnfitError, joined

if TYPE_CHECKING:
    from localmig.vmstate.description import Description

Explained = dict[str, Any]
"""One field, as the vmdesc has it: name, type, size; for some an index or array_len, or a struct."""

_U32: Final = packing.Struct(">I")


class Placed(NamedTuple):
    """A descriptor in a state.

    Attributes:
        path: of its field, as errors name it.
        kind: as declared.
        fd: the descriptor.
    """

    path: str
    kind: FdKind | str | None
    fd: OwnedFd

    def inside(self, name: str) -> Placed:
        """The same, with the field or the `[index]` around it."""
        return self._replace(path=joined(name, self.path))


class Line(NamedTuple):
    """A line that the vmdesc of a field may have.

    Attributes:
        name: of the line.
        type: as QEMU calls it.
        size: in bytes, None where the value decides.
        inner: what is in it, if it is a struct.
        always: whether it is there for every value.
    """

    name: str
    type: str
    size: int | None = None
    inner: Layout | None = None
    always: bool = True


class Field(ABC):
    """One named part of a state.

    Attributes:
        name: the attribute of the state it is.
        since: the first version of the section that has it.
        inner: the description of what is inside, if it is a struct or made of them.
    """

    inner: Description[Any] | None = None

    def __init__(self, name: str, since: int) -> None:
        if since < 1:
            raise ValueError(f'field "{name}" exists since version {since}, the first is 1')
        self.name = name
        self.since = since

    @property
    @abstractmethod
    def is_fixed(self) -> bool:
        """Whether every value of it has the same layout."""

    @abstractmethod
    def put(self, value: Any, into: Blob) -> None:
        """Appends `value`. Raises UnfitError."""

    @abstractmethod
    def get(self, reader: Reader, version: int) -> Any:
        """Reads one value as version `version` of the section wrote it. Raises MalformedError."""

    @abstractmethod
    def explain(self, value: Any) -> list[Explained]:
        """What `put` writes for `value`, field by field."""

    @abstractmethod
    def lines(self) -> Sequence[Line]:
        """The lines that `explain` may give, in their order."""

    def descriptors(self, value: Any) -> Iterator[Placed]:
        """Every descriptor in `value`, placed below this field."""
        return iter(())


class _Scalar(Field):
    """An unsigned integer or a bool, big endian. Neighbours are read and written together: see `_Run`."""

    is_fixed = True

    def __init__(self, name: str, since: int, code: str, kind: str) -> None:
        super().__init__(name, since)
        self.code = code
        self.kind = kind
        self.layout = packing.Struct(f">{code}")
        self.value_max = 1 if kind == "bool" else (1 << 8 * self.layout.size) - 1

    def check(self, value: object) -> None:
        """Raises UnfitError if `value` is no integer in range."""
        if not isinstance(value, int) or not 0 <= value <= self.value_max:
            raise UnfitError(f"is {value!r}, outside 0..{self.value_max}")

    def put(self, value: int, into: Blob) -> None:
        self.check(value)
        into.data += self.layout.pack(value)

    def get(self, reader: Reader, version: int) -> int:
        (value,) = reader.unpack(self.layout)
        return self.narrow(value)

    def narrow(self, value: int) -> int:
        """The value in the type the state has. Raises MalformedError for a bool that is neither 0 nor 1."""
        if self.kind != "bool":
            return value
        if value > 1:
            raise MalformedError(f"is {value}, a bool is 0 or 1")
        return bool(value)

    def explain(self, value: int) -> list[Explained]:
        return [{"name": self.name, "type": self.kind, "size": self.layout.size}]

    def lines(self) -> Sequence[Line]:
        return [Line(self.name, self.kind, self.layout.size)]


class _Bytes(Field):
    """A blob, or with `_Text` a string: its size, then its bytes."""

    is_fixed = False

    def __init__(self, name: str, since: int, size_max: int) -> None:
        super().__init__(name, since)
        self.size_max = size_max

    def encode(self, value: Any) -> bytes:
        return bytes(value)

    def decode(self, data: bytes) -> Any:
        return data

    def put(self, value: Any, into: Blob) -> None:
        data = self.encode(value)
        if len(data) > self.size_max:
            raise UnfitError(f"has {len(data)} bytes, limit is {self.size_max}")
        into.shape.append(len(data))
        into.data += _U32.pack(len(data))
        into.data += data

    def get(self, reader: Reader, version: int) -> Any:
        (size,) = reader.unpack(_U32)
        if size > self.size_max:
            raise MalformedError(f"has {size} bytes, limit is {self.size_max}")
        return self.decode(reader.take(size))

    def explain(self, value: Any) -> list[Explained]:
        return [
            {"name": f"{self.name}.size", "type": "uint32", "size": _U32.size},
            {"name": self.name, "type": "buffer", "size": len(self.encode(value))},
        ]

    def lines(self) -> Sequence[Line]:
        return [Line(f"{self.name}.size", "uint32", _U32.size), Line(self.name, "buffer")]


class _Text(_Bytes):
    """A string, as UTF-8."""

    def encode(self, value: str) -> bytes:
        return value.encode()

    def decode(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise MalformedError(f"is not UTF-8: {error.reason} at byte {error.start}") from None


class _Fd(Field):
    """A descriptor: lent when saved, owned by the state when loaded."""

    is_fixed = True

    def __init__(self, name: str, since: int, kind: FdKind | str | None) -> None:
        super().__init__(name, since)
        self.kind = kind

    def put(self, value: OwnedFd, into: Blob) -> None:
        into.put_fd(value)

    def get(self, reader: Reader, version: int) -> OwnedFd:
        return reader.take_fd()

    def explain(self, value: OwnedFd) -> list[Explained]:
        line: Explained = {"name": self.name, "type": "fd", "size": 1}
        return [line if self.kind is None else {**line, "kind": self.kind}]

    def lines(self) -> Sequence[Line]:
        return [Line(self.name, "fd", 1)]

    def descriptors(self, value: OwnedFd) -> Iterator[Placed]:
        yield Placed("", self.kind, value)


class _Struct(Field):
    """Another description's fields in place, written and read at the version of the section around them."""

    def __init__(self, name: str, since: int, inner: Description[Any]) -> None:
        super().__init__(name, since)
        if inner.subsections:
            # Nothing would tell where its fields end and a subsection begins: 0x05 may be a field's value.
            raise ValueError(f'"{inner.name}" has subsections, so it can only be a section, not field "{name}"')
        self.inner = inner
        self._layout = inner.layout
        self._state = inner.state

    @property
    def is_fixed(self) -> bool:
        return self._layout.is_fixed

    def put(self, value: Any, into: Blob) -> None:
        self._layout.put(value, into)

    def get(self, reader: Reader, version: int) -> Any:
        return self._state(**self._layout.get(reader, version))

    def explain(self, value: Any) -> list[Explained]:
        assert self.inner is not None
        fields = self._layout.explain(value)
        struct = {"vmsd_name": self.inner.name, "version": self.inner.version, "fields": fields}
        return [{"name": self.name, "type": "struct", "struct": struct, "size": total_size(fields)}]

    def lines(self) -> Sequence[Line]:
        return [Line(self.name, "struct", inner=self._layout)]

    def descriptors(self, value: Any) -> Iterator[Placed]:
        return self._layout.descriptors(value)


@functools.lru_cache(maxsize=128)  # a daemon's arrays have some dozen lengths
def _numbers(count: int, code: str) -> packing.Struct:
    return packing.Struct(f">{count}{code}")


class _Array(Field):
    """A count, then so many elements."""

    is_fixed = False

    def __init__(self, name: str, since: int, element: Field, count_max: int) -> None:
        super().__init__(name, since)
        self.element = element
        self.count_max = count_max
        self.inner = element.inner
        # Numbers are packed and unpacked in one call; what does not fit is then looked for one by one.
        self._code = element.code if isinstance(element, _Scalar) and element.kind != "bool" else None
        self._code_size = element.layout.size if isinstance(element, _Scalar) else 0

    def put(self, value: Sequence[Any], into: Blob) -> None:
        if len(value) > self.count_max:
            raise UnfitError(f"has {len(value)} elements, limit is {self.count_max}")
        into.shape.append(len(value))
        into.data += _U32.pack(len(value))
        if self._code is not None:
            try:
                into.data += _numbers(len(value), self._code).pack(*value)
            except packing.error:
                pass  # one of them does not fit: it is looked for below
            else:
                return
        for index, item in enumerate(value):
            try:
                self.element.put(item, into)
            except UnfitError as error:
                error.add_outer(f"[{index}]")
                raise

    def get(self, reader: Reader, version: int) -> Any:
        (count,) = reader.unpack(_U32)
        if count > self.count_max:
            raise MalformedError(f"has {count} elements, limit is {self.count_max}")
        if self._code is not None and reader.remaining >= count * self._code_size:
            return reader.unpack(_numbers(count, self._code))
        values = []
        for index in range(count):
            try:
                values.append(self.element.get(reader, version))
            except MalformedError as error:
                error.add_outer(f"[{index}]")
                raise
        return tuple(values)

    def explain(self, value: Sequence[Any]) -> list[Explained]:
        count: list[Explained] = [{"name": f"{self.name}.count", "type": "uint32", "size": _U32.size}]
        if len(value) == 1:
            return count + self.element.explain(value[0])
        if value and self.element.is_fixed:
            return count + [{**line, "array_len": len(value)} for line in self.element.explain(value[0])]
        indexed = [{**line, "index": index} for index, item in enumerate(value) for line in self.element.explain(item)]
        return count + indexed

    def lines(self) -> Sequence[Line]:
        count = Line(f"{self.name}.count", "uint32", _U32.size)
        return [count, *(line._replace(always=False) for line in self.element.lines())]

    def descriptors(self, value: Sequence[Any]) -> Iterator[Placed]:
        for index, item in enumerate(value):
            for placed in self.element.descriptors(item):
                yield placed.inside(f"[{index}]")


class _Numbers(_Array):
    """An array of integers that are bytes in the state, for code that makes and reads them quicker than Python."""

    def __init__(self, name: str, since: int, element: _Scalar, count_max: int) -> None:
        super().__init__(name, since, element, count_max)
        self._size = element.layout.size

    def put(self, value: Any, into: Blob) -> None:
        count, rest = divmod(len(value), self._size)
        if rest:
            raise UnfitError(f"has {len(value)} bytes, an element has {self._size}")
        if count > self.count_max:
            raise UnfitError(f"has {count} elements, limit is {self.count_max}")
        into.shape.append(count)
        into.data += _U32.pack(count)
        into.data += value

    def get(self, reader: Reader, version: int) -> bytes:
        (count,) = reader.unpack(_U32)
        if count > self.count_max:
            raise MalformedError(f"has {count} elements, limit is {self.count_max}")
        return reader.take(count * self._size)

    def explain(self, value: Any) -> list[Explained]:
        return super().explain((0,) * (len(value) // self._size))

    def descriptors(self, value: Any) -> Iterator[Placed]:
        return iter(())


class _Optional(Field):
    """A presence byte, then the field if it is there. None in the state is: not there."""

    is_fixed = False

    def __init__(self, field: Field) -> None:
        super().__init__(field.name, field.since)
        self.field = field
        self.inner = field.inner

    def put(self, value: Any, into: Blob) -> None:
        present = value is not None
        into.shape.append(present)
        into.data.append(present)
        if present:
            self.field.put(value, into)

    def get(self, reader: Reader, version: int) -> Any:
        present = reader.take(1)[0]
        if present > 1:
            raise MalformedError(f"has presence {present}, which is 0 or 1")
        return self.field.get(reader, version) if present else None

    def explain(self, value: Any) -> list[Explained]:
        presence: list[Explained] = [{"name": f"{self.name}.present", "type": "bool", "size": 1}]
        return presence if value is None else presence + self.field.explain(value)

    def lines(self) -> Sequence[Line]:
        presence = Line(f"{self.name}.present", "bool", 1)
        return [presence, *(line._replace(always=False) for line in self.field.lines())]

    def descriptors(self, value: Any) -> Iterator[Placed]:
        return iter(()) if value is None else self.field.descriptors(value)


class _Run:
    """Neighbouring scalars, packed and unpacked in one call."""

    def __init__(self, scalars: Sequence[_Scalar]) -> None:
        self.scalars = scalars
        self.names = tuple(scalar.name for scalar in scalars)
        self.layout = packing.Struct(">" + "".join(scalar.code for scalar in scalars))
        self._values_of = attrgetter(*self.names)
        self._bools = [scalar for scalar in scalars if scalar.kind == "bool"]

    def put(self, state: object, into: Blob) -> None:
        values = self._values_of(state) if len(self.names) > 1 else (self._values_of(state),)
        try:
            into.data += self.layout.pack(*values)
        except packing.error:
            _check_each(self.scalars, state)
            raise
        _check_each(self._bools, state)

    def get(self, reader: Reader, into: dict[str, Any]) -> None:
        try:
            values = reader.unpack(self.layout)
        except MalformedError:
            self._report_end(reader)
            raise
        into.update(zip(self.names, values))  # noqa: B905 - one name a value, and checking it costs a third
        for scalar in self._bools:
            try:
                into[scalar.name] = scalar.narrow(into[scalar.name])
            except MalformedError as error:
                error.add_outer(scalar.name)
                raise

    def _report_end(self, reader: Reader) -> None:
        """Raises for the first scalar that is not there whole."""
        for scalar in self.scalars:
            try:
                reader.unpack(scalar.layout)
            except MalformedError as error:
                error.add_outer(scalar.name)
                raise


class Layout:
    """An ordered set of fields, ready to be put and got.

    Args:
        fields: with different names.

    Raises:
        ValueError: two fields have one name.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        names = [field.name for field in fields]
        if len(set(names)) != len(names):
            raise ValueError(f"a name stands twice among the fields {', '.join(names)}")
        self.fields = tuple(fields)
        self.is_fixed = all(field.is_fixed for field in fields)
        versions = {1, *(field.since for field in fields)}
        self._steps_since = [
            (version, _grouped([field for field in fields if field.since <= version]))
            for version in sorted(versions, reverse=True)
        ]
        self._lines_at: dict[int, Mapping[str, Line]] = {}

    def put(self, state: object, into: Blob) -> None:
        """Appends the newest version's fields of `state`. Raises UnfitError."""
        for step in self._steps_since[0][1]:
            if type(step) is _Run:
                step.put(state, into)
                continue
            assert isinstance(step, Field)
            try:
                step.put(getattr(state, step.name), into)
            except UnfitError as error:
                error.add_outer(step.name)
                raise

    def get(self, reader: Reader, version: int) -> dict[str, Any]:
        """Reads the fields that `version` has. Raises MalformedError."""
        values: dict[str, Any] = {}
        for step in self._steps_at(version):
            if type(step) is _Run:
                step.get(reader, values)
                continue
            assert isinstance(step, Field)
            try:
                values[step.name] = step.get(reader, version)
            except MalformedError as error:
                error.add_outer(step.name)
                raise
        return values

    def _steps_at(self, version: int) -> tuple[_Run | Field, ...]:
        for since, steps in self._steps_since:
            if since <= version:
                return steps
        raise AssertionError(version)

    def explain(self, state: object) -> list[Explained]:
        """The vmdesc lines of what `put` writes for `state`."""
        return [line for field in self.fields for line in field.explain(getattr(state, field.name))]

    def lines_at(self, version: int) -> Mapping[str, Line]:
        """The lines that `explain` of version `version` may give, by name, in their order."""
        if version not in self._lines_at:
            fields = [field for field in self.fields if field.since <= version]
            self._lines_at[version] = {line.name: line for field in fields for line in field.lines()}
        return self._lines_at[version]

    def descriptors(self, state: object) -> Iterator[Placed]:
        """Every descriptor in `state`."""
        for field in self.fields:
            for placed in field.descriptors(getattr(state, field.name)):
                yield placed.inside(field.name)


def _check_each(scalars: Sequence[_Scalar], state: object) -> None:
    for scalar in scalars:
        try:
            scalar.check(getattr(state, scalar.name))
        except UnfitError as error:
            error.add_outer(scalar.name)
            raise


def _grouped(fields: Sequence[Field]) -> tuple[_Run | Field, ...]:
    """The fields in order, neighbouring scalars as one run."""
    steps: list[_Run | Field] = []
    for is_scalar, group in itertools.groupby(fields, lambda field: isinstance(field, _Scalar)):
        if is_scalar:
            steps.append(_Run([field for field in group if isinstance(field, _Scalar)]))
        else:
            steps += group
    return tuple(steps)


def total_size(lines: Sequence[Explained]) -> int:
    """Bytes that the lines of a vmdesc stand for."""
    return sum(line["size"] * line.get("array_len", 1) for line in lines)


def u8(name: str, *, since: int = 1) -> Field:
    """An integer of 0..2**8-1."""
    return _Scalar(name, since, "B", "uint8")


def u16(name: str, *, since: int = 1) -> Field:
    """An integer of 0..2**16-1."""
    return _Scalar(name, since, "H", "uint16")


def u32(name: str, *, since: int = 1) -> Field:
    """An integer of 0..2**32-1."""
    return _Scalar(name, since, "I", "uint32")


def u64(name: str, *, since: int = 1) -> Field:
    """An integer of 0..2**64-1."""
    return _Scalar(name, since, "Q", "uint64")


def boolean(name: str, *, since: int = 1) -> Field:
    """A bool."""
    return _Scalar(name, since, "B", "bool")


def text(name: str, *, size_max: int, since: int = 1) -> Field:
    """A str of at most `size_max` bytes of UTF-8."""
    return _Text(name, since, size_max)


def blob(name: str, *, size_max: int, since: int = 1) -> Field:
    """At most `size_max` bytes."""
    return _Bytes(name, since, size_max)


def fd(name: str, *, kind: FdKind | str | None = None, since: int = 1) -> Field:
    """A descriptor, an `OwnedFd` in the state.

    Args:
        name: the attribute.
        kind: what it is a descriptor of, for who reads the vmdesc; None where nobody can know. An `FdKind` is looked
            for by `check_descriptors`. A str is what a frontend should have given: if it gave something else, that is
            its own rings' loss and no lie of the source's.
        since: the first version of the section that has it.
    """
    return _Fd(name, since, kind)


def struct(name: str, inner: Description[Any], *, since: int = 1) -> Field:
    """Another dataclass, by its own description. `since` inside `inner` counts this section's versions."""
    return _Struct(name, since, inner)


def array(name: str, element: Description[Any] | Callable[[str], Field], *, count_max: int, since: int = 1) -> Field:
    """A sequence of at most `count_max` elements; a tuple once loaded.

    Args:
        name: the attribute.
        element: a description for structs, a kind (`u64`, `fd`, …) for anything else.
        count_max: most elements, with its reason beside the constant.
        since: the first version of the section that has it.
    """
    return _Array(name, since, element(name) if callable(element) else _Struct(name, 1, element), count_max)


def numbers(name: str, element: Callable[[str], Field], *, count_max: int, since: int = 1) -> Field:
    """At most `count_max` integers, bytes in the state: big endian, one after the other.

    Args:
        name: the attribute.
        element: `u8`, `u16`, `u32` or `u64`.
        count_max: most of them, with its reason beside the constant.
        since: the first version of the section that has it.
    """
    scalar = element(name)
    if not isinstance(scalar, _Scalar) or scalar.kind == "bool":
        raise TypeError(f'field "{name}" is of numbers, and its element of none')
    return _Numbers(name, since, scalar, count_max)


def optional(field: Field) -> Field:
    """`field`, or None."""
    return _Optional(field)
