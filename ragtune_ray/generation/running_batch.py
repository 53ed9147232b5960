"""The requests that are being decoded together, one token per request and step; they come and go between steps.

In: requests. Out: their texts and ends. It knows nothing of queues, threads or time: `continuous` decides who comes when.

One request's failure is its own. Whatever it raises while its prompt is prefilled or its token is chosen ends it alone; an
error in a step that all share ends those that shared it, and the next ones start afresh.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import torch

from ragtune_ray import RagtuneError
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.lora import Adapters
from ragtune_ray.generation.request import Request
from ragtune_ray.generation.sampling import choose_tokens

__all__ = ["RunningBatch"]

_logger = logging.getLogger(__name__)


class _AbandonedError(RagtuneError):
    """Nobody waits for what is being prefilled."""


class RunningBatch:
    """Requests whose rows share every step.

    Args:
        generator: the model; its `batch_tokens` bound the keys and values.
        max_running: most requests at once.
        adapters: the LoRA adapters that requests may name; None where there are none.

    Attributes:
        generated_tokens: of all requests so far, end tokens included.
    """

    def __init__(self, generator: TransformersGenerator, max_running: int, adapters: Adapters | None = None) -> None:
        self._generator = generator
        self._adapters = adapters
        self._batch = generator.open_batch(max_running)
        self._requests: list[Request] = []  # in the order of the batch's rows
        self._left: list[Request] = []
        self.generated_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> tuple[Request, ...]:
        """Those that run, and those that are over and have not been let go yet."""
        return tuple(self._requests)

    def has_room(self, request: Request) -> bool:
        """Whether a request may come in now."""
        return self._batch.has_room(len(request.row.ids) + request.row.room)

    def admit(self, request: Request, between_layers: Callable[[], None]) -> None:
        """Prefill a request's prompt and give it its first token.

        Args:
            request: one that fits.
            between_layers: called once per layer of the prefill; it may call `release` and `step`. A request that is over by
                then is given up at once.
        """
        row = request.row

        def go_on() -> None:
            between_layers()
            if request.expire():
                raise _AbandonedError

        try:
            with self._adapted([request]):
                self._batch.join([row.ids], row.room, go_on)
        except _AbandonedError:
            self._left.append(request)
            return
        except Exception as error:
            _logger.exception("a request's prompt of %d tokens failed", len(row.ids))
            self._lose([request], error)
            return
        self._requests.append(request)
        self._extend([request], self._batch.logits[-1:])

    def step(self) -> None:
        """The next token of every request."""
        if not self._requests:
            return
        try:
            with self._adapted(self._requests):
                self._batch.step(torch.tensor([request.row.generated[-1] for request in self._requests]))
        except Exception as error:
            _logger.exception("a step of %d requests failed", len(self._requests))
            self._lose(self._requests, error)
            self._requests = []
            while len(self._batch):
                self._batch.drop(len(self._batch) - 1)
            return
        self._extend(self._requests, self._batch.logits)

    def release(self) -> list[Request]:
        """Let those go that are over.

        Returns:
            All that have left since the last call.
        """
        for place in reversed(range(len(self._requests))):
            request = self._requests[place]
            if request.is_over:
                self._batch.drop(place)
                self._requests[place] = self._requests[-1]
                self._requests.pop()
                self._left.append(request)
        left, self._left = self._left, []
        return left

    def clear(self) -> list[Request]:
        """Forget all requests, whatever state the batch is in, and give them."""
        left = [*self._left, *self._requests]
        self._left, self._requests = [], []
        return left

    def _extend(self, requests: Sequence[Request], logits: torch.Tensor) -> None:
        tokens = choose_tokens(logits, [request.row for request in requests])
        for request, token in zip(requests, tokens, strict=True):
            if token is None:
                request.fail("failed", "the model gave logits that are not numbers")
                continue
            self.generated_tokens += 1
            try:
                self._generator.append(request.row, token, watch=True)
            except Exception as error:
                _logger.exception("a request's token %d could not be read", token)
                request.fail("failed", _named(error))
            request.advance()

    def _adapted(self, requests: Sequence[Request]) -> contextlib.AbstractContextManager[None]:
        if self._adapters is None:
            return contextlib.nullcontext()
        return self._adapters.applied([request.adapter for request in requests])

    def _lose(self, requests: Sequence[Request], error: Exception) -> None:
        for request in requests:
            request.fail("failed", _named(error))
            self._left.append(request)
        if self._generator.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
