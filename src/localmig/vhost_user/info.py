"""What there is to see of a vhost-user session, for people and programs that ask.

Owns:        SessionInfo and VringInfo, and their names in QMP.
Never sees:  descriptors; the session itself.
Read next:   protocol.py for what is said in a session, devices/ for who fills these in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from localmig.qapi import Array, Boolean, Enumeration, Member, String, Struct, Uint64
from localmig.qapi.bits import named, names_of
from localmig.vhost_user.message import LOG_ALL_BIT, PROTOCOL_FEATURES_BIT, ProtocolFeature
from localmig.vhost_user.ownership import Role
from localmig.vhost_user.protocol import SessionState
from localmig.virtio import DeviceStatus, Feature


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """A frontend's session.

    Attributes:
        number: tells it from all other sessions of the device.
        role: what it is to the device.
        since_s: since when, in seconds since 1970.
        path: the address by which the frontend came.
        pid: the frontend's process, None where the kernel does not tell it, or it is in another PID namespace.
        uid: its user, likewise.
        features_acked: virtio feature bits, with the bit for protocol features.
        protocol_features_acked: vhost-user's own.
        device_status: virtio device status, 0 where the frontend does not tell it.
        region_count: how many regions of guest memory it shares.
        memory_size: bytes of all regions.
    """

    number: int
    role: Role
    since_s: int
    path: str
    pid: int | None
    uid: int | None
    features_acked: int
    protocol_features_acked: int
    device_status: int
    region_count: int
    memory_size: int

    @classmethod
    def of(
        cls,
        state: SessionState,
        *,
        number: int,
        role: Role,
        since_s: int,
        path: str,
        pid: int | None,
        uid: int | None,
    ) -> SessionInfo:
        """What `state` says, and what else there is to tell."""
        return cls(
            number=number,
            role=role,
            since_s=since_s,
            path=path,
            pid=pid,
            uid=uid,
            features_acked=state.features_acked,
            protocol_features_acked=state.protocol_features_acked,
            device_status=state.device_status,
            region_count=len(state.regions),
            memory_size=sum(region.size for region in state.regions),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VringInfo:
    """One ring of a session.

    Attributes:
        index: its number in the device.
        size: entries, 0 until the frontend said it.
        started: the frontend wants it to run.
        enabled: and it is one that the guest uses.
        running: it runs here.
        position: where it goes on; a moment old while it runs. With packed rings the top bit is the wrap counter.
        failed: it was given up, until the frontend sets it up anew.
        failure: why. None where it did not fail, or did so in the process before this one.
    """

    index: int
    size: int
    started: bool
    enabled: bool
    running: bool
    position: int
    failed: bool
    failure: str | None


_FEATURES: Final[Mapping[int, str]] = {
    **named("VIRTIO_F_", Feature),
    Feature.RING_INDIRECT_DESC.value: "VIRTIO_RING_F_INDIRECT_DESC",
    Feature.RING_EVENT_IDX.value: "VIRTIO_RING_F_EVENT_IDX",
    1 << LOG_ALL_BIT: "VHOST_F_LOG_ALL",
    1 << PROTOCOL_FEATURES_BIT: "VHOST_USER_F_PROTOCOL_FEATURES",
}
_PROTOCOL_FEATURES: Final = named("VHOST_USER_PROTOCOL_F_", ProtocolFeature)
_STATUS: Final = named("VIRTIO_CONFIG_S_", DeviceStatus)


def feature_names(bits: int, device: Mapping[int, str]) -> list[str]:
    """A device's feature bits; `device` has the names of those that only such devices have."""
    return names_of(bits, {**_FEATURES, **device})


def protocol_feature_names(bits: int) -> list[str]:
    """vhost-user's own feature bits."""
    return names_of(bits, _PROTOCOL_FEATURES)


def status_names(bits: int) -> list[str]:
    """The bits of a device status."""
    return names_of(bits, _STATUS)


def session_members(features: Callable[[int], list[str]]) -> Struct:
    """A `SessionInfo` of a device whose feature bits have the names that `features` returns."""
    names = Array(String())
    return Struct(
        (
            Member(name="number", attribute="number", type=Uint64()),
            Member(name="role", attribute="role", type=Enumeration(tuple(Role))),
            Member(name="since", attribute="since_s", type=Uint64()),
            Member(name="socket", attribute="path", type=String()),
            Member(name="pid", attribute="pid", type=Uint64(), required=False),
            Member(name="user-id", attribute="uid", type=Uint64(), required=False),
            Member(name="features", attribute="features_acked", type=names, convert=features),
            Member(
                name="protocol-features",
                attribute="protocol_features_acked",
                type=names,
                convert=protocol_feature_names,
            ),
            Member(name="device-status", attribute="device_status", type=names, convert=status_names),
            Member(name="memory-regions", attribute="region_count", type=Uint64()),
            Member(name="memory-size", attribute="memory_size", type=Uint64()),
        )
    )


VRING: Final = Struct(
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
"""A `VringInfo`."""
