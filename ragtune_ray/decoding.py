"""Many prompts through one causal language model at once: prefill, then one token per row and step.

In: token ids. Out: logits. It knows nothing of text, tokenizers or stop strings.

Why not `model.generate`: (1) Keys and values lie in buffers allocated once, each row from position 0, instead of being
copied at every step. (2) A prompt longer than half of `prefill_tokens` is prefilled alone, shorter ones in small groups
padded on the right, where causal attention never looks; no prefill needs an attention mask. (3) So a row's numbers do not
depend on its neighbours. A decoding step was found to give the same bits for 1 to 32 rows, in bfloat16 too; a prefill does
so only in the same shape, since kernels sum in another order for another length or number of rows, bfloat16 rounds
differently, and near-ties between tokens flip. That is why prompts are not grouped beyond what speed needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from ragtune_ray.completion import GeneratorError

__all__ = ["DecodingBatch", "check_architecture"]

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_BLOCK_POSITIONS = 64  # attention always sees a multiple of this many positions


def check_architecture(config: Any) -> None:
    """Refuse a model whose layers keep more than keys and values (recurrent and linear-attention layers).

    Raises:
        GeneratorError: names the kinds of layers.
    """
    text = config.get_text_config(decoder=True)
    others = set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others or getattr(text, "is_encoder_decoder", False):
        raise GeneratorError(
            f"generator.model: {text.model_type} has layers of kind {sorted(others) or 'encoder-decoder'}; this engine "
            "runs decoders with full or sliding attention. Serve the model and set generator.engine=openai"
        )


class _RowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """One layer's keys and values in a buffer of shape (rows, heads, capacity, size of a head)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.rows = self.positions = torch.empty(0, dtype=torch.long)
        self.view = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states (rows, heads, tokens, size) at each row's own positions; give the part in use."""
        self.keys[self.rows, :, self.positions] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.positions] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.view], self.values[:, :, : self.view]


class DecodingBatch:
    """Rows of one batch, each with its keys and values; `logits` are those after each row's last token.

    Args:
        model: a transformers causal language model, in eval mode.
        prompts: token ids, none empty.
        max_new_tokens: room for the answer of each row.
        prefill_tokens: padded tokens per prefill forward (a longer prompt goes alone).
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, prefill_tokens: int) -> None:
        self._model = model
        self._device = model.device
        self._text_config = model.config.get_text_config(decoder=True)
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        capacity = _round_up(max(len(prompt) for prompt in prompts) + max_new_tokens, _BLOCK_POSITIONS)
        self._layers: list[_RowLayer] = []
        pieces = [self._prefill(prompts, group, capacity) for group in _groups(prompts, prefill_tokens)]
        self.logits = torch.cat(pieces)

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]], group: range, capacity: int) -> torch.Tensor:
        longest = max(len(prompts[row]) for row in group)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        for place, row in enumerate(group):
            ids[place, : len(prompts[row])] = torch.tensor(prompts[row])
        last = torch.tensor([len(prompts[row]) - 1 for row in group], device=self._device)
        ends, place_of_end = torch.unique(last, return_inverse=True)
        cache = DynamicCache()
        output = self._model(input_ids=ids.to(self._device), past_key_values=cache, use_cache=True, logits_to_keep=ends)
        if not self._layers:
            self._layers = [_empty_layer(layer.keys, len(prompts), capacity) for layer in cache.layers]
        for layer, filled in zip(self._layers, cache.layers, strict=True):
            layer.keys[group.start : group.stop, :, :longest] = filled.keys
            layer.values[group.start : group.stop, :, :longest] = filled.values
        logits: torch.Tensor = output.logits[torch.arange(len(group), device=self._device), place_of_end]
        return logits

    @torch.inference_mode()
    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens to every row and give the logits after each of them.

        Args:
            tokens: shape (rows, tokens); a row with fewer is padded on the right with any token.

        Returns:
            Logits of shape (rows, tokens, vocabulary).
        """
        tokens = tokens.to(self._device)
        positions = self._lengths[:, None] + torch.arange(tokens.shape[1], device=self._device)
        view = min(_round_up(int(positions.max()) + 1, _BLOCK_POSITIONS), self._layers[0].keys.shape[2])
        rows = torch.arange(len(tokens), device=self._device)[:, None].expand_as(positions)
        for layer in self._layers:
            layer.rows, layer.positions, layer.view = rows, positions, view
        output = self._model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks(positions, view),
            past_key_values=Cache(layers=self._layers),
            use_cache=True,
        )
        self._lengths = self._lengths + tokens.shape[1]
        logits: torch.Tensor = output.logits
        return logits

    def step(self, tokens: torch.Tensor) -> None:
        """Append one token per row (shape (rows,)); `logits` become those after it."""
        self.logits = self.extend(tokens[:, None])[:, -1]

    @torch.inference_mode()
    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows (indices, in the order given) only."""
        rows = rows.to(self._device)
        self._lengths, self.logits = self._lengths[rows], self.logits[rows]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

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


def _empty_layer(like: torch.Tensor, num_rows: int, capacity: int) -> _RowLayer:
    shape = (num_rows, like.shape[1], capacity, like.shape[3])
    return _RowLayer(like.new_zeros(shape), like.new_zeros(shape))  # zeros: masked positions must not hold NaN


def _groups(prompts: Sequence[Sequence[int]], prefill_tokens: int) -> list[range]:
    """Neighbouring rows whose padded tokens fit `prefill_tokens`."""
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
