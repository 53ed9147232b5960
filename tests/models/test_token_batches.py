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
