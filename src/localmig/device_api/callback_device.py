"""A device whose rings are all served by its own Python code: what most authors of a device derive from.

Owns:        CallbackDevice: which thread its code runs in, what becomes of code that fails or hangs.
Never sees:  bytes of vhost-user, guest memory.
Read next:   callback_group.py for Chain; examples/ for whole devices.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final

from localmig.contact import ConnectTo, ListenAt
from localmig.dataplane import CallbackCounters
from localmig.device_api.callback_group import CallbackGroup, Chain
from localmig.device_api.callback_thread import CALLBACK_SECONDS_MAX, CallbackThread
from localmig.device_api.device_info import DeviceInfo, device_members
from localmig.device_api.queues import Queues
from localmig.device_api.ring_group import RingGroup
from localmig.device_api.vhost_user_device import VhostUserDevice
from localmig.qapi import Array, Member, String, Struct, Uint64
from localmig.trace import Tracer
from localmig.vhost_user.message import ProtocolFeature
from localmig.vhost_user.protocol import PROTOCOL_FEATURES_OFFERED, Offer
from localmig.virtio import Feature

FEATURES: Final = Feature.VERSION_1 | Feature.ANY_LAYOUT | Feature.RING_EVENT_IDX | Feature.RING_INDIRECT_DESC
"""What the engine serves, whatever the device. Not IN_ORDER, for a device may keep chains; not packed rings."""

PROTOCOL_FEATURES: Final = PROTOCOL_FEATURES_OFFERED & ~(ProtocolFeature.RARP | ProtocolFeature.MTU)
"""All but what is a NIC's."""

VRING_SIZE_MAX: Final = 1024
"""Entries of a ring: the largest that VMMs give to such a device."""

_TAKEN_AT_ONCE: Final = 64
"""Chains that are handed to a device before its thread looks whether it is to pause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallbackRingInfo:
    """What a ring's engine counted, since the device was first served, handovers included."""

    vring: int
    name: str
    counters: CallbackCounters


@dataclass(frozen=True, kw_only=True, slots=True)
class CallbackDeviceInfo(DeviceInfo):
    """A device whose rings are served by its own code.

    Attributes:
        rings: what was counted of each.
    """

    rings: tuple[CallbackRingInfo, ...]


_RING: Final = Struct(
    (
        Member(name="index", attribute="vring", type=Uint64()),
        Member(name="name", attribute="name", type=String()),
        Member(
            name="counters",
            attribute="counters",
            type=Struct(
                tuple(
                    Member(name=name.replace("_", "-"), attribute=name, type=Uint64())
                    for name in CallbackCounters._fields
                )
            ),
        ),
    )
)


def callback_members(features: Mapping[int, str] | None = None) -> tuple[Member, ...]:
    """What query-devices shows of a `CallbackDevice`: for an ObjectType's `info`.

    Args:
        features: names of the feature bits that only such devices have.
    """
    return (*device_members(features or {}), Member(name="rings", attribute="rings", type=Array(_RING)))


class CallbackDevice(VhostUserDevice):
    """A device with as many rings as it has names for.

    `on_serving`, `on_chain`, `on_returned` and what is watched are called in a thread of the device's own, one after
    the other. All other methods are called in the event loop. `save` is called while the guest runs, so a callback may
    run beside it; if one ran, it is called again after the last callback has ended, and that state counts.

    Attributes:
        device_id: virtio's number of the kind of device (virtio 1.2, section 5).
        ring_names: what its rings are called, in their order.
        features: virtio feature bits of the kind of device.
    """

    device_id: ClassVar[int]
    ring_names: ClassVar[tuple[str, ...]]
    features: ClassVar[int] = 0

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the user's word
        socket: ListenAt | ConnectTo,
        local_migration: bool,
        queues: Queues,
        tracer: Tracer,
    ) -> None:
        super().__init__(id=id, socket=socket, local_migration=local_migration, queues=queues, tracer=tracer)
        self._group: CallbackGroup | None = None
        self._thread: CallbackThread | None = None
        self._changes_saved = 0
        self._look: asyncio.TimerHandle | None = None
        self._stuck = ""

    # -- what an author writes ------------------------------------------------------------------------------------

    @abstractmethod
    def on_chain(self, chain: Chain) -> None:
        """A driver made a chain available, to be completed now or later. An exception from here fails all rings."""

    def on_returned(self, ring: str) -> None:
        """The driver has this ring back: forget the chains of it that you keep. Called before further ones come."""

    def on_serving(self) -> None:
        """This process serves from now on: what is the device's own may be touched, and watched.

        Called before any chain comes: when a daemon starts, when it has taken over, and when it goes on after a
        handover that failed.
        """

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Has `callback` called in the device's thread whenever `fd` can be read, while this process serves."""
        assert self._thread is not None, self.id
        self._thread.watch(fd, callback)

    def unwatch(self, fd: int) -> None:
        """To be called before `fd` is closed."""
        if self._thread is not None:
            self._thread.unwatch(fd)

    # -- what it is -----------------------------------------------------------------------------------------------

    def offer(self) -> Offer:
        """The device's features and what the engine serves."""
        protocol_features = PROTOCOL_FEATURES
        if len(self.ring_names) == 1:
            protocol_features &= ~ProtocolFeature.MQ
        return Offer(
            features=FEATURES | self.features,
            vring_count=len(self.ring_names),
            protocol_features=protocol_features,
            vring_size_max=VRING_SIZE_MAX,
        )

    def make_groups(self, event_fd: int) -> Iterator[RingGroup]:
        """One group of all rings, and the thread that serves it."""
        self._group = CallbackGroup(dict(enumerate(self.ring_names)), event_fd)
        yield self._group
        self._thread = CallbackThread(self.id, self._failed)
        self._thread.watch(self._group.engine.fileno(), self._take_chains)

    def ring_name(self, vring: int) -> str:
        """With the author's name for it."""
        return f"vring {vring} ({self.ring_names[vring]})"

    def info(self) -> Any:
        """The session, the rings, and what they counted."""
        counters = self._group.engine.counters() if self._group is not None else []
        return CallbackDeviceInfo(
            **self.facts(),
            rings=tuple(
                CallbackRingInfo(vring=vring, name=self.ring_names[vring], counters=CallbackCounters(*values))
                for vring, values in enumerate(counters)
            ),
        )

    # -- serving ------------------------------------------------------------------------------------------------

    def thaw(self) -> None:
        """Serves the socket, and lets the device's code run."""
        super().thaw()
        assert self._thread is not None, self.id
        self._thread.post(self.on_serving)
        self._thread.resume()
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(CALLBACK_SECONDS_MAX, self._look_after)

    def quiesce(self) -> bool:
        """Lets no callback begin; whether none is under way. One that takes too long is left behind."""
        return self._thread is None or self._thread.pause() or self._leave_behind()

    def freeze(self) -> None:
        """Leaves sockets alone, and calls nothing any more."""
        super().freeze()
        self._stop_looking()
        if self._thread is not None and not self._thread.pause():
            self._leave_behind(at_once=True)

    def ring_left(self, vring: int) -> None:
        """Lets the device's code know."""
        if self._thread is not None:
            self._thread.post(partial(self.on_returned, self.ring_names[vring]))

    def is_own_state_outdated(self) -> bool:
        """Whether its code ran since it was saved last."""
        return self._thread is not None and self._thread.change_count != self._changes_saved

    def note_saved(self) -> None:
        """Its own state is saved now."""
        if self._thread is not None:
            self._changes_saved = self._thread.change_count

    def groups_dropped(self) -> None:
        """Ends the thread."""
        self._stop_looking()
        if self._thread is not None:
            self._thread.close()
        self._group = self._thread = None

    def find_notes(self) -> Iterator[str]:
        """Besides what may be the matter with any device: code that hangs."""
        if self._stuck:
            yield self._stuck
        yield from super().find_notes()

    # -- inside -------------------------------------------------------------------------------------------------

    def _take_chains(self) -> None:
        assert self._group is not None, self.id
        for _ in range(_TAKEN_AT_ONCE):
            chain = self._group.take()
            if chain is None:
                return
            self.on_chain(chain)

    def _failed(self, error: BaseException) -> None:
        if self._group is not None:
            self._group.fail(f"its code raised {error!r}")

    def _look_after(self) -> None:
        """Sees to it that code which hangs is found while nobody waits for it."""
        self._look = asyncio.get_running_loop().call_later(CALLBACK_SECONDS_MAX, self._look_after)
        self._leave_behind()

    def _stop_looking(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _leave_behind(self, *, at_once: bool = False) -> bool:
        """Gives the device up where its code has not returned for too long; whether that is so."""
        assert self._thread is not None, self.id
        if self._stuck or not (at_once or self._thread.seconds_busy() > CALLBACK_SECONDS_MAX):
            return bool(self._stuck)
        self._stuck = (
            f"its code has not returned for {self._thread.seconds_busy():.1f} s; hand over to a daemon with code that "
            "does, and reset the driver"
        )
        self._thread.close()
        if self._group is not None:
            self._group.fail(self._stuck)
        return True
