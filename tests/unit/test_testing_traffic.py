"""What the traffic tools count, without traffic."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.kit.cases import each_case

from localmig.errors import PeerError
from localmig.testing.traffic import UNANSWERED, EchoLog, PingRecord, StreamReport, percentile

MS = 1_000_000


def test_an_answer_to_every_request_is_no_loss() -> None:
    log = EchoLog()
    for number in range(100):
        assert log.sent(number * MS) == number
        log.answered(number, number * MS + 200_000)
    report = log.report()
    assert (report.sent, report.received, report.lost, report.duplicates) == (100, 100, 0, 0)
    assert report.rtt_us_p50 == report.rtt_us_max == 200
    assert report.silence_us_max == 200
    assert report.send_gap_us_max == 1000


def test_a_request_without_an_answer_is_lost_and_the_wait_for_the_next_is_silence() -> None:
    log = EchoLog()
    for number in range(10):
        log.sent(number * MS)
        if number not in (3, 4, 5):
            log.answered(number, number * MS + 100_000)
    report = log.report()
    assert (report.received, report.lost) == (7, 3)
    # From the request at 3 ms to the answer at 6.1 ms.
    assert report.silence_us_max == 3100


def test_a_pinger_that_was_late_measures_no_silence() -> None:
    log = EchoLog()
    for at_ms in (0, 1, 500, 501):
        log.answered(log.sent(at_ms * MS), at_ms * MS + 100_000)
    report = log.report()
    assert report.silence_us_max == 100
    assert report.send_gap_us_max == 499_000


def test_answers_that_come_late_and_together_count_as_silence_and_not_as_loss() -> None:
    log = EchoLog()
    for number in range(20):
        log.sent(number * MS)
    for number in range(20):
        log.answered(number, 20 * MS)
    report = log.report()
    assert report.lost == 0
    assert report.silence_us_max == 20_000
    assert report.rtt_us_max == 20_000


def test_a_silence_that_lasts_to_the_end_counts() -> None:
    log = EchoLog()
    log.answered(log.sent(0), 100_000)
    for at_ms in range(1, 50):
        log.sent(at_ms * MS)
    assert log.report().silence_us_max == 48_000
    assert log.outstanding == 49


def test_a_second_answer_is_a_duplicate_and_not_an_answer() -> None:
    log = EchoLog()
    first, second = log.sent(0), log.sent(MS)
    log.answered(first, 2 * MS)
    log.answered(first, 3 * MS)
    report = log.report()
    assert (report.received, report.lost, report.duplicates) == (1, 1, 1)
    log.answered(second, 4 * MS)
    assert log.report().lost == 0


def test_an_answer_to_what_was_never_asked_is_refused_and_changes_nothing() -> None:
    log = EchoLog()
    log.sent(0)
    before = log.report()
    with pytest.raises(PeerError, match="sequence number 1, highest sent is 0"):
        log.answered(1, MS)
    assert log.report() == before


def test_a_log_of_nothing_has_a_report() -> None:
    report = EchoLog().report()
    assert report.sent == report.lost == report.silence_us_max == 0
    assert report.rtt_us_p50 is None


def test_an_answer_that_was_overtaken_ends_no_silence() -> None:
    log = EchoLog()
    first, second = log.sent(0), log.sent(MS)
    log.answered(second, 2 * MS)
    log.answered(first, 3 * MS)
    log.answered(log.sent(10 * MS), 11 * MS)
    assert list(log.record.silences()) == [(0, 2 * MS), (10 * MS, 11 * MS)]


def test_an_answer_stamped_before_its_request_is_an_answer() -> None:
    log = EchoLog()
    log.answered(log.sent(MS), MS - 1)  # the wall clock was set in between
    assert (log.report().lost, log.report().rtt_us_max) == (0, 0)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = PingRecord(sent_ns=[5, 7, 9], rtt_ns=[100, UNANSWERED, 0])
    path = tmp_path / "pings.csv"
    record.write(path)
    read = PingRecord.read(path)
    assert (list(read.sent_ns), list(read.rtt_ns)) == (record.sent_ns, record.rtt_ns)


@pytest.mark.parametrize(("text", "wrong"), [("", "begins with ''"), ("sent_ns,rtt_ns\n5,x\n", "the line '5,x")])
def test_what_is_no_record_of_pings_is_refused(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "pings.csv"
    path.write_text(text)
    with pytest.raises(PeerError, match=wrong):
        PingRecord.read(path)


@each_case(("fraction", "expected"), [(0.0, 1), (0.01, 1), (0.5, 50), (0.501, 51), (0.99, 99), (1.0, 100)])
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(fraction: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), fraction) == expected


def test_a_percentile_of_nothing_is_nothing() -> None:
    assert percentile([], 0.5) is None


@pytest.mark.parametrize(
    ("received", "digest", "intact"), [(10, "aa", True), (None, "aa", True), (9, "aa", False), (10, "ab", False)]
)
def test_a_stream_is_intact_if_hash_and_known_length_agree(received: int | None, digest: str, *, intact: bool) -> None:
    report = StreamReport(bytes_sent=10, bytes_received=received, sha256_sent="aa", sha256_received=digest, seconds=1.0)
    assert report.intact is intact
