"""Decides whether a premise entails a hypothesis, with a cross-encoder for natural language inference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ragtune_ray.models import layout, loading, weights
from ragtune_ray.models.hardware import choose_device, resolve_precision

ENTAILMENT = "entailment"


class EntailmentModel:
    """A sequence classifier with a label for entailment, as published for MNLI, ANLI and fact checking.

    Args:
        name: a directory or a hub name.
        device: a torch device; `auto` is the GPU if there is one.

    Raises:
        ModelError: the model is not whole, or its config.json has no label for entailment.
    """

    def __init__(self, name: str, device: str = "auto") -> None:
        model = weights.resolve(name)
        self.fingerprint = model.fingerprint
        directory = weights.weights_of(model)
        self._label = entailment_label(directory)
        target = choose_device(device)
        self._model = loading.load_cross_encoder(directory, target, resolve_precision("auto", target))

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Probability that each (premise, hypothesis) is an entailment: float32 (num_pairs,).

        A premise that is too long for the model is cut at its end.
        """
        if not pairs:
            return np.empty(0, dtype=np.float32)
        found = self._model.predict(list(pairs), apply_softmax=True, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)[:, self._label]


def entailment_label(directory: Path) -> int:
    """The number of the label for entailment in a model's config.json.

    Raises:
        ModelError: there is none, or more than one.
    """
    labels = layout.read_object(directory, directory / "config.json").get("id2label") or {}
    found = [number for number, label in labels.items() if str(label).strip().lower() == ENTAILMENT]
    if len(found) != 1 or len(labels) < 2:
        shown = ", ".join(str(label) for label in labels.values()) or "none"
        raise weights.ModelError(
            f"model {directory}: id2label in config.json has no label {ENTAILMENT!r} (it has: {shown}); name a cross-encoder for "
            "natural language inference as evaluate.nli_model"
        )
    return int(found[0])
