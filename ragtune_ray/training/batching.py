"""Decides which examples each optimizer step trains on.

The plan depends only on the examples and the settings, not on the number of workers or on interruptions, so a resumed run
trains on the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ragtune_ray import config


def steps_per_epoch(num_examples: int, batch_examples: int) -> int:
    """Number of steps in one epoch.

    >>> steps_per_epoch(33, 16)
    3
    """
    return -(-num_examples // batch_examples)


def smallest_step(num_examples: int, batch_examples: int) -> int:
    """Number of examples in the smallest step, which is also the largest number of workers that all get one.

    >>> smallest_step(33, 16)
    11
    """
    return num_examples // steps_per_epoch(num_examples, batch_examples)


def num_steps(num_examples: int, settings: config.Training) -> int:
    """Number of optimizer steps in the whole run."""
    total = settings.epochs * steps_per_epoch(num_examples, settings.batch_examples)
    return min(total, settings.max_steps or total)


def passage_groups(passage_ids: pa.ChunkedArray) -> np.ndarray:
    """Number the groups of examples that show the same passages in the same order: (num_examples,).

    `passage_ids` has one list per example. An example without passages forms its own group.

    >>> passage_groups(pa.chunked_array([[["a", "b"], ["b"], ["a", "b"], [], []]])).tolist()
    [0, 1, 0, 2, 3]
    """
    encoded = pc.dictionary_encode(pc.binary_join(passage_ids, "\0"))
    numbers = encoded.combine_chunks().indices.to_numpy().astype(np.int64)
    alone = pc.list_value_length(passage_ids).to_numpy() == 0
    numbers[alone] = len(numbers) + np.flatnonzero(alone)
    return np.unique(numbers, return_inverse=True)[1]


def steps(groups: np.ndarray, settings: config.Training, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Yield the row numbers of each step, from step `first` to the end of the run.

    Every epoch shuffles the groups (num_examples,), which `passage_groups` numbers, and the examples within each group. Examples
    of one group stay adjacent, so that a step encodes their passages once. The steps of an epoch differ in size by at most one
    example.
    """
    num_examples = len(groups)
    per_epoch = steps_per_epoch(num_examples, settings.batch_examples)
    total = num_steps(num_examples, settings)
    for epoch in range(first // max(per_epoch, 1), -(-total // max(per_epoch, 1))):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(num_examples)
        if num_examples:
            group_order = rng.permutation(int(groups.max()) + 1)
            order = order[np.argsort(group_order[groups[order]], kind="stable")]
        for number, rows in enumerate(np.array_split(order, per_epoch), start=epoch * per_epoch):
            if first <= number < total:
                yield rows


def worker_rows(lengths: np.ndarray, worker: int, num_workers: int) -> np.ndarray:
    """Select a worker's rows of a step by their lengths in tokens: every `num_workers`-th, which balances the work.

    >>> worker_rows(np.array([5, 9, 7, 1]), 1, 2).tolist()
    [2, 3]
    """
    return np.argsort(-lengths, kind="stable")[worker::num_workers]
