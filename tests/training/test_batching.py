"""Batches: each example once per epoch, the same steps after an interruption, equal work for all workers."""

import itertools
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import config
from ragtune_ray.training.batching import num_steps, passage_groups, steps, steps_per_epoch, worker_rows


def training(batch_examples: int, epochs: int = 1, max_steps: int = 0) -> config.Training:
    return config.Training(batch_examples=batch_examples, epochs=epochs, max_steps=max_steps)


def rows_of(num_examples: int, settings: config.Training, seed: int = 0, first: int = 0) -> list[list[int]]:
    """The steps if no two examples show the same passages."""
    return [rows.tolist() for rows in steps(np.arange(num_examples), settings, seed, first)]


@pytest.mark.parametrize(
    ("num_examples", "batch_examples", "expected"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (32, 16, 2), (7, 1, 7)]
)
def test_an_epoch_has_as_few_steps_as_the_batch_allows(num_examples: int, batch_examples: int, expected: int) -> None:
    assert steps_per_epoch(num_examples, batch_examples) == expected
    assert num_steps(num_examples, training(batch_examples, 3)) == 3 * expected
    assert len(rows_of(num_examples, training(batch_examples, 3))) == 3 * expected


@given(st.integers(1, 150), st.integers(1, 40), st.integers(1, 4), st.integers(0, 10**6))
def test_each_epoch_visits_every_example_once_in_even_steps(
    num_examples: int, batch_examples: int, epochs: int, seed: int
) -> None:
    settings = training(batch_examples, epochs)
    every = rows_of(num_examples, settings, seed)
    each = -(-num_examples // batch_examples)
    assert len(every) == num_steps(num_examples, settings) == epochs * each
    for epoch in range(epochs):
        taken = every[epoch * each : (epoch + 1) * each]
        assert sorted(row for rows in taken for row in rows) == list(range(num_examples))
        sizes = [len(rows) for rows in taken]
        assert max(sizes) <= batch_examples
        assert max(sizes) - min(sizes) <= 1


@given(st.data())
def test_a_resumed_run_takes_the_remaining_steps(data: Any) -> None:
    num_examples = data.draw(st.integers(1, 60))
    settings = training(
        data.draw(st.integers(1, 20)), epochs=data.draw(st.integers(1, 4)), max_steps=data.draw(st.integers(0, 30))
    )
    every = rows_of(num_examples, settings, seed=5)
    for first in range(len(every) + 3):
        assert rows_of(num_examples, settings, seed=5, first=first) == every[first:]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.integers(1, 100))
def test_max_steps_takes_the_first_steps_of_the_full_run(
    num_examples: int, batch_examples: int, epochs: int, max_steps: int
) -> None:
    every = rows_of(num_examples, training(batch_examples, epochs))
    fewer = training(batch_examples, epochs, max_steps)
    assert rows_of(num_examples, fewer) == every[:max_steps]
    assert num_steps(num_examples, fewer) == min(max_steps, len(every))


def test_each_epoch_and_seed_has_a_different_order() -> None:
    settings = training(100, epochs=3)
    orders = [rows for seed in (0, 1) for rows in rows_of(100, settings, seed)]
    assert len({tuple(order) for order in orders}) == 6
    assert all(order != sorted(order) for order in orders)
    assert orders[:3] == rows_of(100, settings, 0), "the same seed has the same order"


def test_examples_with_the_same_passages_are_adjacent_in_random_order() -> None:
    shown = [["b", "a"], ["a"], ["b", "a"], [], ["a", "b"], ["a"], [], ["b", "a"]]
    alike = passage_groups(pa.chunked_array([shown[:3], shown[3:]], pa.list_(pa.string())))
    assert alike.tolist() == [0, 1, 0, 3, 2, 1, 4, 0]
    orders = {tuple(next(steps(alike, training(8), seed)).tolist()) for seed in range(40)}
    assert len(orders) > 30
    for order in orders:
        together = [alike[row] for row in order]
        assert len([1 for one, other in itertools.pairwise(together) if one != other]) == len(set(alike)) - 1
    assert {tuple(row for row in order if alike[row] == 0) for order in orders} == set(
        itertools.permutations([0, 2, 7])
    )


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 20))
def test_grouping_keeps_every_example_once_per_epoch(numbers: list[int], batch_examples: int) -> None:
    alike = np.unique(numbers, return_inverse=True)[1]
    taken = [row for rows in steps(alike, training(batch_examples), 3) for row in rows.tolist()]
    assert sorted(taken) == list(range(len(numbers)))


def test_no_examples_mean_no_steps() -> None:
    assert rows_of(0, training(4, epochs=2)) == []
    assert rows_of(0, training(4, epochs=2), first=3) == []


def test_a_few_steps_do_not_draw_all_epochs() -> None:
    start = time.process_time()
    assert len(rows_of(1000, training(500, epochs=100_000, max_steps=3))) == 3
    assert time.process_time() - start < 0.5


LENGTHS = st.lists(st.integers(1, 2000), max_size=40)


@given(LENGTHS, st.integers(1, 50))
def test_workers_share_the_rows_and_tokens_of_a_step_evenly(lengths: list[int], workers: int) -> None:
    taken = [worker_rows(np.array(lengths, dtype=np.int64), worker, workers).tolist() for worker in range(workers)]
    assert sorted(row for rows in taken for row in rows) == list(range(len(lengths)))
    counts = [len(rows) for rows in taken]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(lengths[row] for row in rows) for rows in taken]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


def test_rows_of_equal_length_alternate_between_workers() -> None:
    assert [worker_rows(np.full(5, 7), worker, 2).tolist() for worker in (0, 1)] == [[0, 2, 4], [1, 3]]
    # By length: 90, 80 | 70, 40 | 30.
    assert [worker_rows(np.array([40, 90, 30, 70, 80]), worker, 2).tolist() for worker in (0, 1)] == [[1, 3, 2], [4, 0]]
