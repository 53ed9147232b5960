"""Settings of `answering`: prompts and answers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ragtune_ray.config.arms import Arm, retrieves
from ragtune_ray.config.section import Section

__all__ = ["Answer", "Prompt"]


class Prompt(Section):
    """What the generator is shown."""

    system: str = (
        "Answer the question with a short phrase from the passages and cite the passage like [1]. "
        "If the passages do not hold the answer, say: I don't know."
    )
    """The instruction when passages are shown."""
    system_without_passages: str = "Answer the question with a short phrase. If you do not know, say: I don't know."
    """The instruction in the base arm."""
    max_tokens: int = Field(1536, ge=64)
    """Longest prompt, in tokens of the generator; passages are shortened or dropped to fit, the question never is."""


class Answer(Section):
    """Bulk answering."""

    arm: Arm = "rag"
    """`rag` shows the generator the retrieved passages, `base` does not; `ft` and `rag+ft`: the same with the generator that
    `ragtune train` last made for them; a mode's name: rag with the retriever and generator that `ragtune tune` made in it."""
    gold_passage: bool = False
    """Show the passage that holds the answer in place of what is retrieved: how far the generator alone comes. Queries without
    such a passage fail."""
    closed_book: bool = False
    """Show no passages, though the arm retrieves: what its generator knows by itself."""
    reading: Literal["together", "apart"] = "together"
    """`together`: all retrieved passages stand in one prompt. `apart`: each in a prompt of its own, and the likeliest of the
    answers is given, as in RAG-Sequence (Lewis et al. 2020). That takes retrieval.top_k times the work, and suits a small
    generator that was tuned on one passage a prompt (training.passages=1)."""
    rank_weight: float = Field(1.5, ge=0)
    """reading `apart`: how much retrieval's order counts beside how likely the generator finds an answer: the passage of rank r
    counts as 1 / r ** rank_weight. 0: not at all. Choose it on validation questions."""
    unit_queries: int = Field(32, gt=0)
    """Queries per unit of work: what a killed worker costs at most."""
    max_failed_share: float = Field(0.5, ge=0, le=1)
    """The job ends as failed when more than this share of its rows has status `failed`."""

    @property
    def shows_passages(self) -> bool:
        """Whether the generator is shown passages."""
        return retrieves(self.arm) and not self.closed_book

    @model_validator(mode="after")
    def _arm_shows_passages(self) -> Self:
        if self.closed_book and self.gold_passage:
            raise ValueError("answer.closed_book shows no passage and answer.gold_passage one; give one of them")
        if self.gold_passage and not retrieves(self.arm):
            raise ValueError(
                f"answer.gold_passage shows a passage, and answer.arm={self.arm} shows none; use rag or rag+ft"
            )
        return self
