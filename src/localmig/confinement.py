"""What this process gives up before it serves: its user, its capabilities, system calls that it never needs.

Owns:        RunAs and Sandbox; the order of giving up.
Never sees:  devices, sockets, who may talk to the daemon (access.py).
Read next:   rust/sandbox/ for the lists of calls; cli/run.py for when which is given up.

What takes privileges is opened first: TAPs, and their scripts run. Then the user is changed and the sandbox closed, and
only then sockets are made and guests' memory is mapped. So the sockets are the user's, and no thread is left outside.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Self

from localmig import dataplane
from localmig.access import nameless_user_id
from localmig.errors import ConfigError, KernelError
from localmig.options import RunAsSpec, SandboxSpec

_logger = logging.getLogger(__name__)

CAPABILITIES_KEPT: Final = (
    "CAP_NET_ADMIN",  # a destination may have to open its own TAP, whose script configures it
    "CAP_DAC_OVERRIDE",  # root's daemon has its sockets in directories of others
    "CAP_CHOWN",  # and gives them to a group
    "CAP_FOWNER",
    "CAP_KILL",  # to fence a destination of another user
)
"""What the sandbox leaves to a daemon that has it: root's. One that runs as another user has none of them as a rule."""

_CAP_SYS_NICE: Final = "CAP_SYS_NICE"
"""Kept as well where a limit cannot take its place: without CAP_SYS_RESOURCE, as in many a container."""

_REALTIME_PRIORITY: Final = 1
"""The one that a thread takes while a guest waits for it (migration/downtime.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAs:
    """The user to become, with groups.

    Attributes:
        name: as the operator wrote it.
        user_id: the user.
        group_id: the primary group.
        group_ids: the supplementary groups.
    """

    name: str
    user_id: int
    group_id: int
    group_ids: tuple[int, ...] = ()

    @classmethod
    def resolve(cls, spec: RunAsSpec) -> Self:
        """The user that `spec` means on this machine.

        Raises:
            ConfigError: there is none, it is root, or this process may not become it.
        """
        if spec.group_id is not None:
            found = cls(name=spec.user, user_id=int(spec.user), group_id=spec.group_id)
        else:
            entry = _entry(spec.user)
            groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
            found = cls(name=spec.user, user_id=entry.pw_uid, group_id=entry.pw_gid, group_ids=tuple(groups))
        if found.user_id == 0:
            raise ConfigError(f"--runas {spec.user}: this is root; name another user, or leave --runas out")
        if found.user_id == nameless_user_id():
            raise ConfigError(
                f"--runas {spec.user}: {found.user_id} stands for every user of a container without a number here, and "
                "all of them would pass for this daemon's; name a user of its own"
            )
        if os.geteuid() not in (0, found.user_id):
            raise ConfigError(
                f"--runas {spec.user}: this process has user id {os.geteuid()} and cannot become {found.user_id}: "
                "start it as root, or leave --runas out"
            )
        return found

    @property
    def is_now(self) -> bool:
        """Whether the process is this user's already, for good."""
        return os.getresuid() == (self.user_id,) * 3

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Until the end of the block the process acts as the user, in what it makes and to whom it connects."""
        if self.is_now:
            yield
            return
        before = os.getegid(), os.getgroups()
        os.setgroups(self.group_ids)
        os.setegid(self.group_id)
        os.seteuid(self.user_id)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(before[0])
            os.setgroups(before[1])

    def become(self) -> None:
        """Becomes the user for good, with the right to the real-time priority that a handover uses.

        Raises:
            ConfigError: the user cannot read the program, which loads parts of itself when it needs them.
            KernelError: the kernel refuses.
        """
        if self.is_now:
            return
        try:
            _allow_realtime_priority()
            os.setgroups(self.group_ids)
            os.setresgid(self.group_id, self.group_id, self.group_id)
            os.setresuid(self.user_id, self.user_id, self.user_id)
            # What this user's processes could read here they may ask for by QMP as well, TAP and all. And `upgrade`,
            # which is one of them, looks up the working directory.
            dataplane.set_dumpable()
        except OSError as error:
            raise KernelError(
                f"--runas {self.name}: cannot become user id {self.user_id}: {error.strerror}", errno=error.errno or 0
            ) from error
        assert self.is_now, os.getresuid()
        for file in (__file__, os.__file__):
            if not os.access(file, os.R_OK):
                raise ConfigError(
                    f"--runas {self.name}: this user cannot read '{file}', a part of the program: install it where all "
                    "may read"
                )


def _entry(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(int(user)) if user.isascii() and user.isdigit() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        raise ConfigError(f"--runas {user}: there is no such user on this machine; UID:GID needs no entry") from None


@dataclass(kw_only=True, slots=True)
class Privileges:
    """What the process was started with and gives up.

    Attributes:
        run_as: the user to become; None: as it is.
        sandbox: the sandbox, open still.
    """

    run_as: RunAs | None
    sandbox: Sandbox

    @contextmanager
    def as_user(self) -> Iterator[None]:
        """Until the end of the block the process acts as the user that it will be."""
        with self.run_as.meanwhile() if self.run_as is not None else contextlib.nullcontext():
            yield

    def give_up(self) -> None:
        """Becomes the user and closes the sandbox. Raises as `RunAs.become`."""
        if self.run_as is not None:
            self.run_as.become()
        self.sandbox.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxState:
    """What of the sandbox is closed.

    Attributes:
        option: what the operator said of it.
        enabled: whether system calls are forbidden.
        spawn: whether the process may run programs.
        reason: why it is not `enabled`; None where it is.
    """

    option: str
    enabled: bool
    spawn: bool
    reason: str | None = None


class Sandbox:
    """Closed in two steps, neither of which can be taken back: `close`, then `forbid_programs`."""

    def __init__(self, spec: SandboxSpec) -> None:
        self._spec = spec
        self.state = SandboxState(
            option=str(spec), enabled=False, spawn=True, reason=None if spec.enabled else "switched off by --sandbox"
        )

    def close(self) -> None:
        """Gives up capabilities and calls that no daemon needs. Before there are other threads.

        Where the kernel has no such thing, the log says so, and `state`.
        """
        if not self._spec.enabled:
            return
        try:
            may_be_urgent = _allow_realtime_priority()
            dataplane.keep_capabilities((*CAPABILITIES_KEPT, *(() if may_be_urgent else (_CAP_SYS_NICE,))))
            dataplane.forbid_unneeded()
        except OSError as error:
            self._fail(error)
        else:
            self.state = replace(self.state, enabled=True)
            if self._spec.spawn is False:
                self.forbid_programs()

    def forbid_programs(self) -> None:
        """Gives up running programs, unless the operator allowed it. For when no TAP has one to run. Idempotent."""
        if not self.state.enabled or not self.state.spawn or self._spec.spawn:
            return
        try:
            dataplane.forbid_programs()
        except OSError as error:
            self._fail(error)
        else:
            self.state = replace(self.state, spawn=False)

    def _fail(self, error: OSError) -> None:
        reason = f"this kernel has no such sandbox: {error.strerror or error}"
        self.state = replace(self.state, reason=reason)
        _logger.warning("--sandbox %s: %s", self._spec, reason)


def _allow_realtime_priority() -> bool:
    """Allows it by a limit, which lasts when the capability goes; whether that could be done."""
    wanted = [
        limit if limit == resource.RLIM_INFINITY else max(limit, _REALTIME_PRIORITY)
        for limit in resource.getrlimit(resource.RLIMIT_RTPRIO)
    ]
    try:
        resource.setrlimit(resource.RLIMIT_RTPRIO, (wanted[0], wanted[1]))
    except (ValueError, OSError) as error:
        _logger.debug("the limit of real-time priorities stays: %s", error)
        return False
    return True
