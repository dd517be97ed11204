"""Faults at named points of a handover, in a real daemon process.

Owns:        the points, what can happen at one, a `localmig` in which it does.
Never sees:  which outcome is right; tests/faults/ does.
Read next:   tests/faults/, migration/channel.py, whose frames are the points.

    python -m localmig.testing.faults before-send:READY=kill -- run --incoming unix:/run/vm1/migrate.sock …

A point is `before-send`, `after-send` or `after-receive` of a kind of frame: between two of them a side does one
thing, so they tell its steps apart. The action is taken once, at the first passing.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from localmig.errors import ConfigError
from localmig.migration.channel import Channel, Frame, FrameKind
from localmig.migration.downtime import MirrorChannel


class Place(StrEnum):
    """Where, seen from a frame."""

    BEFORE_SEND = "before-send"
    AFTER_SEND = "after-send"
    AFTER_RECEIVE = "after-receive"


class Action(StrEnum):
    """What happens."""

    KILL = "kill"
    """The process is killed: nothing is cleaned up."""
    STOP = "stop"
    """The process stops (SIGSTOP), until somebody continues it."""
    RAISE = "raise"
    """An error nobody expects is raised."""


class InjectedError(Exception):
    """What RAISE raises: no class of ours, as a bug's would be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One action at one point."""

    place: Place
    kind: FrameKind
    action: Action

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `PLACE:KIND=ACTION`. ConfigError where it is none."""
        point, _, action = text.partition("=")
        place, _, kind = point.partition(":")
        for word, known in ((place, list(Place)), (kind, [each.name for each in FrameKind]), (action, list(Action))):
            if word not in known:
                raise ConfigError(f"fault '{text}' is not PLACE:KIND=ACTION: '{word}' is none of {', '.join(known)}")
        return cls(place=Place(place), kind=FrameKind[kind], action=Action(action))

    def __str__(self) -> str:
        return f"{self.place}:{self.kind.name}={self.action}"

    def act(self) -> None:
        """Lets it happen."""
        match self.action:
            case Action.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Action.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Action.RAISE:
                raise InjectedError(str(self))


def install(fault: Fault) -> None:
    """From now on the fault waits in every channel of this process."""
    waiting = [fault]

    def pass_by(channel: Channel, place: Place, kind: FrameKind) -> None:
        if waiting and not isinstance(channel, MirrorChannel) and (fault.place, fault.kind) == (place, kind):
            waiting.clear()
            fault.act()

    send, try_send, receive = Channel.send, Channel.try_send, Channel.receive

    async def faulty_send(self: Channel, kind: FrameKind, *arguments: Any, **options: Any) -> None:
        pass_by(self, Place.BEFORE_SEND, kind)
        await send(self, kind, *arguments, **options)
        pass_by(self, Place.AFTER_SEND, kind)

    def faulty_try_send(self: Channel, kind: FrameKind, data: bytes = b"") -> bool:
        pass_by(self, Place.BEFORE_SEND, kind)
        is_sent = try_send(self, kind, data)
        pass_by(self, Place.AFTER_SEND, kind)
        return is_sent

    async def faulty_receive(self: Channel, **options: Any) -> Frame:
        frame = await receive(self, **options)
        pass_by(self, Place.AFTER_RECEIVE, frame.kind)
        return frame

    Channel.send = faulty_send  # type: ignore[method-assign]
    Channel.try_send = faulty_try_send  # type: ignore[method-assign]
    Channel.receive = faulty_receive  # type: ignore[method-assign]


USAGE: Final = f"""\
usage: python -m localmig.testing.faults PLACE:KIND=ACTION -- LOCALMIG-ARGUMENTS…

  PLACE   {", ".join(Place)}
  KIND    {", ".join(kind.name for kind in FrameKind)}
  ACTION  {", ".join(Action)}
"""


def main(argv: Sequence[str]) -> None:
    """Runs `localmig` with the arguments behind `--` and the fault before it."""
    if argv in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return
    if len(argv) < 3 or argv[1] != "--":
        sys.stderr.write(USAGE)
        sys.exit(2)
    try:
        fault = Fault.parse(argv[0])
    except ConfigError as error:
        sys.stderr.write(f"{USAGE}\nlocalmig: error: {error}\n")
        sys.exit(2)
    install(fault)
    sys.argv = ["localmig", *argv[2:]]
    runpy.run_module("localmig.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
