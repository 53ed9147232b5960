"""Scores pairs of query and passage with a cross-encoder or by late interaction, to reorder the candidates of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragtune_ray.models import late_interaction, layout, loading, weights
from ragtune_ray.models.hardware import choose_device, resolve_precision

if TYPE_CHECKING:
    import torch

BLEND = "reranker.json"
"""File of a model trained here: `first_stage_weight`, the weight of the retrieval score that validation chose."""


class Reranker:
    """A cross-encoder, a late-interaction model, or an encoder used as one; slow, so only for candidates.

    `first_stage_weight` is the one that the model was trained with, or 0 if the directory names none.
    """

    def __init__(self, name: str, device: str = "auto") -> None:
        model = weights.resolve(name)
        target = choose_device(device)
        self.fingerprint = model.fingerprint
        directory = weights.weights_of(model)
        self.first_stage_weight = _first_stage_weight(directory)
        self._model = load_reranker(directory, target, resolve_precision("auto", target), layout.prompts_of(directory))

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Score (query, passage) pairs: float32 (num_pairs,), larger is better."""
        if not pairs:
            return np.empty(0, dtype=np.float32)
        if late_interaction.is_late_interaction(self._model):
            return late_interaction.score(self._model, pairs)
        return np.asarray(self._model.predict(list(pairs), show_progress_bar=False), dtype=np.float32)


def load_reranker(
    directory: Path, device: str, dtype: torch.dtype, prefixes: tuple[str, str], **of_cross_encoder: Any
) -> Any:
    """Load the reranker that a model directory contains; an encoder becomes a late-interaction model.

    Args:
        directory: of the model.
        device: a torch device.
        dtype: of the weights.
        prefixes: for queries and passages, if the directory contains an encoder.
        **of_cross_encoder: further arguments of sentence-transformers' `CrossEncoder`.

    Raises:
        ModelError: the model is not whole.
    """
    if loading.is_late_interaction(directory):
        return loading.load_late_interaction(directory, device, dtype)
    if loading.is_cross_encoder(directory):
        return loading.load_cross_encoder(directory, device, dtype, **of_cross_encoder)
    return late_interaction.from_encoder(loading.load_sentence_encoder(directory, device, dtype), *prefixes)


def _first_stage_weight(directory: Path) -> float:
    weight = layout.read_object(directory, directory / BLEND).get("first_stage_weight", 0.0)
    if not isinstance(weight, int | float):
        raise weights.ModelError(
            f"model {directory}: {BLEND} has the first_stage_weight {weight!r}, which is no number; copy or download it again"
        )
    return float(weight)
