"""Texts to unit vectors: the bi-encoder, and the cross-encoder that re-scores.

In: texts and a model from `models`. Out: float32 arrays of shape (num_texts, dimension) whose rows have length 1, and
reranker scores. This module knows nothing of documents, FAISS or Ray.

Texts are tokenised apart, sorted by length and run in batches of a fixed number of padded tokens: small enough that a
batch's activations stay in a CPU's cache, where bfloat16 matrix units are otherwise starved.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ragtune_ray import config
from ragtune_ray.ingest.chunking import TokenSpans, tokenizer_spans, word_spans
from ragtune_ray.models import weights
from ragtune_ray.models.hardware import choose_device, resolve_precision
from ragtune_ray.models.token_batches import batches_by_length, padded_tokens, token_ids

__all__ = [
    "Encoder",
    "HashingEncoder",
    "SentenceEncoder",
    "TokenCounter",
    "load_encoder",
    "load_token_counter",
]

CPU_BATCH_TOKENS = 2_048
GPU_BATCH_TOKENS = 65_536

WORDS = re.compile(r"\w+")

logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """What an index needs of an encoder."""

    fingerprint: str
    """Identifies everything that changes the passages' vectors: weights and prefixes, not the precision."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Passages to unit vectors (num_texts, dimension), float32."""

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Queries to unit vectors (num_texts, dimension), float32."""


def load_encoder(settings: config.Encoder, device: str = "auto") -> Encoder:
    """The encoder that the config names, ready to encode.

    Args:
        settings: the `encoder` section.
        device: "cpu", "cuda" or "auto", which takes a GPU where torch sees one.

    Raises:
        models.ModelError: the model cannot be had.
    """
    model = weights.resolve(settings.model)
    if settings.query_model:
        return QuerySideEncoder(model, weights.resolve(settings.query_model), settings, device)
    if model.directory is None:
        return HashingEncoder(model.name)
    return SentenceEncoder(model, settings, device)


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """How an encoder counts the tokens of a passage, known without loading its weights."""

    token_spans: TokenSpans
    num_added_tokens: int
    """Special tokens and those of the passage prefix, which every passage carries."""
    max_tokens: int
    """Longest text the encoder reads, all added tokens included."""


@functools.lru_cache(maxsize=2)
def load_token_counter(settings: config.Encoder) -> TokenCounter:
    """The token counter of the encoder that the config names; kept for the process, since units of a corpus share it.

    Raises:
        models.ModelError: the model cannot be had.
    """
    model = weights.resolve(settings.model)
    if model.directory is None:
        return TokenCounter(word_spans, 0, HashingEncoder.max_tokens)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.directory, local_files_only=True, trust_remote_code=False)
    added = len(tokenizer(settings.passage_prefix)["input_ids"])
    described = model.directory / "sentence_bert_config.json"
    longest = json.loads(described.read_text(encoding="utf-8")).get("max_seq_length") if described.is_file() else None
    return TokenCounter(tokenizer_spans(tokenizer), added, int(longest or tokenizer.model_max_length))


class SentenceEncoder:
    """A sentence-transformers bi-encoder (Reimers and Gurevych 2019), in bfloat16 where the hardware computes in it."""

    def __init__(self, model: weights.Model, settings: config.Encoder, device: str = "auto") -> None:
        from sentence_transformers import SentenceTransformer

        # It loads torch, which tasks that only count tokens, or hash, need not wait for.
        from ragtune_ray.models.packing import pack

        self.device = choose_device(device)
        self.fingerprint = weights.encoder_fingerprint(model.fingerprint, settings)
        self._settings = settings
        with weights.quiet_transformers():
            self._model = SentenceTransformer(
                str(model.directory),
                device=self.device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={
                    "dtype": resolve_precision(settings.precision, self.device),
                    "use_safetensors": True,
                },
            )
        self._model.eval()
        pack(next(iter(self._model)))
        # Pooling sums over hundreds of tokens: in bfloat16 that loses the third digit, in float32 it costs nothing.
        for module in list(self._model)[1:]:
            module.float()
        self.dimension = int(self._model.get_embedding_dimension())
        self._batch_tokens = settings.batch_tokens or (CPU_BATCH_TOKENS if self.device == "cpu" else GPU_BATCH_TOKENS)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Passages to unit vectors (num_texts, dimension), float32; a row may be NaN if the model makes it so."""
        return self._encode([self._settings.passage_prefix + text for text in texts])

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Queries to unit vectors (num_texts, dimension), float32."""
        return self._encode([self._settings.query_prefix + text for text in texts])

    def _encode(self, texts: list[str]) -> np.ndarray:
        import torch

        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        tokens = token_ids(self._model, texts)
        lengths = np.fromiter((len(row) for row in tokens), dtype=np.int64, count=len(tokens))
        for rows in batches_by_length(lengths, self._batch_tokens):
            with torch.inference_mode():
                vectors[rows] = self._forward([tokens[row] for row in rows]).cpu().numpy()
        return vectors

    def _forward(self, rows: list[list[int]]) -> Any:
        from torch.nn.functional import normalize

        padded = padded_tokens(self._model, rows)
        transformer, *rest = list(self._model)
        features = transformer({name: value.to(self.device) for name, value in padded.items()})
        features["token_embeddings"] = features["token_embeddings"].float()
        for module in rest:
            features = module(features)
        return normalize(features["sentence_embedding"].float(), dim=1)


class QuerySideEncoder:
    """Passages by one model, queries by another that was trained towards its vectors; each is loaded when it is first used.

    Raises:
        models.ModelError: one of them has no weights, or the queries' model says that it was trained for another encoder of
            passages.
    """

    def __init__(self, passages: weights.Model, queries: weights.Model, settings: config.Encoder, device: str) -> None:
        if passages.directory is None or queries.directory is None:
            raise weights.ModelError(
                f"encoder.query_model {queries.name!r} with encoder.model {passages.name!r}: a hashing encoder has no weights "
                "that another could be trained towards; name two models, or leave encoder.query_model empty"
            )
        self.fingerprint = weights.encoder_fingerprint(passages.fingerprint, settings)
        trained_for = weights.passage_encoder(queries)
        if trained_for not in ("", self.fingerprint):
            raise weights.ModelError(
                f"encoder.query_model {queries.name!r} was trained for the passages of another encoder ({trained_for}) than "
                f"encoder.model {passages.name!r} ({self.fingerprint}): their vectors do not compare; name the one it was "
                "trained for, or train it for this one"
            )
        self._models, self._settings, self._device = (passages, queries), settings, device

    @functools.cached_property
    def _passages(self) -> SentenceEncoder:
        return SentenceEncoder(self._models[0], self._settings, self._device)

    @functools.cached_property
    def _queries(self) -> SentenceEncoder:
        return SentenceEncoder(self._models[1], self._settings, self._device)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self._queries.dimension

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Passages to unit vectors (num_texts, dimension), float32."""
        return self._passages.encode_passages(texts)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Queries to unit vectors (num_texts, dimension), float32."""
        return self._queries.encode_queries(texts)


class HashingEncoder:
    """Words hashed into a fixed number of signed buckets (Weinberger et al. 2009): no weights, for dry runs and tests."""

    max_tokens = 1_000_000

    def __init__(self, name: str) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        size = name.removeprefix(weights.HASHING_PREFIX)
        if not re.fullmatch(r"[1-9][0-9]{0,4}", size):
            raise weights.ModelError(f"encoder.model {name!r}: must read hashing-DIMENSION, such as hashing-384")
        self.fingerprint = name
        self.dimension = int(size)
        self._vectorizer = HashingVectorizer(
            n_features=self.dimension, norm="l2", tokenizer=WORDS.findall, token_pattern=None
        )

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Passages to unit vectors (num_texts, dimension), float32."""
        if not texts:  # scikit-learn refuses an empty list
            return np.empty((0, self.dimension), dtype=np.float32)
        vectors = np.asarray(self._vectorizer.transform(texts).toarray(), dtype=np.float32)
        # Buckets can cancel out and a text can be all punctuation: such a text gets the first axis, not a zero vector.
        vectors[~vectors.any(axis=1), 0] = 1.0
        return vectors

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Queries to unit vectors (num_texts, dimension), float32."""
        return self.encode_passages(texts)
