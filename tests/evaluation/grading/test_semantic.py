"""The cosine of answer and gold answer, against a product computed by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from ragtune_ray.evaluation.grading.semantic import SemanticGrader
from ragtune_ray.evaluation.grading.task import Task, fixed_value
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.schema import Query
from tests.support.comparisons import answer_row

VECTORS = {"a": (1, 0), "b": (0.6, 0.8), "c": (-1, 0), "d": (0, 1), "nan": (np.nan, 0)}


class Fixed:
    fingerprint, dimension = "fixed", 2

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded += texts
        return np.array([VECTORS[text] for text in texts], dtype=np.float32)

    encode_queries = encode_passages


def test_the_closest_gold_answer_counts_and_opposites_are_0() -> None:
    encoder = Fixed()
    tasks = [
        Task("", golds, answer) for golds, answer in ((("a",), "b"), (("a", "d"), "b"), (("a",), "c"), (("a",), "a"))
    ]
    found = SemanticGrader(encoder).grade(tasks)
    assert [grade.values["semantic"] for grade in found] == pytest.approx([0.6, 0.8, 0.0, 1.0])
    assert sorted(encoder.encoded) == ["a", "b", "c", "d"], "each text once"


def test_a_vector_that_is_not_finite_fails_its_own_grade_alone() -> None:
    first, second = SemanticGrader(Fixed()).grade([Task("", ("a",), "nan"), Task("", ("a",), "b")])
    assert "not finite" in first.error
    assert not first.values
    assert second.values["semantic"] == pytest.approx(0.6)


def test_words_in_another_order_have_another_text_and_the_same_meaning_to_a_bag_of_words() -> None:
    (grade,) = SemanticGrader(HashingEncoder("hashing-64")).grade([Task("", ("red green",), "green red")])
    assert grade.values["semantic"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("golds", "changes", "expected"),
    [
        (("me",), {}, None),
        (None, {}, None),
        (("me",), {"abstained": True}, 0.0),
        (None, {"abstained": True}, 0.0),
        (("me",), {"status": "failed"}, 0.0),
        (("me",), {"answer": " "}, 0.0),
        ((), {"abstained": True}, 1.0),
        ((), {}, 0.0),
        ((), {"abstained": True, "status": "failed"}, 0.0),
    ],
)
def test_what_needs_no_model(golds: tuple[str, ...] | None, changes: dict, expected: float | None) -> None:
    query = Query("q", "Who?", golds, (), (), "test")
    assert fixed_value(query, answer_row("q", **{"answer": "you", **changes})) == expected
