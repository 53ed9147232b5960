"""Named places at which a test can end the process, as a power cut would.

In: the environment. Out: nothing, or a process that is gone. `RAGTUNE_FAILPOINT=NAME` makes the first process that reaches
that place kill itself; with `RAGTUNE_FAILPOINT_ONCE=FILE` only while that file does not exist yet, which it then does. Where
the variable is not set, a failpoint costs one look at the environment. This module knows nothing of what is being done.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

__all__ = ["NAMES", "reach"]

NAMES = (
    "build.read",
    "build.embedded",
    "build.trained",
    "segment.staged",
    "segment.published",
    "build.calibrated",
    "delete.tombstones",
    "publish.staged",
    "publish.version",
    "publish.current",
    "build.cleaned",
    "compact.planned",
    "compact.merged",
    "gc.planned",
    "gc.version",
    "gc.segment",
    "gc.rest",
    "tune.worked",
    "tune.noted",
    "tune.published",
)
"""Every place, roughly in the order in which a job passes it; the fault tests go through all of them."""


def reach(name: str) -> None:
    """End this process here, without any cleaning up, if a test asks for it.

    Args:
        name: one of `NAMES`.
    """
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
