"""The fit of retrieval: what is tried, what is advised, and that nothing is advised by chance."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.evaluation.retrieval_fit import WEIGHTS, Scores, fit_retrieval, summary_lines

QUESTIONS = 200
NOISE = np.random.default_rng(0).normal(0, 0.02, QUESTIONS)


def world(quality: Callable[[config.Retrieval], float], asked: list[dict[str, Any]]) -> Callable[..., Scores]:
    """A `measure` whose nDCG@10 is this quality for every question, but for fixed noise; recall grows with k."""

    def measure(values: Mapping[str, Any]) -> Scores:
        asked.append(dict(values))
        mean = quality(config.Config().with_values(values).retrieval)
        recalls = {"recall@1": 0.5, "recall@3": 0.85, "recall@5": 0.89, "recall@10": 0.9}
        sign = -1 if len(asked) % 2 else 1
        return {f"q{n}": {"nDCG@10": mean + sign * noise, **recalls} for n, noise in enumerate(NOISE)}

    return measure


def peak_at(best: float, dense: float, lexical: float) -> Callable[[config.Retrieval], float]:
    """A hybrid that loses as the square of the distance of its weight to the best one; more candidates change nothing."""

    def quality(retrieval: config.Retrieval) -> float:
        match retrieval.mode:
            case "dense":
                return dense
            case "lexical":
                return lexical
        return 0.9 - (retrieval.lexical_weight - best) ** 2

    return quality


def test_the_best_weight_is_advised_and_more_candidates_only_if_they_help() -> None:
    asked: list[dict[str, Any]] = []
    fit = fit_retrieval(config.Config(), world(peak_at(0.7, 0.5, 0.6), asked))
    assert fit is not None
    assert fit.advised == {"retrieval.lexical_weight": 0.7}
    assert [values.get("retrieval.mode") for values in asked[:3]] == [None, "dense", "lexical"]
    assert [values["retrieval.lexical_weight"] for values in asked[3:10]] == list(WEIGHTS)
    assert [values["retrieval.candidates"] for values in asked[10:]] == [100, 200]
    assert {values["retrieval.lexical_weight"] for values in asked[10:]} == {0.7}
    tried = {each.settings.get("retrieval.lexical_weight"): each for each in fit.tried[3:10]}
    assert tried[0.7].difference.value == pytest.approx((0.7 - 0.35) ** 2, abs=0.005)
    assert tried[0.7].difference.low > 0
    assert fit.recalls == pytest.approx({1: 0.5, 3: 0.85, 5: 0.89, 10: 0.9})


def test_a_difference_that_may_be_chance_changes_nothing() -> None:
    fit = fit_retrieval(config.Config(), world(peak_at(0.3505, 0.5, 0.6), []))
    assert fit is not None
    assert fit.advised == {}
    assert summary_lines(fit)[-1] == "nothing is better than the current settings with confidence; keep them"


@pytest.mark.parametrize(("dense", "lexical", "mode"), [(0.2, 0.97, "lexical"), (0.97, 0.2, "dense")])
def test_the_better_half_is_advised_where_the_other_harms(dense: float, lexical: float, mode: str) -> None:
    asked: list[dict[str, Any]] = []
    fit = fit_retrieval(config.Config(), world(peak_at(0.35, dense, lexical), asked))
    assert fit is not None
    assert fit.advised == {"retrieval.mode": mode}
    assert summary_lines(fit)[-1] == f"set: retrieval.mode={mode}"
    assert not any("retrieval.candidates" in values for values in asked), "one half needs no more candidates"


@pytest.mark.parametrize(("margin", "top_k"), [(0.02, 5), (0.06, 3), (0.0, 10)])
def test_the_number_of_hits_is_the_smallest_that_loses_no_more_than_the_margin(margin: float, top_k: int) -> None:
    settings = config.Config().with_values({"compare.margin": margin, "retrieval.top_k": 7})
    fit = fit_retrieval(settings, world(peak_at(0.35, 0.5, 0.6), []))
    assert fit is not None
    assert fit.advised == {"retrieval.top_k": top_k}


def test_an_index_with_unknown_scripts_gets_both_weights() -> None:
    asked: list[dict[str, Any]] = []
    names = ("retrieval.lexical_weight", "retrieval.unknown_script_weight")
    fit_retrieval(config.Config(), world(peak_at(0.35, 0.5, 0.6), asked), names)
    assert asked[3]["retrieval.lexical_weight"] == asked[3]["retrieval.unknown_script_weight"] == WEIGHTS[0]


def test_few_questions_choose_nothing() -> None:
    def measure(values: Mapping[str, Any]) -> Scores:
        return {f"q{n}": {"nDCG@10": 1.0} for n in range(29)} | {"other": {}}

    assert fit_retrieval(config.Config(), measure) is None
