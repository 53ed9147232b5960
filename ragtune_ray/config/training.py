"""Settings of `training`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ragtune_ray.config.models import Precision
from ragtune_ray.config.section import Section

__all__ = ["Objective", "Training"]

Objective = Literal["sft", "contrastive", "distillation", "query_side", "joint"]


class Training(Section):
    """Fine-tuning of the generator or of the retriever."""

    objective: Objective = "sft"
    """`sft`: the generator learns answers. The retriever: `contrastive` (positives against negatives), `distillation` (a
    teacher's ranking), `query_side` (contrastive, but only queries are encoded anew: the index stays as it is). Both at once:
    `joint` (the likelihood of the answer, summed over the passages that may be found, of which the retriever says how likely each
    is; only queries are encoded anew)."""
    arm: Literal["ft", "rag+ft"] = "rag+ft"
    """`sft`: whether the examples show the question alone (ft) or with passages (rag+ft)."""
    name: str = ""
    """Names the result in `models/`; empty: the arm, or `retriever`, or `both`. The arms ft and rag+ft answer with the models of
    their own names; one of another name is used by naming its directory in generator.model or encoder.model."""
    epochs: int = Field(1, gt=0)
    """Passes over the examples."""
    max_steps: int = Field(0, ge=0)
    """Stop after so many optimiser steps; 0: all epochs. Warm-up and decay fit the steps that are made."""
    batch_examples: int = Field(16, gt=0)
    """Examples per optimiser step, over all workers."""
    micro_batch_tokens: int = Field(2048, gt=0)
    """Padded tokens that a worker takes through the model at once; a step's gradient is accumulated over them."""
    max_tokens: int = Field(1024, ge=32)
    """`sft` and `joint`: longest prompt and answer together; passages are shortened or dropped to fit, the answer never is."""
    learning_rate: float = Field(0.0, ge=0)
    """0: 5e-5 for the generator (2e-4 with LoRA), 3e-5 for the retriever and for both at once."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls as a cosine."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices; biases and norms have none (AdamW)."""
    clip_norm: float = Field(1.0, gt=0)
    """Longest gradient."""
    precision: Precision = "auto"
    """What matrices are multiplied in; learnt weights stay in float32. `auto`: bfloat16 where the hardware has it."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    lora_rank: int = Field(0, ge=0)
    """`sft`: learn adapters of this rank on all linear layers instead of all weights; 0: all weights."""
    lora_alpha: float = Field(32.0, gt=0)
    """Scale of the adapters, divided by their rank."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`fsdp`: weights and optimiser state are spread over the workers, for generators (`sft`) that do not fit one GPU."""
    workers: int = Field(1, gt=0)
    """Fewest training workers."""
    max_workers: int = Field(0, ge=0)
    """Most of them, where the cluster has room; 0: exactly `workers`."""
    max_failures: int = Field(3, ge=0)
    """So often a lost worker is replaced and the run goes on from its last checkpoint."""
    checkpoint_steps: int = Field(100, gt=0)
    """Steps between checkpoints: what a killed run costs at most."""
    evaluate_steps: int = Field(100, gt=0)
    """Steps between evaluations on validation examples; the best weights are kept."""
    validation_examples: int = Field(256, gt=0)
    """Most validation examples, drawn by the seed."""
    passages: int = Field(0, ge=0)
    """`sft`, rag+ft: passages per example; 0: retrieval.top_k."""
    distractors: Literal["query", "passage"] = "query"
    """`sft`, rag+ft: what the other passages of an example are retrieved for. `query`: its question, as in answering. `passage`:
    the passage that holds the answer, so that all questions about it show the same passages, which are then read once."""
    gold_left_out_share: float = Field(0.1, ge=0, le=1)
    """`sft`, rag+ft: share of examples without the passage that holds the answer (RAFT, Zhang et al. 2024)."""
    abstain_share: float = Field(0.5, ge=0, le=1)
    """... of which so many are to be answered with `abstention`."""
    abstention: str = Field("I don't know.", min_length=1)
    """What to say when the passages do not hold the answer."""
    cite: bool = True
    """`sft`, rag+ft: answers end with the number of the passage they rest on, such as [2]."""
    replay_path: str = ""
    """`sft`: other questions with answers (as queries.path), mixed in without passages against forgetting."""
    replay_share: float = Field(0.1, ge=0, lt=1)
    """Share of the examples that are replay, where there is a `replay_path`."""
    hard_negatives: int = Field(4, ge=0)
    """Retriever: passages per example that were found but do not answer. `joint`: candidates beside the first."""
    negative_depth: int = Field(50, gt=0)
    """Retriever: hits that hard negatives are taken from."""
    negative_margin: float = Field(0.05, ge=0, lt=1)
    """Retriever: a hit scoring above (1 - margin) of the positive may be a false negative and is left out (Moreira 2024)."""
    temperature: float = Field(0.05, gt=0)
    """Retriever: divides the cosines of the model that learns."""
    teacher: Literal["retrieval", "generator"] = "retrieval"
    """Whose scores are taught. `retrieval` (`distillation` only): the reranker's or, without one, those that the hits came with.
    `generator` (also `query_side`): by how much a passage raises the likelihood of the answer; no qrels are needed, and a
    reranker is mixed in."""
    teacher_temperature: float = Field(0.3, gt=0)
    """Divides the teacher's scores: those of retrieval are scaled to 0..1 per query, the generator's are nats per token."""
    contrastive_weight: float = Field(0.1, ge=0)
    """Of the contrastive term beside the teacher's."""

    @property
    def learns_from_generator(self) -> bool:
        """Whether the generator scores the passages that the retriever learns from."""
        return self.teacher == "generator" and self.objective in ("distillation", "query_side")

    @property
    def trains_generator(self) -> bool:
        """Whether the weights of the generator move."""
        return self.objective in ("sft", "joint")

    @property
    def keeps_index(self) -> bool:
        """Whether the retriever learns, but passages stay as they are encoded in the index."""
        return self.objective in ("query_side", "joint")

    @model_validator(mode="after")
    def _workers_are_ordered(self) -> Self:
        if self.max_workers and self.max_workers < self.workers:
            raise ValueError(
                f"training.max_workers ({self.max_workers}) is less than training.workers ({self.workers})"
            )
        if self.teacher == "generator" and self.objective == "contrastive":
            raise ValueError(
                "training.teacher=generator teaches training.objective distillation or query_side, not contrastive"
            )
        if self.lora_rank and not self.trains_generator:
            raise ValueError(
                "training.lora_rank: adapters are for objectives sft and joint; the retriever is trained whole"
            )
        return self
