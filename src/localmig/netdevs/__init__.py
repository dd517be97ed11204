"""netdevs: the host side of a NIC.

Owns:        TAPs, macvtaps and streams of frames: opening, configuring, handing over.
Never sees:  rings, vhost-user, which device is on the other side.
Read next:   tap.py, macvtap.py, stream.py.
"""
