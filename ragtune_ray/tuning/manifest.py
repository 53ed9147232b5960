"""The manifest of a finished tune, as a type."""

from __future__ import annotations

from typing import Any, NotRequired, cast

from ragtune_ray.storage import artifacts
from ragtune_ray.training.manifest import TrainingCost


class TuneManifest(TrainingCost):
    """Manifest of `models/MODE/ID/`, an accepted pair of retriever and generator."""

    config: dict[str, Any]
    mode: str
    pair: dict[str, str]
    """Fields of `models.arms.Pair`: the accepted pair."""
    start: dict[str, str]
    """The pair before tuning."""
    rounds: list[dict[str, Any]]
    """The verdicts, for the report of a comparison."""
    split_record_id: NotRequired[str]
    """Identity of the draw in `queries.split_record`."""
    created: str
    """UTC, such as 2026-01-31T12:00:00Z."""


def read_tune_manifest(url: str) -> TuneManifest:
    """Read the manifest of a finished tune."""
    return cast(TuneManifest, artifacts.read_manifest(url))
