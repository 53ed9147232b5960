"""What an encoder learns from, with its passages: contrastive and distillation. `objectives` says what all objectives share.

In: a sentence-transformers model and retriever examples. Out: tensors to run, the loss of each, and MRR@10 on validation ones.
This module knows nothing of optimisers, files or Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from ragtune_ray.models.token_batches import batches_by_length, padded_tokens, token_ids
from ragtune_ray.schema import RetrieverExample, document_id_of
from ragtune_ray.training.objectives.sft import VALIDATION_TOKENS, Piece, on_device

__all__ = [
    "Contrastive",
    "Distillation",
    "EncoderObjective",
    "contrast",
    "cosines",
    "document_number",
    "listwise_divergence",
]

PADDING = -1
"""Stands where a worker has fewer passages than another."""
MRR_DEPTH = 10


class EncoderObjective(nn.Module):
    """What the objectives of an encoder share: texts of a step are encoded once each, in chunks where they are many."""

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float,
        query_prefix: str = "",
        passage_prefix: str = "",
        chunk_tokens: int = 16_384,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self._temperature = temperature
        self._query_prefix, self._passage_prefix = query_prefix, passage_prefix
        self._chunk_tokens = chunk_tokens

    def texts(self, rows: Sequence[RetrieverExample]) -> tuple[list[str], list[str]]:
        """The queries of the rows, one per row, and the passages that are encoded with gradient, row after row."""
        queries = [self._query_prefix + row.query for row in rows]
        return queries, [self._passage_prefix + text for row in rows for text in row.passages]

    def loss(self, queries: Tensor, passages: Tensor, columns: Piece) -> Tensor:
        """The summed loss of this worker's rows.

        Args:
            queries: (num_rows, dimension) unit vectors.
            passages: (num_passages, dimension) unit vectors.
            columns: from `columns`.
        """
        raise NotImplementedError

    def weight(self, rows: Sequence[RetrieverExample]) -> float:
        """Queries: the loss of a step is their mean."""
        return float(len(rows))

    def pieces(self, rows: Sequence[RetrieverExample]) -> Iterator[Piece]:
        """The rows as one piece or, where they are larger than `chunk_tokens`, a piece per chunk of texts with its gradient."""
        queries, passages = self.texts(rows)
        columns, chunks = self.columns(rows), self._chunks([*queries, *passages], self._chunk_tokens)
        if len(chunks) == 1:
            yield columns | chunks[0]
            return
        columns = on_device(self, columns)
        with torch.no_grad():
            embedded = self._embedded(chunks)
        embedded.requires_grad_()
        loss = self._loss_of_texts(embedded, columns)
        (gradient,) = torch.autograd.grad(loss, embedded)
        value = loss.detach()
        for chunk in chunks:
            # The first piece carries the value of the whole loss, whose gradient they carry together.
            yield chunk | {"gradient": gradient[chunk["rows"].to(gradient.device)], "value": value}
            value = torch.zeros_like(value)

    def forward(self, piece: Piece) -> Tensor:
        """The loss of a piece, summed over its rows."""
        embedded = self._embed(piece)
        if "gradient" in piece:
            surrogate = (embedded * piece["gradient"]).sum()
            return surrogate - surrogate.detach() + piece["value"]
        return self._loss_of_texts(self._assembled([piece], [embedded]), piece)

    def columns(self, rows: Sequence[RetrieverExample]) -> Piece:
        """Which vector is what.

        `queries` (num_rows,) and `passages` (num_passages,): places among the distinct texts; `owner` and `place`
        (num_passages,): the row that shows the passage, and where, 0 being its positive; `document` (num_passages,): a number per
        document; `taught` (num_passages,): the teacher's scores, NaN where there are none.
        """
        queries, passages = self.texts(rows)
        places = {text: number for number, text in enumerate(dict.fromkeys([*queries, *passages]))}
        unknown = [float("nan")]
        return {
            "queries": torch.tensor([places[text] for text in queries]),
            "passages": torch.tensor([places[text] for text in passages], dtype=torch.long),
            "owner": torch.tensor([number for number, row in enumerate(rows) for _ in row.passage_ids]),
            "place": torch.tensor([place for row in rows for place in range(len(row.passage_ids))]),
            "document": torch.tensor([document_number(name) for row in rows for name in row.passage_ids]),
            "taught": torch.tensor(
                [score for row in rows for score in row.teacher_scores or unknown * len(row.passage_ids)]
            ),
        }

    def _loss_of_texts(self, embedded: Tensor, columns: Piece) -> Tensor:
        return self.loss(embedded[columns["queries"]], embedded[columns["passages"]], columns)

    def _chunks(self, texts: Sequence[str], chunk_tokens: int) -> list[Piece]:
        """The distinct texts as token tensors of similar length; `rows` says which of them they are."""
        ids = token_ids(self.encoder, list(dict.fromkeys(texts)))
        lengths = np.array([len(row) for row in ids])
        return [
            {**padded_tokens(self.encoder, [ids[row] for row in batch]), "rows": torch.from_numpy(batch)}
            for batch in batches_by_length(lengths, chunk_tokens)
        ]

    def _embed(self, piece: Piece) -> Tensor:
        """Unit vectors (num_texts, dimension) of a chunk, float32."""
        features = {name: piece[name] for name in ("input_ids", "attention_mask")}
        return functional.normalize(cast(Any, self.encoder)(features)["sentence_embedding"].float(), dim=1)

    def _embedded(self, chunks: Sequence[Piece]) -> Tensor:
        """The vectors of all chunks' texts, in their order."""
        return self._assembled(chunks, [self._embed(on_device(self, chunk)) for chunk in chunks])

    def _assembled(self, chunks: Sequence[Piece], embedded: Sequence[Tensor]) -> Tensor:
        """The vectors of all chunks in the order of the distinct texts."""
        order = torch.cat([chunk["rows"] for chunk in chunks]).to(embedded[0].device)
        return torch.cat(list(embedded))[order.argsort()]

    @torch.no_grad()
    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (num_texts, dimension) of texts that carry their prefix already."""
        places = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        return self._embedded(self._chunks(texts, VALIDATION_TOKENS))[[places[text] for text in texts]]

    def passage_pool(self, rows: Sequence[RetrieverExample]) -> tuple[list[str], Tensor]:
        """The passages that validation ranks, by id, and their vectors."""
        texts = {name: text for row in rows for name, text in zip(row.passage_ids, row.passages, strict=True)}
        return list(texts), self.vectors([self._passage_prefix + text for text in texts.values()])

    @torch.no_grad()
    def validate(self, rows: Sequence[RetrieverExample]) -> dict[str, float]:
        """`MRR@10` of the positives among the passages of all rows together, and `score`, the same.

        What scores as much as the positive stands before it: an encoder that makes one vector of all texts has found nothing.
        """
        names, pool = self.passage_pool(rows)
        numbers = {name: number for number, name in enumerate(names)}
        positive = torch.tensor([numbers[row.passage_ids[0]] for row in rows], device=pool.device)
        scores = cosines(self.vectors([self._query_prefix + row.query for row in rows]), pool)
        # Not below, rather than at least as much: of NaN neither is true, and it must not come first. The positive counts itself.
        rank = (~(scores < scores.gather(1, positive.unsqueeze(1)))).sum(dim=1)
        reciprocal = torch.where(rank <= MRR_DEPTH, 1 / rank, 0.0).mean()
        return {f"MRR@{MRR_DEPTH}": float(reciprocal), "score": float(reciprocal)}


class Contrastive(EncoderObjective):
    """InfoNCE of each query against every passage of the step, those of other workers included.

    Args:
        encoder: a sentence-transformers model.
        temperature: divides cosines.
        query_prefix: put before queries.
        passage_prefix: put before passages.
        chunk_tokens: padded tokens that are encoded with gradient at once. A larger step is encoded in chunks, twice, so
            that memory does not grow with it (GradCache, Gao et al. 2021); the gradient is the same.
    """

    def loss(self, queries: Tensor, passages: Tensor, columns: Piece) -> Tensor:
        """Cross-entropy of each row's positive among the passages of all workers.

        What else is shown of the positive's document, by this row or another, is left out: the document answers the query, so
        none of it is a negative.
        """
        everywhere, first = _gathered(passages)
        document, _ = _gathered(columns["document"])
        place = columns["place"]
        own = first + (place == 0).nonzero().squeeze(1)
        logits = cosines(queries, everywhere) / self._temperature
        left_out = document == columns["document"][place == 0].unsqueeze(1)
        left_out |= document == PADDING
        return contrast(logits, own, left_out)


class Distillation(Contrastive):
    """A teacher's distribution over the query's own passages (listwise KL), plus a small contrastive term.

    A teacher that scores all passages of a query alike says nothing about them: such a row has no KL term.

    Args:
        encoder: a sentence-transformers model.
        temperature: divides the cosines of the student.
        teacher_temperature: divides the teacher's scores.
        contrastive_weight: of the contrastive term.
        query_prefix: put before queries.
        passage_prefix: put before passages.
        chunk_tokens: as for `Contrastive`.
    """

    def __init__(
        self, encoder: nn.Module, *, teacher_temperature: float, contrastive_weight: float, **options: Any
    ) -> None:
        super().__init__(encoder, **options)
        self._teacher_temperature = teacher_temperature
        self._contrastive_weight = contrastive_weight

    def loss(self, queries: Tensor, passages: Tensor, columns: Piece) -> Tensor:
        """KL of the teacher's distribution from the student's, and the weighted contrastive term."""
        student = (queries[columns["owner"]] * passages).sum(dim=1)
        divergence = listwise_divergence(student / self._temperature, columns, self._teacher_temperature)
        if not self._contrastive_weight:
            return divergence
        return divergence + self._contrastive_weight * super().loss(queries, passages, columns)


def cosines(queries: Tensor, passages: Tensor) -> Tensor:
    """The products of unit vectors, (num_queries, num_passages) float32, whatever `autocast` has matrices multiplied in.

    In bfloat16 cosines that differ by less than 0.004 would be the same, and over a temperature of 0.05 far off.

    Args:
        queries: (num_queries, dimension).
        passages: (num_passages, dimension).
    """
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ passages.float().T


def contrast(logits: Tensor, positive: Tensor, left_out: Tensor) -> Tensor:
    """The summed cross-entropy of each row's positive against what is not left out.

    Args:
        logits: (num_rows, num_passages).
        positive: (num_rows,) its place in the row.
        left_out: (num_rows, num_passages) bool; of the positive it is not heeded.
    """
    shown = ~left_out
    shown[torch.arange(len(positive), device=positive.device), positive] = True
    return functional.cross_entropy(logits.masked_fill(~shown, -torch.inf), positive, reduction="sum")


def listwise_divergence(student: Tensor, columns: Piece, teacher_temperature: float) -> Tensor:
    """The summed KL of the teacher's distribution over each query's own passages from the student's.

    Args:
        student: (num_passages,) the student's scores, divided by its temperature.
        columns: from `columns`.
        teacher_temperature: divides the teacher's scores.
    """
    owner, place = columns["owner"], columns["place"]
    shape = (int(owner.max()) + 1, int(place.max()) + 1)
    learnt = student.new_full(shape, -torch.inf)
    learnt[owner, place] = student
    teacher = student.new_full(shape, -torch.inf)
    teacher[owner, place] = columns["taught"].to(teacher.dtype) / teacher_temperature
    shown = torch.isfinite(teacher)
    taught = teacher.softmax(dim=1)
    terms = taught * (torch.where(shown, teacher.log_softmax(dim=1) - learnt.log_softmax(dim=1), 0.0))
    lowest = teacher.masked_fill(~shown, torch.inf).amin(dim=1)
    says_something = teacher.amax(dim=1) > lowest
    return (terms.sum(dim=1) * says_something).sum()


def document_number(passage_id: str) -> int:
    """A number that stands for the document of a passage, alike on every worker; never negative."""
    return int.from_bytes(hashlib.blake2b(document_id_of(passage_id).encode(), digest_size=8).digest(), "big") >> 1


def _gathered(local: Tensor) -> tuple[Tensor, int]:
    """The rows of all workers, with gradient, and the place of this worker's first; shorter ones are padded.

    The gradient that other workers' losses have with respect to these rows flows back into them.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return local, 0
    from torch.distributed.nn.functional import all_gather

    most = torch.tensor(len(local), device=local.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    size = int(most)
    padding = local.new_full((size - len(local), *local.shape[1:]), PADDING)
    padded = torch.cat([local, padding]).contiguous()
    if local.requires_grad:
        parts = all_gather(padded)  # type: ignore[no-untyped-call]  # torch has no types for it
    else:
        parts = [torch.empty_like(padded) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, padded)
    return torch.cat(list(parts)), size * torch.distributed.get_rank()
