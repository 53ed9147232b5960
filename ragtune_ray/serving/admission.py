"""Admission control: limits the requests in flight and refuses those that would time out while they wait."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ragtune_ray import config
from ragtune_ray.serving.requests import ApiError

MIN_INTERVALS = 4
"""Number of intervals from which the throughput is known."""
MAX_INTERVALS = 32
"""Number of intervals kept: enough that one stall, such as a replica's restart, does not dominate the mean."""


@dataclass(slots=True)
class Load:
    """The requests that wait for or use one resource, and how fast they complete. A request of n answers counts n times."""

    capacity: int
    current: int = 0
    intervals: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=MAX_INTERVALS))
    """Seconds between recent completions while others were in flight, and how many requests the later one counts as."""
    last_completion: float = 0.0
    """Monotonic time; 0 if nothing is in flight."""

    @property
    def _throughput_is_known(self) -> bool:
        return len(self.intervals) >= MIN_INTERVALS

    @property
    def seconds_per_request(self) -> float:
        """Mean seconds between completions; 1 until the throughput is known."""
        if not self._throughput_is_known:
            return 1.0
        return sum(seconds for seconds, _ in self.intervals) / sum(count for _, count in self.intervals)

    @contextlib.contextmanager
    def admit(self, timeout_seconds: float, count: int = 1) -> Iterator[None]:
        """Count a request, or `count` of them, as in flight during the block.

        Raises:
            ApiError: 429, too few slots are free, or the request would time out waiting.
        """
        if self._throughput_is_known and self.current * self.seconds_per_request > timeout_seconds:
            raise self._overloaded()
        self.refuse_if_full(count)
        self.current += count
        try:
            yield
        finally:
            self._complete(count)

    def refuse_if_full(self, count: int = 1) -> None:
        """Raise ApiError 429 if so many slots are not free; can be called before the request is read."""
        if self.current + count > self.capacity:
            raise self._overloaded()

    def _overloaded(self) -> ApiError:
        return ApiError(
            429,
            "too many requests are in flight; try again later",
            code="overloaded",
            retry_after_seconds=min(60.0, max(1.0, self.current * self.seconds_per_request)),
        )

    def _complete(self, count: int) -> None:
        now = time.monotonic()
        if self.last_completion and self.current > count:
            self.intervals.append((min(now - self.last_completion, 10.0 * count), count))
        self.current -= count
        self.last_completion = now if self.current else 0.0  # idle time does not count towards the throughput


def capacity(replicas: config.Replicas) -> int:
    """How many requests all replicas of a deployment accept, including those that wait."""
    return replicas.max_replicas * replicas.max_ongoing_requests + replicas.max_queued_requests


def slots_per_replica(generator: config.Replicas) -> int:
    """How many requests one generator replica accepts: a full batch, and a quarter as many that wait for it."""
    return generator.max_ongoing_requests + max(1, generator.max_ongoing_requests // 4)
