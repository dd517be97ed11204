"""What a daemon's process may do, and who may talk to it.

Owns:        the options that concern no object: the QMP socket, users and modes of control sockets, the user to become,
             the sandbox.
Never sees:  which users there are: names are looked up where they are needed.
Read next:   access.py and confinement.py for what becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.access import ACCOUNT_ID_MAX
from localmig.errors import ConfigError
from localmig.options.keyval import parse_keyval
from localmig.options.values import FileMode, GroupName, Switch, UserName
from localmig.unix_socket import check_path

USER_COUNT_MAX: Final = 64
"""Users listed: a machine has a few that manage guests, and a group is for more."""

_ID_DIGITS_MAX: Final = len(str(ACCOUNT_ID_MAX))

_SPAWN: Final = {True: "allow", False: "deny"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessSpec:
    """`--allow-user`, `--socket-mode`, `--socket-group`: who may use QMP and migration sockets.

    Attributes:
        users: names or numbers.
        mode: as chmod(1) writes it; None: 0600.
        group: name or number; None: as the directory says.
    """

    users: tuple[str, ...] = ()
    mode: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if len(self.users) > USER_COUNT_MAX:
            raise ConfigError(f"Parameter 'allow-user' has {len(self.users)} users, limit is {USER_COUNT_MAX}")
        for user in self.users:
            UserName().check("allow-user", user)
        if self.mode is not None:
            FileMode().check("socket-mode", self.mode)
        if self.group is not None:
            GroupName().check("socket-group", self.group)


def parse_users(text: str) -> tuple[str, ...]:
    """The users in `USER[,USER…]`, which `AccessSpec` checks."""
    return tuple(text.split(","))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAsSpec:
    """`--runas USER` or `--runas UID:GID`: the user to become before guests are served.

    Attributes:
        user: name or number; a number where there is a group.
        group_id: the group where it was given; the user has no other then.
    """

    user: str
    group_id: int | None = None


def read_runas(text: str) -> RunAsSpec:
    """Reads what `--runas` takes, as QEMU does: a user, or `UID:GID`. ConfigError where it is neither."""
    user, colon, group = text.partition(":")
    UserName().check("runas", user)
    if not colon:
        return RunAsSpec(user=user)
    for number in (user, group):
        if not (number.isascii() and number.isdigit() and len(number) <= _ID_DIGITS_MAX):
            raise ConfigError(f"Parameter 'runas' expects USER or UID:GID, not '{text}'")
        if int(number) > ACCOUNT_ID_MAX:
            raise ConfigError(f"Parameter 'runas' expects numbers up to {ACCOUNT_ID_MAX}, not {number}")
    return RunAsSpec(user=user, group_id=int(group))


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxSpec:
    """`--sandbox on|off[,spawn=allow|deny]`: whether the process gives up what it does not need.

    Attributes:
        enabled: whether it does.
        spawn: whether it may run programs; None: where a TAP has a script to run.
    """

    enabled: bool = True
    spawn: bool | None = None

    def __str__(self) -> str:
        spawn = "" if self.spawn is None else f",spawn={_SPAWN[self.spawn]}"
        return f"{'on' if self.enabled else 'off'}{spawn}"


def read_sandbox(text: str) -> SandboxSpec:
    """Reads what `--sandbox` takes. ConfigError where it is something else."""
    values = parse_keyval(text, "enable")
    enabled = Switch().read("sandbox", values.pop("enable", ""))
    spawn = values.pop("spawn", None)
    if values:
        raise ConfigError(f"Parameter '{next(iter(values))}' is unexpected, the sandbox has: spawn")
    if spawn not in (None, *_SPAWN.values()):
        raise ConfigError(f"Parameter 'spawn' expects allow or deny, not '{spawn}'")
    return SandboxSpec(enabled=bool(enabled), spawn=None if spawn is None else spawn == _SPAWN[True])


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorSpec:
    """`--qmp unix:PATH`: where the daemon answers QMP."""

    path: str

    def __post_init__(self) -> None:
        check_path(self.path)


def parse_monitor(text: str) -> MonitorSpec:
    """Reads what `--qmp` takes: `unix:PATH`. QEMU's `,server=on,wait=off` may follow: so it always is.

    Raises:
        ConfigError: it is something else.
    """
    try:
        return read_monitor(text)
    except ConfigError as error:
        raise ConfigError(f"--qmp {text}: {error}") from error


def read_monitor(text: str) -> MonitorSpec:
    """As `parse_monitor`; what is wrong does not name the option."""
    values = parse_keyval(text, "address")
    address = values.pop("address", "")
    protocol, _, path = address.partition(":")
    if protocol != "unix":
        raise ConfigError(f"'{address}' is no UNIX socket, expected unix:PATH")
    for key, value in values.items():
        if (key, value) not in (("server", "on"), ("wait", "off")):
            raise ConfigError(f"Parameter '{key}={value}' is unexpected, only server=on and wait=off may be there")
    return MonitorSpec(path=path)
