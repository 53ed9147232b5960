"""Unit vectors for tests of search: random ones, and some that form clusters."""

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_vectors(count: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dimension)))


def clustered_vectors(count: int, dimension: int = 32) -> np.ndarray:
    source = np.random.default_rng(7)
    centres = source.normal(size=(50, dimension))
    return unit(centres[source.integers(0, 50, count)] + 0.4 * source.normal(size=(count, dimension)))
