"""What the demonstration tells of two rounds: table, verdict, picture; and what it says where it cannot run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.kit.cases import each_case

from localmig.demo import picture
from localmig.demo.__main__ import main
from localmig.demo.guests import choose_guest
from localmig.demo.report import GuestCounters, Replacement, Round, legend, table, verdict
from localmig.errors import ConfigError, KernelError
from localmig.testing import qemu
from localmig.testing.linux_guest import discarded_replies
from localmig.testing.traffic import UNANSWERED, PingRecord, PingReport, StreamReport

MS = 1_000_000

STREAM = StreamReport(
    bytes_sent=250_000_000, bytes_received=250_000_000, sha256_sent="aa", sha256_received="aa", seconds=10.0
)


def replacement(at_ms: float, downtime_ms: float | None) -> Replacement:
    """One that began at `at_ms`; None: the guest did not survive it."""
    stopped = int(at_ms * MS)
    if downtime_ms is None:
        return Replacement(stopped_ns=stopped, started_ns=None, recovered_ns=None)
    started = stopped + int(downtime_ms * MS)
    return Replacement(stopped_ns=stopped, started_ns=started, recovered_ns=started + 100 * MS)


def round_of(
    *replacements: Replacement, rtt_ns: dict[int, int] | None = None, seconds: int = 2, discarded: int = 0
) -> Round:
    """Pings with a round trip of 0.2 ms each, but for those in `rtt_ns` by number."""
    record = PingRecord(
        sent_ns=[number * MS for number in range(seconds * 1000)],
        rtt_ns=[(rtt_ns or {}).get(number, 200_000) for number in range(seconds * 1000)],
    )
    lost = sum(rtt == UNANSWERED for rtt in record.rtt_ns)
    pings = PingReport(
        sent=len(record.rtt_ns),
        received=len(record.rtt_ns) - lost,
        lost=lost,
        duplicates=0,
        rtt_us_p50=200,
        rtt_us_p99=200,
        rtt_us_max=max(record.rtt_ns) // 1000,
        silence_us_max=0,
        send_gap_us_max=1100,
    )
    guest = GuestCounters(carrier_changes=0, discarded_replies=discarded)
    return Round(replacements=replacements, pings=pings, record=record, stream=STREAM, guest=guest)


GOOD = round_of(replacement(100, 0.21), replacement(500, 0.19), replacement(900, 1.2))
RESTARTED = replace(
    round_of(replacement(100, 500), rtt_ns=dict.fromkeys(range(100, 700), UNANSWERED)),
    stream=replace(STREAM, sha256_received="bb"),
    guest=GuestCounters(carrier_changes=2, discarded_replies=30),
)
LOST = replace(
    round_of(replacement(100, None), rtt_ns=dict.fromkeys(range(100, 2000), UNANSWERED)), stream=None, guest=None
)


def rows(left: Round, right: Round) -> dict[str, tuple[str, str]]:
    lines = [line for line in table(left, right).splitlines()[1:] if line]
    cells = [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in lines]
    return {name: (first, second) for name, first, second in cells}


def test_the_table_shows_both_rounds_side_by_side() -> None:
    shown = rows(GOOD, RESTARTED)
    assert list(shown)[:2] == ["pings lost", "discarded by the guest"]
    assert shown["pings lost"] == ("0", "600")
    assert shown["discarded by the guest"] == ("0", "30")
    assert shown["downtime p50"] == ("0.21 ms", "500.00 ms")
    assert shown["downtime max"] == ("1.20 ms", "500.00 ms")
    assert shown["longest silence"] == ("0.20 ms", "600.20 ms")
    assert shown["link changes in guest"] == ("0", "2")
    assert shown["SHA-256 at both ends"] == ("equal", "DIFFERENT")


def test_a_guest_that_is_lost_has_no_downtime_and_is_silent_for_good() -> None:
    shown = rows(GOOD, LOST)
    assert shown["downtime p50"] == ("0.21 ms", "-")
    assert shown["longest silence"] == ("0.20 ms", "for good")
    assert shown["replacements"] == ("3", "0, then guest lost")
    assert shown["discarded by the guest"] == ("0", "-")
    assert shown["TCP stream"] == ("250 MB", "broken")


def test_a_silence_while_the_guest_recovers_is_the_replacements_and_a_later_one_is_not() -> None:
    # Rings run at 100.2 ms, the guest has recovered at 200.2 ms.
    late = {number: (160 - number) * MS for number in range(150, 160)}
    assert round_of(replacement(100, 0.2), rtt_ns=late).silences_us() == (10_000, 200)
    assert round_of(replacement(1000, 0.2), rtt_ns=late).silences_us() == (200, 10_000)


def test_pings_that_the_guest_discarded_itself_are_no_harm_done_by_handovers() -> None:
    lost = dict.fromkeys(range(300, 310), UNANSWERED)
    result = round_of(replacement(100, 0.2), rtt_ns=lost, discarded=10)
    assert result.is_unharmed
    assert "10 pings lost, all discarded by the guest itself and none by a handover" in verdict(result)


@each_case(
    ("result", "wrong"),
    [
        pytest.param(
            round_of(replacement(100, 0.2), rtt_ns={300: UNANSWERED, 301: UNANSWERED}, discarded=1),
            "2 pings lost, 1 of them proven to be discarded by the guest itself",
            id="more lost than the guest discarded",
        ),
        pytest.param(
            round_of(replacement(100, 150), rtt_ns={200: UNANSWERED}, discarded=1),
            "1 ping lost, 0 of them proven",
            id="a downtime so long that replies pile up by it",
        ),
        pytest.param(
            replace(GOOD, guest=GuestCounters(carrier_changes=2, discarded_replies=0)),
            "the guest saw 2 link changes",
            id="the link changed",
        ),
        pytest.param(replace(GOOD, stream=None), "the stream broke", id="the stream broke"),
        pytest.param(
            replace(GOOD, stream=replace(STREAM, sha256_received="bb")), "bytes differ", id="the stream differs"
        ),
        pytest.param(LOST, "the guest has lost its network", id="the guest is lost"),
    ],
)
def test_harm_that_handovers_did_is_named(result: Round, wrong: str) -> None:
    assert not result.is_unharmed
    assert wrong in verdict(result)


def test_handovers_without_harm_are_told_so() -> None:
    assert verdict(GOOD) == "3 handovers: no ping lost, no link change, every byte of the stream intact."


def test_the_legend_says_how_the_guest_looks_for_its_backend() -> None:
    assert "then another starts; it never looks." in legend(reconnects="it never looks")


def test_discarded_replies_are_what_the_kernel_counts_as_icmp_errors() -> None:
    snmp = "Ip: Forwarding\nIp: 1\nIcmp: InMsgs InEchos OutMsgs OutErrors OutEchoReps\nIcmp: 9 9 7 2 7\nIcmpMsg: A\n"
    assert discarded_replies(snmp) == 2


# -- the picture ------------------------------------------------------------------------------------------------


def test_the_picture_has_every_ping_every_replacement_and_both_sums() -> None:
    pytest.importorskip("matplotlib")
    upper, lower = picture.figure_of(GOOD, RESTARTED, guest="the guest").axes
    assert "3 times, 0 of 2000 pings lost, downtime 0.21 ms at the median, 1.20 ms at most" in upper.get_title("left")
    assert "600 of 2000 pings lost" in lower.get_title("left")
    for axes, result in ((upper, GOOD), (lower, RESTARTED)):
        assert len(axes.patches) == len(result.replacements)
        *moments, answered, lost = axes.lines
        assert len(moments) == len(result.replacements)
        assert len(answered.get_path()) == result.pings.received
        assert len(lost.get_path()) == result.pings.lost
    assert upper.get_xlim() == lower.get_xlim()
    assert upper.get_ylim() == lower.get_ylim()
    assert lower.get_yscale() == "log"


def test_the_picture_tells_what_the_guest_lost_by_itself() -> None:
    pytest.importorskip("matplotlib")
    discarded = round_of(replacement(100, 0.2), rtt_ns={300: UNANSWERED, 301: UNANSWERED}, discarded=1)
    upper, lower = picture.figure_of(discarded, RESTARTED, guest="the guest").axes
    assert "2 of 2000 pings lost (1 by the guest itself)" in upper.get_title("left")
    assert "by the guest" not in lower.get_title("left")  # its downtime was long enough to be the reason


def test_the_picture_shows_a_guest_that_is_lost_as_lost_to_the_end() -> None:
    pytest.importorskip("matplotlib")
    _, lower = picture.figure_of(GOOD, LOST, guest="the guest").axes
    (gap,) = lower.patches
    assert gap.get_extents().x1 == pytest.approx(lower.transData.transform((1.999, 1))[0])
    assert "0 times, then the guest was lost" in lower.get_title("left")


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_picture_is_written_over_an_older_one(tmp_path: Path, suffix: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"demo{suffix}"
    path.write_bytes(b"older")
    picture.draw(path, GOOD, RESTARTED, guest="the guest")
    assert path.read_bytes().startswith(begins)


def test_a_picture_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "demo.png"
    folder.mkdir()
    with pytest.raises(KernelError, match=r"cannot write the picture '.*demo.png': Is a directory"):
        picture.draw(folder, GOOD, RESTARTED, guest="the guest")


def test_without_matplotlib_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reason = picture.unavailable_reason()
    assert reason is not None
    assert "pip install matplotlib" in reason


@pytest.mark.parametrize(
    ("path", "wrong"),
    [("demo.jpeg", r"ends with '\.jpeg': it may end with \.png, \.svg, \.pdf"), ("no/such/demo.png", "--no-picture")],
)
def test_a_picture_that_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, path: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        picture.check_path(tmp_path / path)
    assert main(["--picture", str(tmp_path / path)]) == 1
    assert capsys.readouterr().err.startswith("localmig: error: ")


# -- the guests -------------------------------------------------------------------------------------------------


def test_a_guest_under_qemu_without_a_kernel_says_where_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in (qemu.PROGRAM, "busybox"):
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="make guest-kernel"):
        choose_guest("qemu", tmp_path)


@pytest.mark.parametrize(("kind", "package"), [("qemu", "qemu-system-x86"), ("uml", "user-mode-linux")])
def test_a_guest_whose_program_is_missing_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"on Debian, apt-get install {package}"):
        choose_guest(kind, tmp_path)
