"""virtio-console: the guest's console on a pseudoterminal of the host (virtio 1.2, section 5.3).

Install it and run it:

    pip install ./examples/virtio-console
    localmig run --device virtio-console,id=con0,socket=/run/vm1/con0.sock,link=/run/vm1/console
    picocom /run/vm1/console

It keeps the driver's receive buffers until somebody types, and it owns a descriptor: both move in a handover.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tty
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localmig.device_api import (
    BuildContext,
    CallbackDevice,
    Chain,
    Description,
    FilePath,
    KernelError,
    ObjectType,
    OwnedFd,
    PeerError,
    VhostUserSpec,
    callback_members,
    fd,
    option,
    optional,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtioConsoleSpec(VhostUserSpec):
    """`--device virtio-console,…`."""

    type_name = "virtio-console"
    summary = "a console of the guest, on a pseudoterminal of the host"

    link: str = option(FilePath(), "symbolic link to make to the pseudoterminal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Terminal:
    """Both ends of a pseudoterminal. The daemon holds the far end too, or whoever leaves it would end it."""

    near: OwnedFd | None
    far: OwnedFd | None


TERMINAL: Final = Description(
    name="virtio-console",
    version=1,
    oldest_version=1,
    state=Terminal,
    fields=(optional(fd("near")), optional(fd("far"))),
)


class VirtioConsole(CallbackDevice):
    """One port: what is typed goes into the oldest receive buffer, what the guest prints goes to the terminal."""

    device_id = 3
    ring_names = ("receive", "transmit")
    own_state = TERMINAL
    link: str

    _terminal = Terminal(near=None, far=None)

    def open(self) -> None:
        """Makes the pseudoterminal, and a link for `on_serving` to put in place."""
        self._make_terminal()
        self._buffers: deque[Chain] = deque()
        super().open()

    def on_chain(self, chain: Chain) -> None:
        """Prints what the guest sends; keeps what the guest gives to be typed into."""
        assert self._terminal.near is not None
        if chain.ring == "receive":
            self._buffers.append(chain)
            self.watch(self._terminal.near.fileno(), self._read)
            return
        with contextlib.suppress(BlockingIOError):  # nobody reads: as on a line that is not connected, it is lost
            os.write(self._terminal.near.fileno(), chain.readable)
        chain.complete()

    def on_returned(self, ring: str) -> None:
        """What was kept of it leads nowhere."""
        if ring == "receive":
            self._buffers.clear()

    def _read(self) -> None:
        assert self._terminal.near is not None
        if not self._buffers:
            self.unwatch(self._terminal.near.fileno())  # what is typed waits in the terminal
            return
        typed = os.read(self._terminal.near.fileno(), self._buffers[0].writable)
        self._buffers.popleft().complete(typed)

    # -- a handover -----------------------------------------------------------------------------------------------

    def save(self, *, with_descriptors: bool) -> Terminal:
        """The terminal. The buffers that are kept move by themselves: the successor's `on_chain` gets them again."""
        return self._terminal if with_descriptors else Terminal(near=None, far=None)

    def check(self, state: Terminal) -> None:
        """Both ends come, or none."""
        if (state.near is None) is not (state.far is None):
            raise PeerError(f"device '{self.id}': one end of a pseudoterminal came")

    def load(self, state: Terminal) -> None:
        """Goes on with the terminal, or makes one."""
        self._drop()
        self._buffers = deque()
        if state.near is None or state.far is None:
            self._make_terminal()
        else:
            self._terminal = Terminal(near=state.near.take(), far=state.far.take())

    def on_serving(self) -> None:
        """Only now: until here the link may have to lead to the terminal of a daemon that goes on."""
        with contextlib.suppress(FileNotFoundError):  # it leads to this terminal already
            self._new_link.replace(self.link)

    def release(self) -> None:
        """Lets go of the terminal, which another process has."""
        super().release()
        self._new_link.unlink(missing_ok=True)
        self._drop()

    def close(self) -> None:
        """Ends the terminal."""
        super().close()
        self._drop()
        Path(self.link).unlink(missing_ok=True)

    def _make_terminal(self) -> None:
        near, far = os.openpty()
        self._terminal = Terminal(near=OwnedFd(near), far=OwnedFd(far))
        tty.setraw(far)
        os.set_blocking(near, False)
        try:
            if Path(self.link).is_dir() and not Path(self.link).is_symlink():  # nothing can be put in its place
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._new_link.unlink(missing_ok=True)
            self._new_link.symlink_to(os.ttyname(far))
        except OSError as error:
            self._drop()
            raise KernelError(f"cannot make '{self.link}': {error.strerror}", errno=error.errno or 0) from error

    @property
    def _new_link(self) -> Path:
        return Path(f"{self.link}.new")

    def _drop(self) -> None:
        for end in (self._terminal.near, self._terminal.far):
            if end is not None:
                end.close()
        self._terminal = Terminal(near=None, far=None)


def build(spec: VirtioConsoleSpec, context: BuildContext) -> VirtioConsole:
    """What the daemon serves for a spec."""
    device = VirtioConsole(**spec.arguments(context))
    device.link = spec.link
    return device


OBJECT: Final = ObjectType(spec=VirtioConsoleSpec, build=build, info=callback_members())
