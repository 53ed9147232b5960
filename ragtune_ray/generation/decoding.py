"""Runs many prompts through one causal language model: prefill, then one token per row and step.

Differences from transformers' `model.generate`:

1. Keys and values are written into buffers allocated in advance, each row from position 0, instead of being concatenated.
2. A prompt longer than half of `prefill_tokens` is prefilled alone, shorter ones in small groups. Padding is on the right,
   where causal attention never looks, so a prefill needs no attention mask.
3. A row's numbers do not depend on the other rows, except for rounding: kernels sum in another order for another shape,
   which can decide near-ties between tokens. In float32, logits differed by up to 6e-5 and no text changed. In bfloat16, one
   text in ten changed. So on a CPU in bfloat16 every prompt is prefilled alone (`prefill_tokens` 0) and a step multiplies a
   few rows at a time (`packing`), and each row gets the same bits in every batch.
4. A system message is prefilled once (`shared_prefixes.PrefixCache`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ragtune_ray.generation.interface import GeneratorError
from ragtune_ray.generation.shared_prefixes import PrefixCache
from ragtune_ray.models.packing import ContinuedCache
from ragtune_ray.models.token_batches import padded_length

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_BLOCK_POSITIONS = 64  # attention always sees a multiple of this many positions


def context_tokens(config: Any) -> int:
    """Most tokens that a model reads, prompt and answer together."""
    return int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**30)


def batch_context_tokens(config: Any) -> int:
    """As `context_tokens`, for rows that are decoded together.

    LongRoPE (Ding et al. 2024, arXiv:2402.13753) rotates by other factors beyond the length of the first training. transformers
    chooses them by the longest row of a batch, so a single longer row would turn the keys of all others.
    """
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return context_tokens(config)
    first = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return min(context_tokens(config), int(first or 2**30))


def check_architecture(config: Any) -> None:
    """Refuse a model with state other than keys and values, such as recurrent or linear-attention layers.

    Raises:
        GeneratorError: the message names the kinds of layers.
    """
    text = config.get_text_config(decoder=True)
    others = set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others or getattr(text, "is_encoder_decoder", False):
        raise GeneratorError(
            f"generator.model: {text.model_type} has layers of kind {sorted(others) or 'encoder-decoder'}; this engine "
            "runs decoders with full or sliding attention; serve the model elsewhere and set generator.engine=openai"
        )


class DecodingBatch:
    """Rows that are decoded together and join or leave between steps.

    Rows are ordered by when they joined, except that the last row moves to the position of one that leaves (`drop`).

    Args:
        model: a transformers causal language model, in eval mode.
        prompts: token ids of the first rows, of which there may be none; no prompt is empty.
        max_new_tokens: longest answer of each of them.
        prefill_tokens: padded tokens per prefill pass (a longer prompt is prefilled alone); 0: every prompt alone.
        max_rows: most rows at once, for which memory is reserved; 0: the number of first prompts.
        max_tokens: most positions to reserve, rows times the longest row; 0: no limit. A first row always has room.
        prefixes: has the keys and values of beginnings that prompts share.
        num_shared: number of tokens at the beginning of each prompt that are computed by themselves (0: none); () is all 0.

    Attributes:
        logits: after each row's last token, shape (rows, vocabulary).
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        prefill_tokens: int,
        max_rows: int = 0,
        max_tokens: int = 0,
        *,
        prefixes: PrefixCache | None = None,
        num_shared: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._device = model.device
        self._text_config = model.config.get_text_config(decoder=True)
        self._context_tokens = batch_context_tokens(model.config)
        self._prefill_tokens = prefill_tokens
        self._max_rows, self._max_tokens = max_rows or len(prompts), max_tokens
        self._prefixes = prefixes
        self._layers: list[RowLayer] = []
        self._limits: list[int] = []  # per row: tokens of the prompt and of the longest answer
        self._lengths = torch.zeros(0, dtype=torch.long, device=self._device)
        self.logits = torch.zeros(0, 0, device=self._device)
        if prompts:
            self.join(prompts, max_new_tokens, num_shared)

    def __len__(self) -> int:
        return len(self._limits)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a row of `num_tokens`, prompt and longest answer, may join now."""
        num_rows = len(self) + 1
        num_positions = num_rows * self._capacity([num_tokens])
        return num_rows == 1 or (
            num_rows <= self._max_rows and (not self._max_tokens or num_positions <= self._max_tokens)
        )

    @torch.inference_mode()
    def join(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        num_shared: Sequence[int] = (),
        between_layers: Callable[[], None] | None = None,
    ) -> None:
        """Prefill prompts (token ids, none empty) and append them as rows, group by group; for `num_shared` see the class.

        `between_layers` is called once per layer of a prefill. It may step or drop rows that have already joined, so that they
        need not wait for a long prompt, and may raise to abandon the group.
        """
        limits = [len(prompt) + max_new_tokens for prompt in prompts]
        for group in _groups(prompts, self._prefill_tokens):
            group_prompts = [prompts[row] for row in group]
            cache, logits = self._prefill(group_prompts, num_shared[group.start : group.stop], between_layers)
            first = len(self)
            self._reserve(cache, first + len(group), self._capacity(limits))
            for layer, filled in zip(self._layers, cache.layers, strict=True):
                layer.fill(first, filled.keys, filled.values)
            lengths = torch.tensor([len(prompt) for prompt in group_prompts], device=self._device)
            self._lengths = torch.cat([self._lengths, lengths])
            self.logits = torch.cat([self.logits, logits]) if first else logits
            self._limits += limits[group.start : group.stop]

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """Remove a row; the last row moves to its position."""
        last = len(self) - 1
        if row != last:
            tokens = int(self._lengths[[row, last]].max())  # zeros follow
            for layer in self._layers:
                layer.move(last, row, tokens)
            self._lengths[row], self.logits[row] = self._lengths[last], self.logits[last]
            self._limits[row] = self._limits[last]
        self._lengths, self.logits = self._lengths[:last], self.logits[:last]
        self._limits.pop()
        if not self._limits:
            self._layers = []  # frees the memory

    def _prefill(
        self, prompts: Sequence[Sequence[int]], num_shared: Sequence[int], between_layers: Callable[[], None] | None
    ) -> tuple[ContinuedCache, torch.Tensor]:
        """One forward pass over prompts padded on the right: keys and values, and the logits after each prompt."""
        cache, num_begun = self._begun(prompts, num_shared, between_layers)
        tails = [prompt[num_begun:] for prompt in prompts]
        longest = max(len(tail) for tail in tails)
        ids = torch.zeros(len(tails), padded_length(longest, self._context_tokens - num_begun), dtype=torch.long)
        for place, tail in enumerate(tails):
            ids[place, : len(tail)] = torch.tensor(tail)
        last = torch.tensor([len(tail) - 1 for tail in tails], device=self._device)
        ends, place_of_end = torch.unique(last, return_inverse=True)
        output = self._model(input_ids=ids.to(self._device), past_key_values=cache, use_cache=True, logits_to_keep=ends)
        return cache, output.logits[torch.arange(len(prompts), device=self._device), place_of_end]

    def _begun(
        self, prompts: Sequence[Sequence[int]], num_shared: Sequence[int], between_layers: Callable[[], None] | None
    ) -> tuple[ContinuedCache, int]:
        """A cache with the beginning that all these prompts share, and its length; empty if none is computed by itself."""
        cache = ContinuedCache(between_layers)
        beginnings = {tuple(prompt[:count]) for prompt, count in zip(prompts, num_shared, strict=False)}
        if self._prefixes is None or len(beginnings) != 1 or not (beginning := beginnings.pop()):
            return cache, 0
        cache.begin(self._prefixes.states(beginning, between_layers), len(prompts))
        return cache, len(beginning)

    def _capacity(self, more: Sequence[int]) -> int:
        return _round_up(max([*self._limits, *more]), _BLOCK_POSITIONS)

    def _reserve(self, like: ContinuedCache, num_rows: int, capacity: int) -> None:
        """Grow the buffers to this many rows and positions, keeping the keys and values of the present rows."""
        affordable = min(self._max_rows, self._max_tokens // capacity) if self._max_tokens else self._max_rows
        reserved = max(num_rows, affordable)
        if not self._layers:
            self._layers = [RowLayer(layer.keys, layer.values, reserved, capacity) for layer in like.layers]
        for place, layer in enumerate(self._layers):
            if not layer.fits(num_rows, capacity):
                self._layers[place] = RowLayer(layer.keys, layer.values, reserved, capacity)
                tokens = min(capacity, layer.keys.shape[2])
                self._layers[place].fill(0, layer.keys[: len(self), :, :tokens], layer.values[: len(self), :, :tokens])

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> None:
        """Append one token per row, shape (rows,), and compute the `logits` that follow it."""
        positions = self._lengths[:, None]
        view = _round_up(int(positions.max()) + 1, _BLOCK_POSITIONS)
        rows = torch.arange(len(tokens), device=self._device)[:, None]
        for layer in self._layers:
            layer.rows, layer.positions, layer.view = rows, positions, view
        output = self._model(
            input_ids=tokens.to(self._device)[:, None],
            position_ids=positions,
            attention_mask=self._masks(positions, view),
            past_key_values=Cache(layers=self._layers),
            use_cache=True,
        )
        self._lengths = self._lengths + 1
        self.logits = output.logits[:, -1]

    def _masks(self, positions: torch.Tensor, view: int) -> torch.Tensor | dict[str, torch.Tensor]:
        distance = positions[:, None, :, None] - torch.arange(view, device=self._device)
        full = self._additive(distance >= 0)
        kinds = set(getattr(self._text_config, "layer_types", None) or ())
        window = getattr(self._text_config, "sliding_window", None)
        if not window:
            return full
        sliding = self._additive((distance >= 0) & (distance < window))
        if not kinds:  # every layer slides (Mistral 7B v0.1)
            return sliding
        return {"full_attention": full, "sliding_attention": sliding} if "sliding_attention" in kinds else full

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=self._model.dtype, device=self._device)
        return mask.masked_fill_(~allowed, float("-inf"))


def _groups(prompts: Sequence[Sequence[int]], prefill_tokens: int) -> list[range]:
    """Runs of consecutive rows whose padded tokens fit `prefill_tokens`."""
    groups: list[range] = []
    start = longest = 0
    for row, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if row > start and longest * (row + 1 - start) > prefill_tokens:
            groups.append(range(start, row))
            start, longest = row, len(prompt)
    return [*groups, range(start, len(prompts))]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class RowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """One layer's keys and values in buffers of shape (num_rows, heads, capacity, head size).

    The buffers have the dtype, device, heads and head sizes of the states `keys` and `values`; sizes differ in DeepSeek.

    Attributes:
        rows, positions: where the next states are written; they broadcast to (rows, tokens).
        view: number of positions that attention sees.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, num_rows: int, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        # An empty tensor uses no memory until it is written: `fill` writes a whole row when it joins.
        self.keys, self.values = (
            like.new_empty(num_rows, like.shape[1], capacity, like.shape[3]) for like in (keys, values)
        )
        self.rows = self.positions = torch.empty(0, dtype=torch.long)
        self.view = 0

    def fits(self, num_rows: int, capacity: int) -> bool:
        """Whether the buffers have this many rows and positions."""
        return self.keys.shape[0] >= num_rows and self.keys.shape[2] >= capacity

    def fill(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write states (rows, heads, tokens, size) at the beginning of the rows from `first` on."""
        rows, tokens = slice(first, first + len(keys)), min(keys.shape[2], self.keys.shape[2])  # beyond is padding
        self.keys[rows, :, :tokens], self.values[rows, :, :tokens] = keys[:, :, :tokens], values[:, :, :tokens]
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
