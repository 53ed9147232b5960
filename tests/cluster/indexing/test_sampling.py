"""Vectors that train and calibrate an index: drawn once each, from the whole input."""

from pathlib import Path

import numpy as np
import pytest

from ragtune_ray.cluster.indexing import sampling, units

DIMENSION = 8


def store(build: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    source = np.random.default_rng(1)
    vectors = {f"u{number}": source.normal(size=(size, DIMENSION)).astype("f4") for number, size in enumerate(sizes)}
    samples = {key: (np.arange(len(rows))[::-1], rows[::-1]) for key, rows in vectors.items()}
    monkeypatch.setattr(units, "read_sample", lambda _, key: samples[key])
    return vectors


@pytest.mark.parametrize("kind", ["ivf_sq", "ivf_pq", "flat", "hnsw"])
@pytest.mark.parametrize("sizes", [[1], [0, 2, 0], [700, 300, 500], [3000, 0, 1000]])
def test_queries_are_distinct_vectors_at_the_places_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, sizes: list[int]
) -> None:
    vectors = store(tmp_path, sizes, monkeypatch)
    training = [(key, len(rows)) for key, rows in vectors.items()]
    drawn = sampling.draw(str(tmp_path), training, kind, sum(sizes), seed=3)
    assert len(drawn.queries) == min(sampling.NUM_QUERIES, sum(sizes) // 2)
    places = list(zip(drawn.keys.tolist(), drawn.rows.tolist(), strict=True))
    assert len(set(places)) == len(places)
    for query, (key, row) in zip(drawn.queries, places, strict=True):
        np.testing.assert_array_equal(query, vectors[key][row])
    if kind in {"flat", "hnsw"}:
        assert len(drawn.sample) == 0
    else:
        stored = {row.tobytes() for rows in vectors.values() for row in rows}
        assert {row.tobytes() for row in drawn.sample} <= stored
        assert len({row.tobytes() for row in drawn.sample}) == len(drawn.sample) > 0


def test_a_large_sample_leaves_the_queries_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = store(tmp_path, [40_000], monkeypatch)
    drawn = sampling.draw(str(tmp_path), [("u0", 40_000)], "ivf_sq", 40_000, seed=3)
    assert len(vectors["u0"]) > len(drawn.sample) + len(drawn.queries)
    assert not {row.tobytes() for row in drawn.sample} & {row.tobytes() for row in drawn.queries}


def test_training_units_are_spread_over_the_input() -> None:
    names = [f"part {number}" for number in range(4_000)]
    chosen = np.array(sampling.training_units(names, seed=1))
    assert len(set(chosen.tolist())) == 200
    quarters = np.histogram(chosen, bins=4, range=(0, 4_000))[0]
    assert quarters.min() > 30
    assert sampling.training_units(names, seed=1) == chosen.tolist()
    assert sampling.training_units(names, seed=2) != chosen.tolist()
    without = [name for name in names if name != "part 7"]
    kept = {without[number] for number in sampling.training_units(without, seed=1)}
    assert len(kept - {names[number] for number in chosen}) <= 1


@pytest.mark.parametrize("size_bytes", [10**6, 10**9, 10**12])
@pytest.mark.parametrize("passage_bytes", [150, 1_000, 10_000])
def test_samples_suffice_for_short_and_long_passages(size_bytes: int, passage_bytes: int) -> None:
    num_units = max(1, min(16_000, size_bytes // 2**18))
    training = len(sampling.training_units([str(number) for number in range(num_units)], 0))
    share = sampling.sample_share(training, num_units, size_bytes)
    num_vectors = size_bytes // passage_bytes
    sampled = share * num_vectors * training / num_units
    needed = sampling.faiss_index.training_sample_size("ivf_sq", num_vectors)
    assert sampled >= 0.99 * min(needed, num_vectors * training / num_units)
