"""virtio-rng: bytes from the host's random number generator (virtio 1.2, section 5.4).

Install it and run it:

    pip install ./examples/virtio-rng
    localmig run --device virtio-rng,id=rng0,socket=/run/vm1/rng0.sock
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from localmig.device_api import (
    BuildContext,
    CallbackDevice,
    Chain,
    Number,
    ObjectType,
    VhostUserSpec,
    callback_members,
    option,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtioRngSpec(VhostUserSpec):
    """`--device virtio-rng,…`."""

    type_name = "virtio-rng"
    summary = "an entropy source for the guest"

    max_bytes: int = option(
        Number(lowest=1, highest=65536, reason="a driver asks for some dozen bytes at once"),
        "bytes that one request gets at most",
        default=4096,
    )


class VirtioRng(CallbackDevice):
    """Each chain is a request for as many bytes as it has room for."""

    device_id = 4
    ring_names = ("requests",)
    max_bytes: int

    def on_chain(self, chain: Chain) -> None:
        """Answers at once."""
        chain.complete(os.urandom(min(chain.writable, self.max_bytes)))


def build(spec: VirtioRngSpec, context: BuildContext) -> VirtioRng:
    """What the daemon serves for a spec."""
    device = VirtioRng(**spec.arguments(context))
    device.max_bytes = spec.max_bytes
    return device


OBJECT: Final = ObjectType(spec=VirtioRngSpec, build=build, info=callback_members())
