"""What an encoder of queries alone learns from: the vectors that the index holds, which stay. See `encoder_objectives`.

In: a sentence-transformers model, stored vectors and retriever examples. Out: tensors to run, the loss of each, and MRR@10 of
validation examples. This module knows nothing of optimisers, files or Ray.
"""

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

__all__ = ["QuerySide"]


class QuerySide(EncoderObjective):
    """InfoNCE of each query against stored vectors: the passages' encoder, and so the index, stays as it is.

    Of rows with a teacher's scores its distribution over their own passages is learnt, plus a small contrastive term.

    Args:
        encoder: a sentence-transformers model, which becomes the encoder of queries.
        pool: passage_id -> vector of everything that queries are contrasted with.
        temperature: divides cosines.
        teacher_temperature: divides the teacher's scores.
        contrastive_weight: of the contrastive term beside a teacher's.
        query_prefix: put before queries.
        chunk_tokens: as for `Contrastive`.
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
        """The queries alone."""
        return [self._query_prefix + row.query for row in rows], []

    def columns(self, rows: Sequence[RetrieverExample]) -> Piece:
        """As for every encoder, and `stored` (num_passages,): the place of each passage in the pool."""
        stored = torch.tensor([self._places[name] for row in rows for name in row.passage_ids])
        return super().columns(rows) | {"stored": stored}

    def loss(self, queries: Tensor, passages: Tensor, columns: Piece) -> Tensor:
        """Cross-entropy of each positive in the pool; where a teacher scored, mostly KL from its distribution.

        As in `Contrastive`, what else the pool holds of the positive's document is left out.
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

    def asked(self, query: str, passage_ids: Sequence[str]) -> Piece:
        """A query's tokens, and as `stored` (num_passages,) the places of passages in the pool: what `log_shares` takes."""
        (tokens,) = self._chunks([self._query_prefix + query], VALIDATION_TOKENS)
        return {**tokens, "stored": torch.tensor([self._places[name] for name in passage_ids])}

    def log_shares(self, piece: Piece) -> Tensor:
        """How likely each passage is for the query, log of the softmax of the cosines over the temperature: (num_passages,)."""
        (shown,) = cosines(self._embed(piece), cast(Tensor, self._pool)[piece["stored"]])
        return functional.log_softmax(shown / self._temperature, dim=0)

    def passage_pool(self, rows: Sequence[RetrieverExample]) -> tuple[list[str], Tensor]:
        """The stored vectors of the rows' passages."""
        names = list(dict.fromkeys(name for row in rows for name in row.passage_ids))
        return names, cast(Tensor, self._pool)[[self._places[name] for name in names]]
