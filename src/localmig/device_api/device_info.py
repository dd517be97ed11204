"""What there is to see of any device that is served over vhost-user, for people and programs that ask.

Owns:        DeviceInfo, and its names in QMP.
Never sees:  the device itself.
Read next:   vhost_user/info.py for sessions and rings; vhost_user_device.py, which fills it in;
             devices/virtio_net/info.py for a type that adds to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from localmig.qapi import Array, Boolean, Member, String
from localmig.vhost_user.info import VRING, SessionInfo, VringInfo, feature_names, session_members


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceInfo:
    """A device.

    Attributes:
        socket: the path of its vhost-user socket.
        second_socket: the other one that it connects to, None where there is none.
        server: whether it listens there.
        sessions: those of all frontends that are connected, the oldest first.
        session: the one that owns; while none does, the one that came last. None while no frontend is connected.
        vrings: that session's rings.
        notes: what keeps it from working, each with what to do.
    """

    socket: str
    second_socket: str | None
    server: bool
    sessions: tuple[SessionInfo, ...]
    session: SessionInfo | None
    vrings: tuple[VringInfo, ...]
    notes: tuple[str, ...]


def device_members(features: Mapping[int, str]) -> tuple[Member, ...]:
    """What query-devices shows of a `DeviceInfo`, besides what it shows of every object.

    Args:
        features: names of the feature bits that only such devices have (`qapi.bits.named`).
    """
    session = session_members(lambda bits: feature_names(bits, features))
    return (
        Member(name="socket", attribute="socket", type=String()),
        Member(name="second-socket", attribute="second_socket", type=String(), required=False),
        Member(name="server", attribute="server", type=Boolean()),
        Member(name="sessions", attribute="sessions", type=Array(session)),
        Member(name="session", attribute="session", type=session, required=False),
        Member(name="vrings", attribute="vrings", type=Array(VRING)),
    )
