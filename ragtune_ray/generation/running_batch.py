"""Decodes several requests together, one token per request and step; they join and leave between steps.

`continuous` decides when a request joins. An error while a prompt is prefilled or a token is chosen fails only that request;
an error in a shared step fails the requests that shared it, and later requests start with an empty batch.
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

_logger = logging.getLogger(__name__)


class _AbandonedError(RagtuneError):
    """The request that is being prefilled is over."""


class RunningBatch:
    """Requests whose rows share every step.

    Args:
        generator: the model; its `batch_tokens` limits the memory for keys and values.
        max_running: most requests at once.
        adapters: the LoRA adapters that requests may name, if any.
    """

    def __init__(self, generator: TransformersGenerator, max_running: int, adapters: Adapters | None = None) -> None:
        self._generator = generator
        self._adapters = adapters
        self._batch = generator.open_batch(max_running)
        self._requests: list[Request] = []  # in the order of the batch's rows
        self._left: list[Request] = []  # since the last `release`
        self.generated_tokens = 0  # of all requests so far, including end tokens

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The running requests, and those that are over but not yet released."""
        return tuple(self._requests)

    def has_room(self, request: Request) -> bool:
        """Whether a request may join now."""
        return self._batch.has_room(len(request.row.ids) + request.row.room)

    def admit(self, request: Request, between_layers: Callable[[], None]) -> None:
        """Prefill the prompt of a request that `has_room` accepts, and append its first token.

        `between_layers` is called once per layer of the prefill; it may call `release` and `step`. If the request is over after
        such a call, the prefill is abandoned.
        """
        row = request.row

        def check_between_layers() -> None:
            between_layers()
            if request.expire():
                raise _AbandonedError

        try:
            with self._adapted([request]):
                shared = 0 if request.adapter else row.num_shared  # an adapter changes keys and values
                self._batch.join([row.ids], row.room, [shared], check_between_layers)
        except _AbandonedError:
            self._left.append(request)
            return
        except Exception as error:
            _logger.exception("a request's prompt of %d tokens failed", len(row.ids))
            self._fail([request], error)
            return
        self._requests.append(request)
        self._extend([request], self._batch.logits[-1:])

    def step(self) -> None:
        """Append the next token of every request."""
        if not self._requests:
            return
        try:
            with self._adapted(self._requests):
                self._batch.step(torch.tensor([request.row.generated[-1] for request in self._requests]))
        except Exception as error:
            _logger.exception("a step of %d requests failed", len(self._requests))
            self._fail(self._requests, error)
            self._requests = []
            while len(self._batch):
                self._batch.drop(len(self._batch) - 1)
            return
        self._extend(self._requests, self._batch.logits)

    def release(self) -> list[Request]:
        """Remove the requests that are over; return all requests that left since the last call."""
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
        """Remove and return all requests; usable even after an error in the batch."""
        left = [*self._left, *self._requests]
        self._left, self._requests = [], []
        return left

    def _extend(self, requests: Sequence[Request], logits: torch.Tensor) -> None:
        tokens = choose_tokens(logits, [request.row for request in requests])
        for request, token in zip(requests, tokens, strict=True):
            if token is None:
                request.fail("failed", "the model's logits are not numbers")
                continue
            self.generated_tokens += 1
            try:
                request.row.append(token, self._generator.end_tokens, self._generator.decode, watch=True)
            except Exception as error:
                _logger.exception("a request's token %d could not be decoded", token)
                request.fail("failed", _describe(error))
            request.advance()

    def _adapted(self, requests: Sequence[Request]) -> contextlib.AbstractContextManager[None]:
        if self._adapters is None:
            return contextlib.nullcontext()
        return self._adapters.applied([request.adapter for request in requests])

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        for request in requests:
            request.fail("failed", _describe(error))
            self._left.append(request)
        if self._generator.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
