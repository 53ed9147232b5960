"""Encodes texts as unit vectors: float32 arrays of shape (num_texts, dimension).

Texts are tokenized first, sorted by length, and run in batches of a fixed number of padded tokens. On a CPU a batch is
so small that its activations stay in the cache; otherwise the bfloat16 matrix units would wait for memory.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ragtune_ray import config
from ragtune_ray.ingest.chunking import TokenSpans, tokenizer_spans, word_spans
from ragtune_ray.models import layout, loading, weights
from ragtune_ray.models.hardware import choose_device, resolve_precision
from ragtune_ray.models.token_batches import batches_by_length, padded_tokens, token_ids, tokenized

CPU_BATCH_TOKENS = 2_048
GPU_BATCH_TOKENS = 65_536

WORDS = re.compile(r"\w+")

logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """Turns texts into unit vectors, float32 (num_texts, dimension)."""

    fingerprint: str
    """Identifies what determines the vectors of passages: weights and prefixes, but not the precision."""

    @property
    def dimension(self) -> int:
        """Number of components of a vector."""

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Encode passages."""

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Encode queries."""


def load_encoder(settings: config.Encoder, device: str = "auto") -> Encoder:
    """Load the encoder that the config names, on "cpu", "cuda", or "auto": a GPU if torch finds one.

    Raises:
        ModelError: the model cannot be found or fetched.
    """
    model = weights.resolve(settings.model)
    if settings.query_model:
        return QuerySideEncoder(model, weights.resolve(settings.query_model), settings, device)
    if model.directory is None:
        return HashingEncoder(model.name)
    return SentenceEncoder(model, settings, device)


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """Counts the tokens of passages as an encoder does, without its weights."""

    token_spans: TokenSpans
    num_added_tokens: int
    """Special tokens and the tokens of the passage prefix, which are added to every passage."""
    max_tokens: int
    """The encoder's longest input, added tokens included."""
    token_ids: Callable[[Sequence[str]], list[list[int]]] | None = None
    """What `encode_tokens` of the encoder takes for passages; None if the encoder takes texts alone."""


@functools.lru_cache(maxsize=2)
def load_token_counter(settings: config.Encoder) -> TokenCounter:
    """Load the token counter of the encoder that the config names; cached, as all units of a corpus use it.

    Raises:
        ModelError: the model cannot be found or fetched.
    """
    model = weights.resolve(settings.model)
    if model.directory is None:
        return TokenCounter(word_spans, 0, HashingEncoder.max_tokens)
    tokenizer = loading.load_tokenizer(model.directory)
    prefix = weights.with_prompts(settings, model.directory).passage_prefix
    added = len(tokenizer(prefix)["input_ids"])
    longest = int(layout.transformer_settings(model.directory).get("max_seq_length") or tokenizer.model_max_length)

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenized(tokenizer, [f"{prefix}{text}" for text in texts], longest)

    return TokenCounter(tokenizer_spans(tokenizer), added, longest, ids)


class SentenceEncoder:
    """A sentence-transformers bi-encoder (Reimers and Gurevych 2019)."""

    def __init__(self, model: weights.Model, settings: config.Encoder, device: str = "auto") -> None:
        # Imports torch, which tasks that only count tokens or hash words do not need.
        import torch

        from ragtune_ray.models.packing import pack

        self.device = choose_device(device)
        self.fingerprint = weights.encoder_fingerprint(model, settings)
        self._prefixed = weights.with_prompts(settings, model.directory)
        precision = resolve_precision(settings.precision, self.device)
        self._model = loading.load_sentence_encoder(weights.weights_of(model), self.device, precision)
        self._model.eval()
        if precision == torch.bfloat16:  # in float32, vectors stay those of every index that was built before
            pack(next(iter(self._model)))
        # Pooling sums over hundreds of tokens: bfloat16 loses the third digit, and float32 costs nothing here.
        for module in list(self._model)[1:]:
            module.float()
        self.dimension = int(self._model.get_embedding_dimension())
        self._batch_tokens = settings.batch_tokens or (CPU_BATCH_TOKENS if self.device == "cpu" else GPU_BATCH_TOKENS)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Encode passages; a row is NaN if the model's output is."""
        return self._encode([f"{self._prefixed.passage_prefix}{text}" for text in texts])

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Encode queries; a row is NaN if the model's output is."""
        return self._encode([f"{self._prefixed.query_prefix}{text}" for text in texts])

    def _encode(self, texts: list[str]) -> np.ndarray:
        return self.encode_tokens(token_ids(self._model, texts) if texts else [])

    def encode_tokens(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Encode texts that are tokenized already, as by `TokenCounter.token_ids`."""
        import torch

        vectors = np.empty((len(tokens), self.dimension), dtype=np.float32)
        lengths = np.fromiter((len(row) for row in tokens), dtype=np.int64, count=len(tokens))
        for rows in batches_by_length(lengths, self._batch_tokens):
            with torch.inference_mode():
                vectors[rows] = self._forward([tokens[row] for row in rows]).cpu().numpy()
        return vectors

    def _forward(self, rows: Sequence[Sequence[int] | np.ndarray]) -> Any:
        from torch.nn.functional import normalize

        padded = padded_tokens(self._model, rows)
        transformer, *rest = list(self._model)
        features = transformer({name: value.to(self.device) for name, value in padded.items()})
        features["token_embeddings"] = features["token_embeddings"].float()
        for module in rest:
            features = module(features)
        return normalize(features["sentence_embedding"].float(), dim=1)


class QuerySideEncoder:
    """Encodes passages with one model and queries with another, trained for its vectors. Loads each on first use.

    Raises:
        ModelError: one of them has no weights, or the query model was trained for another passage encoder.
    """

    def __init__(self, passages: weights.Model, queries: weights.Model, settings: config.Encoder, device: str) -> None:
        if passages.directory is None or queries.directory is None:
            raise weights.ModelError(
                f"encoder.query_model {queries.name!r} with encoder.model {passages.name!r}: a hashing encoder has no weights; "
                "name two models, or leave encoder.query_model empty"
            )
        self.fingerprint = weights.encoder_fingerprint(passages, settings)
        trained_for = weights.passage_encoder(queries)
        if trained_for not in ("", self.fingerprint):
            raise weights.ModelError(
                f"encoder.query_model {queries.name!r} was trained for another passage encoder ({trained_for}) than "
                f"encoder.model {passages.name!r} ({self.fingerprint}); their vectors are not comparable. Name the encoder it "
                "was trained for, or train a query model for this one"
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
        """Number of components of a vector."""
        return self._queries.dimension

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Encode passages."""
        return self._passages.encode_passages(texts)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Encode queries."""
        return self._queries.encode_queries(texts)

    def encode_tokens(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Encode passages that are tokenized already."""
        return self._passages.encode_tokens(tokens)


class HashingEncoder:
    """Hashes words into a fixed number of signed buckets (Weinberger et al. 2009); for dry runs and tests."""

    max_tokens = 1_000_000

    def __init__(self, name: str) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        size = name.removeprefix(weights.HASHING_PREFIX)
        if not re.fullmatch(r"[1-9][0-9]{0,4}", size):
            raise weights.ModelError(f"encoder.model {name!r}: must be hashing-DIMENSION, such as hashing-384")
        self.fingerprint = name
        self.dimension = int(size)
        options = {"norm": "l2", "tokenizer": WORDS.findall, "token_pattern": None}
        self._vectorizer = HashingVectorizer(n_features=self.dimension, **options)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Encode passages."""
        if not texts:  # scikit-learn refuses an empty list
            return np.empty((0, self.dimension), dtype=np.float32)
        vectors = np.asarray(self._vectorizer.transform(texts).toarray(), dtype=np.float32)
        # Buckets can cancel out, and a text can be all punctuation: use the first axis instead of a zero vector.
        vectors[~vectors.any(axis=1), 0] = 1.0
        return vectors

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Encode queries."""
        return self.encode_passages(texts)
