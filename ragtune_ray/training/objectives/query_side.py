"""Trains only the encoder of queries, against the fixed passage vectors of the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ragtune_ray.schema import RetrieverExample
from ragtune_ray.training.objectives.contrastive import (
    EncoderObjective,
    contrast,
    cosines,
    document_number,
    listwise_divergence,
)
from ragtune_ray.training.objectives.sft import VALIDATION_TOKENS, Piece


class QuerySide(EncoderObjective):
    """InfoNCE of each query against stored vectors; the encoder of passages and the index stay unchanged.

    If a teacher scored the rows, the loss is the KL from its distribution, plus a weighted contrastive term. `pool` has the
    vector of every passage that queries are contrasted with, by id; the other arguments are those of `Distillation`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        pool: dict[str, np.ndarray],
        teacher_temperature: float = 0.3,
        contrastive_weight: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(encoder, **options)
        self._teacher_temperature, self._contrastive_weight = teacher_temperature, contrastive_weight
        self._places = {name: number for number, name in enumerate(pool)}
        self.register_buffer("_pool", torch.from_numpy(np.stack(list(pool.values()))).float(), persistent=False)
        self.register_buffer("_documents", torch.tensor([document_number(name) for name in pool]), persistent=False)

    def texts(self, rows: Sequence[RetrieverExample]) -> tuple[list[str], list[str]]:
        """The queries only."""
        return [self._query_prefix + row.query for row in rows], []

    def batch_columns(self, rows: Sequence[RetrieverExample]) -> Piece:
        """Adds `stored` (num_passages,): the place of each passage in the pool."""
        stored = torch.tensor([self._places[name] for row in rows for name in row.passage_ids])
        return super().batch_columns(rows) | {"stored": stored}

    def loss(self, queries: Tensor, passages: Tensor, columns: Piece) -> Tensor:
        """Cross-entropy of each positive among the pool, or mostly KL from a teacher's distribution.

        As in `Contrastive`, other passages of the positive's document are left out.
        """
        del passages
        pool, documents, stored = cast(Tensor, self._pool), cast(Tensor, self._documents), columns["stored"]
        positive = stored[columns["place"] == 0]
        left_out = documents == documents[positive].unsqueeze(1)
        contrasted = contrast(cosines(queries, pool) / self._temperature, positive, left_out)
        if columns["taught"].isnan().any():
            return contrasted
        student = (queries[columns["owner"]] * pool[stored]).sum(dim=1)
        divergence = listwise_divergence(student / self._temperature, columns, self._teacher_temperature)
        return divergence + self._contrastive_weight * contrasted

    def collate(self, query: str, passage_ids: Sequence[str]) -> Piece:
        """The input of `log_probabilities`: a query's tokens, and as `stored` (num_passages,) places in the pool."""
        (tokens,) = self._chunks([self._query_prefix + query], VALIDATION_TOKENS)
        return {**tokens, "stored": torch.tensor([self._places[name] for name in passage_ids])}

    def log_probabilities(self, piece: Piece) -> Tensor:
        """The log-softmax of the passages' cosines with the query over the temperature: (num_passages,)."""
        (scores,) = cosines(self._embed(piece), cast(Tensor, self._pool)[piece["stored"]])
        return functional.log_softmax(scores / self._temperature, dim=0)

    def passage_pool(self, rows: Sequence[RetrieverExample]) -> tuple[list[str], Tensor]:
        """The ids of the rows' passages, and their stored vectors."""
        names = list(dict.fromkeys(name for row in rows for name in row.passage_ids))
        return names, cast(Tensor, self._pool)[[self._places[name] for name in names]]
