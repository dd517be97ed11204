"""Limits of the kernel's that more than one part of the program goes by.

Owns:        the numbers, each with its reason. A limit that one module alone has stands there.
Never sees:  what is measured by them.
Read next:   docs/security.md, which lists all limits.
"""

from __future__ import annotations

from typing import Final

INTERFACE_NAME_BYTES_MAX: Final = 15
"""IFNAMSIZ is 16, and the last byte is NUL (linux/if.h)."""

PATH_BYTES_MAX: Final = 4095
"""PATH_MAX is 4096, and the last byte is NUL (linux/limits.h). A UNIX socket's path is shorter: see unix_socket.py."""

MTU_MIN: Final = 68
MTU_MAX: Final = 65521
"""What the kernel lets a TAP have (MIN_MTU, MAX_MTU in drivers/net/tun.c, less the Ethernet header)."""

QUEUE_PAIR_COUNT_MAX: Final = 128
"""vhost-user has 8 bits for the number of a vring, and a queue pair has two."""
