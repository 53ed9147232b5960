"""Groups tokenized texts into padded batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_LENGTH_MULTIPLE = 16  # rows of a CPU's matrix unit, and a divisor that GPU kernels prefer


def max_tokens_of(model: Any) -> int:
    """The longest input of a sentence-transformers model in tokens, special tokens included."""
    return int(model.max_seq_length or model.tokenizer.model_max_length)


def token_ids(model: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text for a sentence-transformers model, with special tokens, truncated to its limit."""
    return tokenized(model.tokenizer, texts, max_tokens_of(model))


def tokenized(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """The token ids of each text, with special tokens, truncated to a limit."""
    options = {"padding": False, "return_attention_mask": False, "return_token_type_ids": False}
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens, **options)
    found: list[list[int]] = encoded["input_ids"]
    return found


def padded_tokens(model: Any, rows: Sequence[Sequence[int] | np.ndarray]) -> dict[str, Any]:
    """Rows of `token_ids` as `input_ids` and `attention_mask`, padded to (num_rows, `padded_length`)."""
    import torch

    length = padded_length(max(map(len, rows)), max_tokens_of(model))
    tokenizer = model.tokenizer
    ids = np.full((len(rows), length), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        filled = slice(len(row)) if tokenizer.padding_side == "right" else slice(length - len(row), None)
        ids[number, filled], mask[number, filled] = row, 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def batches_by_length(lengths: np.ndarray, batch_tokens: int, most_padding: int | None = None) -> list[np.ndarray]:
    """Row numbers in batches of similar length, the longest first.

    >>> [batch.tolist() for batch in batches_by_length(np.array([1, 9, 8, 2]), 18)]
    [[1, 2], [3, 0]]
    >>> [batch.tolist() for batch in batches_by_length(np.array([1, 9, 8, 2]), 100, most_padding=8)]
    [[1, 2, 3], [0]]

    Args:
        lengths: tokens per row, (num_rows,).
        batch_tokens: maximum tokens of a padded batch; a single row may be longer.
        most_padding: maximum tokens of padding in a batch; None: any number.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < len(order):
        longest = int(lengths[order[first]])
        rows = order[first : first + max(1, batch_tokens // max(1, longest))]
        if most_padding is not None:
            padding = np.cumsum(longest - lengths[rows])
            rows = rows[: int(np.searchsorted(padding, most_padding, side="right"))]
        batches.append(rows)
        first += len(rows)
    return batches


def padded_length(longest: int, limit: int) -> int:
    """The length to pad a batch to: its longest text, rounded up to a multiple of 16 within the model's limit.

    Building the kernel for one shape takes a CPU as long as a prompt of several hundred tokens, so shapes should be few.

    >>> padded_length(33, 512), padded_length(509, 510), padded_length(1000, 510)
    (48, 510, 1000)
    """
    return max(longest, min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, limit))
