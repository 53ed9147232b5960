"""Chooses the next token of every row from the model's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ragtune_ray.generation.row import Row


def choose_tokens(logits: torch.Tensor, rows: Sequence[Row]) -> list[int | None]:
    """Choose the next token of each row of (rows, vocabulary): the likeliest, or a random one by the row's options and seed.

    The token's log-probability, at temperature 1 and without penalties, is added to its row.

    >>> choose_tokens(torch.tensor([[0.0, 2.0, 1.0], [float("nan"), 0.0, 0.0]]), [Row(0, [1], 5), Row(1, [1], 5)])
    [1, None]

    Returns:
        Token ids; None for a row whose logits contain NaN, or only -inf.
    """
    exact, logits = logits.float(), _penalized(logits, rows)
    best = logits.argmax(-1)
    usable: list[bool] = logits.gather(-1, best[:, None])[:, 0].isfinite().tolist()  # argmax treats NaN as the maximum
    tokens: list[int | None] = [token if good else None for token, good in zip(best.tolist(), usable, strict=True)]
    for place, row in enumerate(rows):
        if row.temperature > 0 and usable[place]:
            drawn = _draw(logits[place], row, int(best[place]))
            tokens[place] = best[place] = drawn
    log_probabilities = (exact.gather(-1, best[:, None])[:, 0] - exact.logsumexp(-1)).tolist()
    for row, log_probability, good in zip(rows, log_probabilities, usable, strict=True):
        if good:
            row.log_probability += log_probability
            row.num_chosen += 1
    return tokens


def _draw(logits: torch.Tensor, row: Row, best: int) -> int:
    if row.source is None:
        row.source = torch.Generator().manual_seed(row.seed)
    probabilities = torch.softmax(logits.float() / row.temperature, -1).cpu()
    if not probabilities.isfinite().all():  # a temperature near 0 overflows; its limit is greedy decoding
        return best
    if row.top_p < 1:
        probabilities = nucleus(probabilities, row.top_p)
    return int(torch.multinomial(probabilities, 1, generator=row.source))


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probabilities (vocabulary,) of the fewest likeliest tokens that reach `top_p`, and 0 for all others.

    At least one token stays (Holtzman et al. 2020, without their rescaling).

    >>> nucleus(torch.tensor([0.25, 0.5, 0.125, 0.125]), 0.6).tolist()
    [0.25, 0.5, 0.0, 0.0]
    """
    ordered, tokens = probabilities.sort(descending=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    kept[1:] = ordered.cumsum(-1)[:-1] < top_p
    return torch.zeros_like(probabilities).index_put_((tokens[kept],), ordered[kept])


def _penalized(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """The logits, less the penalties of the tokens that each row has generated."""
    places = [place for place, row in enumerate(rows) if row.presence_penalty or row.frequency_penalty]
    if not places:
        return logits
    logits = logits.clone()
    for place in places:
        row = rows[place]
        counts = torch.tensor(row.generated, dtype=torch.long).bincount(minlength=logits.shape[-1]).to(logits.device)
        penalties = row.presence_penalty * (counts > 0) + row.frequency_penalty * counts
        logits[place] -= penalties.to(logits.dtype)
    return logits
