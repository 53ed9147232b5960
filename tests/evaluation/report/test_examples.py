"""Which questions are shown as examples, and the sources of their answers."""

from ragtune_ray import schema
from ragtune_ray.evaluation.report import examples
from ragtune_ray.schema import Citation
from tests.support.comparisons import answer_row as answer


def test_example_questions_favour_no_arm() -> None:
    scores = {
        "base": {f"q{n}": {"EM": float(n in (1, 5))} for n in range(6)},
        "rag": {f"q{n}": {"EM": float(n in (2, 3))} for n in range(6)},
    }
    assert examples.most_telling(scores, "EM", 4) == ["q1", "q2", "q5", "q3"]
    assert len(examples.most_telling(scores, "EM", 100)) == 6
    assert examples.most_telling(scores, "EM", 0) == []


def test_the_most_contested_questions_are_those_on_which_two_metrics_differ_most() -> None:
    pairs = {
        "q0": (1.0, 0.0, 0.0, 1.0),
        "q1": (0.6, 0.2, 0.0, 1.0),
        "q2": (1.0, 0.0, 1.0, 1.0),
        "q3": (0.0, 1.0, 0.0, 1.0),
    }
    scores = {
        "ft": {name: {"token_F1": f1, "judge": judge} for name, (f1, _, judge, _) in pairs.items()},
        "rag": {name: {"token_F1": f1, "judge": judge} for name, (_, f1, _, judge) in pairs.items()},
    }
    scores["rag"]["q4"] = scores["ft"]["q4"] = {"token_F1": 1.0}
    metrics, arms = ("token_F1", "judge"), ("rag", "ft")
    assert examples.most_contested(scores, metrics, arms, 9) == ["q0", "q1"], (
        "both metrics agree on q3, the judge is even on q2"
    )
    assert examples.most_contested(scores, metrics, arms, 1) == ["q0"]


def test_sources_keep_their_numbers_and_missing_ones_are_dropped() -> None:
    passages = {
        "d1#0": schema.Passage("d1#0", "d1", "text one", "One", "", 0, 8),
        "d3#2": schema.Passage("d3#2", "d3", "text three", "Three", "", 5, 15),
    }
    given = answer("a", "x", ("d1#0", "d2#0", "d3#2"), citations=(Citation("d3#2", "d3", 5, 9),))
    shown = examples.shown_answer(given, 0.5, passages)
    assert [(each.number, each.title, each.cited) for each in shown.sources] == [
        (1, "One", False),
        (3, "Three", True),
    ]
