"""Any generator asked by many at once, each request in a thread of its own: for engines that batch elsewhere (engine `openai`).

In: prompts. Out: pieces as they come, with deadlines and cancellation. It has the face of the engine that batches here, as far as
the endpoint uses it. A request that is cancelled, or whose deadline passes, lets go of its caller at once; its thread ends when
the next piece comes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ragtune_ray.completion import Completion, Generator, GeneratorError
from ragtune_ray.prompts import Prompt

__all__ = ["Overloaded", "PassThroughGenerator", "PassThroughRequest", "RequestFailed", "Stats"]


class Overloaded(GeneratorError):
    """As many requests run and wait as may."""


class RequestFailed(GeneratorError):
    """A request ended without an answer.

    Args:
        reason: `deadline`, `cancelled` or `failed`.
        detail: what happened.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Stats:
    """How many requests there are."""

    running: int
    waiting: int


class PassThroughRequest:
    """A request under way."""

    def __init__(self, prompt: Prompt, max_new_tokens: int, deadline: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | RequestFailed | None] = asyncio.Queue()
        self._prompt, self._max_new_tokens, self._deadline = prompt, max_new_tokens, deadline
        self.cancelled = threading.Event()
        self._text = ""
        self._completion: Completion | None = None

    async def apieces(self) -> AsyncIterator[str]:
        """The pieces of the text.

        Raises:
            RequestFailed: the deadline passed, it was cancelled, or the generator failed.
        """
        try:
            while True:
                left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
                try:
                    piece = await asyncio.wait_for(self._pieces.get(), left)
                except TimeoutError:
                    raise RequestFailed("deadline", "the deadline passed") from None
                if piece is None:
                    return
                if isinstance(piece, RequestFailed):
                    raise piece
                self._text += piece
                yield piece
        finally:
            self.cancel()

    def completion(self) -> Completion:
        """What was generated, once the pieces have ended."""
        if self._completion is None:
            raise RequestFailed("failed", "the request has not ended")
        return self._completion

    def cancel(self) -> None:
        """Let go of it."""
        self.cancelled.set()

    def run(self, generator: Generator, temperature: float, stop: Sequence[str], seed: int) -> None:
        """Do the work, in a thread."""
        started = time.perf_counter()
        last: RequestFailed | None = None
        try:
            pieces = generator.stream(
                self._prompt, max_new_tokens=self._max_new_tokens, temperature=temperature, stop=stop, seed=seed
            )
            text = ""
            for piece in pieces:
                if self.cancelled.is_set():
                    return
                text += piece
                self._put(piece)
            num_tokens = generator.count_tokens([text])[0]
            finish = "length" if num_tokens >= self._max_new_tokens else "stop"
            seconds = time.perf_counter() - started
            self._completion = Completion(text, self._prompt.num_tokens, num_tokens, seconds, finish, "")  # type: ignore[arg-type]
        except (ValueError, RuntimeError, OSError) as error:
            last = RequestFailed("failed", str(error))
        finally:
            self._put(last)

    def _put(self, piece: str | RequestFailed | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


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
    ) -> PassThroughRequest:
        """Begin a request; to be called in an event loop.

        Raises:
            Overloaded: as many run and wait as may.
        """
        with self._lock:
            if self._num_requests >= self._max_running + self._max_waiting:
                raise Overloaded(f"{self._num_requests} requests run or wait")
            self._num_requests += 1
        deadline = time.monotonic() + deadline_seconds if deadline_seconds else None
        request = PassThroughRequest(prompt, max_new_tokens, deadline)

        def work() -> None:
            try:
                if not request.cancelled.is_set():
                    request.run(self._generator, temperature, stop, seed)
            finally:
                with self._lock:
                    self._num_requests -= 1

        self._pool.submit(work)
        return request

    def stats(self) -> Stats:
        """How many requests there are."""
        with self._lock:
            return Stats(min(self._num_requests, self._max_running), max(0, self._num_requests - self._max_running))

    def close(self, grace_seconds: float) -> None:
        """Take no more; what runs ends with its next piece."""
        del grace_seconds
        self._pool.shutdown(wait=False, cancel_futures=True)
