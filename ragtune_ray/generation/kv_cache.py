"""Where the keys and values of a decoding batch lie, layer by layer, as transformers' models expect to find them.

In: states that a layer computed. Out: those that its attention looks at. This module knows nothing of tokens or models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["RowLayer", "WatchedCache"]


class RowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """One layer's keys and values in buffers of shape (rows, heads, capacity, size of a head).

    Args:
        like: states of this layer, for their number format, device, heads and size.
        num_rows: places.
        capacity: positions of each.

    Attributes:
        rows, positions: where the next states go; shape (rows, tokens).
        view: positions that attention looks at.
    """

    def __init__(self, like: torch.Tensor, num_rows: int, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(like, like)
        shape = (num_rows, like.shape[1], capacity, like.shape[3])
        # Reserved, not touched: `fill` writes the whole place of a row, so memory is taken as rows come.
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.rows = self.positions = torch.empty(0, dtype=torch.long)
        self.view = 0

    def fits(self, num_rows: int, capacity: int) -> bool:
        """Whether there are so many places of so many positions."""
        return self.keys.shape[0] >= num_rows and self.keys.shape[2] >= capacity

    def fill(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Rows from `first` on begin with these states (rows, heads, tokens, size)."""
        rows, tokens = slice(first, first + len(keys)), keys.shape[2]
        self.keys[rows, :, :tokens], self.values[rows, :, :tokens] = keys, values
        self.keys[rows, :, tokens:] = self.values[rows, :, tokens:] = 0  # masked positions must not hold NaN

    def move(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` positions of one row take the place of another's."""
        self.keys[target, :, :tokens] = self.keys[source, :, :tokens]
        self.values[target, :, :tokens] = self.values[source, :, :tokens]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states (rows, heads, tokens, size) at each row's own positions; give the part in use."""
        self.keys[self.rows, :, self.positions] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.positions] = value_states.transpose(1, 2)
        num_rows = len(key_states)
        return self.keys[:num_rows, :, : self.view], self.values[:num_rows, :, : self.view]


class WatchedCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
    """A cache that calls back whenever a layer writes to it: between the layers of a forward pass."""

    def __init__(self, callback: Callable[[], None]) -> None:
        super().__init__()
        self._callback = callback

    def update(self, *states: Any, **rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the base class does, after the call."""
        self._callback()
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(*states, **rest)
        return updated
