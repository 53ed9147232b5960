"""Ray Serve: what the copies that retrieve and those that generate share: they follow what is published.

In: what a copy follows. Out: its health, and what it had to refuse. This module knows nothing of indexes and models.
"""

from __future__ import annotations

from typing import Any

from ragtune_ray.cluster import session
from ragtune_ray.serving.backend import Failed
from ragtune_ray.serving.following import Follower

__all__ = ["TOO_LATE", "TRIAL_QUESTION", "Following", "prepare_process", "refusal_of"]

TRIAL_QUESTION = "Is this a trial?"
"""What a copy asks of a new index or model before it takes it."""
TOO_LATE = Failed(504, "the answer was not ready in time", "deadline_exceeded")


class Following:
    """A copy that follows what is published."""

    _follower: Follower[Any]

    def check_health(self) -> None:
        """Whether the copy can go on; Serve replaces it where this raises."""
        self._follower.check()

    def __del__(self) -> None:
        if hasattr(self, "_follower"):
            self._follower.stop()


def refusal_of(follower: Follower[Any]) -> dict[str, str] | None:
    """What was published and refused last; None: nothing was."""
    refused = follower.refused
    return {"version": refused.name.strip('"[]').rstrip("/").rsplit("/", 1)[-1]} if refused else None


def prepare_process(num_threads: int) -> None:
    """Logs where Serve's are, and so many threads to compute with; before anything is loaded."""
    session.log_with_serve()
    session.use_threads(max(1, num_threads))
