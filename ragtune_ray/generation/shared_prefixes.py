"""Prompts that begin alike, read once: several questions about the same passages as one row of tokens.

In: token ids of prompts and of the answers that follow them. Out: tensors in which a beginning that several prompts share stands
once, and each own rest sees it and itself alone; and what a causal language model makes of them. Every token's logits are
what they would be in a row of its own (as in Wang and Hegde 2024, Accelerating Direct Preference Optimization with Prefix
Sharing). This module knows nothing of losses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragtune_ray.models.token_batches import batches_by_length

__all__ = ["IGNORED", "batches", "collate", "groups", "logits", "mask", "num_tokens", "suits"]

IGNORED = -100
"""A label that costs nothing, as torch's cross-entropy has it."""
OWN_TOKENS = 512
"""Most tokens of a group beside its shared beginning: each is weighed against every other, though most may not see each other."""
_PADDING, _SHARED = -1, 0
"""Segments of a token; a prompt's own rest has one from 1 on."""

TokenIds = Sequence[int]


def suits(model: Any) -> bool:
    """Whether a model of transformers sees what an attention mask shows it and no more: no state, no sliding window."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(base.config, "layer_types", None) or ()
    return (
        bool(getattr(base, "_supports_attention_backend", False))
        and not getattr(base, "_is_stateful", False)
        and not getattr(base.config, "sliding_window", None)
        and set(layers) <= {"full_attention"}
    )


def batches(
    model: Any, prompts: Sequence[TokenIds], taught: Sequence[TokenIds], batch_tokens: int
) -> Iterator[list[list[int]]]:
    """The rows as batches of groups of similar length; where the model does not suit, a group is a row.

    Args:
        model: that is to read them.
        prompts: token ids, per row.
        taught: token ids of what follows each.
        batch_tokens: of a batch when padded, at most (a single row may be longer).
    """
    found = groups(prompts, taught, batch_tokens) if suits(model) else [[row] for row in range(len(prompts))]
    lengths = [num_tokens([prompts[row] for row in group], [taught[row] for row in group]) for group in found]
    for batch in batches_by_length(np.array(lengths), batch_tokens):
        yield [found[number] for number in batch]


def groups(prompts: Sequence[TokenIds], taught: Sequence[TokenIds], longest: int) -> list[list[int]]:
    """Row numbers in groups whose prompts share at least half of their tokens, from the first on.

    >>> groups([[1, 2, 3], [7, 8], [1, 2, 4]], [[5], [5], [5]], 100)
    [[0, 2], [1]]

    Args:
        prompts: token ids, per row.
        taught: token ids of what follows each.
        longest: tokens of a group, at most, but for a group of one row.
    """
    found: list[list[int]] = []
    for number in sorted(range(len(prompts)), key=lambda row: list(prompts[row])):
        if found:
            joined = [*found[-1], number]
            shared = _num_shared([prompts[row] for row in joined])
            total = _total([prompts[row] for row in joined], [taught[row] for row in joined], shared)
            half = all(2 * shared >= len(prompts[row]) for row in joined)
            if half and total - shared <= OWN_TOKENS and total <= longest:
                found[-1] = joined
                continue
        found.append([number])
    return found


def num_tokens(prompts: Sequence[TokenIds], taught: Sequence[TokenIds]) -> int:
    """Tokens of a group in one row.

    >>> num_tokens([[1, 2, 3], [1, 2, 4]], [[5, 6], [5]])
    5
    """
    return _total(prompts, taught, _num_shared(prompts))


def _total(prompts: Sequence[TokenIds], taught: Sequence[TokenIds], shared: int) -> int:
    # The last token taught is predicted, and predicts nothing.
    return shared + sum(len(prompt) - shared + len(told) - 1 for prompt, told in zip(prompts, taught, strict=True))


def _num_shared(prompts: Sequence[TokenIds]) -> int:
    """Tokens at the beginning that all prompts share; the last of a prompt is its own, as the first answer token follows it."""
    if len(prompts) == 1:
        return 0
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def collate(
    prompts: Sequence[TokenIds], taught: Sequence[TokenIds], rows: Sequence[Sequence[int]], pad_token: int
) -> dict[str, Tensor]:
    """Groups as tensors, one row each, padded on the left: (num_groups, longest).

    `input_ids`; `position_ids`, each token's place in its own prompt; `segments`, which of the group's prompts it belongs to
    (from 1; 0 is all of them); `attention_mask`, 1 where it is no padding; `labels`, the token that should come next, or IGNORED.
    Places with a label stand last in a row, so that the last few suffice for all; what sees what is said by `mask`, not by the
    order.

    Args:
        prompts: token ids.
        taught: token ids of what follows each, at least one.
        rows: of which a group consists, such as `groups` finds.
        pad_token: where a row ends early.
    """
    packed = [_packed([prompts[row] for row in group], [taught[row] for row in group]) for group in rows]
    width = max(len(places) for places in packed)
    names = {
        "input_ids": pad_token,
        "position_ids": 0,
        "segments": _PADDING,
        "labels": IGNORED,
    }
    tensors = {name: torch.full((len(packed), width), filling) for name, filling in names.items()}
    for number, places in enumerate(packed):
        for name, column in zip(names, zip(*places, strict=True), strict=True):
            tensors[name][number, -len(places) :] = torch.tensor(column)
    return tensors | {"attention_mask": (tensors["segments"] != _PADDING).long()}


def _packed(prompts: Sequence[TokenIds], taught: Sequence[TokenIds]) -> list[tuple[int, int, int, int]]:
    """The places of a group: token, position, segment and label of each, those with a label last."""
    shared = _num_shared(prompts)
    places = [(token, position, _SHARED, IGNORED) for position, token in enumerate(prompts[0][:shared])]
    for segment, (prompt, told) in enumerate(zip(prompts, taught, strict=True), start=1):
        read = [*prompt, *told[:-1]]
        labels = [*([IGNORED] * (len(prompt) - 1)), *told]
        places += [(read[place], place, segment, labels[place]) for place in range(shared, len(read))]
    return sorted(places, key=lambda place: place[-1] != IGNORED)  # stable: the order within is kept


def logits(model: Any, piece: dict[str, Tensor]) -> Tensor:
    """A causal language model's logits at the last places of each row, as many as have a label: (num_rows, kept, vocabulary).

    The vocabulary is the widest matrix of a small model: only places that are taught go through it.

    Args:
        model: of transformers; one that `suits`, or rows of a prompt each.
        piece: from `collate`, on the model's device.
    """
    kept = int((piece["labels"] != IGNORED).sum(dim=1).max())
    shown = piece["attention_mask"]
    if bool((piece["segments"] > 1).any()):
        seen = mask(piece["segments"], piece["position_ids"]).unsqueeze(1)
        dtype = next(model.parameters()).dtype
        # What is added to the scores of attention. Without a shared beginning the model's own causal mask says the same.
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
    """Which token (third axis) each token (second axis) sees: (num_groups, longest, longest), bool.

    Those before it in its own prompt: the shared beginning, and its own rest. Padding sees itself, so that no row is empty.
    """
    seeing, seen = segments.unsqueeze(2), segments.unsqueeze(1)
    own = (seen == seeing) | ((seen == _SHARED) & (seeing != _PADDING))
    before = position_ids.unsqueeze(1) <= position_ids.unsqueeze(2)
    itself = torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return (own & before & (seen != _PADDING)) | itself
