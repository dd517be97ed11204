"""A table of cases as one test: each case is tried, and all that fail are told together.

Owns:        `each_case`, which reads as `pytest.mark.parametrize` and makes one item instead of hundreds.
Never sees:  what the cases are.
Read next:   any test that uses it.

An item costs pytest some milliseconds, in each of its workers. Fixtures are shared by all cases; what a case needs of
its own is `fresh`. Cases that take long are for `parametrize`, so that workers share them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import MappingProxyType
from typing import Any, Final

import pytest

_FAILURES_SHOWN_MAX: Final = 10
"""Cases whose failure is shown whole; of the others the names are."""

Test = Callable[..., None]


def each_case(
    names: str | Sequence[str],
    cases: Iterable[Any],
    *,
    ids: Callable[[Any], str] | Sequence[str] = repr,
    fresh: Mapping[str, Callable[[], AbstractContextManager[Any]]] = MappingProxyType({}),
) -> Callable[[Test], Test]:
    """Calls the test with each case in turn, and fails naming all cases that failed.

    Args:
        names: of the arguments that a case is for: one name, or several for cases that are tuples.
        cases: what they are; `pytest.param` gives one a name.
        ids: what names a value, or the names of all cases.
        fresh: what each case has one of its own of, by the name of the argument.
    """
    arguments = [names] if isinstance(names, str) else list(names)
    table = [
        _named(case, is_single=isinstance(names, str), ids=repr if isinstance(ids, Sequence) else ids) for case in cases
    ]
    if isinstance(ids, Sequence):
        table = [(name, values) for name, (_, values) in zip(ids, table, strict=True)]
    assert table, names

    def fold(test: Test) -> Test:
        def walked(**fixtures: Any) -> None:
            failures: list[BaseException] = []
            failed: list[str] = []
            for name, values in table:
                try:
                    with ExitStack() as stack:
                        own = {each: stack.enter_context(make()) for each, make in fresh.items()}
                        test(**fixtures, **own, **dict(zip(arguments, values, strict=True)))
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - told below, with all others
                    error.add_note(f"in the case {name}")
                    failed.append(name)
                    failures.append(error)
            if failures:
                text = f"{len(failures)} of {len(table)} cases failed: {'; '.join(failed)}"
                raise BaseExceptionGroup(text, failures[:_FAILURES_SHOWN_MAX])

        signature = inspect.signature(test)
        missing = {*arguments, *fresh} - signature.parameters.keys()
        assert not missing, f"{test.__name__} has no argument {missing}"
        left = [each for each in signature.parameters.values() if each.name not in (*arguments, *fresh)]
        walked.__name__, walked.__qualname__, walked.__module__ = test.__name__, test.__qualname__, test.__module__
        walked.__doc__ = test.__doc__
        walked.__dict__.update(test.__dict__)  # marks
        walked.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return walked

    return fold


def _named(case: Any, *, is_single: bool, ids: Callable[[Any], str]) -> tuple[str, Sequence[Any]]:
    values: Sequence[Any]
    if isinstance(case, type(pytest.param())):
        values = case.values
        if case.id is not None:
            return str(case.id), values
    else:
        values = (case,) if is_single else tuple(case)
    return ", ".join(map(ids, values)), values
