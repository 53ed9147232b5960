"""Trains the encoder of queries and passages, by contrast or from a teacher's scores."""

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
from ragtune_ray.training.objectives.sft import VALIDATION_TOKENS, Piece, most_of_workers, on_device

PADDING = -1
"""Fills the rows of a worker that has fewer passages than another."""
MRR_DEPTH = 10


class EncoderObjective(nn.Module):
    """Base of the encoder's objectives: encodes each distinct text of a step once, in chunks if there are many.

    Args:
        encoder: a sentence-transformers model.
        temperature: divides cosines.
        query_prefix: prepended to queries.
        passage_prefix: prepended to passages.
        chunk_tokens: padded tokens to encode at once with gradient. A larger step is encoded twice, in chunks, so that
            memory does not grow with the step (GradCache, Gao et al. 2021); the gradient is the same.
    """

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
        """The queries, one per row, and the passages to encode with gradient, row after row."""
        queries = [self._query_prefix + row.query for row in rows]
        return queries, [self._passage_prefix + text for row in rows for text in row.passages]

    def loss(self, queries: Tensor, passages: Tensor, columns: Piece) -> Tensor:
        """The summed loss of this worker's rows, from unit vectors (num_rows or num_passages, dimension)."""
        raise NotImplementedError

    def weight(self, rows: Sequence[RetrieverExample]) -> float:
        """Number of queries: the loss of a step is a mean over them."""
        return float(len(rows))

    def pieces(self, rows: Sequence[RetrieverExample]) -> Iterator[Piece]:
        """The rows as one piece, or a piece per chunk of texts with the gradient of their vectors."""
        queries, passages = self.texts(rows)
        columns, chunks = self.batch_columns(rows), self._chunks([*queries, *passages], self._chunk_tokens)
        # All workers take the same path, since the loss gathers vectors of all of them.
        if most_of_workers(len(chunks), next(self.encoder.parameters()).device) == 1:
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
            # The gradient of the loss is divided among the pieces; the first has its value.
            yield chunk | {"gradient": gradient[chunk["rows"].to(gradient.device)], "value": value}
            value = torch.zeros_like(value)

    def forward(self, piece: Piece) -> Tensor:
        """The loss of a piece, summed over its rows."""
        embedded = self._embed(piece)
        if "gradient" in piece:
            surrogate = (embedded * piece["gradient"]).sum()
            return surrogate - surrogate.detach() + piece["value"]
        return self._loss_of_texts(self._assembled([piece], [embedded]), piece)

    def batch_columns(self, rows: Sequence[RetrieverExample]) -> Piece:
        """Describe the vectors of a batch.

        `queries` (num_rows,) and `passages` (num_passages,): places among the distinct texts; `owner` and `place`
        (num_passages,): the passage's row, and its place in it, 0 for the positive; `document` (num_passages,): a number
        per document; `taught` (num_passages,): the teacher's scores, NaN if there are none.
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
        """The distinct texts in batches of similar length; `rows` (num_texts,) are their places."""
        ids = token_ids(self.encoder, list(dict.fromkeys(texts)))
        lengths = np.array([len(row) for row in ids])
        return [
            {**padded_tokens(self.encoder, [ids[row] for row in batch]), "rows": torch.from_numpy(batch)}
            for batch in batches_by_length(lengths, chunk_tokens)
        ]

    def _embed(self, piece: Piece) -> Tensor:
        """Unit vectors of a chunk's texts, (num_texts, dimension) float32."""
        features = {name: piece[name] for name in ("input_ids", "attention_mask")}
        return functional.normalize(cast(Any, self.encoder)(features)["sentence_embedding"].float(), dim=1)

    def _embedded(self, chunks: Sequence[Piece]) -> Tensor:
        """The vectors of the distinct texts, in their order."""
        return self._assembled(chunks, [self._embed(on_device(self, chunk)) for chunk in chunks])

    def _assembled(self, chunks: Sequence[Piece], embedded: Sequence[Tensor]) -> Tensor:
        """The chunks' vectors in the order of the distinct texts."""
        order = torch.cat([chunk["rows"] for chunk in chunks]).to(embedded[0].device)
        return torch.cat(list(embedded))[order.argsort()]

    @torch.no_grad()
    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (num_texts, dimension) of texts that include their prefix."""
        places = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        return self._embedded(self._chunks(texts, VALIDATION_TOKENS))[[places[text] for text in texts]]

    def passage_pool(self, rows: Sequence[RetrieverExample]) -> tuple[list[str], Tensor]:
        """The ids of the passages that validation ranks, and their vectors."""
        texts = {name: text for row in rows for name, text in zip(row.passage_ids, row.passages, strict=True)}
        return list(texts), self.vectors([self._passage_prefix + text for text in texts.values()])

    @torch.no_grad()
    def validate(self, rows: Sequence[RetrieverExample]) -> dict[str, float]:
        """`MRR@10` of the positives among the passages of all rows, and `score`, the same.

        Ties rank before the positive, so an encoder that maps all texts to one vector ranks it last.
        """
        names, pool = self.passage_pool(rows)
        numbers = {name: number for number, name in enumerate(names)}
        positive = torch.tensor([numbers[row.passage_ids[0]] for row in rows], device=pool.device)
        scores = cosines(self.vectors([self._query_prefix + row.query for row in rows]), pool)
        # "Not below" instead of ">=", so that NaN also ranks before the positive. The positive counts itself.
        rank = (~(scores < scores.gather(1, positive.unsqueeze(1)))).sum(dim=1)
        reciprocal = torch.where(rank <= MRR_DEPTH, 1 / rank, 0.0).mean()
        return {f"MRR@{MRR_DEPTH}": float(reciprocal), "score": float(reciprocal)}


class Contrastive(EncoderObjective):
    """InfoNCE of each query against every passage of the step, including those of other workers."""

    def loss(self, queries: Tensor, passages: Tensor, columns: Piece) -> Tensor:
        """Cross-entropy of each row's positive among the passages of all workers.

        Other passages of the positive's document are left out, because the document answers the query.
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
    """Listwise KL from a teacher's distribution over the query's own passages, plus a weighted contrastive term.

    A row whose passages all have the same teacher score has no KL term. `teacher_temperature` divides the teacher's scores; the
    other arguments are those of `EncoderObjective`.
    """

    def __init__(
        self, encoder: nn.Module, *, teacher_temperature: float, contrastive_weight: float, **options: Any
    ) -> None:
        super().__init__(encoder, **options)
        self._teacher_temperature = teacher_temperature
        self._contrastive_weight = contrastive_weight

    def loss(self, queries: Tensor, passages: Tensor, columns: Piece) -> Tensor:
        """KL from the teacher's distribution, plus the weighted contrastive term."""
        student = (queries[columns["owner"]] * passages).sum(dim=1)
        divergence = listwise_divergence(student / self._temperature, columns, self._teacher_temperature)
        if not self._contrastive_weight:
            return divergence
        return divergence + self._contrastive_weight * super().loss(queries, passages, columns)


def cosines(queries: Tensor, passages: Tensor) -> Tensor:
    """Products of unit vectors in float32, even under `autocast`: (num_queries, num_passages).

    bfloat16 rounds cosines to steps of 0.004, which is too coarse at a temperature of 0.05.
    """
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ passages.float().T


def contrast(logits: Tensor, positive: Tensor, left_out: Tensor) -> Tensor:
    """Summed cross-entropy of each row's positive against the passages that are not left out.

    `positive` (num_rows,) is its place in the row of `logits`; it is never left out.
    """
    shown = ~left_out
    shown[torch.arange(len(positive), device=positive.device), positive] = True
    return functional.cross_entropy(logits.masked_fill(~shown, -torch.inf), positive, reduction="sum")


def listwise_divergence(student: Tensor, columns: Piece, teacher_temperature: float) -> Tensor:
    """Summed KL(teacher || student) over each query's own passages.

    `student` (num_passages,) are scores divided by the student's temperature; `columns` are from `batch_columns`.
    """
    owner, place = columns["owner"], columns["place"]
    shape = (int(owner.max()) + 1, int(place.max()) + 1)
    # Both (num_queries, max_passages_per_query), padded with -inf.
    learner = student.new_full(shape, -torch.inf)
    learner[owner, place] = student
    teacher = student.new_full(shape, -torch.inf)
    teacher[owner, place] = columns["taught"].to(teacher.dtype) / teacher_temperature
    shown = torch.isfinite(teacher)
    difference = torch.where(shown, teacher.log_softmax(dim=1) - learner.log_softmax(dim=1), 0.0)
    terms = teacher.softmax(dim=1) * difference
    lowest = teacher.masked_fill(~shown, torch.inf).amin(dim=1)
    is_informative = teacher.amax(dim=1) > lowest
    return (terms.sum(dim=1) * is_informative).sum()


def document_number(passage_id: str) -> int:
    """A non-negative number that identifies the document of a passage, the same on every worker."""
    return int.from_bytes(hashlib.blake2b(document_id_of(passage_id).encode(), digest_size=8).digest(), "big") >> 1


def _gathered(local: Tensor) -> tuple[Tensor, int]:
    """The rows of all workers, padded to equal numbers, and the place of this worker's first row.

    Gradients of other workers' losses flow back into this worker's rows.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return local, 0
    from torch.distributed.nn.functional import all_gather

    size = most_of_workers(len(local), local.device)
    padding = local.new_full((size - len(local), *local.shape[1:]), PADDING)
    padded = torch.cat([local, padding]).contiguous()
    if local.requires_grad:
        parts = all_gather(padded)  # type: ignore[no-untyped-call]  # torch has no types for it
    else:
        parts = [torch.empty_like(padded) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, padded)
    return torch.cat(list(parts)), size * torch.distributed.get_rank()
