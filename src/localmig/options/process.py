"""What a daemon's process may do, and who may talk to it.

Owns:        the options that concern no object: users and modes of control sockets.
Never sees:  which users there are: names are looked up where they are needed.
Read next:   access.py for what becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from localmig.errors import ConfigError
from localmig.options.values import FileMode, GroupName, UserName

USER_COUNT_MAX: Final = 64
"""Users listed: a machine has a few that manage guests, and a group is for more."""


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
