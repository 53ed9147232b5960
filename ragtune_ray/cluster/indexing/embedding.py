"""Embeds the passages of one unit."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pyarrow as pa

from ragtune_ray import config
from ragtune_ray.cluster.indexing import units
from ragtune_ray.models import scripts


class Embedder:
    """An encoder that embeds units."""

    def __init__(self, settings: config.Encoder) -> None:
        from ragtune_ray.models.encoder import load_encoder

        self._encoder = load_encoder(settings)
        self._unit_passages = settings.unit_passages

    def embed(self, passages: pa.Table, *, is_probed: bool) -> units.Embedded:
        """Embed passages, in groups that depend on nothing else, so that the vectors are the same wherever this runs.

        Args:
            passages: of one unit.
            is_probed: measure which scripts the encoder knows, on the first group.
        """
        started = time.monotonic()
        groups = [
            passages.slice(first, self._unit_passages) for first in range(0, passages.num_rows, self._unit_passages)
        ]
        parts = [self._encode(group) for group in groups]
        vectors = np.concatenate([np.empty((0, self._encoder.dimension), dtype=np.float32), *parts])
        probed: dict[str, scripts.ScriptFacts] = {}
        if is_probed and groups:
            finite = np.flatnonzero(np.isfinite(parts[0]).all(axis=1))
            texts = groups[0]["text"].take(pa.array(finite)).to_pylist()
            probed = scripts.probe(self._encoder, texts, parts[0][finite])
        facts: units.EmbeddingFacts = {
            "encoder": self._encoder.fingerprint,
            "dimension": self._encoder.dimension,
            "scripts": probed,
            "seconds": round(time.monotonic() - started, 4),
        }
        return units.Embedded(vectors, facts)

    def _encode(self, passages: pa.Table) -> np.ndarray:
        from ragtune_ray.models.encoder import QuerySideEncoder, SentenceEncoder

        if "tokens" in passages.column_names and isinstance(self._encoder, SentenceEncoder | QuerySideEncoder):
            tokens = passages["tokens"].combine_chunks()
            ids, edges = tokens.flatten().to_numpy(), np.append(0, np.cumsum(tokens.value_lengths().to_numpy()))
            return self._encoder.encode_tokens([ids[first:last] for first, last in itertools.pairwise(edges)])
        return self._encoder.encode_passages(passages["text"].to_pylist())
