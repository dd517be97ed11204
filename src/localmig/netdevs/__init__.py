"""netdevs: the host side of a NIC.

Owns:        TAP interfaces: opening, configuring, handing over.
Never sees:  rings, vhost-user, which device is on the other side.
Read next:   tap.py.
"""
