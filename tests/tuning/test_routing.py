"""Each failure goes to the component that can learn from it."""

import dataclasses

import pytest

from ragtune_ray.schema import Answer, Passage, Query
from ragtune_ray.tuning import routing

QUERY = Query("q", "When did Apollo 11 land on the Moon?", ("1969",), (), (), "train")
RIGHT = Passage("moon#0", "moon", "Apollo 11 landed on the Moon in July 1969.", "The Moon", "{}", 0, 42)
BY_CHANCE = Passage("song#0", "song", "The song was written in 1969 by two brothers.", "A Song", "{}", 0, 45)
OTHER = Passage("mars#0", "mars", "Mars has two moons.", "Mars", "{}", 0, 19)


def answer(text: str = "Mars", shown: tuple[Passage, ...] = (OTHER,), **changes: object) -> Answer:
    row = Answer(
        "q", QUERY.text, text, (), tuple(each.passage_id for each in shown), (1.0,) * len(shown), False, 0.0, 1, 1, "ok", "", "1", "m"
    )  # fmt: skip
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def routed(
    row: Answer,
    passages: list[Passage],
    query: Query = QUERY,
    score: float | None = 0.0,
    forbidden: tuple[str, ...] = (),
) -> routing.Routed:
    return routing.route(query, row, score, passages, 0.5, forbidden)


def test_a_correct_answer_is_a_success_and_a_failed_row_teaches_nothing() -> None:
    assert routed(answer("1969"), [RIGHT], score=0.5).route == "success"
    assert routed(answer(status="failed"), [RIGHT]).route == "failed"


def test_a_wrong_answer_with_the_right_passage_is_a_reading_failure() -> None:
    assert routed(answer(shown=(OTHER, RIGHT)), [OTHER, RIGHT]).route == "reading"


def test_a_right_passage_not_shown_is_a_retrieval_failure() -> None:
    found = routed(answer(), [OTHER, BY_CHANCE, RIGHT])
    assert (found.route, found.positive) == ("retrieval", RIGHT)


def test_a_passage_with_the_answer_by_chance_is_not_a_positive() -> None:
    assert routed(answer(), [OTHER, BY_CHANCE]) == routing.Routed(QUERY, "unanswerable")


@pytest.mark.parametrize(("judged", "route"), [("song", "retrieval"), ("mars", "unanswerable")])
def test_only_relevant_documents_are_positives_if_any_are_judged(judged: str, route: str) -> None:
    query = dataclasses.replace(QUERY, document_ids=(judged,), relevances=(1.0,))
    assert routed(answer(), [OTHER, RIGHT, BY_CHANCE], query).route == route


def test_documents_of_other_splits_are_never_positives() -> None:
    assert routed(answer(), [OTHER, RIGHT], forbidden=("moon",)).route == "unanswerable"


def test_a_question_without_an_answer_requires_an_abstention() -> None:
    query = dataclasses.replace(QUERY, answers=())
    assert routed(answer(), [], query, None).route == "unanswerable"
    assert routed(answer("I don't know.", abstained=True), [], query, None).route == "success"


def many(route: routing.Route, count: int, positive: Passage | None = None) -> list[routing.Routed]:
    rows = [dataclasses.replace(QUERY, query_id=f"{route}-{number:02d}") for number in range(count)]
    return [routing.Routed(row, route, positive) for row in rows]


def test_each_component_learns_from_its_failures_and_some_successes() -> None:
    rows = [
        *many("success", 50),
        *many("reading", 6),
        *many("retrieval", 3, RIGHT),
        *many("unanswerable", 3),
        *many("failed", 4),
    ]
    learnt = routing.generator_queries(rows, 0.4, seed=0)
    kinds = [query.query_id.partition("-")[0] for query in learnt]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"reading": 6, "unanswerable": 3, "success": 6}
    assert all((query.answers == ()) == query.query_id.startswith("unanswerable") for query in learnt)
    learnt = routing.retriever_queries(rows, 0.4, seed=0)
    assert [query.query_id for query in learnt if query.document_ids == ("moon",)] == [
        f"retrieval-0{number}" for number in range(3)
    ]
    assert len(learnt) == 5
    assert learnt == routing.retriever_queries(rows[::-1], 0.4, seed=0), "the order of the rows does not matter"
    assert learnt != routing.retriever_queries(rows, 0.4, seed=1)


def test_without_failures_there_are_no_training_questions() -> None:
    assert routing.generator_queries(many("success", 9), 0.4, 0) == []
    assert routing.retriever_queries([*many("success", 9), *many("reading", 9)], 0.4, 0) == []


def test_the_table_counts_every_route() -> None:
    table = routing.routing_table([*many("reading", 5), *many("failed", 1)])
    assert {name: row["count"] for name, row in table.items()} == {
        "success": 0,
        "reading": 5,
        "retrieval": 0,
        "unanswerable": 0,
        "failed": 1,
    }
    assert table["reading"]["questions"] == [QUERY.text] * 3
