"""Settings of `training`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ragtune_ray.config.models import Precision
from ragtune_ray.config.section import Section

Objective = Literal["sft", "contrastive", "distillation", "query_side", "joint", "reranker"]

_UNRELATED = {
    "name",
    "max_failures",
    "workers",
    "max_workers",
    "checkpoint_steps",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "compile",
}
"""Settings that do not affect what is learned."""


class Training(Section):
    """Fine-tuning of the generator, the retriever, or both."""

    objective: Objective = "sft"
    """What is trained. `sft`: the generator, on gold answers. `contrastive`: the retriever, on positives and negatives.
    `distillation`: the retriever, on the ranking of a teacher. `query_side`: contrastive, but only the encoder of queries
    is trained, so the index stays valid. `joint`: generator and encoder of queries, on one loss: the likelihood of the
    answer summed over retrieved passages. `reranker`: a late-interaction model or a cross-encoder, on
    positives and negatives; use it with `retrieval.reranker`."""
    arm: Literal["ft", "rag+ft"] = "rag+ft"
    """`sft`: arm to train for. `ft`: examples show the question alone. `rag+ft`: examples show the question with passages."""
    name: str = ""
    """Name of the result in the workspace's `models/`. Empty: the arm for `sft`, `both` for `joint`, `reranker` for
    `reranker`, otherwise `retriever`. Arms `ft` and `rag+ft` use the models of their own names; to use another, set
    `generator.model` or `encoder.model` to its directory."""
    epochs: int = Field(1, gt=0)
    """Passes over the examples."""
    max_steps: int = Field(0, ge=0)
    """Stop after this many optimizer steps; warm-up and decay are fitted to it. 0: all epochs."""
    batch_examples: int = Field(16, gt=0)
    """Examples per optimizer step, over all workers."""
    micro_batch_tokens: int = Field(2048, gt=0)
    """Tokens per forward pass and worker, padding included. Gradients are accumulated over the passes of a step."""
    max_tokens: int = Field(1024, ge=32)
    """`sft` and `joint`: maximum length of prompt and answer together, in tokens. Passages are shortened or dropped
    to fit; the answer is never shortened."""
    learning_rate: float = Field(0.0, ge=0)
    """Peak learning rate. 0: 5e-5 for the generator (2e-4 with LoRA), 3e-5 for the retriever, the
    reranker and `joint`."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly; then it falls along a cosine. 0: no warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW weight decay of matrices. Biases and norms have none. 0: no decay."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    precision: Precision = "auto"
    """Number format of matrix products; trained weights stay in float32. `auto`: bfloat16 if the hardware supports it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third more time."""
    lora_rank: int = Field(0, ge=0)
    """`sft` and `joint`: train LoRA adapters of this rank on all linear layers. 0: train all weights."""
    lora_alpha: float = Field(32.0, gt=0)
    """Scale of the LoRA adapters: their output is multiplied by lora_alpha / lora_rank."""
    quantization: Literal["none", "nf4"] = "none"
    """Number format of the frozen weights under LoRA adapters. `nf4`: four bits (QLoRA, Dettmers et al. 2023), with which
    a model of 8 billion parameters takes 6 GB instead of 16; needs the extra `quantization`. The trained adapters are
    merged into the weights of the model as it was. `none`: as the model stores them."""
    compile: bool = False
    """`sft` with `ddp`: compile the model with torch.compile, which needs a C++ compiler on every worker and takes a
    minute or more before the first step."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker has the whole model. `fsdp` (`sft` only): weights and optimizer state are divided among the
    workers, for generators that do not fit on one GPU."""
    workers: int = Field(1, gt=0)
    """Number of training workers; with `training.max_workers`, the minimum."""
    max_workers: int = Field(0, ge=0)
    """Upper limit on workers, if the cluster has room. 0: exactly `training.workers`."""
    max_failures: int = Field(3, ge=0)
    """How often a lost worker is replaced and training resumes from the last checkpoint. 0: never."""
    checkpoint_steps: int = Field(100, gt=0)
    """Steps between checkpoints."""
    evaluate_steps: int = Field(100, gt=0)
    """Steps between evaluations on validation examples. The best weights are kept."""
    validation_examples: int = Field(256, gt=0)
    """Maximum number of validation examples, drawn at random with `seed`."""
    passages: int = Field(0, ge=0)
    """`sft` for `rag+ft`: passages per example. 0: `retrieval.top_k`."""
    distractors: Literal["query", "passage"] = "query"
    """`sft` for `rag+ft`: which other passages an example shows. `query`: those retrieved for its question, as when
    answering. `passage`: those retrieved for the passage that contains the answer, so that all questions on one passage
    share a prompt prefix, which is computed once."""
    gold_left_out_share: float = Field(0.1, ge=0, le=1)
    """`sft` for `rag+ft`: share of examples without the gold passage (RAFT, Zhang et al. 2024). 0: none."""
    abstain_share: float = Field(0.5, ge=0, le=1)
    """Share of the examples without the gold passage whose target is `training.abstention`; the others keep their answer."""
    abstention: str = Field("I don't know.", min_length=1)
    """Target answer when the passages do not contain the answer."""
    cite: bool = True
    """`sft` for `rag+ft`: end target answers with the number of the passage that contains them, such as [2]."""
    replay_path: str = ""
    """`sft`: other questions with answers, mixed in to reduce forgetting (formats as for queries.path). Empty: none."""
    replay_share: float = Field(0.1, ge=0, lt=1)
    """Share of the examples that are replayed, if `training.replay_path` is set."""
    hard_negatives: int = Field(4, ge=0)
    """Retriever and reranker: retrieved passages per example that do not answer the question. `joint`: candidates after
    the first."""
    negative_depth: int = Field(50, gt=0)
    """Retriever and reranker: number of top hits from which hard negatives are taken."""
    negative_margin: float = Field(0.05, ge=0, lt=1)
    """Retriever and reranker: leave out hits that score above (1 - margin) times the score of the positive, since they may be
    false negatives (Moreira et al. 2024). 0: leave out none."""
    temperature: float = Field(0.05, gt=0)
    """Retriever: cosines of the trained model are divided by this. Smaller is sharper."""
    teacher: Literal["retrieval", "generator"] = "retrieval"
    """Source of the scores to learn. `retrieval` (`distillation` only): the reranker, or without one the retrieval that
    found the hits. `generator` (`distillation` and `query_side`): how much a passage raises the likelihood of the answer;
    needs no qrels, and mixes in the scores of a reranker if there is one."""
    teacher_temperature: float = Field(0.3, gt=0)
    """Teacher scores (retrieval: scaled to 0..1 per query; generator: nats per token) are divided by this."""
    contrastive_weight: float = Field(0.1, ge=0)
    """Weight of the contrastive loss added to the teacher's loss. 0: the teacher's loss alone."""

    def identity(self) -> dict[str, Any]:
        """What identifies a trained model: the settings that affect what is learned."""
        # A setting that is newer than finished models is left out at its old value, so that they are found again.
        newer = {"quantization"} if self.quantization == "none" else set()
        return self.model_dump(mode="json", exclude=_UNRELATED | newer)

    @property
    def learns_from_generator(self) -> bool:
        """Whether the generator scores the passages that the retriever learns from."""
        return self.teacher == "generator" and self.objective in ("distillation", "query_side")

    @property
    def trains_generator(self) -> bool:
        """Whether the generator is trained."""
        return self.objective in ("sft", "joint")

    @property
    def keeps_index(self) -> bool:
        """Whether the retriever is trained without changing the embeddings of passages."""
        return self.objective in ("query_side", "joint")

    @model_validator(mode="after")
    def _workers_are_ordered(self) -> Self:
        if self.max_workers and self.max_workers < self.workers:
            raise ValueError(f"training.max_workers ({self.max_workers}) is below training.workers ({self.workers})")
        if self.teacher == "generator" and self.objective in ("contrastive", "reranker"):
            raise ValueError("training.teacher=generator works with training.objective distillation or query_side")
        if self.lora_rank and not self.trains_generator:
            raise ValueError("training.lora_rank: only objectives sft and joint train adapters; set it to 0")
        if self.quantization != "none" and not self.lora_rank:
            raise ValueError("training.quantization=nf4 trains adapters; set training.lora_rank, for example to 16")
        if self.quantization != "none" and self.strategy == "fsdp":
            raise ValueError("training.quantization=nf4 works with training.strategy=ddp")
        if self.compile and (self.objective != "sft" or self.strategy != "ddp"):
            raise ValueError("training.compile works with training.objective=sft and training.strategy=ddp")
        return self
