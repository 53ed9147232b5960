import pytest

from ragtune_ray import config, schema
from ragtune_ray.evaluation import failures
from ragtune_ray.schema import Answer, Citation, Query


def query(name: str, answers: tuple[str, ...] | None = ("Paris",), documents: tuple[str, ...] = ("d1",)) -> Query:
    return Query(name, f"{name}?", answers, documents, (1.0,) * len(documents), "test")


def answer(name: str, text: str = "", passages: tuple[str, ...] = (), **changes: object) -> Answer:
    facts = {
        "query_id": name, "query": f"{name}?", "answer": text, "citations": (), "passage_ids": passages, "scores": (1.0,) * len(passages),
        "abstained": False, "seconds": 0.1, "prompt_tokens": 1, "completion_tokens": 1, "status": "ok", "error": "",
        "index_version": "", "model": "m",
    }  # fmt: skip
    return Answer(**{**facts, **changes})


CASES = [
    # query, answer, its scores, the loss in an arm that retrieves, in one that does not
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
def test_each_answer_is_counted_once_and_where_its_points_went(arm: config.Arm, place: int) -> None:
    for case in CASES:
        found = failures.losses([case[0]], {case[0].query_id: case[1]}, {case[0].query_id: case[2]}, "token_F1", arm)
        assert [name for name, count in found.items() if count] == [case[place]], case[0].query_id
    together = failures.losses(
        [case[0] for case in CASES],
        {c[0].query_id: c[1] for c in CASES},
        {c[0].query_id: c[2] for c in CASES},
        "token_F1",
        arm,
    )
    assert sum(together.values()) == len(CASES)


def test_shown_questions_favour_no_arm() -> None:
    scores = {
        "base": {f"q{n}": {"EM": float(n in (1, 5))} for n in range(6)},
        "rag": {f"q{n}": {"EM": float(n in (2, 3))} for n in range(6)},
    }
    assert failures.most_telling(scores, "EM", 4) == ["q1", "q2", "q5", "q3"]
    assert len(failures.most_telling(scores, "EM", 100)) == 6
    assert failures.most_telling(scores, "EM", 0) == []


def test_citing_is_counted_among_answers_that_were_given() -> None:
    cited = (Citation("d1#0", "d1", 0, 5),)
    rows = [
        answer("a", "x", citations=cited), answer("b", "x"), answer("c", "x", citations=cited), answer("d", "x", citations=cited),
        answer("e", status="failed"), answer("f", "I don't know", abstained=True),
    ]  # fmt: skip
    found = failures.cited_share(rows, config.Evaluate(), 0)
    assert (found.value, found.n) == (0.75, 4)
    assert failures.cited_share(rows[4:], config.Evaluate(), 0).n == 0


def test_sources_are_numbered_as_they_were_shown_and_what_has_gone_is_left_out() -> None:
    passages = {
        "d1#0": schema.Passage("d1#0", "d1", "text one", "One", "", 0, 8),
        "d3#2": schema.Passage("d3#2", "d3", "text three", "Three", "", 5, 15),
    }
    given = answer("a", "x", ("d1#0", "d2#0", "d3#2"), citations=(Citation("d3#2", "d3", 5, 9),))
    shown = failures.shown_answer(given, 0.5, passages)
    assert [(each["number"], each["title"], each["cited"]) for each in shown["sources"]] == [
        (1, "One", False),
        (3, "Three", True),
    ]
