"""Continuous batching: requests join and leave a running batch that one thread decodes.

Requests join in order of arrival, so none starves: one that does not fit into `batch_tokens` yet waits at the head of the queue
until enough others have left. After half a second of prefilling, the running requests take a step, if need be between two layers
of a prompt. So even the longest prompt delays a token, a cancellation or a deadline by half a second at most. Every prompt is
prefilled alone and no row attends to another: an answer does not depend on other requests, except for rounding (see `decoding`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch

from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.interface import DecodingOptions, GeneratorError, Prompt
from ragtune_ray.generation.lora import Adapters
from ragtune_ray.generation.request import Overloaded, Request, RequestFailed
from ragtune_ray.generation.running_batch import RunningBatch

_logger = logging.getLogger(__name__)
_DIED = "the generation thread has died; see the log"
_PREFILL_SECONDS = 0.5  # if shorter, fewer rows run at once, because they leave faster than others join
_LAST_STEP_SECONDS = 10.0  # for the current step or prefill after the grace period


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of requests and tokens since the generator started; all but `running` and `waiting` only grow."""

    running: int
    waiting: int
    finished: int
    failed: int
    cancelled: int
    expired: int
    """Requests whose deadline passed while they waited or ran."""
    refused: int
    """Requests refused because the queue was full."""
    prompt_tokens: int
    """Prefilled tokens."""
    generated_tokens: int


class ContinuousGenerator:
    """A model and a thread that decodes all running requests, one token per request and step.

    Args:
        generator: the model; its `batch_tokens` limits the keys and values of the running requests.
        max_running: most requests that run at once.
        max_waiting: most requests in the queue.
        adapters: directories of LoRA adapters for this model, as PEFT writes them, by the name that requests use.

    Raises:
        GeneratorError: an adapter does not fit this model.
    """

    def __init__(
        self,
        generator: TransformersGenerator,
        *,
        max_running: int = 16,
        max_waiting: int = 64,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        self._generator = generator
        self._max_waiting = max_waiting
        self._adapters: Adapters | None = generator.load_adapters(adapters) if adapters else None
        generator.count_tokens([""])  # a tokenizer's first call changes its settings and is not thread-safe
        self._running = RunningBatch(generator, max_running, self._adapters)
        self._waiting: deque[Request] = deque()
        self._counts: Counter[str] = Counter()
        self._changed = threading.Condition()  # guards the queue, the counts and the three flags below
        self._closing = self._grace_is_over = self._died = False
        self._stepped = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Prompt, *, deadline_seconds: float = 0.0, adapter: str = "", **options: Unpack[DecodingOptions]
    ) -> Request:
        """Queue a prompt, from any thread. `deadline_seconds` (0: none) limits the time from now until the answer ends.

        Raises:
            GeneratorError: the prompt is empty or too long, or no adapter has this name.
            Overloaded: `max_waiting` requests are in the queue, or the generator is closing.
            RequestFailed: the generation thread has died.
        """
        known = self._adapters.names if self._adapters else ()
        if adapter and adapter not in known:
            raise GeneratorError(f"adapter {adapter!r} is not served; available: {', '.join(known) or 'none'}")
        if options["max_new_tokens"] < 1:
            raise GeneratorError(f"max_new_tokens={options['max_new_tokens']}: must be at least 1")
        row = self._generator.to_row(prompt, **options)
        request = Request(row, deadline_seconds=deadline_seconds, adapter=adapter)
        with self._changed:
            if self._died:
                raise RequestFailed("failed", f"{_DIED}; start a new replica")
            if self._closing:
                raise Overloaded("the generator is closing; ask another replica")
            if len(self._waiting) >= self._max_waiting:
                self._sweep_waiting()
            if len(self._waiting) >= self._max_waiting:
                self._counts["refused"] += 1
                raise Overloaded(f"{self._max_waiting} requests wait already; retry later")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def stats(self) -> Stats:
        """Current counts."""
        with self._changed:
            counts = self._counts
            return Stats(
                running=sum(not request.is_over for request in self._running.requests),
                waiting=len(self._waiting),
                finished=counts["finished"],
                failed=counts["failed"],
                cancelled=counts["cancelled"],
                expired=counts["deadline"],
                refused=counts["refused"],
                prompt_tokens=counts["prompt_tokens"],
                generated_tokens=self._running.generated_tokens,
            )

    def is_alive(self) -> bool:
        """Whether the generation thread runs; False after `close`, or if the thread has died."""
        return self._thread.is_alive()

    def close(self, grace_seconds: float = 30.0) -> None:
        """Refuse new requests, finish the present ones, and fail those that are left after `grace_seconds`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(grace_seconds)
        with self._changed:
            self._grace_is_over = True
        self._thread.join(_LAST_STEP_SECONDS)
        if self._thread.is_alive():
            _logger.error("a step is still running %g seconds after the generator was closed", _LAST_STEP_SECONDS)

    @torch.inference_mode()
    def _run(self) -> None:
        message = _DIED
        try:
            while self._wait_for_work():
                self._sweep()
                while (request := self._next()) is not None:
                    self._running.admit(request, self._step_if_due)
                    self._step_if_due()
                self._step()
            message = "the generator was closed before the request was finished"
        except Exception:
            _logger.exception("the generation thread has died")
            self._died = True
        finally:
            with self._changed:
                self._closing = True
                for request in [*self._running.clear(), *self._waiting]:
                    request.fail("failed", message)
                    self._count(request)
                self._waiting.clear()

    def _wait_for_work(self) -> bool:
        """Wait for requests; False if the generator is closed and none are left, or its grace period is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or len(self._running))
            return not self._grace_is_over and bool(self._waiting or len(self._running))

    def _next(self) -> Request | None:
        """The request at the head of the queue, if the batch has room for it."""
        with self._changed:
            if not self._waiting or not self._running.has_room(self._waiting[0]):
                return None
            request = self._waiting.popleft()
            self._counts["prompt_tokens"] += len(request.row.ids)
            return request

    def _step_if_due(self) -> None:
        if time.monotonic() - self._stepped >= _PREFILL_SECONDS:
            self._step()

    def _step(self) -> None:
        self._sweep()
        self._running.step()
        self._stepped = time.monotonic()

    def _sweep(self) -> None:
        """Release finished, cancelled and expired requests, running or waiting."""
        for request in self._running.requests:
            request.expire()
        left = self._running.release()
        with self._changed:
            for request in left:
                self._count(request)
            self._sweep_waiting()

    def _sweep_waiting(self) -> None:
        for request in [request for request in self._waiting if request.expire()]:
            self._waiting.remove(request)
            self._count(request)

    def _count(self, request: Request) -> None:
        self._counts[request.failure or "finished"] += 1
