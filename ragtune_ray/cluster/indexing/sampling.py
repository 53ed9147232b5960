"""Draws the vectors that train an index's structure, and those that calibrate it, from some of a build's units.

A structure is trained as soon as these units are finished, so segments can be built while other units are still embedded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ragtune_ray.cluster.indexing import units
from ragtune_ray.index import faiss_index, search_effort

FEWEST_UNITS = 64
UNIT_SHARE = 0.05
"""Units that train, at least: so many, and this share of all. A build with fewer units trains on all of them."""
NUM_QUERIES = search_effort.NUM_QUERIES
BYTES_PER_PASSAGE = 1000
SPARE = 4
"""A unit stores its sample before anyone knows how many passages the input has. So many times more vectors than an input with
`BYTES_PER_PASSAGE` needs are enough for one with a `SPARE`th squared of the passages, since samples grow with their root."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Vectors that were drawn from units.

    Attributes:
        sample: (num_sampled, dimension), to train on.
        queries: (num_queries, dimension), held out to calibrate with.
        keys: (num_queries,) unit of each query.
        rows: (num_queries,) of each query in its unit.
    """

    sample: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The queries of a `Drawn`, as they are stored."""

    queries: np.ndarray
    keys: np.ndarray
    rows: np.ndarray

    def save(self, path: Path) -> None:
        """Write a .npz file."""
        np.savez(path, queries=self.queries, keys=self.keys.astype("U64"), rows=self.rows)

    @classmethod
    def load(cls, path: Path) -> HeldOut:
        """Read a .npz file."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["queries"], arrays["keys"], arrays["rows"])


def training_units(names: Sequence[str], seed: int) -> list[int]:
    """The numbers of the units that train, ascending; they hardly change if a unit is added or removed.

    >>> training_units(["a", "b"], 0), len(training_units([f"{number}" for number in range(10_000)], 0))
    ([0, 1], 500)

    Args:
        names: of all units.
        seed: of the draw.
    """
    count = min(len(names), max(FEWEST_UNITS, round(UNIT_SHARE * len(names))))
    drawn = sorted(range(len(names)), key=lambda number: hashlib.sha256(f"{seed} {names[number]}".encode()).digest())
    return sorted(drawn[:count])


def expected_rows(num_rows: int, read_bytes: int, all_bytes: int) -> int:
    """The number of vectors of the whole build, from those of the units that train and the input bytes of both.

    >>> expected_rows(500, 100, 100), expected_rows(500, 100, 1000)
    (500, 5000)
    """
    return num_rows if read_bytes >= all_bytes else round(num_rows * all_bytes / max(1, read_bytes))


def sample_share(num_training: int, num_units: int, size_bytes: int) -> float:
    """The share of its vectors that a unit that trains stores as its sample: a power of two, at most 1.

    >>> sample_share(3, 3, 10**6), sample_share(800, 16_000, 10**12)
    (1.0, 0.5)

    Args:
        num_training: units that train.
        num_units: units of the build.
        size_bytes: of the whole input.
    """
    expected = max(1, size_bytes // BYTES_PER_PASSAGE)
    needed = faiss_index.training_sample_size("ivf_pq", expected) + NUM_QUERIES
    share = SPARE * needed / (expected * num_training / num_units)
    # A power of two, because finished units are only used again by a build with the same share.
    return min(1.0, 2.0 ** math.ceil(math.log2(share)))


def draw(
    build: str,
    training: Sequence[tuple[str, int]],
    kind: faiss_index.ConcreteKind,
    num_vectors: int,
    seed: int,
) -> Drawn:
    """Draw vectors from the samples of units.

    Args:
        build: directory of the build.
        training: key and number of sampled rows of each unit that trains, in order.
        kind: of the structure.
        num_vectors: of the whole build.
        seed: of the draw.
    """
    counts = np.array([rows for _, rows in training], dtype=np.int64)
    total = int(counts.sum())
    size = faiss_index.training_sample_size(kind, num_vectors)
    num_queries = min(NUM_QUERIES, total // 2)
    random = np.random.default_rng(seed)
    drawn = random.choice(total, min(total, size + num_queries), replace=False)
    queries = np.sort(drawn[:num_queries])
    # A small corpus has no vectors to spare, so its held-out vectors are used for training too.
    can_spare = len(drawn) - num_queries >= min(size, total // 2)
    sampled = np.sort(drawn[num_queries:] if can_spare else drawn) if size else np.empty(0, dtype=np.int64)
    edges = np.cumsum(np.concatenate([[0], counts]))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for (key, rows), first in zip(training, edges[:-1].tolist(), strict=True):
        chosen = [_within(ordinals, first, rows) for ordinals in (sampled, queries)]
        if len(chosen[0]) or len(chosen[1]):
            places, vectors = units.read_sample(build, key)
            found.append((vectors[chosen[0]], vectors[chosen[1]], places[chosen[1]]))
        else:
            found.append((np.empty((0, 0)), np.empty((0, 0)), chosen[1]))
    samples, held_out, places = zip(*found, strict=True)
    return Drawn(
        _joined(samples),
        _joined(held_out),
        np.repeat(np.array([key for key, _ in training]), [len(each) for each in places]),
        np.concatenate(places),
    )


def _within(ordinals: np.ndarray, first: int, count: int) -> np.ndarray:
    low, high = np.searchsorted(ordinals, [first, first + count])
    return ordinals[low:high] - first


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    filled = [part for part in parts if part.size]
    return np.concatenate(filled) if filled else np.empty((0, 0), dtype=np.float32)
