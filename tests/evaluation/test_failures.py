"""What became of each question of an arm."""

import pytest

from ragtune_ray import config
from ragtune_ray.evaluation import failures
from ragtune_ray.schema import Query
from tests.support.comparisons import answer_row as answer


def query(name: str, answers: tuple[str, ...] | None = ("Paris",), documents: tuple[str, ...] = ("d1",)) -> Query:
    return Query(name, f"{name}?", answers, documents, (1.0,) * len(documents), "test")


CASES = [
    # query, answer, scores, outcome in an arm that retrieves, outcome in one that does not
    (query("right"), answer("right", "Paris", ("d1#0",)), {"token_F1": 1.0}, "correct", "correct"),
    (
        query("wordy"),
        answer("wordy", "It is Paris, I think", ("d1#0",)),
        {"token_F1": 0.3, "contains_answer": 1.0},
        "correct",
        "correct",
    ),
    (query("misread"), answer("misread", "Rome", ("d2#0", "d1#3")), {"token_F1": 0.0}, "misread", "wrong"),
    (query("missed"), answer("missed", "Rome", ("d2#0", "d11#0")), {"token_F1": 0.0}, "not_retrieved", "wrong"),
    (
        query("shy"),
        answer("shy", "I don't know", ("d1#0",), abstained=True),
        {"token_F1": 0.0},
        "abstained",
        "abstained",
    ),
    (
        query("missed and shy"),
        answer("missed and shy", "I don't know", ("d2#0",), abstained=True),
        {"token_F1": 0.0},
        "not_retrieved",
        "abstained",
    ),
    (query("broken"), answer("broken", status="failed", error="x"), {"token_F1": 0.0}, "failed", "failed"),
    (query("none", ()), answer("none", "Rome", ("d1#0",)), {"token_F1": 0.0}, "wrong", "wrong"),
    (query("unjudged", documents=()), answer("unjudged", "Rome", ("d1#0",)), {"token_F1": 0.0}, "wrong", "wrong"),
]


@pytest.mark.parametrize(("arm", "place"), [("rag", 3), ("base", 4)])
def test_each_question_is_counted_once_under_its_outcome(arm: config.Arm, place: int) -> None:
    for case in CASES:
        found = failures.count_outcomes(
            [case[0]], {case[0].query_id: case[1]}, {case[0].query_id: case[2]}, "token_F1", arm
        )
        assert [name for name, count in found.items() if count] == [case[place]], case[0].query_id
    together = failures.count_outcomes(
        [case[0] for case in CASES],
        {c[0].query_id: c[1] for c in CASES},
        {c[0].query_id: c[2] for c in CASES},
        "token_F1",
        arm,
    )
    assert sum(together.values()) == len(CASES)


def test_token_f1_decides_where_the_metric_is_undefined() -> None:
    row, given = query("right"), answer("right", "in Paris", ("d1#0",))

    def outcome(values: dict[str, float]) -> list[str]:
        found = failures.count_outcomes([row], {"right": given}, {"right": values}, "numeric_match", "rag")
        return [name for name, count in found.items() if count]

    assert outcome({"token_F1": 0.67}) == ["correct"]
    assert outcome({"token_F1": 0.67, "numeric_match": 0.0}) == ["misread"]
