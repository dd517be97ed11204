"""netdevs: the host side of a NIC.

Owns:        TAP interfaces and streams of frames: opening, configuring, handing over.
Never sees:  rings, vhost-user, which device is on the other side.
Read next:   tap.py, stream.py.
"""

from localmig.netdevs.stream import Stream
from localmig.netdevs.tap import Tap

__all__ = ["Stream", "Tap"]
