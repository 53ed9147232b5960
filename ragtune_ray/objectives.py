"""What is minimised: modules that turn examples into a loss; whoever trains them needs to know nothing else.

In: a model and examples. Out: tensors to run (`pieces`), the loss of each (`forward`), and a validation score. An objective holds
its model, so that DistributedDataParallel wraps the objective itself. This module knows nothing of optimisers, files or Ray.

Every loss is a *sum*; a step divides it by the weight of the whole step, over all workers. So the gradient is the same however a
step is cut into pieces and spread over workers.

| objective | learns | loss |
|---|---|---|
| `Sft` | generator | negative log-likelihood of the answer's tokens, and of no others |
| `Contrastive` | encoder | InfoNCE (van den Oord et al. 2018) over the passages of the whole step |
| `Distillation` | encoder | KL from a teacher's ranking of the query's own passages, and a little InfoNCE |
| `QuerySide` | encoder of queries | either, over stored passage vectors, which stay (Izacard et al. 2023, section 3.4) |
| `Joint` | generator and encoder of queries | likelihood of the answer over all candidates (Lewis et al. 2020, RAG-Sequence) |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from ragtune_ray import shared_prefixes
from ragtune_ray.chat import ChatTokenizer
from ragtune_ray.encoder import batches_by_length
from ragtune_ray.schema import GeneratorExample, JointExample, RetrieverExample
from ragtune_ray.shared_prefixes import IGNORED

__all__ = ["Contrastive", "Distillation", "Joint", "Objective", "Piece", "QuerySide", "Sft", "on_device"]

Piece = dict[str, Tensor]
"""What one forward pass takes."""
PADDING = -1
"""Stands where a worker has fewer passages than another."""
MRR_DEPTH = 10
VALIDATION_TOKENS = 4096
"""Padded tokens that are encoded at once without gradient."""


class Objective(Protocol):
    """What a training loop asks of an objective, which is an `nn.Module` besides."""

    def pieces(self, rows: Sequence[Any]) -> Iterator[Piece]:
        """A worker's rows of a step as tensors for `forward`, at least one."""

    def weight(self, rows: Sequence[Any]) -> float:
        """What the summed loss of these rows is divided by."""

    def validate(self, rows: Sequence[Any]) -> dict[str, float]:
        """`score`, larger is better, and what it is made of."""


class Sft(nn.Module):
    """Supervised fine-tuning of a causal language model on answers (loss on the answer's tokens only).

    Args:
        model: as transformers loads it.
        tokenizer: its own.
        end_token: what ends an answer.
        micro_batch_tokens: padded tokens that go through the model at once.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, end_token: int, micro_batch_tokens: int = 2048) -> None:
        super().__init__()
        self.model = model
        self._chat = ChatTokenizer(tokenizer)
        self._end_token = end_token
        self._micro_batch_tokens = micro_batch_tokens
        self._pad_token = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token)

    def pieces(self, rows: Sequence[GeneratorExample]) -> Iterator[Piece]:
        """The rows in micro-batches of similar length; prompts that begin alike are read once."""
        return self._batches(rows, self._micro_batch_tokens)

    def collate(self, prompts: Sequence[str], answers: Sequence[str]) -> Piece:
        """One row of `shared_prefixes.collate` per prompt: its labels are the tokens of the answer and its end."""
        asked, taught = self._token_ids(prompts, answers)
        return shared_prefixes.collate(asked, taught, [[row] for row in range(len(asked))], self._pad_token)

    def forward(self, piece: Piece) -> Tensor:
        """The negative log-likelihood of all labels, summed."""
        return self.losses(piece).sum()

    def losses(self, piece: Piece) -> Tensor:
        """The negative log-likelihood of each row's labels, summed over them: (num_rows,)."""
        logits = shared_prefixes.logits(self.model, piece)
        labels = piece["labels"][:, -logits.shape[1] :]
        each = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return each.view(len(labels), -1).sum(dim=1)

    def weight(self, rows: Sequence[GeneratorExample]) -> float:
        """Tokens that are taught: the loss of a step is their mean."""
        return float(sum(row.num_answer_tokens for row in rows))

    @torch.no_grad()
    def validate(self, rows: Sequence[GeneratorExample]) -> dict[str, float]:
        """`loss`, the mean over the answers' tokens of all rows, and `score`, its negative."""
        total = sum(float(self(on_device(self, piece))) for piece in self._batches(rows, VALIDATION_TOKENS))
        loss = total / self.weight(rows)
        return {"loss": loss, "score": -loss}

    def _batches(self, rows: Sequence[GeneratorExample], batch_tokens: int) -> Iterator[Piece]:
        asked, taught = self._token_ids([row.prompt for row in rows], [row.answer for row in rows])
        for groups in shared_prefixes.batches(self.model, asked, taught, batch_tokens):
            yield shared_prefixes.collate(asked, taught, groups, self._pad_token)

    def _token_ids(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Those of the prompts, and of the answers with their end."""
        told = self._chat.encode([self._chat.defused(answer) for answer in answers])
        return self._chat.encode(prompts), [[*answer, self._end_token] for answer in told]


class _EncoderObjective(nn.Module):
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
        (num_passages,): the row that shows the passage, and where, 0 being its positive; `identity` (num_passages,): a number per
        passage_id; `taught` (num_passages,): the teacher's scores, NaN where there are none.
        """
        queries, passages = self.texts(rows)
        places = {text: number for number, text in enumerate(dict.fromkeys([*queries, *passages]))}
        unknown = [float("nan")]
        return {
            "queries": torch.tensor([places[text] for text in queries]),
            "passages": torch.tensor([places[text] for text in passages], dtype=torch.long),
            "owner": torch.tensor([number for number, row in enumerate(rows) for _ in row.passage_ids]),
            "place": torch.tensor([place for row in rows for place in range(len(row.passage_ids))]),
            "identity": torch.tensor([_number(name) for row in rows for name in row.passage_ids]),
            "taught": torch.tensor(
                [score for row in rows for score in row.teacher_scores or unknown * len(row.passage_ids)]
            ),
        }

    def _loss_of_texts(self, embedded: Tensor, columns: Piece) -> Tensor:
        return self.loss(embedded[columns["queries"]], embedded[columns["passages"]], columns)

    def _chunks(self, texts: Sequence[str], chunk_tokens: int) -> list[Piece]:
        """The distinct texts as token tensors of similar length; `rows` says which of them they are."""
        ids = self._token_ids(list(dict.fromkeys(texts)))
        lengths = np.array([len(row) for row in ids])
        return [self._padded(ids, batch) for batch in batches_by_length(lengths, chunk_tokens)]

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        encoder = cast(Any, self.encoder)
        longest = encoder.max_seq_length or encoder.tokenizer.model_max_length
        found = encoder.tokenizer(
            list(texts),
            truncation=True,
            max_length=int(longest),
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return cast(list[list[int]], found["input_ids"])

    def _padded(self, ids: Sequence[Sequence[int]], batch: np.ndarray) -> Piece:
        rows = [ids[number] for number in batch]
        padded = cast(Any, self.encoder).tokenizer.pad({"input_ids": rows}, padding="longest", return_tensors="pt")
        return {**padded, "rows": torch.from_numpy(batch)}

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
        """`MRR@10` of the positives among the passages of all rows together, and `score`, the same."""
        names, pool = self.passage_pool(rows)
        numbers = {name: number for number, name in enumerate(names)}
        positive = torch.tensor([numbers[row.passage_ids[0]] for row in rows], device=pool.device)
        scores = self.vectors([self._query_prefix + row.query for row in rows]) @ pool.T
        rank = (scores > scores.gather(1, positive.unsqueeze(1))).sum(dim=1) + 1
        reciprocal = torch.where(rank <= MRR_DEPTH, 1 / rank, 0.0).mean()
        return {f"MRR@{MRR_DEPTH}": float(reciprocal), "score": float(reciprocal)}


class Contrastive(_EncoderObjective):
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

        Where another row shows the row's positive it is left out: it is no negative.
        """
        everywhere, first = _gathered(passages)
        identity, _ = _gathered(columns["identity"])
        place = columns["place"]
        own = first + (place == 0).nonzero().squeeze(1)
        logits = (queries @ everywhere.T / self._temperature).float()
        same = identity.unsqueeze(0) == columns["identity"][place == 0].unsqueeze(1)
        same |= (identity == PADDING).unsqueeze(0)
        same[torch.arange(len(own), device=own.device), own] = False
        return functional.cross_entropy(logits.masked_fill(same, -torch.inf), own, reduction="sum")


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
        cosines = (queries[columns["owner"]] * passages).sum(dim=1)
        divergence = _divergence(cosines / self._temperature, columns, self._teacher_temperature)
        if not self._contrastive_weight:
            return divergence
        return divergence + self._contrastive_weight * super().loss(queries, passages, columns)


def _divergence(student: Tensor, columns: Piece, teacher_temperature: float) -> Tensor:
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


class QuerySide(_EncoderObjective):
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

    def texts(self, rows: Sequence[RetrieverExample]) -> tuple[list[str], list[str]]:
        """The queries alone."""
        return [self._query_prefix + row.query for row in rows], []

    def columns(self, rows: Sequence[RetrieverExample]) -> Piece:
        """As for every encoder, and `stored` (num_passages,): the place of each passage in the pool."""
        stored = torch.tensor([self._places[name] for row in rows for name in row.passage_ids])
        return super().columns(rows) | {"stored": stored}

    def loss(self, queries: Tensor, passages: Tensor, columns: Piece) -> Tensor:
        """Cross-entropy of each positive in the whole pool; where a teacher scored, mostly KL from its distribution."""
        del passages
        pool, stored = cast(Tensor, self._pool), columns["stored"]
        positive = stored[columns["place"] == 0]
        contrast = functional.cross_entropy((queries @ pool.T / self._temperature).float(), positive, reduction="sum")
        if columns["taught"].isnan().any():
            return contrast
        cosines = (queries[columns["owner"]] * pool[stored]).sum(dim=1)
        divergence = _divergence(cosines / self._temperature, columns, self._teacher_temperature)
        return divergence + self._contrastive_weight * contrast

    def asked(self, query: str, passage_ids: Sequence[str]) -> Piece:
        """A query's tokens, and as `stored` (num_passages,) the places of passages in the pool: what `log_shares` takes."""
        (tokens,) = self._chunks([self._query_prefix + query], VALIDATION_TOKENS)
        return {**tokens, "stored": torch.tensor([self._places[name] for name in passage_ids])}

    def log_shares(self, piece: Piece) -> Tensor:
        """How likely each passage is for the query, log of the softmax of the cosines over the temperature: (num_passages,)."""
        cosines = cast(Tensor, self._pool)[piece["stored"]] @ self._embed(piece)[0]
        return functional.log_softmax(cosines / self._temperature, dim=0)

    def passage_pool(self, rows: Sequence[RetrieverExample]) -> tuple[list[str], Tensor]:
        """The stored vectors of the rows' passages."""
        names = list(dict.fromkeys(name for row in rows for name in row.passage_ids))
        return names, cast(Tensor, self._pool)[[self._places[name] for name in names]]


class Joint(nn.Module):
    """Retriever and generator under one loss: the likelihood of the answer, whichever candidate passage it was read in.

    -log sum over passages of p(passage | query) p(answer | query, passage), the first by the retriever among the candidates, the
    second by the generator: RAG-Sequence (Lewis et al. 2020). So the generator learns most from the passages that explain the
    answer, and the retriever to find those. Passages keep their stored vectors.

    Args:
        generator: reads.
        retriever: of which the encoder of queries learns.
    """

    _ASKED = "asked_"

    def __init__(self, generator: Sft, retriever: QuerySide) -> None:
        super().__init__()
        self.generator, self.retriever = generator, retriever

    def pieces(self, rows: Sequence[JointExample]) -> Iterator[Piece]:
        """Row by row: the passages of one query must be weighed against each other."""
        for row in rows:
            yield self.collate(row)

    def collate(self, row: JointExample) -> Piece:
        """Those of `Sft.collate`, a row per passage, and those of `QuerySide.asked`, named `asked_...`."""
        read = self.generator.collate(row.prompts, [row.answer] * len(row.prompts))
        asked = self.retriever.asked(row.query, row.passage_ids)
        return read | {f"{self._ASKED}{name}": value for name, value in asked.items()}

    def forward(self, piece: Piece) -> Tensor:
        """The negative log-likelihood of one query's answer."""
        asked = {name.removeprefix(self._ASKED): value for name, value in piece.items() if name.startswith(self._ASKED)}
        return -torch.logsumexp(self.retriever.log_shares(asked) - self.generator.losses(piece), dim=0)

    def weight(self, rows: Sequence[JointExample]) -> float:
        """Queries: the loss of a step is their mean."""
        return float(len(rows))

    @torch.no_grad()
    def validate(self, rows: Sequence[JointExample]) -> dict[str, float]:
        """`loss`, the mean over the rows, and `score`, its negative."""
        loss = sum(float(self(on_device(self, piece))) for piece in self.pieces(rows)) / self.weight(rows)
        return {"loss": loss, "score": -loss}


def _number(name: str) -> int:
    """A number that stands for a passage_id, alike on every worker; never negative."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


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


def on_device(module: nn.Module, piece: Piece) -> Piece:
    """The piece where the module computes."""
    device = next(module.parameters()).device
    return {name: value.to(device) for name, value in piece.items()}
