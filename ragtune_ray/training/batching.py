"""Examples -> the optimiser steps of a run: which examples, in which order.

In: which passages each example shows and the settings of training. Out: row numbers per step. They depend on nothing else: not
on the workers, not on when a run was interrupted. So a run that is killed and resumed sees the same batches. This module knows
nothing of texts, tensors or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ragtune_ray import config

__all__ = ["num_steps", "own_rows", "same_passages", "smallest_step", "steps", "steps_per_epoch"]


def steps_per_epoch(num_examples: int, batch_examples: int) -> int:
    """Steps of one pass.

    >>> steps_per_epoch(33, 16)
    3
    """
    return -(-num_examples // batch_examples)


def smallest_step(num_examples: int, batch_examples: int) -> int:
    """Examples of the smallest step: the most workers of which each has one in every step.

    >>> smallest_step(33, 16)
    11
    """
    return num_examples // steps_per_epoch(num_examples, batch_examples)


def num_steps(num_examples: int, settings: config.Training) -> int:
    """Optimiser steps of the whole run."""
    every = settings.epochs * steps_per_epoch(num_examples, settings.batch_examples)
    return min(every, settings.max_steps or every)


def same_passages(passage_ids: pa.ChunkedArray) -> np.ndarray:
    """A number for each example, alike where the same passages are shown in the same order: (num_examples,).

    >>> same_passages(pa.chunked_array([[["a", "b"], ["b"], ["a", "b"], [], []]])).tolist()
    [0, 1, 0, 2, 3]

    Args:
        passage_ids: lists; an example without passages is like no other.
    """
    shown = pc.dictionary_encode(pc.binary_join(passage_ids, "\0"))
    numbers = shown.combine_chunks().indices.to_numpy().astype(np.int64)
    alone = pc.list_value_length(passage_ids).to_numpy() == 0
    numbers[alone] = len(numbers) + np.flatnonzero(alone)
    return np.unique(numbers, return_inverse=True)[1]


def steps(alike: np.ndarray, settings: config.Training, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """The rows of each step from the `first` on, to the end of the run.

    Each epoch draws its own order, of passages and of the examples that show the same ones: those come one after the other, so
    that a step reads their passages once. The steps of an epoch differ by one example at most, so that none is a remnant.

    Args:
        alike: (num_examples,) a number per example, as `same_passages` gives; all different: no two go together.
        settings: batch_examples, epochs and max_steps are used.
        seed: another one draws other orders.
        first: steps that are done already.
    """
    num_examples = len(alike)
    each = steps_per_epoch(num_examples, settings.batch_examples)
    total = num_steps(num_examples, settings)
    for epoch in range(first // max(each, 1), -(-total // max(each, 1))):
        source = np.random.default_rng([seed, epoch])
        order = source.permutation(num_examples)
        if num_examples:
            place_of = source.permutation(int(alike.max()) + 1)
            order = order[np.argsort(place_of[alike[order]], kind="stable")]
        for number, rows in enumerate(np.array_split(order, each), start=epoch * each):
            if first <= number < total:
                yield rows


def own_rows(lengths: np.ndarray, worker: int, workers: int) -> np.ndarray:
    """Which of a step's rows a worker takes: every `workers`-th by length, so that all have about as much to do.

    >>> own_rows(np.array([5, 9, 7, 1]), 1, 2).tolist()
    [2, 3]

    Args:
        lengths: tokens of each row of the step.
        worker: from 0.
        workers: how many there are.
    """
    return np.argsort(-lengths, kind="stable")[worker::workers]
