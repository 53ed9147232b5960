"""What generator and encoder of queries learn from at once. `objectives` says what all objectives share.

In: the objectives of both, and joint examples. Out: tensors to run, the loss of each, and a validation score. This module knows
nothing of optimisers, files or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ragtune_ray.schema import JointExample
from ragtune_ray.training.objectives.query_side import QuerySide
from ragtune_ray.training.objectives.sft import Piece, Sft, on_device

__all__ = ["Joint"]


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
