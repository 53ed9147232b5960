"""Trains the generator and the encoder of queries under one loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ragtune_ray.schema import JointExample
from ragtune_ray.training.objectives.query_side import QuerySide
from ragtune_ray.training.objectives.sft import Piece, Sft, on_device


class Joint(nn.Module):
    """The negative log-likelihood of the answer, marginalized over the candidate passages.

    RAG-Sequence (Lewis et al. 2020): -log sum over passages of p(passage | query) p(answer | query, passage). The retriever
    computes the first factor, the generator the second. The generator learns most from the passages that explain the answer, and
    the retriever learns to find them. Passage vectors stay fixed.
    """

    _RETRIEVER = "asked_"

    def __init__(self, generator: Sft, retriever: QuerySide) -> None:
        super().__init__()
        self.generator, self.retriever = generator, retriever

    def pieces(self, rows: Sequence[JointExample]) -> Iterator[Piece]:
        """One piece per row, because the loss sums over all passages of a query."""
        for row in rows:
            yield self.collate(row)

    def collate(self, row: JointExample) -> Piece:
        """The tensors of `Sft.collate`, a row per passage, and those of `QuerySide.collate`, prefixed with `asked_`."""
        read = self.generator.collate(row.prompts, [row.answer] * len(row.prompts))
        retrieved = self.retriever.collate(row.query, row.passage_ids)
        return read | {f"{self._RETRIEVER}{name}": value for name, value in retrieved.items()}

    def forward(self, piece: Piece) -> Tensor:
        """The negative log-likelihood of one query's answer."""
        retrieved = {
            name.removeprefix(self._RETRIEVER): value
            for name, value in piece.items()
            if name.startswith(self._RETRIEVER)
        }
        return -torch.logsumexp(self.retriever.log_probabilities(retrieved) - self.generator.losses(piece), dim=0)

    def weight(self, rows: Sequence[JointExample]) -> float:
        """Number of queries: the loss of a step is a mean over them."""
        return float(len(rows))

    @torch.no_grad()
    def validate(self, rows: Sequence[JointExample]) -> dict[str, float]:
        """`loss`, the mean over the rows, and `score`, its negative."""
        loss = sum(float(self(on_device(self, piece))) for piece in self.pieces(rows)) / self.weight(rows)
        return {"loss": loss, "score": -loss}
