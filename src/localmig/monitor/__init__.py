"""The monitor: QMP, QEMU's wire, words and texts, in front of a daemon.

Owns:        how a daemon is asked and told things from outside.
Never sees:  devices, the migration stream, descriptors of guests.
Read next:   wire.py (bytes), protocol.py (one client), schema.py (types), commands/ (what can be asked), server.py.
"""

from localmig.monitor.server import QmpServer

__all__ = ["QmpServer"]
