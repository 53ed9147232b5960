"""The retriever replica in this process: embeddings."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.cluster.serving.retriever import EMBEDDED_TEXTS, RetrieverReplica
from ragtune_ray.models.encoder import load_encoder

pytestmark = pytest.mark.cluster


def replica(**changed: Any) -> RetrieverReplica:
    made = RetrieverReplica.__new__(RetrieverReplica)
    made._settings = config.Config().using("encoder.model=hashing-32")
    made._encoder = load_encoder(made._settings.encoder)
    made._thread = ThreadPoolExecutor(1)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def test_many_texts_are_embedded_in_pieces_so_that_queries_come_between() -> None:
    made = replica()
    texts = [f"code of vessel {number}" for number in range(2 * EMBEDDED_TEXTS + 5)]
    sizes: list[int] = []

    class Counting:
        def encode_queries(self, some: list[str]) -> np.ndarray:
            sizes.append(len(some))
            return whole.encode_queries(some)

    whole, made._encoder = made._encoder, Counting()
    found = asyncio.run(made.embed(texts, "query"))
    assert sizes == [EMBEDDED_TEXTS, EMBEDDED_TEXTS, 5]
    assert np.array_equal(found.vectors, whole.encode_queries(texts))
    assert (found.model, found.num_tokens) == ("hashing-32", 4 * len(texts))


def test_without_an_encoder_there_are_no_embeddings() -> None:
    refused = asyncio.run(replica(_encoder=None).embed(["x"], "query"))
    assert (refused.status, refused.code) == (409, "no_encoder")
