"""One QMP conversation that lasts, without an event loop: a soak has thousands, and each must cost little.

Owns:        the connection, the events that came.
Never sees:  what a command does.
Read next:   chain.py; tests/faults/test_shortage.py, its other user.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final, Self

from localmig.errors import PeerError

ANSWER_SECONDS_MAX: Final = 30.0
"""No command waits for anything; a handover under load may take a while."""

ENDED: Final = ("completed", "failed", "cancelled")


class Monitor:
    """A client of a daemon's QMP socket that has the migration's events on."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_SECONDS_MAX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._statuses: list[str] = []
        self._read()
        self.execute("qmp_capabilities")
        self.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])

    def execute(self, command: str, **arguments: object) -> Any:
        """What the daemon answers. PeerError with the text of an error."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        while True:
            answer = self._read()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise PeerError(f"{command}: {answer['error']['desc']}")

    def migrate(self, uri: str) -> None:
        """Begins a migration."""
        self._statuses.clear()
        self.execute("migrate", uri=uri)

    def wait_status(self, *wanted: str) -> str:
        """The first of these statuses that the migration comes to."""
        while True:
            for status in self._statuses:
                if status in wanted:
                    return status
            self._read()

    def wait_settled(self) -> None:
        """Waits until a daemon that took over has nothing more to wait for from its source."""
        while self.execute("query-migrate")["status"] != "completed":
            self._read()

    def quit(self) -> None:
        """Ends the daemon."""
        self.execute("quit")
        self.close()

    def close(self) -> None:
        """Ends the conversation."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise PeerError("the daemon closed the conversation")
        message: dict[str, Any] = json.loads(line)
        if message.get("event") == "MIGRATION":
            self._statuses.append(message["data"]["status"])
        return message
