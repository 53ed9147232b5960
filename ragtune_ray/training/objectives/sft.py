"""Supervised fine-tuning of the generator, and the interface of all objectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from ragtune_ray.generation import shared_prefixes
from ragtune_ray.generation.chat import ChatTokenizer
from ragtune_ray.generation.shared_prefixes import IGNORED
from ragtune_ray.schema import GeneratorExample

Piece = dict[str, Tensor]
"""Input tensors of one forward pass."""
VALIDATION_TOKENS = 4096
"""Padded tokens per forward pass without gradient."""


class Objective(Protocol):
    """What the training loop needs from an objective, in addition to `nn.Module`."""

    def pieces(self, rows: Sequence[Any]) -> Iterator[Piece]:
        """A worker's rows of a step as one or more inputs of `forward`."""

    def weight(self, rows: Sequence[Any]) -> float:
        """The number by which the summed loss of these rows is divided."""

    def validate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Validation metrics, among them `score`, where larger is better."""


class Sft(nn.Module):
    """Supervised fine-tuning of a causal language model, with loss on the answers' tokens only.

    `end_token` is the id of the token that ends an answer, `micro_batch_tokens` the padded tokens per forward pass.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, end_token: int, micro_batch_tokens: int = 2048) -> None:
        super().__init__()
        self.model = model
        self._chat = ChatTokenizer(tokenizer)
        self._end_token = end_token
        self._micro_batch_tokens = micro_batch_tokens
        self._pad_token = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token)

    def pieces(self, rows: Sequence[GeneratorExample]) -> Iterator[Piece]:
        """The rows in micro-batches of similar length; a common prefix of prompts is computed once."""
        return self._batches(rows, self._micro_batch_tokens)

    def collate(self, prompts: Sequence[str], answers: Sequence[str]) -> Piece:
        """One row of `shared_prefixes.collate` per prompt, with the tokens of answer and end token as labels."""
        prompt_ids, answer_ids = self._token_ids(prompts, answers)
        groups = [[row] for row in range(len(prompt_ids))]
        return shared_prefixes.collate(prompt_ids, answer_ids, groups, self._pad_token)

    def forward(self, piece: Piece) -> Tensor:
        """The negative log-likelihood summed over all labels."""
        return self.losses(piece).sum()

    def losses(self, piece: Piece) -> Tensor:
        """The negative log-likelihood summed over the labels of each row: (num_rows,)."""
        logits = shared_prefixes.logits(self.model, piece)
        labels = piece["labels"][:, -logits.shape[1] :]
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view(len(labels), -1).sum(dim=1)

    def weight(self, rows: Sequence[GeneratorExample]) -> float:
        """Number of answer tokens: the loss of a step is a mean over them."""
        return float(sum(row.num_answer_tokens for row in rows))

    @torch.no_grad()
    def validate(self, rows: Sequence[GeneratorExample]) -> dict[str, float]:
        """`loss`, the mean over the answer tokens of all rows, and `score`, its negative."""
        total = sum(float(self(on_device(self, piece))) for piece in self._batches(rows, VALIDATION_TOKENS))
        loss = total / self.weight(rows)
        return {"loss": loss, "score": -loss}

    def _batches(self, rows: Sequence[GeneratorExample], batch_tokens: int) -> Iterator[Piece]:
        prompt_ids, answer_ids = self._token_ids([row.prompt for row in rows], [row.answer for row in rows])
        for groups in shared_prefixes.batches(self.model, prompt_ids, answer_ids, batch_tokens):
            yield shared_prefixes.collate(prompt_ids, answer_ids, groups, self._pad_token)

    def _token_ids(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts, and of the answers with the end token."""
        answer_ids = self._chat.encode([self._chat.escape_special_tokens(answer) for answer in answers])
        return self._chat.encode(prompts), [[*ids, self._end_token] for ids in answer_ids]


def most_of_workers(count: int, device: torch.device) -> int:
    """The largest count of all workers, which must call this together."""
    if not torch.distributed.is_initialized():
        return count
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def on_device(module: nn.Module, piece: Piece) -> Piece:
    """The piece on the module's device."""
    device = next(module.parameters()).device
    return {name: value.to(device) for name, value in piece.items()}
