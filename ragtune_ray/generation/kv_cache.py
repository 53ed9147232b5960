"""Stores the keys and values of a decoding batch, layer by layer, behind transformers' cache interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """One layer's keys and values in buffers of shape (num_rows, heads, capacity, head size).

    The buffers have the dtype, device, heads and head size of the states `like`.

    Attributes:
        rows, positions: where the next states are written; they broadcast to (rows, tokens).
        view: number of positions that attention sees.
    """

    def __init__(self, like: torch.Tensor, num_rows: int, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(like, like)
        shape = (num_rows, like.shape[1], capacity, like.shape[3])
        # An empty tensor uses no memory until it is written: `fill` writes a whole row when it joins.
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.rows = self.positions = torch.empty(0, dtype=torch.long)
        self.view = 0

    def fits(self, num_rows: int, capacity: int) -> bool:
        """Whether the buffers have this many rows and positions."""
        return self.keys.shape[0] >= num_rows and self.keys.shape[2] >= capacity

    def fill(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write states (rows, heads, tokens, size) at the beginning of the rows from `first` on."""
        rows, tokens = slice(first, first + len(keys)), keys.shape[2]
        self.keys[rows, :, :tokens], self.values[rows, :, :tokens] = keys, values
        self.keys[rows, :, tokens:] = self.values[rows, :, tokens:] = 0  # masked positions must not contain NaN

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` positions of one row to another."""
        self.keys[target, :, :tokens] = self.keys[source, :, :tokens]
        self.values[target, :, :tokens] = self.values[source, :, :tokens]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states (rows, heads, tokens, size) at each row's own positions; return the part in use."""
        self.keys[self.rows, :, self.positions] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.positions] = value_states.transpose(1, 2)
        num_rows = len(key_states)
        return self.keys[:num_rows, :, : self.view], self.values[:num_rows, :, : self.view]


class WatchedCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
    """A cache that calls `callback` whenever a layer writes to it, that is, between the layers of a forward pass."""

    def __init__(self, callback: Callable[[], None]) -> None:
        super().__init__()
        self._callback = callback

    def update(self, *states: Any, **rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Call `callback`, then update as the base class does."""
        self._callback()
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(*states, **rest)
        return updated
