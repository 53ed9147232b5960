"""Verdicts on hand-computed numbers."""

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.tuning import gates

SETTINGS = config.Config().using("evaluate.resamples=2000", "tune.confidence=0.9", "tune.margin=0.02")


def scores(values: list[float]) -> dict[str, float]:
    return {f"q{number}": value for number, value in enumerate(values)}


def judged(before: list[float], after: list[float], problems: tuple[str, ...] = ()) -> gates.Verdict:
    return gates.judge("generator", "EM", scores(before), scores(after), problems, 9, SETTINGS)


def test_a_significant_gain_is_accepted_with_its_numbers() -> None:
    verdict = judged([0.0] * 30 + [1.0] * 10, [1.0] * 40)
    assert (verdict.accepted, verdict.reason, verdict.num_examples, verdict.n) == (True, "better", 9, 40)
    assert (verdict.before, verdict.after) == (0.25, 1.0)
    assert verdict.low is not None
    assert verdict.high is not None
    assert 0.6 < verdict.low < 0.75 < verdict.high < 0.9


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ([0.0] * 40, [0.0] * 40, "no gain"),
        ([1.0] * 40, [0.0] * 40, "a loss"),
        # One more correct of forty, with eleven changes: inconclusive.
        ([0.0] * 6 + [1.0] * 5 + [0.0] * 29, [1.0] * 6 + [0.0] * 5 + [0.0] * 29, "a loss of more than 0.02 cannot"),
    ],
)
def test_a_change_that_may_be_a_loss_is_refused(before: list[float], after: list[float], reason: str) -> None:
    verdict = judged(before, after)
    assert not verdict.accepted
    assert verdict.reason.startswith(reason)


def test_a_guard_refuses_even_a_gain_and_gives_its_reason() -> None:
    verdict = judged([0.0] * 40, [1.0] * 40, ("its passages collapse",))
    assert (verdict.accepted, verdict.reason, verdict.after) == (False, "its passages collapse", 1.0)


def test_questions_are_paired_by_id_and_too_few_are_refused() -> None:
    before, after = scores([0.0] * 40), dict(reversed(scores([1.0] * 40).items()))
    assert gates.judge("retriever", "MRR@10", before, after, (), 9, SETTINGS).n == 40
    few = gates.judge("retriever", "MRR@10", before, scores([1.0] * 19), (), 9, SETTINGS)
    assert (few.accepted, few.after) == (False, None)
    assert "19 validation questions are scored, fewer than 20" in few.reason


def test_the_mean_cosine_equals_a_loop_over_pairs() -> None:
    vectors = np.random.default_rng(0).standard_normal((7, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [float(vectors[i] @ vectors[j]) for i in range(7) for j in range(7) if i != j]
    assert gates.mean_cosine(vectors) == pytest.approx(np.mean(pairs))
    assert gates.mean_cosine(np.ones((4, 1))) == 1.0


def test_a_collapsed_encoder_is_distinguished_from_a_changed_one() -> None:
    assert gates.spread_problem(0.10, 0.20, 0.15) == ""
    assert "collapse: the mean cosine of random ones rose from 0.10 to 0.90" in gates.spread_problem(0.10, 0.90, 0.15)


def test_forgetting_is_a_problem_only_if_significant() -> None:
    assert gates.probe_problem(scores([1.0] * 20), scores([0.0] * 20), SETTINGS).startswith("it forgets: -1.000")
    assert gates.probe_problem(scores([1.0, *[0.0] * 19]), scores([0.0] * 20), SETTINGS) == ""
    assert gates.probe_problem({}, {}, SETTINGS) == ""


def test_a_teacher_must_rank_better_and_be_informative() -> None:
    good = {"MRR": 0.8, "retriever_MRR": 0.6, "entropy": 0.5, "n": 30}
    assert gates.teacher_problem(good) == ""
    assert "no better than the retriever" in gates.teacher_problem({**good, "MRR": 0.6})
    assert "hardly distinguish" in gates.teacher_problem({**good, "entropy": 0.99})
    assert "cannot be checked" in gates.teacher_problem({**good, "n": 0})
