"""`run.trec`: trec_eval, which ignores ranks and orders by score, sees the order of the hits."""

import numpy as np
import pytest

from ragtune_ray.cluster.answering.retrieve import trec_lines
from ragtune_ray.schema import Hit


def hits_of(query_id: str, scores: list[float]) -> list[Hit]:
    return [Hit(query_id, f"d{rank}#0", f"d{rank}", rank, score) for rank, score in enumerate(scores, start=1)]


def order_of_trec_eval(lines: list[str], query_id: str) -> list[str]:
    """By float32 score, then by passage id, both descending."""
    rows = [line.split() for line in lines if line.startswith(f"{query_id} ")]
    return [row[2] for row in sorted(rows, key=lambda row: (np.float32(row[4]), row[2]), reverse=True)]


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5, 0.25], [0.5, 0.5, 0.49999997, 0.4], [0.0, 0.0, -1.0], [7.5, 7.5]])
def test_equal_scores_keep_the_order_of_the_hits(scores: list[float]) -> None:
    # By id alone, the later of two equal scores would come first: "d2#0" > "d1#0".
    hits = [*hits_of("a", scores), *hits_of("b", scores)]
    lines = list(trec_lines(hits))
    for query_id in ("a", "b"):
        assert order_of_trec_eval(lines, query_id) == [hit.passage_id for hit in hits if hit.query_id == query_id]
    written = [float(line.split()[4]) for line in lines[: len(scores)]]
    np.testing.assert_allclose(written, scores, rtol=1e-6, atol=1e-6)
    assert lines[len(scores)].split()[4] == lines[0].split()[4], "every query starts with the same score"
