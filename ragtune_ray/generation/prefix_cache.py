"""Keeps the keys and values of beginnings that many prompts share, which are then computed once: system messages.

A beginning is computed by itself, and what follows it in a pass of its own, whether the beginning was in the cache or not. So a
prompt has the same numbers in every batch and at any time (compare `decoding`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ragtune_ray.generation.shared_prefixes import supports_sharing
from ragtune_ray.models.packing import ContinuedCache, PackedAttention

_FEWEST_TOKENS = 32  # a shorter beginning saves less than a second pass over the layers costs

States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, of shape (1, heads, tokens, head size)."""


class PrefixCache:
    """The beginnings that were used last, for one model. It is safe to use from several threads.

    Args:
        model: a transformers causal language model.
        most_tokens: of all beginnings together; a longer one is not kept apart.
    """

    def __init__(self, model: Any, most_tokens: int) -> None:
        self._model, self._most_tokens = model, most_tokens
        self._states: OrderedDict[tuple[int, ...], States] = OrderedDict()
        self._lock = threading.Lock()

    def pays(self, num_tokens: int) -> bool:
        """Whether a beginning of this length is computed by itself."""
        return _FEWEST_TOKENS <= num_tokens <= self._most_tokens

    @torch.inference_mode()
    def states(self, ids: Sequence[int], between_layers: Callable[[], None] | None = None) -> States:
        """Keys and values of a beginning; computed if they are not in the cache, with `between_layers` as in a prefill."""
        key = tuple(ids)
        with self._lock:
            if key in self._states:
                self._states.move_to_end(key)
                return self._states[key]
        cache = ContinuedCache(between_layers)
        tokens = torch.tensor([key], device=self._model.device)
        self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with self._lock:
            self._states[key] = found
            while sum(map(len, self._states)) > self._most_tokens:
                self._states.popitem(last=False)
        return found


def prefix_cache(model: Any, most_tokens: int) -> PrefixCache | None:
    """A cache for a model whose attention continues a beginning without a mask, which would cost what the cache saves."""
    continues = any(isinstance(module, PackedAttention) for module in model.modules())
    return PrefixCache(model, most_tokens) if continues and supports_sharing(model) else None


def num_common(some: Sequence[int], others: Sequence[int]) -> int:
    """Number of equal elements at the beginning of both.

    >>> num_common([1, 2, 3], [1, 2, 4, 3])
    2
    """
    pairs = zip(some, others, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
