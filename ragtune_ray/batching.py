"""Examples -> the optimiser steps of a run: which examples, in which order.

In: how many examples there are and the settings of training. Out: row numbers per step. They depend on nothing else: not on the
workers, not on when a run was interrupted. So a run that is killed and resumed sees the same batches. This module knows nothing
of texts, tensors or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ragtune_ray import config

__all__ = ["num_steps", "own_rows", "steps", "steps_per_epoch"]


def steps_per_epoch(num_examples: int, batch_examples: int) -> int:
    """Steps of one pass.

    >>> steps_per_epoch(33, 16)
    3
    """
    return -(-num_examples // batch_examples)


def num_steps(num_examples: int, settings: config.Training) -> int:
    """Optimiser steps of the whole run."""
    every = settings.epochs * steps_per_epoch(num_examples, settings.batch_examples)
    return min(every, settings.max_steps or every)


def steps(num_examples: int, settings: config.Training, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """The rows of each step from the `first` on, to the end of the run.

    Each epoch draws its own order; its steps differ by one example at most, so that none is a remnant.

    Args:
        num_examples: in the training set.
        settings: batch_examples, epochs and max_steps are used.
        seed: another one draws other orders.
        first: steps that are done already.
    """
    each = steps_per_epoch(num_examples, settings.batch_examples)
    total = num_steps(num_examples, settings)
    for epoch in range(first // max(each, 1), -(-total // max(each, 1))):
        order = np.random.default_rng([seed, epoch]).permutation(num_examples)
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
