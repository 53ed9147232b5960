"""Scores pairs of query and passage with a cross-encoder, to reorder the candidates of a search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ragtune_ray.models import weights
from ragtune_ray.models.hardware import choose_device, resolve_precision


class Reranker:
    """A cross-encoder; slow, so only for candidates."""

    def __init__(self, name: str, device: str = "auto") -> None:
        from sentence_transformers import CrossEncoder

        model = weights.resolve(name)
        target = choose_device(device)
        self.fingerprint = model.fingerprint
        with weights.quiet_transformers():
            self._model = CrossEncoder(
                str(model.directory),
                device=target,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": resolve_precision("auto", target), "use_safetensors": True},
            )

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Score (query, passage) pairs: float32 (num_pairs,), larger is better."""
        if not pairs:
            return np.empty(0, dtype=np.float32)
        return np.asarray(self._model.predict(list(pairs), show_progress_bar=False), dtype=np.float32)
