"""`localmig status`: what a person reads, of one NIC and of hundreds, in good times and bad ones."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, Final

import pytest
from tests.kit.cases import each_case

from localmig.cli.status import device_of, rates, show, show_device
from localmig.cli.text import quantity
from localmig.dataplane import Counters
from localmig.errors import ConfigError

COUNTERS: Final = {name.replace("_", "-"): 0 for name in Counters._fields}


def vring(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "size": 256,
        "started": True,
        "enabled": True,
        "running": True,
        "position": 1000 + index,
        "failed": False,
        **changes,
    }


def device(number: int = 0, *, pairs: int = 1, **counters: int) -> dict[str, Any]:
    counted = {**COUNTERS, **{name.replace("_", "-"): value for name, value in counters.items()}}
    return {
        "id": f"nic{number}",
        "type": "virtio-net",
        "netdev": f"net{number}",
        "socket": f"/run/vm1/nic{number}.sock",
        "server": True,
        "mac": "52:54:00:12:34:56",
        "session": {
            "features": ["VIRTIO_NET_F_MRG_RXBUF", "VIRTIO_F_VERSION_1"],
            "protocol-features": ["VHOST_USER_PROTOCOL_F_REPLY_ACK"],
            "device-status": ["VIRTIO_CONFIG_S_DRIVER_OK"],
            "memory-regions": 2,
            "memory-size": 512 * 2**20,
        },
        "vrings": [vring(index) for index in range(2 * pairs)],
        "queue-pairs": [{"index": index, "running": True, "counters": dict(counted)} for index in range(pairs)],
    }


def netdev(number: int = 0) -> dict[str, Any]:
    return {
        "id": f"net{number}",
        "type": "tap",
        "open": True,
        "queues": 1,
        "attached-queues": 1,
        "interface": "here",
        "ifname": f"tap{number}",
        "ifindex": 2 + number,
        "mtu": 1500,
        "up": True,
        "vnet-header-length": 12,
        "offloads": ["TUN_F_CSUM"],
        "notes": [],
    }


def facts(*devices: dict[str, Any]) -> dict[str, Any]:
    numbers = range(len(devices))
    objects = [
        *({"id": f"net{number}", "type": "tap", "transfers": True} for number in numbers),
        *({"id": f"nic{number}", "type": "virtio-net", "transfers": True} for number in numbers),
    ]
    return {
        "pid": 5,
        "version": "localmig 1.2.3",
        "security": {
            "user-id": 7,
            "group-id": 7,
            "sandbox": {"option": "on", "enabled": True, "spawn": False},
            "allowed-users": [],
            "socket-mode": "0600",
        },
        "status": "running",
        "migration": {},
        "objects": objects,
        "netdevs": [netdev(number) for number in numbers],
        "devices": list(devices),
    }


def test_a_daemon_that_serves_nothing_has_four_lines() -> None:
    assert show(facts()).splitlines() == [
        "daemon     process 5, localmig 1.2.3",
        "confined   user 7; sandbox on; runs no programs",
        "run state  running",
        "migration  none yet",
    ]


def test_what_is_open_in_the_sandbox_is_told() -> None:
    told = facts()
    told["security"] |= {"sandbox": {"option": "on", "enabled": True, "spawn": True}, "allowed-users": [8, 9]}
    expected = "confined   user 7; sandbox on; may run programs; listens to users 8, 9 as well"
    assert show(told).splitlines()[1] == expected
    told["security"] |= {"sandbox": {"enabled": False, "spawn": True, "reason": "this kernel …"}, "allowed-users": []}
    assert show(told).splitlines()[1] == "confined   user 7; no sandbox; this kernel …"


def test_each_device_has_a_line() -> None:
    one = device(0, rx_packets=1234, rx_bytes=1_600_000, tx_packets=7, tx_bytes=420, tx_dropped_memory=3)
    two = device(1)
    del two["session"]
    two["vrings"] = []
    assert show(facts(one, two)).splitlines()[4:] == [
        "devices    2, 1 connected; 2 rings run, 0 failed",
        "",
        "device  netdev       frontend   rings  to guest                 from guest        dropped",
        "nic0    net0 (tap0)  connected  2 run  1.23 k packets, 1.60 MB  7 packets, 420 B  3",
        "nic1    net1 (tap1)  none       none   0 packets, 0 B           0 packets, 0 B    0",
    ]


def test_several_frontends_are_told_apart() -> None:
    one = device(0)
    since = int(time.time())
    one["sessions"] = [
        {"number": 4, "role": "owns", "since": since - 7300, "socket": "/run/vm1/nic0.sock", "pid": 66, "user-id": 7},
        {"number": 9, "role": "held", "since": since - 130, "socket": "/run/vm1/nic0.sock", "user-id": 7},
        {"number": 10, "role": "held", "since": since + 9, "socket": "/run/vm1/nic0.sock"},
    ]
    assert "1 owns, 2 held" in show(facts(one))
    lines = show_device(facts(one), "nic0").splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith("session"))
    assert lines[begin : begin + 4] == [
        "session  role  for    process  user  socket",
        "4        owns  2 h    66       7     /run/vm1/nic0.sock",
        "9        held  2 min           7     /run/vm1/nic0.sock",
        "10       held  0 s                   /run/vm1/nic0.sock",
    ]
    one["second-socket"] = "/run/vm2/nic0.sock"
    one["server"] = False
    assert "socket     /run/vm1/nic0.sock, connects, and to /run/vm2/nic0.sock" in show_device(facts(one), "nic0")


def test_a_device_that_is_no_nic_moves_bytes_and_no_packets() -> None:
    one, console = device(0), device(1)
    del console["queue-pairs"], console["netdev"], console["mac"]
    counters = {"chains": 3, "bytes-read": 2000, "bytes-written": 5, "kicks": 3, "calls": 2}
    console |= {
        "id": "con0",
        "type": "virtio-console",
        "rings": [{"index": 0, "name": "receive", "counters": counters}],
    }
    assert show(facts(one, console)).splitlines()[-2:] == [
        "nic0    net0 (tap0)  connected  2 run  0 packets, 0 B  0 packets, 0 B  0",
        "con0                 connected  2 run  5 B             2.00 kB",
    ]
    page = show_device(facts(one, console), "con0").splitlines()
    assert page[-2:] == [
        "ring     chains  bytes read  bytes written  kicks  calls",
        "receive  3       2000        5              3      2",
    ]


def test_what_wants_a_look_stands_first_and_says_why() -> None:
    told = facts(device(0), device(1), device(2))
    told["devices"][1]["vrings"][1] |= {"failed": True, "running": False, "failure": "next points nowhere"}
    told["objects"][2] |= {"transfers": False, "reason": "device 'nic2' has local-migration=off"}
    lines = show(told).splitlines()
    assert lines[4] == "devices    3, 3 connected; 5 rings run, 1 failed"
    assert [line.split()[0] for line in lines[7:]] == ["nic1", "nic2", "nic0"]
    assert "1 of 2 run" in lines[7]
    assert lines[7].endswith("vring 1 failed")
    assert lines[8].endswith("net2 stays home: device 'nic2' has local-migration=off")


def test_what_keeps_a_nic_from_working_is_shown_in_its_line_and_its_page() -> None:
    told = facts(device(0), device(1) | {"notes": ["QEMU asks for 4 pairs, nic1 has 2"]})
    assert show(told).splitlines()[7].endswith("QEMU asks for 4 pairs, nic1 has 2")
    assert "note       QEMU asks for 4 pairs, nic1 has 2" in show_device(told, "nic1").splitlines()


def test_a_daemon_that_took_over_from_a_dead_one_says_so() -> None:
    told = facts(device())
    told["migration"] = {
        "status": "completed",
        "local": {"note": "the source died during the handover; this daemon took over from guest memory"},
    }
    assert "migration  completed: the source died during the handover; this daemon took over" in show(told)


def test_hundreds_of_devices_fit_a_terminal() -> None:
    told = facts(*(device(number) for number in range(512)))
    told["devices"][400]["vrings"][0] |= {"failed": True, "running": False}
    lines = show(told).splitlines()
    assert len(lines) <= 30
    assert lines[4] == "devices    512, 512 connected; 1023 rings run, 1 failed"
    assert lines[7].startswith("nic400 ")
    assert lines[-1] == "… and 492 more: --device ID shows one, --json all"


def test_rates_are_what_was_counted_in_a_second() -> None:
    before = [device(0, pairs=2, rx_packets=100, rx_bytes=1000), device(1)]
    after = [device(0, pairs=2, rx_packets=350, rx_bytes=501_000), device(2)]
    moved = rates(before, after, 2.0)
    assert moved.keys() == {"nic0"}
    assert moved["nic0"] == {**dict.fromkeys(COUNTERS, 0.0), "rx-packets": 250.0, "rx-bytes": 500_000.0}
    told = facts(device(0)) | {"rates": moved}
    assert show(told).splitlines()[6:] == [
        "device  netdev       frontend   rings  to guest a second         from guest a second  dropped",
        "nic0    net0 (tap0)  connected  2 run  250 packets, 4.00 Mbit/s  0 packets, 0 bit/s   0",
    ]


def test_one_device_is_shown_with_all_there_is() -> None:
    told = facts(device(0, rx_packets=5))
    told["devices"][0]["vrings"][1] |= {"failed": True, "running": False, "failure": "next points nowhere"}
    assert show_device(told, "nic0").splitlines() == [
        "daemon     process 5, localmig 1.2.3",
        "confined   user 7; sandbox on; runs no programs",
        "run state  running",
        "migration  none yet",
        "device     nic0, virtio-net, 52:54:00:12:34:56",
        "socket     /run/vm1/nic0.sock, listens",
        "netdev     net0, tap tap0, up, MTU 1500, 1 of 1 queues attached, header of 12 bytes, offloads CSUM",
        "note       vring 1 failed",
        "frontend   connected, 512 MiB in 2 regions",
        "driver     DRIVER_OK",
        "features   VIRTIO_NET_F_MRG_RXBUF VIRTIO_F_VERSION_1",
        "protocol   REPLY_ACK",
        "",
        "vring  direction   size  position  state",
        "0      to guest    256   1000      runs",
        "1      from guest  256   1001      failed: next points nowhere",
        "",
        "counter               queue pair 0",
        *(f"{name.ljust(20)}  {5 if name == 'rx-packets' else 0}" for name in COUNTERS),
    ]


def test_queue_pairs_are_columns_as_long_as_they_are_few() -> None:
    few, many = facts(device(pairs=2)), facts(device(pairs=64))
    assert "counter               queue pair 0  queue pair 1  all" in show_device(few, "nic0")
    assert "counter               all" in show_device(many, "nic0")


def without_frontend(told: dict[str, Any]) -> None:
    del told["devices"][0]["session"]
    told["devices"][0] |= {"vrings": [], "queue-pairs": []}


def closed(told: dict[str, Any]) -> None:
    told["netdevs"][0] = {
        "id": "net0",
        "type": "tap",
        "open": False,
        "queues": 1,
        "attached-queues": 0,
        "offloads": [],
        "notes": [],
    }


def bridged(told: dict[str, Any]) -> None:
    told["netdevs"][0] |= {"up": False, "bridge": "br0"}


def moved(told: dict[str, Any]) -> None:
    told["netdevs"][0] |= {"interface": "elsewhere"}
    del told["netdevs"][0]["up"], told["netdevs"][0]["ifindex"]


def gone(told: dict[str, Any]) -> None:
    told["netdevs"][0] |= {"interface": "gone", "attached-queues": 0, "notes": ["'tap0' was deleted: make it again"]}
    del told["netdevs"][0]["up"], told["netdevs"][0]["ifindex"]


def nameless(told: dict[str, Any]) -> None:
    del told["devices"][0]["mac"]
    told["devices"][0]["server"] = False


@each_case(
    ("change", "line"),
    [
        (without_frontend, "frontend   none"),
        (closed, "netdev     net0, closed"),
        (
            bridged,
            (
                "netdev     net0, tap tap0, down, MTU 1500, in bridge br0, 1 of 1 queues attached, header of 12 bytes, "
                "offloads CSUM"
            ),
        ),
        (
            moved,
            (
                "netdev     net0, tap tap0, MTU 1500, whether it is up is unknown (another network namespace), "
                "1 of 1 queues attached, header of 12 bytes, offloads CSUM"
            ),
        ),
        (
            gone,
            (
                "netdev     net0, tap tap0, gone: the interface was deleted, 0 of 1 queues attached, "
                "header of 12 bytes, offloads CSUM"
            ),
        ),
        (gone, "note       'tap0' was deleted: make it again"),
        (nameless, "device     nic0, virtio-net"),
        (nameless, "socket     /run/vm1/nic0.sock, connects"),
    ],
)
def test_what_is_not_there_is_said(change: Callable[[dict[str, Any]], None], line: str) -> None:
    told = copy.deepcopy(facts(device()))
    change(told)
    assert line in show_device(told, "nic0").splitlines()
    assert show(told)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"running": False}, "stands still"),
        ({"running": False, "enabled": False}, "started, not enabled"),
        ({"running": False, "enabled": False, "started": False}, "not started"),
        ({"running": False, "failed": True}, "failed: in the daemon before this one, see its log"),
    ],
)
def test_a_ring_that_does_not_run_says_why(changes: dict[str, Any], state: str) -> None:
    told = facts(device())
    told["devices"][0]["vrings"][0] |= changes
    assert f"0      to guest    256   1000      {state}" in show_device(told, "nic0").splitlines()


def test_a_device_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match="there is no device 'nic9': there are nic0, nic1"):
        device_of(facts(device(0), device(1)), "nic9")
    with pytest.raises(ConfigError, match="there is no device 'nic9': there is none at all"):
        device_of(facts(), "nic9")


@each_case(
    ("number", "text"),
    [
        (0, "0 B"),
        (7, "7 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1234, "1.23 kB"),
        (12_345, "12.3 kB"),
        (123_456, "123 kB"),
        (999_949, "1.00 MB"),
        (10**18, "1.00 EB"),
        (10**22, "10000 EB"),
        (0.25, "0.25 B"),
    ],
)
def test_a_quantity_has_three_digits(number: float, text: str) -> None:
    assert quantity(number, "B") == text


def test_a_daemon_of_before_is_shown_without_what_it_does_not_tell() -> None:
    told = facts(device())
    for each in told["netdevs"]:
        for name in ("interface", "ifindex", "up", "notes"):
            del each[name]
    assert "nic0" in show(told)
    assert "net0, tap tap0, MTU 1500, 1 of 1 queues attached" in show_device(told, "nic0")
