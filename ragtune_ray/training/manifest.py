"""The manifest of a trained model, as a type."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, cast

from ragtune_ray.storage import artifacts


class Scores(TypedDict):
    """Validation metrics. Each metric also has a key of its own name, such as `loss` or `MRR@10`."""

    score: float
    """The metric that training maximizes."""


class BestScores(Scores):
    """Validation metrics of the best step."""

    step: int
    """0: no step was better than the start."""


class StepSeconds(TypedDict):
    """Time spent in training steps, without evaluations and checkpoints."""

    steps: float


class TrainingCost(TypedDict):
    """Facts from which a comparison computes the cost of a trained model or a tune."""

    seconds: StepSeconds
    num_workers: int
    cores_per_worker: int


class ExamplesSummary(TypedDict):
    """The part of the examples' manifest that a model's manifest repeats."""

    index_version: str
    input: dict[str, dict[str, Any]]
    num_train: int
    num_validation: int
    kinds: dict[str, int]
    num_rejects: int


class ModelManifest(TrainingCost):
    """Manifest of `models/NAME/ID/`, a trained model."""

    config: dict[str, Any]
    split_record_id: NotRequired[str]
    """Identity of the draw in `queries.split_record`."""
    objective: str
    arm: str | None
    """`ft` or `rag+ft` for a generator; None for a retriever."""
    base: str
    """Name of the model that training started from."""
    base_fingerprint: str
    query_model: NotRequired[str]
    """Directory of the retriever that was trained jointly."""
    passage_encoder: NotRequired[str]
    """Fingerprint of the encoder whose passage vectors a `query_side` model was trained for."""
    examples: str
    """Directory of the examples."""
    input: ExamplesSummary
    num_steps: int
    start: Scores
    best: BestScores
    tokens_per_second: float


def read_model_manifest(url: str) -> ModelManifest:
    """Read the manifest of a trained model."""
    return cast(ModelManifest, artifacts.read_manifest(url))


def read_training_cost(url: str) -> TrainingCost:
    """Read the training cost from the manifest of a trained model or a tune."""
    return cast(TrainingCost, artifacts.read_manifest(url))
