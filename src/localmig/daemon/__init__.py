"""The composition root: the object graph, the run state, and the migrations a daemon starts or takes.

Owns:        which parts exist, whether the guest's rings may run, who asked for what.
Never sees:  QMP's spelling, argv.
Read next:   daemon.py, then objects.py for how a spec becomes a part.
"""

from __future__ import annotations

from localmig.daemon.daemon import Daemon, RunState
from localmig.daemon.objects import BuiltObject

__all__ = ["BuiltObject", "Daemon", "RunState"]
