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


def test_the_best_of_many_must_be_better_at_the_corrected_confidence() -> None:
    """BM25 alone gains two standard errors: enough for one alternative at 95 %, not for one of eleven."""
    spread = np.random.default_rng(1).normal(0, 0.1, QUESTIONS)
    gain = spread - spread.mean() + 2.3 * spread.std() / np.sqrt(QUESTIONS)

    def measure(values: Mapping[str, Any]) -> Scores:
        extra = gain if values == {"retrieval.mode": "lexical"} else np.full(QUESTIONS, -0.1 if values else 0.0)
        recalls = {f"recall@{k}": 0.5 for k in (1, 3, 5, 10)}
        return {f"q{n}": {"nDCG@10": 0.5 + each, **recalls} for n, each in enumerate(extra)}

    settings = config.Config()
    fit = fit_retrieval(settings, measure)
    assert fit is not None
    found = fit.tried[2].difference
    # The normal quantile of 1 - .05 / 11 / 2; that of .975 would leave a low end above 0.
    error = spread.std() / np.sqrt(QUESTIONS)
    assert found.low == pytest.approx(found.value - 2.838 * error, abs=0.3 * error)
    assert found.value - 1.96 * error > 0 > found.low
    assert fit.advised == {}
    lenient = settings.with_values({"evaluate.confidence": 0.5})
    again = fit_retrieval(lenient, measure)
    assert again is not None
    assert again.advised == {"retrieval.mode": "lexical"}


def test_recall_of_documents_advises_no_number_of_passages() -> None:
    settings = config.Config().with_values({"retrieval.top_k": 7})
    fit = fit_retrieval(settings, world(peak_at(0.35, 0.5, 0.6), []))
    assert fit is not None
    assert fit.advised == {}


def test_an_index_with_unknown_scripts_gets_both_weights() -> None:
    asked: list[dict[str, Any]] = []
    names = ("retrieval.lexical_weight", "retrieval.unknown_script_weight")
    fit_retrieval(config.Config(), world(peak_at(0.35, 0.5, 0.6), asked), names)
    assert asked[3]["retrieval.lexical_weight"] == asked[3]["retrieval.unknown_script_weight"] == WEIGHTS[0]


def test_few_questions_choose_nothing() -> None:
    def measure(values: Mapping[str, Any]) -> Scores:
        return {f"q{n}": {"nDCG@10": 1.0} for n in range(29)} | {"other": {}}

    assert fit_retrieval(config.Config(), measure) is None
