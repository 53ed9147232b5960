"""Settings of `evaluation`: scores, the comparison of arms, prices."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ragtune_ray.config.arms import Arm
from ragtune_ray.config.section import Section

__all__ = ["Compare", "Evaluate", "Prices"]


class Evaluate(Section):
    """Scoring."""

    arms: tuple[Arm, ...] = Field(("base", "rag"), min_length=1)
    """Which arms answer the queries; the first is what the others are compared with."""
    cutoffs: tuple[int, ...] = Field((1, 3, 5, 10), min_length=1)
    """The k of recall@k, MRR@k and nDCG@k."""
    depth: int = Field(20, gt=0)
    """Hits per query in the run of `retrieve` (at least retrieval.top_k); answers always see top_k."""
    resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples behind every interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Coverage of the intervals."""
    language: Literal["en", "zh"] = "en"
    """How EM and token F1 cut an answer: SQuAD words, or characters for Chinese."""


class Compare(Section):
    """Choosing an arm by measurement, on `queries`; where an arm is tuned, on their test split if no other is named."""

    arms: tuple[Arm, ...] = Field(("base", "rag", "ft", "rag+ft"), min_length=1)
    """Which arms stand for choice; tuned ones are trained first where no tuned model stands in models/. The name of a mode of
    `ragtune tune` is an arm too."""
    metric: Literal["EM", "token_F1", "contains_answer"] = "token_F1"
    """What quality means here."""
    margin: float = Field(0.02, ge=0, lt=1)
    """An arm that is worse than the best by no more than this is as good: then the cheapest is taken."""
    answers: int = Field(10_000, gt=0)
    """How many answers indexing and training are spread over when costs are compared."""
    latency_queries: int = Field(20, gt=0)
    """Queries that each arm answers one at a time, to measure how long an answer takes."""
    gold_passages: bool = True
    """Also let the generators answer from the passage that holds the answer: how far reading alone would come."""
    max_p95_seconds: float = Field(0.0, ge=0)
    """Constraint: 95 of 100 answers take no longer; 0: none."""
    max_cost_per_1000: float = Field(0.0, ge=0)
    """Constraint: of a thousand answers, indexing and training spread over `answers`; in prices.currency, or in seconds where
    prices are not known. 0: none."""
    max_visible_seconds: float = Field(0.0, ge=0)
    """Constraint: a changed document shows in answers after so long, with all training that this takes; 0: none."""
    min_cited_share: float = Field(0.0, ge=0, le=1)
    """Constraint: so many of the answers name a passage; 0: none."""
    changes_path: str = ""
    """Documents that changed (as corpus.path may be): upserted in a copy of the index, to see what each arm makes of them."""
    deleted: tuple[str, ...] = ()
    """Ids of documents that went."""
    changed_queries_path: str = ""
    """Questions about what changed, with the new answers."""
    probe_path: str = ""
    """Questions with answers that training never saw, on other things than the corpus: what tuned generators forget."""
    num_examples: int = Field(8, ge=0)
    """Questions whose answers stand side by side in the report."""

    @model_validator(mode="after")
    def _changes_are_whole(self) -> Self:
        if bool(self.changes_path or self.deleted) != bool(self.changed_queries_path):
            raise ValueError(
                "compare.changed_queries_path and what changed (compare.changes_path or compare.deleted) go together: "
                "give both or neither"
            )
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"compare.arms names an arm twice: {', '.join(self.arms)}")
        return self


class Prices(Section):
    """What computing costs, for `plan` and `compare`; 0 means not known, and costs are then given in hours alone."""

    core_hour: float = Field(0.0, ge=0)
    """One CPU core for an hour."""
    gpu_hour: float = Field(0.0, ge=0)
    """One GPU for an hour."""
    gibibyte_month: float = Field(0.0, ge=0)
    """One GiB stored for a month."""
    currency: str = "USD"
    """In which the prices are."""
