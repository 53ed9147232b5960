"""Rows of similar length form batches within a token budget."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray.models.token_batches import batches_by_length


@given(st.lists(st.integers(0, 600), max_size=60), st.integers(1, 2048))
def test_batches_contain_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(np.array(lengths, dtype=np.int64), budget)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    # Longest first, so that a lack of memory shows at once.
    in_order = [lengths[row] for batch in batches for row in batch.tolist()]
    assert in_order == sorted(lengths, reverse=True)


def test_batches_are_as_large_as_the_budget_allows() -> None:
    assert [len(batch) for batch in batches_by_length(np.full(10, 16), 64)] == [4, 4, 2]


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60), st.integers(0, 500))
def test_batches_are_divided_only_where_padding_would_be_more_than_allowed(lengths: list[int], most: int) -> None:
    batches = batches_by_length(np.array(lengths, dtype=np.int64), 10**6, most)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    ordered = [[lengths[row] for row in batch] for batch in batches]
    for batch, following in zip(ordered, [*ordered[1:], []], strict=True):
        padding = sum(batch[0] - length for length in batch)
        assert padding <= most
        assert not following or padding + batch[0] - following[0] > most
