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

Here is the generator's; the others are in `encoder_objectives`, `query_side_objective` and `joint_objective`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ragtune_ray.generation import shared_prefixes
from ragtune_ray.generation.chat import ChatTokenizer
from ragtune_ray.generation.shared_prefixes import IGNORED
from ragtune_ray.schema import GeneratorExample

__all__ = ["Objective", "Piece", "Sft", "on_device"]

Piece = dict[str, Tensor]
"""What one forward pass takes."""
VALIDATION_TOKENS = 4096
"""Padded tokens that go through the model at once without gradient."""


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


def on_device(module: nn.Module, piece: Piece) -> Piece:
    """The piece where the module computes."""
    device = next(module.parameters()).device
    return {name: value.to(device) for name, value in piece.items()}
