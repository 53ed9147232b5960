"""What is shown: a random order that grows at its end, pairs of answers, equal ones once."""

import pytest

from ragtune_ray.evaluation.labelling import drawing
from ragtune_ray.evaluation.labelling.drawing import Item
from ragtune_ray.schema import Passage, Query


def query(name: str, *golds: str) -> Query:
    return Query(name, f"{name}?", golds or None, (), (), "test")


def test_the_order_is_random_and_grows_at_its_end() -> None:
    names = [f"q{number}" for number in range(1000)]
    order = drawing.ordered(names, seed=3)
    assert sorted(order) == sorted(names)
    assert drawing.ordered(reversed(names), seed=3) == order
    assert drawing.ordered(names, seed=4) != order
    # The mean place of 100 drawn of 1,000 is 499.5 with a standard deviation of 27.4.
    assert sum(int(name[1:]) for name in order[:100]) / 100 == pytest.approx(499.5, abs=3 * 27.4)


def test_answers_are_shown_in_pairs_without_their_arms() -> None:
    answers = {
        "base": {"q1": "A", "q2": "A"}, "rag": {"q1": "B", "q2": "A"}, "ft": {"q1": "C", "q2": "A"}, "rag+ft": {"q1": "D"},
    }  # fmt: skip
    found = drawing.items([query("q2", "A"), query("q1")], answers, seed=0)
    assert found[0] == Item("q2", "q2?", ("A",), ("A",))
    assert [item.query_id for item in found[1:]] == ["q1", "q1"]
    assert {answer for item in found[1:] for answer in item.answers} == set("ABCD")
    assert [len(item.answers) for item in found[1:]] == [2, 2]


def test_the_better_arm_is_as_often_left_as_right() -> None:
    names = [f"q{number}" for number in range(400)]
    answers = {"base": dict.fromkeys(names, "No."), "rag": dict.fromkeys(names, "Yes.")}
    found = drawing.items(list(map(query, names)), answers, seed=1)
    left = sum(item.answers[0] == "Yes." for item in found)
    assert abs(left - 200) < 40, "four standard deviations"


def test_sources_are_listed_once_in_order() -> None:
    one, two, three = (Passage(f"d{n}#0", f"d{n}", f"text {n}", "Title", "{}", 0, 6) for n in (1, 2, 3))
    found = drawing.sources_of([(), (two, one), (two, three)])
    assert [each.document_id for each in found] == ["d2", "d1", "d3"]
