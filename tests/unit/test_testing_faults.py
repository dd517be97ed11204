"""How faults are written."""

from __future__ import annotations

import pytest
from tests.kit.cases import each_case

from localmig.errors import ConfigError
from localmig.migration.channel import FrameKind
from localmig.testing.faults import Action, Fault, Place, Point, main


def test_a_fault_is_read_as_it_is_written() -> None:
    fault = Fault.parse("after-receive:SETUP_ACK=stop")
    point = Point(place=Place.AFTER_RECEIVE, subject="SETUP_ACK")
    assert fault == Fault(point=point, action=Action.STOP)
    assert Fault.parse(str(fault)) == fault


@each_case(
    ("text", "expected"),
    [
        ("", "'' is none of before-send, after-send, after-receive"),
        ("during:READY=kill", "'during' is none of before-send"),
        ("before-send:ready=kill", "'ready' is none of HELLO, REFUSE, DESCRIPTION, SETUP"),
        ("before-send:READY", "'' is none of kill, stop, raise"),
        ("before-send:READY=kill=", "'kill=' is none of kill, stop, raise"),
    ],
)
def test_a_fault_that_is_none_is_told_by_the_wrong_word(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Fault.parse(text)


@each_case(
    "argv", [[], ["before-send:READY=kill"], ["before-send:READY=kill", "--"], ["--", "run"], ["oops", "--", "run"]]
)
def test_misuse_is_answered_with_the_usage_and_starts_nothing(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said.startswith(
        "usage: python -m localmig.testing.faults PLACE:SUBJECT[#PASSING]=ACTION|@FILE [--journal FOLDER] -- "
    )
    assert ("'oops' is none of" in said) is ("oops" in argv)


def test_help_names_every_word_a_fault_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    told = capsys.readouterr().out
    assert [word for word in (*Place, *Action, *FrameKind.__members__) if word not in told] == []
