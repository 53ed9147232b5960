"""Trains a reranker to score the passage that answers a query above the query's other hits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ragtune_ray.models import late_interaction
from ragtune_ray.models.token_batches import batches_by_length, max_tokens_of
from ragtune_ray.schema import RerankerExample
from ragtune_ray.training.objectives.contrastive import MRR_DEPTH
from ragtune_ray.training.objectives.sft import VALIDATION_TOKENS, Piece, on_device

FIRST_STAGE_WEIGHTS = (128.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0)
"""Validation chooses the best of these; of equal ones, the first. With 128, the reranker only breaks near ties."""


class Reranking(nn.Module):
    """Cross-entropy of each query's positive among its own passages.

    `model` is a late-interaction model of sentence-transformers, or a cross-encoder with one label; `micro_batch_tokens` is the
    number of padded tokens per forward pass, without those of the queries of a late-interaction model.
    """

    def __init__(self, model: nn.Module, micro_batch_tokens: int = 2048) -> None:
        super().__init__()
        self.model = model
        self._micro_batch_tokens = micro_batch_tokens
        self._is_late = late_interaction.is_late_interaction(model)

    def weight(self, rows: Sequence[RerankerExample]) -> float:
        """Number of queries: the loss of a step is a mean over them."""
        return float(len(rows))

    def pieces(self, rows: Sequence[RerankerExample]) -> Iterator[Piece]:
        """The rows in micro-batches of similar length; a row is never divided.

        Besides the model's inputs, a piece has `owner` and `place` (num_pairs,): the row of a pair, and its place in the row.
        """
        encoded = [self._encoded([(row.query, text) for text in row.passages]) for row in rows]
        tokens = np.array([len(row) * max(map(len, row)) for row in (each["input_ids"] for each in encoded)])
        for numbers in batches_by_length(tokens, self._micro_batch_tokens):
            chosen = [encoded[number] for number in numbers]
            merged = {name: [ids for each in chosen for ids in each[name]] for name in chosen[0]}
            sizes = [len(each["input_ids"]) for each in chosen]
            yield {
                **self._padded(merged),
                "owner": torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)]),
                "place": torch.tensor([place for size in sizes for place in range(size)]),
            }

    def forward(self, piece: Piece) -> Tensor:
        """The loss of a piece, summed over its rows."""
        owner, place = piece["owner"], piece["place"]
        scores = self._scores(piece)
        lists = scores.new_full((int(owner.max()) + 1, int(place.max()) + 1), -torch.inf)
        lists[owner, place] = scores
        return -lists.log_softmax(dim=1)[:, 0].sum()

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The score of each pair of query and passage, float32 (num_pairs,)."""
        encoded = self._encoded(pairs)
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        scores = np.empty(len(pairs), dtype=np.float32)
        for rows in batches_by_length(lengths, VALIDATION_TOKENS):
            batch = self._padded({name: [ids[row] for row in rows] for name, ids in encoded.items()})
            scores[rows] = self._scores(on_device(self, batch)).cpu().numpy()
        return scores

    def validate(self, rows: Sequence[RerankerExample]) -> dict[str, float]:
        """`MRR@10` of the positives among each query's hits, and `score`, the same; `first_stage_weight` is the best one."""
        scores = self.score([(row.query, text) for row in rows for text in row.passages])
        lists = np.split(scores, np.cumsum([len(row.passages) for row in rows])[:-1])
        first = [np.array(row.first_scores) for row in rows]
        found = {weight: mean_reciprocal_rank(lists, first, weight) for weight in FIRST_STAGE_WEIGHTS}
        best = max(found, key=lambda weight: found[weight])
        return {"MRR@10": found[best], "first_stage_weight": best, "score": found[best]}

    def _scores(self, piece: Piece) -> Tensor:
        features = {name: value for name, value in piece.items() if name not in ("owner", "place")}
        if self._is_late:
            return late_interaction.pair_scores(self.model, features)
        return cast(Tensor, cast(Any, self.model)(features)["scores"])[:, 0].float()

    def _encoded(self, pairs: Sequence[tuple[str, str]]) -> dict[str, list[list[int]]]:
        """Token ids and the like of each pair, truncated as in sentence-transformers."""
        model: Any = self.model
        if self._is_late:
            return late_interaction.encode_pairs(model, pairs)
        queries, passages = map(list, zip(*pairs, strict=True))
        return dict(model.tokenizer(queries, passages, truncation=True, max_length=max_tokens_of(model)))

    def _padded(self, encoded: dict[str, list[list[int]]]) -> Piece:
        if self._is_late:
            return late_interaction.pad_pairs(self.model, encoded)
        return dict(cast(Any, self.model).tokenizer.pad(encoded, padding=True, return_tensors="pt"))


def mean_reciprocal_rank(lists: Sequence[np.ndarray], first: Sequence[np.ndarray], weight: float) -> float:
    """MRR@10 of the first entry of each list by its score plus `weight` times its entry of `first`; ties rank before it.

    >>> mean_reciprocal_rank([np.array([1.0, 3.0]), np.array([2.0, 1.0])], [np.array([1.0, 0.5]), np.array([1.0, 0.9])], 0.0)
    0.75
    """
    total = 0.0
    for scores, others in zip(lists, first, strict=True):
        blended = scores + weight * others
        rank = int((~(blended < blended[0])).sum())  # also counts NaN; the positive counts itself
        total += 1 / rank if rank <= MRR_DEPTH else 0.0
    return total / len(lists)
