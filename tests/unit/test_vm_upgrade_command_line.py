"""QEMU's command line becomes options, and is written again with other values."""

from __future__ import annotations

import pytest

from localmig.cli.vm_upgrade.command_line import Option, parse, replaced, to_words

WORDS = [
    *("-M", "q35,accel=tcg", "-nodefaults", "--enable-kvm", "-m", "256", "disk.img"),
    *("-chardev", "socket,id=c0,path=/run/a,,b,server=on,nowait", "-device", '{"driver": "virtio-rng", "id": "r0"}'),
]


def test_words_become_options_and_words_again() -> None:
    options = parse(WORDS)
    assert [option.name for option in options] == ["M", "nodefaults", "enable-kvm", "m", "hda", "chardev", "device"]
    # A word of its own is the first disk, and an option may begin with two dashes.
    expected = ["-enable-kvm" if word == "--enable-kvm" else word for word in WORDS]
    expected.insert(expected.index("disk.img"), "-hda")
    assert to_words(options) == expected


def test_an_option_without_its_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="option '-netdev' has no value"):
        parse(["-netdev"])


@pytest.mark.parametrize(
    ("option", "properties"),
    [
        (Option("M", "q35,accel=tcg"), {"type": "q35", "accel": "tcg"}),
        (Option("chardev", "socket,path=/a,,b"), {"backend": "socket", "path": "/a,b"}),
        (Option("chardev", "socket,nowait,server"), {"backend": "socket", "wait": "off", "server": "on"}),
        (Option("device", '{"driver": "x", "addr": 3, "on": true}'), {"driver": "x", "addr": "3", "on": "on"}),
        (Option("qmp", "unix:/q,server=on"), {"": "unix:/q", "server": "on"}),
        (Option("S"), {}),
    ],
)
def test_a_value_tells_its_properties(option: Option, properties: dict[str, str]) -> None:
    assert option.properties == properties


@pytest.mark.parametrize(
    ("value", "key", "new", "expected"),
    [
        ("socket,id=c,path=/a,,b", "path", "/x,y", "socket,id=c,path=/x,,y"),
        ("socket,id=c,,,path=/a", "path", "/x", "socket,id=c,,,path=/x"),
        ("socket,id=c", "path", "/x", "socket,id=c,path=/x"),
        ("socket,server,id=c", "server", "off", "socket,server=off,id=c"),
        ("socket,id=c", "backend", "file", "file,id=c"),
        ('{"id": "c"}', "path", "/x", '{"id": "c", "path": "/x"}'),
    ],
)
def test_one_property_is_written_and_the_others_stay(value: str, key: str, new: str, expected: str) -> None:
    assert Option("chardev", value).with_property(key, new) == Option("chardev", expected)


def test_an_option_takes_the_place_of_the_one_with_its_name_and_id() -> None:
    old = parse(["-vnc", ":1", "-netdev", "tap,id=n0", "-netdev", "user,id=n1", "-S"])
    new = parse(["-netdev", "user,id=n0", "-vnc", "none"])
    assert to_words(replaced(old, new)) == ["-netdev", "user,id=n1", "-S", "-netdev", "user,id=n0", "-vnc", "none"]
