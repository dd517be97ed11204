"""Addresses: text to type and back, and QEMU's words for what is wrong."""

from __future__ import annotations

import pytest
from tests.kit.cases import each_case

from localmig.errors import ConfigError
from localmig.options.address import (
    Address,
    Defer,
    FdAddress,
    TcpAddress,
    UnixAddress,
    parse_address,
    parse_incoming,
)

ADDRESSES: dict[str, Address] = {
    "unix:/run/vm1/migrate.sock": UnixAddress(path="/run/vm1/migrate.sock"),
    "unix:a:b,c": UnixAddress(path="a:b,c"),
    "unix:" + "p" * 107: UnixAddress(path="p" * 107),
    "fd:7": FdAddress(name="7"),
    "fd:channel": FdAddress(name="channel"),
    "tcp:localhost:4444": TcpAddress(host="localhost", port=4444),
    "tcp::4444": TcpAddress(host="", port=4444),
    "tcp:[::1]:65535": TcpAddress(host="::1", port=65535),
}


@each_case("text", ADDRESSES)
def test_text_becomes_an_address_and_the_same_text_again(text: str) -> None:
    assert parse_address(text) == ADDRESSES[text]
    assert str(ADDRESSES[text]) == text
    assert parse_incoming(text) == ADDRESSES[text]


@each_case(
    ("text", "error"),
    [
        ("foo", "unknown migration protocol: foo"),
        ("", "unknown migration protocol: "),
        ("unix", "unknown migration protocol: unix"),
        ("exec:cat", "unknown migration protocol: exec:cat"),
        ("UNIX:/a", "unknown migration protocol: UNIX:/a"),
        ("defer", "unknown migration protocol: defer"),
        ("unix:", "invalid Unix socket address"),
        ("unix:a\0b", "invalid Unix socket address"),
        (
            "unix:" + "p" * 108,
            f"UNIX socket path '{'p' * 108}' is too long: 108 bytes, limit is 107; use a shorter directory",
        ),
        (
            "unix:" + "é" * 54,
            f"UNIX socket path '{'é' * 54}' is too long: 108 bytes, limit is 107; use a shorter directory",
        ),
        ("fd:", "invalid file descriptor address 'fd:', expected fd:NAME or fd:NUMBER"),
        ("tcp:localhost", "error parsing address 'localhost'"),
        ("tcp:", "error parsing address ''"),
        ("tcp:localhost:", "error parsing port in address 'localhost:'"),
        ("tcp:localhost:ssh", "error parsing port in address 'localhost:ssh'"),
        ("tcp:localhost:-1", "error parsing port in address 'localhost:-1'"),
        ("tcp:localhost:٣", "error parsing port in address 'localhost:٣'"),
        ("tcp:localhost:65536", "error parsing port in address 'localhost:65536', highest port is 65535"),
        ("tcp:localhost:" + "9" * 5000, "error parsing port in address 'localhost:" + "9" * 5000 + "'"),
        ("tcp:[::1", "error parsing IPv6 address '[::1'"),
        ("tcp:[]:1", "error parsing IPv6 address '[]:1'"),
        ("tcp:[[[[]]:3", "error parsing IPv6 address '[[[[]]:3'"),
    ],
)
def test_a_wrong_address_is_refused_in_qemus_words(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert str(caught.value) == error


def test_incoming_may_be_deferred() -> None:
    assert parse_incoming("defer") == Defer()
    assert str(Defer()) == "defer"


@each_case(("name", "number"), [("0", 0), ("12", 12), ("a1", None), ("²", None), ("9" * 11, None)])
def test_a_descriptor_address_knows_whether_it_is_a_number(name: str, number: int | None) -> None:
    assert FdAddress(name=name).number == number
