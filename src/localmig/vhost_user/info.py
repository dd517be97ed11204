"""What there is to see of a vhost-user session, for people and programs that ask.

Owns:        SessionInfo and VringInfo.
Never sees:  descriptors; the session itself.
Read next:   protocol.py for what is said in a session, devices/ for who fills these in.
"""

from __future__ import annotations

from dataclasses import dataclass

from localmig.vhost_user.protocol import SessionState


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """A frontend's session.

    Attributes:
        features_acked: virtio feature bits, with the bit for protocol features.
        protocol_features_acked: vhost-user's own.
        device_status: virtio device status, 0 where the frontend does not tell it.
        region_count: how many regions of guest memory it shares.
        memory_size: bytes of all regions.
    """

    features_acked: int
    protocol_features_acked: int
    device_status: int
    region_count: int
    memory_size: int

    @classmethod
    def of(cls, state: SessionState) -> SessionInfo:
        """What `state` says."""
        return cls(
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
