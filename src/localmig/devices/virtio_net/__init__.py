"""virtio-net: a NIC whose rings the packet path serves and whose host side is a netdev.

Owns:        the device (device.py), how its state travels (state.py); what it is as a type of objects.
Never sees:  /dev/net/tun, the stream, QMP.
Read next:   device.py.
"""

from __future__ import annotations

from typing import Final

from localmig.device_api.objects import BuildContext, ObjectType
from localmig.devices.virtio_net.device import VirtioNet
from localmig.devices.virtio_net.info import SHOWN
from localmig.devices.virtio_net.options import VirtioNetSpec
from localmig.options.values import mac_bytes

__all__ = ["OBJECT", "VirtioNet", "VirtioNetSpec"]


def _build(spec: VirtioNetSpec, context: BuildContext) -> VirtioNet:
    return VirtioNet(
        **spec.arguments(context),
        netdev=context.netdev(spec.netdev),
        offloads=spec.offloads,
        mac=mac_bytes(spec.mac) if spec.mac is not None else None,
        packed=spec.packed,
        device_state=spec.device_state,
    )


OBJECT: Final = ObjectType(spec=VirtioNetSpec, build=_build, info=SHOWN)
