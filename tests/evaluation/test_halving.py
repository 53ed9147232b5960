"""Successive halving, against rounds worked out by hand."""

import math
from collections.abc import Sequence

import pytest

from ragtune_ray.evaluation import halving


class Table:
    """Scores of each candidate on each question, and the questions that were asked."""

    def __init__(self, **rows: Sequence[float]) -> None:
        self.rows, self.asked = rows, list[tuple[str, int, int]]()

    def scores_of(self, name: str, start: int, stop: int) -> Sequence[float]:
        self.asked.append((name, start, stop))
        return self.rows[name][start:stop]


def test_the_better_half_goes_on_with_twice_the_questions_and_no_question_is_asked_twice() -> None:
    table = Table(
        config=[0.0] * 80,
        early=[1.0] * 20 + [0.0] * 60,  # best in the first round alone
        steady=[0.5] * 80,
        late=[0.25] * 20 + [1.0] * 60,
        worst=[0.0] * 79 + [1.0],
    )
    rounds, scores = halving.halve(list(table.rows), 80, table.scores_of)
    assert [each.num_questions for each in rounds] == [20, 40, 80]
    assert rounds[0].means == {"config": 0, "early": 1, "steady": 0.5, "late": 0.25, "worst": 0}
    assert rounds[0].kept == ("early", "steady", "late")
    assert rounds[1].means == {"early": 0.5, "steady": 0.5, "late": 0.625}
    assert rounds[1].kept == ("late", "early"), "of two equal ones, the first"
    assert rounds[2].means == {"early": 0.25, "late": pytest.approx((5 + 60) / 80)}
    assert rounds[2].kept == ("late",)
    assert sum(len(each.means) for each in rounds) == 5 + 3 + 2
    assert {name: len(values) for name, values in scores.items()} == {
        "config": 20, "early": 80, "steady": 40, "late": 80, "worst": 20,
    }  # fmt: skip
    asked = [(name, question) for name, start, stop in table.asked for question in range(start, stop)]
    assert len(asked) == len(set(asked)) == 20 + 80 + 40 + 80 + 20


def test_of_equal_candidates_the_first_wins() -> None:
    for names in (["config", "a"], ["config", "a", "b", "c", "d"]):
        table = Table(**{name: [0.5] * 100 for name in names})
        assert halving.halve(names, 100, table.scores_of)[0][-1].kept == ("config",)


def test_with_few_questions_all_candidates_answer_all_of_them() -> None:
    table = Table(config=[0.0] * 7, a=[0.0] * 6 + [1.0], b=[0.0] * 7, c=[0.0] * 7)
    rounds, _ = halving.halve(list(table.rows), 7, table.scores_of)
    assert [(each.num_questions, len(each.means), each.kept) for each in rounds] == [(7, 4, ("a",))]


@pytest.mark.parametrize("num_candidates", range(2, 20))
def test_the_last_two_answer_every_question(num_candidates: int) -> None:
    names = [str(number) for number in range(num_candidates)]
    table = Table(**{name: [float(name)] * 10_000 for name in names})
    rounds, scores = halving.halve(names, 10_000, table.scores_of)
    assert len(rounds) == math.ceil(math.log2(num_candidates))
    assert rounds[-1].num_questions == 10_000
    assert len(rounds[-1].means) == 2
    assert rounds[-1].kept == (names[-1],)
    assert sum(map(len, scores.values())) <= 10_000 * min(num_candidates, 6)


def test_a_question_whose_grade_failed_is_left_out_for_all_candidates() -> None:
    given = {"a": [1.0, 0.0, None, 1.0], "b": [1.0, 1.0, 0.0, None]}
    (only,), scores = halving.halve(["a", "b"], 4, lambda name, start, stop: given[name][start:stop])
    assert only.means == {"a": 0.5, "b": 1.0}
    assert only.kept == ("b",)
    assert scores == given
    with pytest.raises(halving.HalvingError, match="no question has a score of each of a, b"):
        halving.halve(["a", "b"], 2, lambda name, *_: [None, 1.0] if name == "a" else [1.0, None])
