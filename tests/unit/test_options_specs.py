"""Specs: every form of one is read, checked and written by the same table."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kit.cases import each_case

from localmig.devices.virtio_net.options import OFFLOAD_NAMES, VirtioNetSpec
from localmig.errors import ConfigError, PeerError
from localmig.migration.hello import Origin
from localmig.netdevs.macvtap_options import MacvtapSpec
from localmig.netdevs.stream_options import StreamSpec
from localmig.netdevs.tap_options import TapSpec
from localmig.options import (
    MonitorSpec,
    Spec,
    UnixAddress,
    check_together,
    differences,
    parse_monitor,
    to_mapping,
)
from localmig.options.specs import options_of
from localmig.registry import Registry

REGISTRY = Registry(entry_points=list)
help_for = REGISTRY.help_for
from_mapping = partial(REGISTRY.read_theirs, origin=Origin.own())

TAP = TapSpec(id="net0", ifname="tap0", script="/etc/up", downscript="/etc/down", mtu=9000)
MACVTAP = MacvtapSpec(id="net0", ifname="mt0", link="eth0", mode="vepa")
STREAM = StreamSpec(id="net0", addr_path="/run/passt.sock", reconnect_ms=100)
NIC = VirtioNetSpec(id="nic0", netdev="net0", socket="/run/nic0.sock", local_migration=False)


def parse_netdev(text: str) -> TapSpec:
    spec = REGISTRY.parse("netdev", text)
    assert isinstance(spec, TapSpec), spec
    return spec


def parse_device(text: str) -> VirtioNetSpec:
    spec = REGISTRY.parse("device", text)
    assert isinstance(spec, VirtioNetSpec), spec
    return spec


def test_a_stream_is_read_in_qemus_words_in_text_and_in_json() -> None:
    text = "stream,id=net0,server=off,addr.type=unix,addr.path=/run/passt.sock,reconnect-ms=100"
    assert REGISTRY.parse("netdev", text) == STREAM
    nested = {"type": "stream", "id": "net0", "addr": {"type": "unix", "path": "/run/passt.sock"}, "reconnect-ms": 100}
    assert REGISTRY.parse("netdev", json.dumps(nested)) == STREAM


# -- text -----------------------------------------------------------------------------------------------------


def test_keyval_text_becomes_a_spec() -> None:
    text = "tap,id=net0,ifname=tap0,script=/etc/up,downscript=/etc/down,mtu=9000,queues=1"
    assert parse_netdev(text) == TAP
    assert parse_netdev("type=tap,id=a,fd=5") == TapSpec(id="a", fd="5")
    assert parse_netdev("tap,id=a,sndbuf=65536").sndbuf == 65536
    inherited = parse_netdev("tap,id=a,fds=3:5:4")
    assert (inherited.descriptors, inherited.queues) == ((3, 5, 4), 3)
    assert parse_netdev("tap,id=a,fds=3:5:4,queues=3") == inherited
    assert parse_netdev("tap,id=a,fd=taken:out").descriptors == ("taken:out",)
    assert parse_netdev("tap,id=a,fds=first:7").descriptors == ("first", 7)
    text = "virtio-net,id=nic0,netdev=net0,socket=/run/nic0.sock,local-migration=off"
    assert parse_device(text) == NIC
    assert parse_device(text.replace("off", "on")).local_migration is True
    assert parse_device(text.removesuffix(",local-migration=off")).local_migration is None
    assert parse_device(f"{text},mac=52:54:00:AB:cd:01").mac == "52:54:00:AB:cd:01"
    without = parse_device(f"{text},host_tso4=off,guest_csum=off")
    assert (without.host_tso4, without.guest_csum, without.host_tso6) == (False, False, True)
    assert to_mapping(without)["host_tso4"] is False
    assert not parse_device(text).packed
    assert parse_device(f"{text},packed=on").packed


def test_json_text_becomes_the_same_spec() -> None:
    values = {"type": "tap", "id": "net0", "ifname": "tap0", "mtu": 9000}
    assert parse_netdev(json.dumps(values)) == TapSpec(id="net0", ifname="tap0", mtu=9000)
    assert parse_netdev(json.dumps(values).replace('"', "'")) == TapSpec(id="net0", ifname="tap0", mtu=9000)
    values = {"driver": "virtio-net", "id": "nic0", "netdev": "net0", "socket": "/run/nic0.sock"}
    assert parse_device(json.dumps(values | {"local-migration": False})) == NIC


def test_two_commas_are_one_comma_in_a_value() -> None:
    assert parse_device("virtio-net,id=a,netdev=b,socket=/x,,y,,,local-migration=on").socket == "/x,y,"


def test_a_comma_at_the_end_is_no_option() -> None:
    assert parse_netdev("tap,id=net0,") == TapSpec(id="net0")


NETDEV_ERRORS = {
    "": "Parameter 'type' does not accept value '', one of: tap, macvtap, stream",
    "id=net0": "Parameter 'type' is missing, one of: tap, macvtap, stream",
    "stream,id=a": "Parameter 'addr.path' is missing",
    "stream,id=a,addr.type=inet,addr.path=/s": "Parameter 'addr.type' does not accept value 'inet', one of: unix",
    "stream,id=a,addr.path=/s,server=on,reconnect-ms=1": (
        "'reconnect-ms' option is incompatible with socket in server listen mode"
    ),
    '{"type": "stream", "id": "a", "addr": {"path": "/s", "host": "h"}}': (
        "Parameter 'addr.host' is unexpected, stream has: id, addr.path, addr.type, server, reconnect-ms, mtu"
    ),
    "macvtap,id=a": "Parameter 'ifname' is missing",
    "macvtap,id=a,ifname=mt0,mode=vepa": "mode= is invalid without link=: whoever made the interface chose its mode",
    "macvtap,id=a,ifname=mt0,link=eth0,mode=source": (
        "Parameter 'mode' does not accept value 'source', one of: bridge, vepa, private, passthru"
    ),
    "bridge,id=net0": "Parameter 'type' does not accept value 'bridge', one of: tap, macvtap, stream",
    "virtio-net,id=net0": "Parameter 'type' does not accept value 'virtio-net', one of: tap, macvtap, stream",
    "tap": "Parameter 'id' is missing",
    "tap,id=net0,bogus=1": "Parameter 'bogus' is unexpected, tap has: "
    + ", ".join(each.name for each in options_of(TapSpec)),
    "tap,id=net0,id=net1": "Parameter 'id' is there twice, as 'net0' and 'net1'",
    "tap,id=net0,vhost": "Expected '=' after parameter 'vhost'",
    "tap,,id=net0": "Invalid parameter 'tap,id'",
    "tap,=x": "Invalid parameter ''",
    "tap,id=0net": "Parameter 'id' expects an identifier, not '0net': "
    "identifiers consist of letters, digits, '-', '.', '_', starting with a letter",
    "tap,id=" + "n" * 64: f"Parameter 'id' has 64 letters, limit is 63: '{'n' * 64}'",
    "tap,id=net0,mtu=big": "Parameter 'mtu' expects a number, not 'big'",
    "tap,id=net0,mtu=-1": "Parameter 'mtu' expects a number, not '-1'",
    "tap,id=net0,mtu=": "Parameter 'mtu' expects a number, not ''",
    "tap,id=net0,mtu=67": "Parameter 'mtu' expects a value between 68 and 65521, not 67: "
    "what the kernel lets a TAP have",
    "tap,id=net0,mtu=65522": "Parameter 'mtu' expects a value between 68 and 65521, not 65522: "
    "what the kernel lets a TAP have",
    "tap,id=net0,queues=129": "Parameter 'queues' expects a value between 1 and 128, not 129: "
    "vhost-user can name 256 vrings, two for each queue",
    "tap,id=net0,queues=0": "Parameter 'queues' expects a value between 1 and 128, not 0: "
    "vhost-user can name 256 vrings, two for each queue",
    "tap,id=net0,fds=": "Parameter 'fds' expects a descriptor's number or name, not ''",
    "tap,id=net0,fds=5:": "Parameter 'fds' expects a descriptor's number or name, not ''",
    **{
        f"tap,id=net0,fds={text}": "Parameter 'fds' expects the number of a descriptor, 3 to 1048575, or a name "
        f"that does not begin with a digit, not '{wrong}'"
        for text, wrong in {"5:2": "2", "a:5x": "5x"}.items()
    },
    "tap,id=net0,fds=5:a:a": "Parameter 'fds' has a descriptor twice: '5:a:a'",
    "tap,id=net0,fds=5:6:05": "Parameter 'fds' has a descriptor twice: '5:6:05'",
    "tap,id=net0,fds=5:6,queues=3": "queues=3 is invalid with fds=, which has 2 descriptors",
    "tap,id=net0,fds=5:6,fd=7": "fd= is invalid with fds=: give every descriptor in fds=",
    "tap,id=net0,fd=5,queues=2": "queues=2 is invalid with fd=: give a descriptor for each queue in fds=",
    "tap,id=net0,fds=5:6,script=/x": "ifname=, script=, downscript= and br= are invalid with fds=: "
    "who opened the TAP set it up",
    "tap,id=net0,fds=" + ":".join(map(str, range(3, 132))): "Parameter 'fds' has 129 descriptors, limit is 128",
    "tap,id=net0,fd=5,br=br0": "ifname=, script=, downscript= and br= are invalid with fd=: "
    "who opened the TAP set it up",
    "tap,id=net0,br=br0,script=/x": "script= and downscript= are invalid with br=: "
    "say one way to connect the interface",
    "tap,id=net0,br=br0,downscript=/x": "script= and downscript= are invalid with br=: "
    "say one way to connect the interface",
    "tap,id=net0,br=a/b": "Parameter 'br' expects an interface name, not 'a/b': "
    "no space, '/', ':' or '%', not '.' or '..'",
    "tap,id=net0,guest-carrier=yes": "Parameter 'guest-carrier' expects 'on' or 'off', not 'yes'",
    "tap,id=net0,fd=2": "Parameter 'fd' expects the number of a descriptor, 3 to 1048575, or a name that does not "
    "begin with a digit, not '2'",
    "tap,id=net0,ifname=": "Parameter 'ifname' expects 1 to 15 bytes, not 0: ''",
    "tap,id=net0,ifname=abcdefghijklmnop": "Parameter 'ifname' expects 1 to 15 bytes, not 16: 'abcdefghijklmnop'",
    "tap,id=net0,ifname=tap%d": "Parameter 'ifname' expects an interface name, not 'tap%d': "
    "no space, '/', ':' or '%', not '.' or '..'",
    "tap,id=net0,ifname=..": "Parameter 'ifname' expects an interface name, not '..': "
    "no space, '/', ':' or '%', not '.' or '..'",
    "tap,id=net0,script=": "Parameter 'script' expects a path of 1 to 4095 bytes, not 0",
    "tap,id=net0,fd=5,ifname=tap0": "ifname=, script=, downscript= and br= are invalid with fd=: "
    "who opened the TAP set it up",
    "tap,id=net0,fd=5,downscript=/x": "ifname=, script=, downscript= and br= are invalid with fd=: "
    "who opened the TAP set it up",
    '{"type": "tap", "id": 5}': "Invalid parameter type for 'id', expected: string",
    '{"type": 5}': "Invalid parameter type for 'type', expected: string",
    '{"type": "tap", "id": "net0", "fd": 5}': "Invalid parameter type for 'fd', expected: string",
    '{"type": "tap", "id": "net0", "mtu": "9000"}': "Invalid parameter type for 'mtu', expected: integer",
    '{"type": "tap", "id": "net0", "mtu": true}': "Invalid parameter type for 'mtu', expected: integer",
    '{"type": "tap", "id": "net0", "mtu": null}': "Invalid parameter type for 'mtu', expected: integer",
    '{"type": "tap", "id": "a", "id": "b"}': "Parameter 'id' is there twice, as 'a' and 'b'",
    r'{"type": "tap", "id": "a", "script": "a\u0000"}': "Parameter 'script' has a NUL byte in its value",
    '{"type": "tap"': "JSON parse error, Expecting ',' delimiter: line 1 column 15 (char 14)",
}


@each_case("text", NETDEV_ERRORS)
def test_a_wrong_netdev_is_refused_with_its_text_and_what_is_wrong(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_netdev(text)
    assert str(caught.value) == f"--netdev {text}: {NETDEV_ERRORS[text]}"


DEVICE_ERRORS = {
    "tap,id=nic0": "Parameter 'driver' does not accept value 'tap', one of: virtio-net",
    "virtio-net,id=nic0,socket=/x": "Parameter 'netdev' is missing",
    "virtio-net,id=nic0,netdev=net0,socket=/x,mac=1:2:3:4:5:6": "Parameter 'mac' expects an Ethernet address like "
    "52:54:00:12:34:56, not '1:2:3:4:5:6'",
    "virtio-net,id=nic0,netdev=net0,socket=/x,mac=53:54:00:12:34:56": "Parameter 'mac' expects the address of one "
    "station, not '53:54:00:12:34:56'",
    "virtio-net,id=nic0,netdev=net0": "Parameter 'socket' is missing",
    "virtio-net,id=nic0,netdev=net0,socket=": "Parameter 'socket': invalid Unix socket address",
    f"virtio-net,id=nic0,netdev=net0,socket=/{'s' * 107}": "Parameter 'socket': "
    f"UNIX socket path '/{'s' * 107}' is too long: 108 bytes, limit is 107; use a shorter directory",
    "virtio-net,id=nic0,netdev=net0,socket=/x,local-migration=yes": "Parameter 'local-migration' "
    "expects 'on' or 'off', not 'yes'",
    '{"driver": "virtio-net", "id": "a", "netdev": "b", "socket": "/x", "local-migration": "on"}': "Invalid "
    "parameter type for 'local-migration', expected: boolean",
    '{"driver": "virtio-net", "id": "a", "netdev": "b", "socket": "/x", "local_migration": true}': "Parameter "
    f"'local_migration' is unexpected, virtio-net has: {', '.join(each.name for each in options_of(VirtioNetSpec))}",
    "virtio-net,id=a,netdev=b,socket=/x,reconnect-ms=5": "'reconnect-ms' option is incompatible with socket in server "
    "listen mode",
    "virtio-net,id=a,netdev=b,socket=/x,server=off,reconnect-ms=60001": "Parameter 'reconnect-ms' expects a value "
    "between 0 and 60000, not 60001: a VMM that came back waits a minute at most",
    "virtio-net,id=a,netdev=b,socket=/x,second-socket=/y": "second-socket= is invalid with server=on: "
    "any number of VMMs connects to socket=",
    "virtio-net,id=a,netdev=b,socket=/x,server=off,second-socket=/x": "second-socket= and socket= are both '/x'",
    "virtio-net,id=a,netdev=b,socket=/x,server=off,socket-mode=0660": "socket-mode= and socket-group= are invalid with "
    "server=off: the VMM makes the socket",
    "virtio-net,id=a,netdev=b,socket=/x,server=off,socket-group=kvm": "socket-mode= and socket-group= are invalid with "
    "server=off: the VMM makes the socket",
    "virtio-net,id=a,netdev=b,socket=/x,socket-mode=660": "Parameter 'socket-mode' expects an octal mode between 0600 "
    "and 0777, not '660'",
    "virtio-net,id=a,netdev=b,socket=/x,socket-mode=0468": "Parameter 'socket-mode' expects an octal mode between 0600 "
    "and 0777, not '0468'",
    '{"driver": "virtio-net", "id": "a", "netdev": "b", "socket": "/x", "socket-mode": 432}': "Invalid parameter type "
    "for 'socket-mode', expected: string",
    "virtio-net,id=a,netdev=b,socket=/x,socket-group=": "Parameter 'socket-group' expects 1 to 255 letters, not 0",
    "virtio-net,id=a,netdev=b,socket=/x,socket-group=4294967295": "Parameter 'socket-group' expects a group up to "
    "4294967294, not 4294967295",
}


@each_case("text", DEVICE_ERRORS)
def test_a_wrong_device_is_refused_with_its_text_and_what_is_wrong(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_device(text)
    assert str(caught.value) == f"--device {text}: {DEVICE_ERRORS[text]}"


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(ConfigError, match="JSON parse error"):
        parse_netdev('{"type": ' + "[" * 100_000)


@pytest.mark.parametrize("text", ["unix:/run/qmp.sock", "unix:/run/qmp.sock,server=on,wait=off"])
def test_a_monitor_is_a_unix_socket_that_listens(text: str) -> None:
    assert parse_monitor(text) == MonitorSpec(path="/run/qmp.sock")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("/run/qmp.sock", "'/run/qmp.sock' is no UNIX socket, expected unix:PATH"),
        ("tcp:localhost:1", "'tcp:localhost:1' is no UNIX socket, expected unix:PATH"),
        ("unix:", "invalid Unix socket address"),
        ("unix:/a,wait=on", "Parameter 'wait=on' is unexpected, only server=on and wait=off may be there"),
    ],
)
def test_a_wrong_monitor_is_refused(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_monitor(text)
    assert str(caught.value) == f"--qmp {text}: {error}"


def test_a_spec_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match="Parameter 'id' expects an identifier"):
        TapSpec(id="0")
    with pytest.raises(ConfigError, match="Parameter 'mtu' expects a value"):
        dataclasses.replace(TAP, mtu=1)


# -- help -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["help", "?"])
def test_help_lists_the_types(text: str) -> None:
    assert help_for("netdev", text) == (
        "netdev types:\n"
        "  tap                         a TAP interface of this machine\n"
        "  macvtap                     a macvtap, a port of another device of this machine\n"
        "  stream                      a UNIX stream socket, to passt or to QEMU's -netdev stream"
    )
    assert "virtio-net" in (help_for("device", text) or "")


@pytest.mark.parametrize(
    ("kind", "name", "spec_type"),
    [
        ("netdev", "tap", TapSpec),
        ("netdev", "stream", StreamSpec),
        ("netdev", "macvtap", MacvtapSpec),
        ("device", "virtio-net", VirtioNetSpec),
    ],
)
def test_help_of_a_type_tells_each_option_once(kind: str, name: str, spec_type: type[Spec]) -> None:
    lines = (help_for(kind, f"{name},help") or "").splitlines()
    assert lines[0] == f"{name} options:"
    assert [line.split("=")[0].strip() for line in lines[1:]] == [option.name for option in options_of(spec_type)]


@each_case("text", ["tap,id=help", "bogus,help", "tap", "virtio-net,help", "tap,id=x,script=help"])
def test_text_that_asks_for_no_help_gets_none(text: str) -> None:
    assert help_for("netdev", text) is None


# -- mapping --------------------------------------------------------------------------------------------------

IDS = st.from_regex(r"\A[A-Za-z][A-Za-z0-9._-]{0,62}\Z")
TAPS = st.builds(
    TapSpec,
    id=IDS,
    ifname=st.none() | st.from_regex(r"\A[a-z0-9,=]{1,15}\Z"),
    mtu=st.none() | st.integers(68, 65521),
)
NICS = st.builds(
    VirtioNetSpec,
    id=IDS,
    netdev=IDS,
    socket=st.from_regex(r"\A/[a-z,=]{1,106}\Z"),
    local_migration=st.none() | st.booleans(),
)


@given(TAPS | NICS)
def test_a_spec_survives_its_mapping_and_json(spec: Spec) -> None:
    mapping = to_mapping(spec)
    assert from_mapping(spec.kind, mapping) == spec
    assert from_mapping(spec.kind, json.loads(json.dumps(mapping))) == spec
    parse = parse_netdev if spec.kind == "netdev" else parse_device
    assert parse(json.dumps(mapping)) == spec


def test_a_mapping_leaves_out_defaults_and_what_is_one_process_matter() -> None:
    assert to_mapping(TAP) == {"type": "tap", "id": "net0", "ifname": "tap0", "mtu": 9000}
    assert to_mapping(TapSpec(id="net0", fd="7")) == {"type": "tap", "id": "net0"}
    assert to_mapping(TapSpec(id="net0", fds="7:8")) == {"type": "tap", "id": "net0", "queues": 2}


@each_case(
    ("mapping", "error"),
    [
        ({}, "netdev without id of the other side: Parameter 'type' is missing, one of: tap, macvtap, stream"),
        ({"type": "tap", "id": ["x"]}, "netdev without id of the other side: Invalid parameter type for 'id'"),
        ({"type": "tap", "id": "n", "bogus": 1}, "netdev 'n' of the other side: Parameter 'bogus' is unexpected"),
        ({"type": "tap", "id": "n", "mtu": 1.5}, "netdev 'n' of the other side: Invalid parameter type for 'mtu'"),
        ({"type": "tap", "id": "n", "mtu": None}, "netdev 'n' of the other side: Invalid parameter type for 'mtu'"),
        ({"type": "tap", "id": "n", "fd": "5"}, "netdev 'n' of the other side: Parameter 'fd' does not travel"),
        ({"type": "tap", "id": "n", "script": "/x"}, "netdev 'n' of the other side: Parameter 'script' does not"),
        (
            {"type": "tap", "id": "n", "local-migration-supported": True},
            "netdev 'n' of the other side: Parameter 'local-migration-supported' does not travel",
        ),
        ({"type": {}, "id": "n"}, "netdev 'n' of the other side: Invalid parameter type for 'type'"),
    ],
)
def test_a_mapping_from_the_other_side_is_not_trusted(mapping: dict[str, Any], error: str) -> None:
    with pytest.raises(PeerError) as caught:
        from_mapping("netdev", mapping)
    assert str(caught.value).startswith(error)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
TYPES: tuple[type[Spec], ...] = (TapSpec, MacvtapSpec, StreamSpec, VirtioNetSpec)
NAMES = st.sampled_from([option.name for each in TYPES for option in options_of(each)]) | st.text()


@given(st.sampled_from([TAP, MACVTAP, STREAM, NIC]), st.dictionaries(NAMES, JSON_VALUES, min_size=1, max_size=3))
def test_whatever_a_mapping_holds_it_is_a_spec_or_a_peer_error(spec: Spec, spoiled: dict[str, Any]) -> None:
    try:
        result = from_mapping(spec.kind, to_mapping(spec) | spoiled)
    except PeerError:
        return
    assert from_mapping(spec.kind, to_mapping(result)) == result


# -- differences ----------------------------------------------------------------------------------------------


def test_equal_specs_fit() -> None:
    assert differences(TAP, TAP, with_descriptors=True) == []
    assert differences(NIC, NIC, with_descriptors=True) == []


def test_differences_name_the_option_and_both_values() -> None:
    other = dataclasses.replace(TAP, ifname="tap1", mtu=1500, downscript="no")
    assert differences(TAP, other, with_descriptors=True) == [
        "netdev 'net0' has ifname=tap0 here and tap1 there",
        "netdev 'net0' has mtu=9000 here and 1500 there",
    ]
    for on in (True, None):
        switched = dataclasses.replace(NIC, local_migration=on)
        assert differences(NIC, switched, with_descriptors=True) == [
            "device 'nic0' has local-migration=off here and on there"
        ]


def test_without_descriptors_the_destination_may_have_its_own_interface_and_socket() -> None:
    other = dataclasses.replace(TAP, ifname="tap1")
    assert differences(TAP, other, with_descriptors=False) == []
    assert differences(NIC, dataclasses.replace(NIC, socket="/y"), with_descriptors=False) == []
    assert differences(NIC, dataclasses.replace(NIC, netdev="net1"), with_descriptors=False) == [
        "device 'nic0' has netdev=net0 here and net1 there"
    ]


def test_what_one_side_left_out_fits_everything() -> None:
    assert differences(TapSpec(id="net0"), TAP, with_descriptors=True) == []
    assert differences(TAP, TapSpec(id="net0"), with_descriptors=True) == []


@each_case("option", [*(f"{name}=off" for name in sorted(OFFLOAD_NAMES)), "packed=on"])
def test_each_side_may_offer_what_it_likes_and_the_sources_is_told(option: str) -> None:
    ours = parse_device(f"virtio-net,id=nic0,netdev=net0,socket=/run/nic0.sock,local-migration=off,{option}")
    assert ours != NIC
    for with_descriptors in (True, False):
        assert differences(ours, NIC, with_descriptors=with_descriptors) == []
    name, _, value = option.partition("=")
    assert to_mapping(ours)[name] == (value == "on")


def test_each_side_may_have_its_own_pause_between_attempts_and_the_sources_is_told() -> None:
    ours = VirtioNetSpec(id="nic0", netdev="net0", socket="/x", server=False, reconnect_ms=5)
    theirs = dataclasses.replace(ours, reconnect_ms=7)
    assert differences(ours, theirs, with_descriptors=True) == []
    assert from_mapping("device", to_mapping(theirs)) == theirs
    assert differences(ours, dataclasses.replace(ours, server=True, reconnect_ms=0), with_descriptors=True) == [
        "device 'nic0' has server=off here and on there"
    ]


def test_specs_of_different_types_do_not_fit() -> None:
    assert differences(TAP, NIC, with_descriptors=True) == ["netdev 'net0' is a tap here and a virtio-net there"]


# -- together -------------------------------------------------------------------------------------------------


def test_objects_that_fit_together_pass() -> None:
    other_tap, other_nic = TapSpec(id="net1"), VirtioNetSpec(id="nic1", netdev="net1", socket="/run/nic1.sock")
    check_together([TAP, other_tap, NIC, other_nic], monitor=MonitorSpec(path="/run/qmp.sock"))
    assert check_together([]) == ()


@each_case(
    ("netdevs", "devices", "error"),
    [
        ([TAP, TapSpec(id="net0")], [NIC], "Duplicate ID 'net0' for netdev, a netdev has it already"),
        (
            [TAP],
            [dataclasses.replace(NIC, id="net0")],
            "Duplicate ID 'net0' for device, a netdev has it already",
        ),
        ([], [NIC], "device 'nic0': can't find netdev 'net0', there is none"),
        ([TapSpec(id="net1")], [NIC], "device 'nic0': can't find netdev 'net0', there is 'net1'"),
        (
            [TAP],
            [NIC, dataclasses.replace(NIC, id="nic1", socket="/y")],
            "device 'nic1': can't take netdev 'net0', it's in use by device 'nic0'",
        ),
        (
            [TAP, dataclasses.replace(TAP, id="net1")],
            [],
            "netdev 'net1': interface 'tap0' is used by netdev 'net0' already",
        ),
        (
            [TapSpec(id="net0", fds="4:5"), TapSpec(id="net1", fd="5")],
            [],
            "netdev 'net1': descriptor '5' is used by netdev 'net0' already",
        ),
        (
            [TAP, TapSpec(id="net1")],
            [NIC, dataclasses.replace(NIC, id="nic1", netdev="net1")],
            "device 'nic1': socket '/run/nic0.sock' is used by device 'nic0' already",
        ),
    ],
)
def test_objects_that_do_not_fit_together_are_refused(
    netdevs: list[TapSpec], devices: list[VirtioNetSpec], error: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_together([*netdevs, *devices])
    assert str(caught.value) == error


def test_one_socket_path_has_one_use() -> None:
    with pytest.raises(ConfigError, match=r"--qmp: socket '/run/nic0\.sock' is used by device 'nic0' already"):
        check_together([TAP, NIC], monitor=MonitorSpec(path="/run/nic0.sock"))
    with pytest.raises(ConfigError, match="--incoming: socket '/q' is used by --qmp already"):
        check_together([], monitor=MonitorSpec(path="/q"), incoming=UnixAddress(path="/q"))
