"""Lets tests kill the process at named points, as a power cut would.

With `RAGTUNE_FAILPOINT=NAME`, a process that reaches that point kills itself. If `RAGTUNE_FAILPOINT_ONCE=FILE` is set too,
it does so only if it can create that file, so that one process dies and its successor does not.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

NAMES = (
    "build.unit", "build.embedded", "build.trained", "segment.staged", "segment.published", "build.calibrated",
    "delete.tombstones", "publish.staged", "publish.version", "publish.current", "build.cleaned",
    "compact.planned", "compact.merged", "gc.planned", "gc.version", "gc.segment", "gc.rest",
    "tune.worked", "tune.noted", "tune.published",
)  # fmt: skip
"""All failpoints, roughly in the order in which a job reaches them; the fault tests use every one."""


def reach(name: str) -> None:
    """Kill this process, without any cleanup, if the environment names this failpoint, one of `NAMES`."""
    assert name in NAMES, name
    if os.environ.get("RAGTUNE_FAILPOINT") != name:
        return
    once = os.environ.get("RAGTUNE_FAILPOINT_ONCE")
    if once:
        try:
            Path(once).open("x").close()
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
