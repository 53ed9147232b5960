"""Settings of `answering`: prompts and answers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ragtune_ray.config.arms import Arm, retrieves
from ragtune_ray.config.section import Section


class Prompt(Section):
    """What the generator is shown."""

    system: str = (
        "Answer the question with a short phrase from the passages and cite the passage like [1]. "
        "If the passages do not hold the answer, say: I don't know."
    )
    """Instruction used when passages are shown."""
    system_without_passages: str = "Answer the question with a short phrase. If you do not know, say: I don't know."
    """Instruction used when no passages are shown."""
    max_tokens: int = Field(1536, ge=64)
    """Maximum prompt length, in tokens of the generator. Passages are shortened or dropped to fit; the question never is."""


class Answer(Section):
    """How questions are answered."""

    arm: Arm = "rag"
    """Models and passages to answer with. `base`: no passages. `rag`: retrieved passages. `ft` and `rag+ft`: the same, but
    with the newest generator of `ragtune train`. `staged`, `joint`, `iterative` or `domain`: `rag` with the models that
    `ragtune tune` made in that mode. `base@NAME` and `rag@NAME`: the generator of `compare.hosted.NAME`."""
    gold_passage: bool = False
    """Show the passage that contains the answer instead of retrieved ones, to measure the generator without the retriever.
    Queries that have no such passage fail."""
    closed_book: bool = False
    """Show no passages, even in an arm that retrieves, to measure what the generator answers without them."""
    reading: Literal["together", "apart"] = "together"
    """`together`: one prompt with all retrieved passages. `apart`: one prompt per passage, and the most likely answer is
    kept (RAG-Sequence, Lewis et al. 2020). `apart` takes `retrieval.top_k` times the work; it suits small generators tuned
    with `training.passages=1`."""
    rank_weight: float = Field(1.5, ge=0)
    """`answer.reading=apart`: weight of a passage's rank. The likelihood of its answer is multiplied by
    1 / rank ** rank_weight. 0: the rank is ignored. Choose the value on validation questions."""
    unit_queries: int = Field(32, gt=0)
    """Queries per task. A task is repeated as a whole if its worker dies."""
    max_failed_share: float = Field(0.5, ge=0, le=1)
    """The command fails if more than this share of the answers has status `failed`."""

    @property
    def shows_passages(self) -> bool:
        """Whether the generator is shown passages."""
        return retrieves(self.arm) and not self.closed_book

    @model_validator(mode="after")
    def _arm_shows_passages(self) -> Self:
        if self.closed_book and self.gold_passage:
            raise ValueError("answer.closed_book and answer.gold_passage are both true; set only one of them")
        if self.gold_passage and not retrieves(self.arm):
            raise ValueError(f"answer.gold_passage needs passages, answer.arm={self.arm} shows none; use rag or rag+ft")
        return self
