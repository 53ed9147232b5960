"""Any generator asked by many at once, each request in a thread of its own: for engines that batch elsewhere (engine `openai`).

In: prompts from any thread. Out: requests, to be read as text comes. It has the face of `continuous.ContinuousGenerator`. A
request that is cancelled lets go of its caller at once; its thread ends when the next piece comes. This module knows nothing of
HTTP or Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ragtune_ray.generation.interface import Finish, Generator, Prompt
from ragtune_ray.generation.request import Overloaded, Request, RequestFailed
from ragtune_ray.generation.sampling import Row

__all__ = ["PassThroughGenerator", "PassThroughStats"]


@dataclass(frozen=True, slots=True)
class PassThroughStats:
    """How many requests there are."""

    running: int
    waiting: int


class PassThroughGenerator:
    """A generator whose requests each have a thread.

    Args:
        generator: must bear being used by several threads.
        max_running: threads.
        max_waiting: requests that wait for one.
    """

    def __init__(self, generator: Generator, *, max_running: int = 16, max_waiting: int = 64) -> None:
        self._generator = generator
        self._pool = ThreadPoolExecutor(max_running, thread_name_prefix="generate")
        self._max_running, self._max_waiting = max_running, max_waiting
        self._lock = threading.Lock()
        self._num_requests = 0

    def submit(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        deadline_seconds: float = 0.0,
        adapter: str = "",
    ) -> Request:
        """Begin a request.

        Raises:
            Overloaded: as many run and wait as may.
            RequestFailed: an adapter was asked for, and there are none.
        """
        if adapter:
            raise RequestFailed("failed", f"adapter {adapter!r} is not served by this engine")
        with self._lock:
            if self._num_requests >= self._max_running + self._max_waiting:
                raise Overloaded(f"{self._num_requests} requests run or wait; try again later")
            self._num_requests += 1
        row = Row(0, [0] * prompt.num_tokens, max_new_tokens, seed=seed, temperature=temperature, stop=stop)
        request = Request(row, deadline_seconds=deadline_seconds)
        self._pool.submit(self._run, request, prompt)
        return request

    def stats(self) -> PassThroughStats:
        """How many requests there are."""
        with self._lock:
            running = min(self._num_requests, self._max_running)
            return PassThroughStats(running, self._num_requests - running)

    def is_alive(self) -> bool:
        """Always: the engine is elsewhere."""
        return True

    def close(self, grace_seconds: float = 0.0) -> None:
        """Take no more; what runs is not waited for."""
        del grace_seconds
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, request: Request, prompt: Prompt) -> None:
        row = request.row
        try:
            if request.expire():
                return
            finish = self._follow(request, prompt)
            if finish is None:
                return
            row.generated = [0] * self._generator.count_tokens([row.text])[0]
            row.finish = finish
            request.advance()
        except (ValueError, RuntimeError, OSError) as error:
            request.fail("failed", str(error))
        finally:
            with self._lock:
                self._num_requests -= 1

    def _follow(self, request: Request, prompt: Prompt) -> Finish | None:
        """Hand on the pieces as they come; why they ended, or None where the request was over first."""
        row = request.row
        pieces = self._generator.stream(
            prompt, max_new_tokens=row.room, temperature=row.temperature, stop=row.stop, seed=row.seed
        )
        while True:
            try:
                row.text += next(pieces)
            except StopIteration as end:
                finish: Finish = end.value
                return finish
            request.advance()
            if request.expire():
                return None
