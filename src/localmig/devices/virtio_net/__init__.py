"""virtio-net: a NIC whose rings the packet path serves and whose host side is a netdev.

Owns:        the device (device.py), how its state travels (state.py).
Never sees:  /dev/net/tun, the stream, QMP.
Read next:   device.py.
"""

from __future__ import annotations

from localmig.devices.virtio_net.device import VirtioNet

__all__ = ["VirtioNet"]
