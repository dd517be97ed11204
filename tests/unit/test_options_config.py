"""A daemon's file: what it may say, and where it says what is wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Final

import pytest
from tests.kit.cases import each_case

from localmig.devices.virtio_net.options import VirtioNetSpec
from localmig.errors import ConfigError
from localmig.netdevs.tap_options import TapSpec
from localmig.options import (
    AccessSpec,
    Config,
    Defer,
    MonitorSpec,
    RunAsSpec,
    SandboxSpec,
)
from localmig.options import parse_config as parse
from localmig.registry import Registry

parse_config = partial(parse, read_object=Registry(entry_points=list).read)

PAGE: Final = Path(__file__).resolve().parents[2] / "docs/operating.md"


def test_the_example_of_the_page_is_what_it_says() -> None:
    page = PAGE.read_text()
    section = page[page.index("## From a file") :]
    example = section[section.index("    qmp = ") : section.index("`[[netdev]]` and")]
    assert parse_config(dedent(example)) == Config(
        objects=(
            TapSpec(id="net0", ifname="tap0"),
            VirtioNetSpec(
                id="nic0", netdev="net0", socket="/run/vm1/nic0.sock", socket_mode="0660", socket_group="kvm"
            ),
        ),
        monitor=MonitorSpec(path="/run/vm1/qmp.sock"),
        migration_parameters={"downtime-limit": 250},
    )


def test_an_empty_file_asks_for_nothing() -> None:
    assert parse_config("") == Config()
    assert parse_config("incoming = 'defer'") == Config(incoming=Defer())


def test_a_file_says_what_the_process_gives_up() -> None:
    assert parse_config("runas = 'vm1'\nsandbox = 'off'") == Config(
        runas=RunAsSpec(user="vm1"), sandbox=SandboxSpec(enabled=False)
    )
    assert parse_config("runas = '1001:7'\nsandbox = 'on,spawn=deny'") == Config(
        runas=RunAsSpec(user="1001", group_id=7), sandbox=SandboxSpec(spawn=False)
    )


def test_a_file_says_who_may_use_control_sockets() -> None:
    text = "allow-user = 'vmm,1001'\nsocket-mode = '0660'\nsocket-group = 'kvm'"
    assert parse_config(text) == Config(access=AccessSpec(users=("vmm", "1001"), mode="0660", group="kvm"))


NETDEV: Final = "[[netdev]]\ntype='tap'\nid='net0'\n"

ERRORS: Final = {
    "netdevs=[]": "Parameter 'netdevs' is unexpected, a file has: qmp, incoming, allow-user, socket-mode, "
    "socket-group, runas, sandbox, migration-parameters, netdev, device",
    "qmp=5": "Invalid parameter type for 'qmp', expected: string",
    "qmp='tcp:x'": "qmp: 'tcp:x' is no UNIX socket, expected unix:PATH",
    "incoming='x'": "incoming: unknown migration protocol: x",
    "allow-user=5": "Invalid parameter type for 'allow-user', expected: string",
    "allow-user='a,,b'": "Parameter 'allow-user' expects 1 to 255 letters, not 0",
    "allow-user='4294967295'": "Parameter 'allow-user' expects a user up to 4294967294, not 4294967295",
    "socket-mode='660'": "Parameter 'socket-mode' expects an octal mode between 0600 and 0777, not '660'",
    "runas='a:b'": "runas: Parameter 'runas' expects USER or UID:GID, not 'a:b'",
    "runas='1:4294967295'": "runas: Parameter 'runas' expects numbers up to 4294967294, not 4294967295",
    "runas=''": "runas: Parameter 'runas' expects 1 to 255 letters, not 0",
    "sandbox='maybe'": "sandbox: Parameter 'sandbox' expects 'on' or 'off', not 'maybe'",
    "sandbox='on,spawn=no'": "sandbox: Parameter 'spawn' expects allow or deny, not 'no'",
    "sandbox='on,mode=5'": "sandbox: Parameter 'mode' is unexpected, the sandbox has: spawn",
    "migration-parameters=5": "Invalid parameter type for 'migration-parameters', expected: table",
    "[netdev]\nid='a'": "Invalid parameter type for 'netdev', expected: array of tables, [[netdev]]",
    "device=['virtio-net']": "Invalid parameter type for 'device', expected: array of tables, [[device]]",
    NETDEV + "[[netdev]]\ntype='tap'": "netdev[1]: Parameter 'id' is missing",
    NETDEV + "mtu=1": "netdev[0]: Parameter 'mtu' expects a value between 68 and 65521, not 1: "
    "what the kernel lets a TAP have",
    NETDEV + "mtu=1979-05-27": "netdev[0]: Invalid parameter type for 'mtu', expected: integer",
    NETDEV + "mtu='9000'": "netdev[0]: Invalid parameter type for 'mtu', expected: integer",
    "[[device]]\nid='a'": "device[0]: Parameter 'driver' is missing, one of: virtio-net",
    "[[device]]\ndriver='virtio-net'\nid='a'\nnetdev='b'\nsocket='/x'\nserver='off'": "device[0]: Invalid parameter "
    "type for 'server', expected: boolean",
}


@each_case("text", ERRORS)
def test_what_is_wrong_is_told_in_the_command_lines_words_with_its_place(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert str(caught.value) == ERRORS[text]


@pytest.mark.parametrize("text", ["qmp", "qmp='a'\nqmp='b'", "qmp=" + "[" * 100_000], ids=["cut", "twice", "deep"])
def test_what_is_no_toml_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="TOML parse error, "):
        parse_config(text)
