"""Logits -> the next token of every row; what a row was asked and what it has generated so far.

In: logits and rows. Out: tokens. This module knows nothing of models, tokenizers or batches.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ragtune_ray.generation.interface import Completion

__all__ = ["Row", "choose_tokens", "row_seed"]


@dataclass(slots=True)
class Row:
    """One prompt on its way to an answer."""

    index: int
    """Its place among the prompts of one call."""
    ids: list[int]
    """Token ids of the rendered prompt."""
    room: int
    """Most tokens it may still generate: `max_new_tokens`, or what the model's context leaves."""
    seed: int = 0
    """Its own, so that a sampled answer does not depend on the neighbours."""
    temperature: float = 0.0
    """0 is greedy."""
    stop: Sequence[str] = ()
    """Texts at which the answer ends."""
    generated: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    """None while it goes on."""
    text: str = ""
    """Settled so far."""
    source: torch.Generator | None = None
    """The state of its random numbers, once the first was drawn."""
    log_probability: float = 0.0
    """Of all tokens chosen so far, the one that ends the answer included; before any temperature."""
    num_chosen: int = 0
    """How many those are."""

    @property
    def confidence(self) -> float:
        """The geometric mean of the probabilities of its tokens, 0 to 1."""
        return math.exp(self.log_probability / max(1, self.num_chosen))

    def completion(self, seconds: float) -> Completion:
        """What was made of it, in so many seconds."""
        return Completion(
            self.text,
            len(self.ids),
            len(self.generated),
            seconds,
            self.finish or "length",
            "",
            self.confidence,
            self.log_probability,
        )


def choose_tokens(logits: torch.Tensor, rows: Sequence[Row]) -> list[int | None]:
    """The next token of each row: the likeliest, or drawn at the row's temperature from the row's own random numbers.

    Each row is told how likely its token was.

    >>> choose_tokens(torch.tensor([[0.0, 2.0, 1.0], [float("nan"), 0.0, 0.0]]), [Row(0, [1], 5), Row(1, [1], 5)])
    [1, None]

    Args:
        logits: shape (rows, vocabulary).
        rows: in the same order.

    Returns:
        Token ids; None where the logits hold something that is not a number, or nothing but -inf.
    """
    best = logits.argmax(-1)
    usable: list[bool] = logits.gather(-1, best[:, None])[:, 0].isfinite().tolist()  # argmax takes NaN for the largest
    tokens: list[int | None] = [token if good else None for token, good in zip(best.tolist(), usable, strict=True)]
    for place, row in enumerate(rows):
        if row.temperature > 0 and usable[place]:
            drawn = _draw(logits[place], row, int(best[place]))
            tokens[place] = best[place] = drawn
    wide = logits.float()
    likelihoods = (wide.gather(-1, best[:, None])[:, 0] - wide.logsumexp(-1)).tolist()
    for row, likelihood, good in zip(rows, likelihoods, usable, strict=True):
        if good:
            row.log_probability += likelihood
            row.num_chosen += 1
    return tokens


def row_seed(seed: int, ids: Sequence[int]) -> int:
    """The same prompt samples the same answer under the same seed, alone or in a batch."""
    return zlib.crc32(repr((seed, list(ids))).encode())  # 32 bits: torch ignores the others on CPUs


def _draw(logits: torch.Tensor, row: Row, best: int) -> int:
    if row.source is None:
        row.source = torch.Generator().manual_seed(row.seed)
    chances = torch.softmax(logits.float() / row.temperature, -1).cpu()
    if not chances.isfinite().all():  # divided by next to nothing: all chance is with the likeliest
        return best
    return int(torch.multinomial(chances, 1, generator=row.source))
