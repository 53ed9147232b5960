"""Serves an engine that batches elsewhere (`openai`) with one thread per request.

It has the interface of `continuous.ContinuousGenerator`. A cancelled request releases its caller at once; its thread ends with
the next piece of text.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Unpack

from ragtune_ray.generation.interface import DecodingOptions, Finish, Generator, GeneratorError, Prompt
from ragtune_ray.generation.request import Overloaded, Request, RequestFailed
from ragtune_ray.generation.row import Row

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PassThroughStats:
    """Current numbers of requests."""

    running: int
    waiting: int


class PassThroughGenerator:
    """Answers at most `max_running` requests at once, each in a thread of its own; the generator must be thread-safe."""

    def __init__(self, generator: Generator, *, max_running: int = 16, max_waiting: int = 64) -> None:
        self._generator = generator
        self._pool = ThreadPoolExecutor(max_running, thread_name_prefix="generate")
        self._max_running, self._max_waiting = max_running, max_waiting
        self._lock = threading.Lock()
        self._num_requests = 0

    def submit(
        self, prompt: Prompt, *, deadline_seconds: float = 0.0, adapter: str = "", **options: Unpack[DecodingOptions]
    ) -> Request:
        """Queue a prompt; the arguments are those of `ContinuousGenerator.submit`.

        Raises:
            Overloaded: the threads and the queue are full.
            RequestFailed: `adapter` is not empty; this engine has no adapters.
        """
        if adapter:
            raise RequestFailed("failed", f"adapter {adapter!r} is not served by this engine")
        with self._lock:
            if self._num_requests >= self._max_running + self._max_waiting:
                raise Overloaded(f"{self._num_requests} requests run or wait; retry later")
            self._num_requests += 1
        row = Row(0, [0] * prompt.num_tokens, options["max_new_tokens"])
        request = Request(row, deadline_seconds=deadline_seconds)
        self._pool.submit(self._run, request, prompt, options)
        return request

    def stats(self) -> PassThroughStats:
        """Numbers of requests that run and wait."""
        with self._lock:
            running = min(self._num_requests, self._max_running)
            return PassThroughStats(running, self._num_requests - running)

    def is_alive(self) -> bool:
        """Always True: the engine runs elsewhere."""
        return True

    def close(self, grace_seconds: float = 0.0) -> None:
        """Refuse new requests; running ones are not waited for."""
        del grace_seconds
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, request: Request, prompt: Prompt, options: DecodingOptions) -> None:
        row = request.row
        try:
            if not request.expire() and (finish := self._stream_into(request, prompt, options)) is not None:
                row.generated = [0] * self._generator.count_tokens([row.text])[0]
                row.finish = finish
                request.advance()
        except GeneratorError as error:
            request.fail("failed", str(error))
        except Exception as error:  # any: a request that is left open is waited for until its deadline
            _logger.exception("a request to the generator failed")
            request.fail("failed", f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._num_requests -= 1

    def _stream_into(self, request: Request, prompt: Prompt, options: DecodingOptions) -> Finish | None:
        """Add the engine's pieces to the request; return why they ended, or None if the request was over first."""
        row = request.row
        pieces = self._generator.stream(prompt, **options)
        while True:
            try:
                row.text += next(pieces)
            except StopIteration as end:
                finish: Finish = end.value
                return finish
            request.advance()
            if request.expire():
                return None
