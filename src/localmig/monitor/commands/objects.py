"""Commands about what is served: devices, their sessions and rings, netdevs.

Owns:        query-devices and query-netdevs; QMP's names for all that there is to see.
Never sees:  clients, JSON text, a device.
Read next:   the dataclasses these tables are about: devices/virtio_net/info.py, vhost_user/info.py, netdevs/info.py.

QEMU has no such commands. Feature bits have the names that its x-query-virtio-status gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from localmig.daemon import Daemon
from localmig.dataplane import Counters
from localmig.devices.virtio_net.info import VirtioNetInfo
from localmig.monitor.names import feature_names, offload_names, protocol_feature_names, status_names
from localmig.monitor.schema import Array, Boolean, Command, Enumeration, Member, String, Struct, Uint64, Union, to_qmp
from localmig.netdevs.info import TapInfo, Whereabouts
from localmig.netdevs.stream import StreamInfo

_NAMES: Final = Array(String())

_SESSION: Final = Struct(
    (
        Member(name="features", attribute="features_acked", type=_NAMES, convert=feature_names),
        Member(
            name="protocol-features",
            attribute="protocol_features_acked",
            type=_NAMES,
            convert=protocol_feature_names,
        ),
        Member(name="device-status", attribute="device_status", type=_NAMES, convert=status_names),
        Member(name="memory-regions", attribute="region_count", type=Uint64()),
        Member(name="memory-size", attribute="memory_size", type=Uint64()),
    )
)

_VRING: Final = Struct(
    (
        Member(name="index", attribute="index", type=Uint64()),
        Member(name="size", attribute="size", type=Uint64()),
        Member(name="started", attribute="started", type=Boolean()),
        Member(name="enabled", attribute="enabled", type=Boolean()),
        Member(name="running", attribute="running", type=Boolean()),
        Member(name="position", attribute="position", type=Uint64()),
        Member(name="failed", attribute="failed", type=Boolean()),
        Member(name="failure", attribute="failure", type=String(), required=False),
    )
)

_COUNTERS: Final = Struct(
    tuple(Member(name=name.replace("_", "-"), attribute=name, type=Uint64()) for name in Counters._fields)
)

_QUEUE_PAIR: Final = Struct(
    (
        Member(name="index", attribute="index", type=Uint64()),
        Member(name="running", attribute="running", type=Boolean()),
        Member(name="counters", attribute="counters", type=_COUNTERS),
    )
)

_VIRTIO_NET: Final = (
    Member(name="netdev", attribute="netdev", type=String()),
    Member(name="socket", attribute="socket", type=String()),
    Member(name="server", attribute="server", type=Boolean()),
    Member(name="mac", attribute="mac", type=String(), required=False, convert=lambda mac: mac.hex(":")),
    Member(name="session", attribute="session", type=_SESSION, required=False),
    Member(name="vrings", attribute="vrings", type=Array(_VRING)),
    Member(name="queue-pairs", attribute="queue_pairs", type=Array(_QUEUE_PAIR)),
    Member(name="notes", attribute="notes", type=Array(String())),
)

_TAP: Final = (
    Member(name="open", attribute="is_open", type=Boolean()),
    Member(name="queues", attribute="queue_count", type=Uint64()),
    Member(name="attached-queues", attribute="attached_count", type=Uint64()),
    Member(name="interface", attribute="whereabouts", type=Enumeration(tuple(Whereabouts)), required=False),
    Member(name="ifname", attribute="ifname", type=String(), required=False),
    Member(name="ifindex", attribute="ifindex", type=Uint64(), required=False),
    Member(name="mtu", attribute="mtu", type=Uint64(), required=False),
    Member(name="up", attribute="is_up", type=Boolean(), required=False),
    Member(name="bridge", attribute="bridge", type=String(), required=False),
    Member(name="vnet-header-length", attribute="vnet_header_length", type=Uint64(), required=False),
    Member(name="offloads", attribute="offloads", type=_NAMES, convert=offload_names),
    Member(name="notes", attribute="notes", type=_NAMES),
)

_STREAM: Final = (
    Member(name="open", attribute="is_open", type=Boolean()),
    Member(name="path", attribute="path", type=String()),
    Member(name="server", attribute="is_server", type=Boolean()),
    Member(name="connected", attribute="is_connected", type=Boolean()),
    Member(name="mtu", attribute="mtu", type=Uint64()),
    Member(name="notes", attribute="notes", type=_NAMES),
)

_ID: Final = Member(name="id", attribute="id", type=String())


def _union(branches: Mapping[str, tuple[Member, ...]]) -> Union:
    return Union(
        base=(_ID,),
        tag=Member(name="type", attribute="type_name", type=Enumeration(tuple(branches))),
        branches=branches,
    )


_DEVICE: Final = _union({VirtioNetInfo.type_name: _VIRTIO_NET})
_NETDEV: Final = _union({TapInfo.type_name: _TAP, StreamInfo.type_name: _STREAM})


def query_devices(daemon: Daemon) -> object:
    """Every device with its session, its rings and what they counted."""
    return to_qmp(Array(_DEVICE), [info for info in daemon.infos() if isinstance(info, VirtioNetInfo)])


def query_netdevs(daemon: Daemon) -> object:
    """Every netdev as it is set."""
    return to_qmp(Array(_NETDEV), [info for info in daemon.infos() if isinstance(info, TapInfo | StreamInfo)])


COMMANDS: Final = (
    Command(name="query-devices", run=query_devices, returns=Array(_DEVICE)),
    Command(name="query-netdevs", run=query_netdevs, returns=Array(_NETDEV)),
)
