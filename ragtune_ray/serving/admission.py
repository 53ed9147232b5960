"""Whether a request is let in: how many are under way, and whether its turn would come in time.

In: requests as they come and end. Out: 429 for one that would only fail later. This module knows nothing of what they ask.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ragtune_ray import config
from ragtune_ray.serving.requests import ApiError

__all__ = ["Load", "capacity", "places"]

FEWEST_ENDS = 4
"""Of requests under load, before which nothing is said about how fast they pass."""
RECENT_ENDS = 32
"""After which an end is forgotten."""


@dataclass(slots=True)
class Load:
    """How many requests wait for or use something, and how fast they pass."""

    capacity: int
    current: int = 0
    gaps_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_ENDS))
    """Between the last ends of requests, while there were others; their mean says how fast requests pass. Over so many, one
    stall (a copy that died and was started anew) does not pass for the pace."""
    last_end: float = 0.0
    """On the monotonic clock; 0: nobody has been there since it was quiet."""

    @property
    def seconds_each(self) -> float:
        """Between two ends; a second as long as too few are known."""
        return sum(self.gaps_seconds) / len(self.gaps_seconds) if len(self.gaps_seconds) >= FEWEST_ENDS else 1.0

    @contextlib.contextmanager
    def entered(self, seconds: float) -> Iterator[None]:
        """Count a request in for the length of the block.

        Args:
            seconds: that it has. One whose turn would come later than that is refused now: it would only fail later.

        Raises:
            ApiError: 429: there are too many.
        """
        too_late = len(self.gaps_seconds) >= FEWEST_ENDS and self.current * self.seconds_each > seconds
        if too_late:
            raise self._refusal()
        self.refuse_if_full()
        self.current += 1
        try:
            yield
        finally:
            self._leave()

    def refuse_if_full(self) -> None:
        """Let nothing pass where no more may come in: what can be known before a request was read.

        Raises:
            ApiError: 429: there are too many.
        """
        if self.current >= self.capacity:
            raise self._refusal()

    def _refusal(self) -> ApiError:
        return ApiError(
            429,
            "more requests are under way than can be served; try again later",
            code="overloaded",
            retry_after_seconds=min(60.0, max(1.0, self.current * self.seconds_each)),
        )

    def _leave(self) -> None:
        now = time.monotonic()
        if self.last_end and self.current > 1:
            self.gaps_seconds.append(min(now - self.last_end, 10.0))
        self.current -= 1
        self.last_end = now if self.current else 0.0  # what passes until the next comes is nobody's pace


def capacity(replicas: config.Replicas) -> int:
    """How many requests all copies of a deployment may hold, those that wait included."""
    return replicas.max_replicas * replicas.max_ongoing_requests + replicas.max_queued_requests


def places(generator: config.Replicas) -> int:
    """How many requests one copy of the generator holds: its batch, and a quarter as many that are next."""
    return generator.max_ongoing_requests + max(1, generator.max_ongoing_requests // 4)
