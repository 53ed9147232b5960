"""Computes a beginning that prompts share once.

For training and likelihoods, prompts with a common beginning are packed into one row, for example those of several questions
about the same passages. A prompt's own tokens attend to the shared beginning and to each other, so the logits are those of an
unpacked prompt (Wang and Hegde 2024, Accelerating Direct Preference Optimization with Prefix Sharing).

For decoding, `PrefixCache` keeps the keys and values of beginnings. A beginning is computed by itself, and what follows it in a
pass of its own, whether the beginning was in the cache or not. So a prompt has the same numbers in every batch and at any time.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragtune_ray.models.packing import ContinuedCache, PackedAttention
from ragtune_ray.models.token_batches import batches_by_length

IGNORED = -100
"""The label of tokens that do not count in the loss, as in torch's cross-entropy."""
OWN_TOKENS = 512
"""Most tokens of a group without its shared beginning: attention computes all their pairs, though most are masked."""
_FEWEST_TOKENS = 32  # a shorter beginning saves less than a second pass over the layers costs
_PASS_TOKENS = 256  # a pass costs what this many tokens cost, so a batch with more padding is better divided
_PADDING, _SHARED = -1, 0
"""Segments of padding and of the shared beginning; the own tokens of the prompts have segments from 1 on."""

TokenIds = Sequence[int]
States = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, of shape (1, heads, tokens, head size)."""


def supports_sharing(model: Any) -> bool:
    """Whether an attention mask alone decides what a transformers model sees: no state and no sliding window."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.config.get_text_config(decoder=True)
    layers = getattr(text, "layer_types", None) or ()
    return (
        bool(getattr(base, "_supports_attention_backend", False))
        and not getattr(base, "_is_stateful", False)
        and not getattr(text, "sliding_window", None)
        and set(layers) <= {"full_attention"}
    )


def batches(
    model: Any, prompts: Sequence[TokenIds], answers: Sequence[TokenIds], batch_tokens: int
) -> Iterator[list[list[int]]]:
    """Yield batches of groups of similar length; if the model does not support sharing, a group is one prompt.

    A padded batch has at most `batch_tokens` tokens, unless it is a single longer group.
    """
    found = (
        groups(prompts, answers, batch_tokens) if supports_sharing(model) else [[row] for row in range(len(prompts))]
    )
    lengths = [num_tokens([prompts[row] for row in group], [answers[row] for row in group]) for group in found]
    for batch in batches_by_length(np.array(lengths), batch_tokens, _PASS_TOKENS):
        yield [found[number] for number in batch]


def groups(prompts: Sequence[TokenIds], answers: Sequence[TokenIds], longest: int) -> list[list[int]]:
    """Group the indices of prompts that share at least their first half; a group of several has at most `longest` tokens.

    >>> groups([[1, 2, 3], [7, 8], [1, 2, 4]], [[5], [5], [5]], 100)
    [[0, 2], [1]]
    """
    found: list[list[int]] = []
    for number in sorted(range(len(prompts)), key=lambda row: list(prompts[row])):
        if found:
            joined = [*found[-1], number]
            shared = _num_shared([prompts[row] for row in joined])
            total = _total([prompts[row] for row in joined], [answers[row] for row in joined], shared)
            half = all(2 * shared >= len(prompts[row]) for row in joined)
            if half and total - shared <= OWN_TOKENS and total <= longest:
                found[-1] = joined
                continue
        found.append([number])
    return found


def num_tokens(prompts: Sequence[TokenIds], answers: Sequence[TokenIds]) -> int:
    """Number of tokens of a group in one row.

    >>> num_tokens([[1, 2, 3], [1, 2, 4]], [[5, 6], [5]])
    5
    """
    return _total(prompts, answers, _num_shared(prompts))


def _total(prompts: Sequence[TokenIds], answers: Sequence[TokenIds], shared: int) -> int:
    # The last token of an answer is predicted but predicts nothing, so it is not read.
    return shared + sum(len(prompt) - shared + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True))


def _num_shared(prompts: Sequence[TokenIds]) -> int:
    """Length of the common beginning, without any prompt's last token, whose logits predict that prompt's answer."""
    if len(prompts) == 1:
        return 0
    return num_common(*(prompt[:-1] for prompt in prompts))


def collate(
    prompts: Sequence[TokenIds], answers: Sequence[TokenIds], rows: Sequence[Sequence[int]], pad_token: int
) -> dict[str, Tensor]:
    """Groups as tensors of shape (num_groups, longest), one row each, padded on the left.

    - `input_ids`
    - `position_ids`: each token's position in its own prompt.
    - `segments`: which of the group's prompts a token belongs to, from 1; 0: all of them; -1: padding.
    - `attention_mask`: 0 for padding, else 1.
    - `labels`: the next token of an answer, or IGNORED. Tokens with a label come last in a row, so that logits of the
      last few suffice; `mask`, not their order, decides which tokens see each other.

    An answer has at least one token; `rows` are as `groups` returns them.
    """
    packed = [_packed([prompts[row] for row in group], [answers[row] for row in group]) for group in rows]
    width = max(len(places) for places in packed)
    names = {"input_ids": pad_token, "position_ids": 0, "segments": _PADDING, "labels": IGNORED}
    tensors = {name: torch.full((len(packed), width), filling) for name, filling in names.items()}
    for number, places in enumerate(packed):
        for name, column in zip(names, zip(*places, strict=True), strict=True):
            tensors[name][number, -len(places) :] = torch.tensor(column)
    return tensors | {"attention_mask": (tensors["segments"] != _PADDING).long()}


def _packed(prompts: Sequence[TokenIds], answers: Sequence[TokenIds]) -> list[tuple[int, int, int, int]]:
    """The (token, position, segment, label) of each token of a group, those with a label last."""
    shared = _num_shared(prompts)
    places = [(token, position, _SHARED, IGNORED) for position, token in enumerate(prompts[0][:shared])]
    for segment, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        read = [*prompt, *answer[:-1]]
        labels = [*([IGNORED] * (len(prompt) - 1)), *answer]
        places += [(read[place], place, segment, labels[place]) for place in range(shared, len(read))]
    return sorted(places, key=lambda place: place[-1] != IGNORED)  # a stable sort


def logits(model: Any, piece: dict[str, Tensor]) -> Tensor:
    """Logits of the last positions of each row, enough for all labels: (num_rows, num_kept, vocabulary).

    The projection to the vocabulary is the largest matrix of a small model, so only labelled positions go through it. `piece`
    is from `collate`, on the model's device; if the model does not support sharing, each of its rows must be one prompt.
    """
    kept = int((piece["labels"] != IGNORED).sum(dim=1).max())
    shown = piece["attention_mask"]
    if bool((piece["segments"] > 1).any()):
        seen = mask(piece["segments"], piece["position_ids"]).unsqueeze(1)
        dtype = next(model.parameters()).dtype
        # Added to the attention scores. For rows of one prompt the model's own causal mask is the same.
        shown = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    found: Tensor = model(
        input_ids=piece["input_ids"],
        attention_mask=shown,
        position_ids=piece["position_ids"],
        logits_to_keep=kept,
        use_cache=False,
    ).logits
    return found[:, -kept:]


def mask(segments: Tensor, position_ids: Tensor) -> Tensor:
    """Which tokens (third axis) each token (second axis) attends to: bool (num_groups, longest, longest).

    A token sees the tokens before it in its own prompt, including the shared beginning. Padding sees itself, because
    attention over nothing is NaN.
    """
    seeing, seen = segments.unsqueeze(2), segments.unsqueeze(1)
    own = (seen == seeing) | ((seen == _SHARED) & (seeing != _PADDING))
    before = position_ids.unsqueeze(1) <= position_ids.unsqueeze(2)
    itself = torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return (own & before & (seen != _PADDING)) | itself


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


def num_common(*sequences: Sequence[int]) -> int:
    """Number of equal elements at the beginning of all sequences.

    >>> num_common([1, 2, 3], [1, 2, 4, 3])
    2
    """
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda elements: len(set(elements)) == 1, columns))
