"""The fit of rewriting and splitting: what is tried on which questions, what is advised, and that nothing is by chance."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.evaluation.retrieval_fit import Scores
from ragtune_ray.evaluation.search_fit import fit_searches, search_lines

FOLLOW_UPS = {f"q{n}" for n in range(0, 100, 2)}
NOISE = np.random.default_rng(0).normal(0, 0.02, 100)


def world(
    rewriting: Mapping[str, float], split: float, asked: list[dict[str, Any]], start: config.Config
) -> Callable[..., Scores]:
    """Follow-ups score `rewriting[way]`, other questions .8; splitting adds `split` to all. The noise is fixed."""

    def measure(values: Mapping[str, Any]) -> Scores:
        asked.append(dict(values))
        retrieval = start.with_values(values).retrieval
        found = {}
        for n, noise in enumerate(NOISE):
            base = rewriting[retrieval.rewrite] if f"q{n}" in FOLLOW_UPS else 0.8
            value = base + split * retrieval.decompose + (noise if len(asked) % 2 else -noise)
            found[f"q{n}"] = {"recall@10": 1.0, "MRR@10": value / 2, "nDCG@10": value}
        return found

    return measure


def fitted(
    rewriting: Mapping[str, float], split: float, *overrides: str, follow_ups: set[str] = FOLLOW_UPS
) -> tuple[Any, list[dict[str, Any]]]:
    start, asked = config.Config().using("evaluate.resamples=500", *overrides), list[dict[str, Any]]()
    return fit_searches(start, world(rewriting, split, asked, start), follow_ups), asked


def test_the_best_rewriting_is_advised_by_the_follow_ups_alone_and_splitting_stays_off() -> None:
    fit, asked = fitted({"none": 0.3, "last_turns": 0.5, "generator": 0.7}, -0.1)
    assert fit.advised == {"retrieval.rewrite": "generator"}
    assert asked == [
        {},
        {"retrieval.rewrite": "none"},
        {"retrieval.rewrite": "generator"},
        {"retrieval.rewrite": "generator"},
        {"retrieval.rewrite": "generator", "retrieval.decompose": True},
    ]
    now, none, generator = fit.rewriting
    assert {way.differences["nDCG@10"].n for way in fit.rewriting} == {50}
    assert {way.differences["nDCG@10"].n for way in fit.splitting} == {100}
    assert now.means["nDCG@10"] == pytest.approx(0.5, abs=0.01)
    assert generator.differences["nDCG@10"].value == pytest.approx(0.2, abs=0.02)
    assert generator.differences["MRR@10"].value == pytest.approx(0.1, abs=0.01)
    assert none.differences["nDCG@10"].high < 0
    assert fit.splitting[1].differences["nDCG@10"].high < 0
    lines = search_lines(fit)
    assert lines[0] == "50 validation questions that follow a conversation; intervals of differences"
    assert lines[1].startswith("  now: recall@10 1.0000 +0.0000")
    assert lines[4] == "100 validation questions; intervals of differences"
    assert lines[-1] == "set: retrieval.rewrite=generator"


def test_splitting_is_advised_where_it_finds_more() -> None:
    fit, _ = fitted({"none": 0.5, "last_turns": 0.5, "generator": 0.5}, 0.1)
    assert fit.advised == {"retrieval.decompose": True}
    assert search_lines(fit)[-1] == "set: retrieval.decompose=true"


def test_rewriting_that_only_harms_is_advised_off() -> None:
    fit, _ = fitted({"none": 0.6, "last_turns": 0.4, "generator": 0.3}, 0.0)
    assert fit.advised == {"retrieval.rewrite": "none"}


def test_without_a_gain_the_settings_stay() -> None:
    fit, _ = fitted({"none": 0.5, "last_turns": 0.5, "generator": 0.5}, 0.0)
    assert fit.advised == {}
    assert search_lines(fit)[-1].endswith("keep them")


def test_few_follow_ups_choose_no_rewriting_and_few_questions_nothing() -> None:
    fit, asked = fitted(
        {"none": 0.0, "last_turns": 0.5, "generator": 0.9}, 0.0, follow_ups={f"q{n}" for n in range(29)}
    )
    assert (fit.rewriting, fit.advised) == ((), {})
    assert asked == [{}, {"retrieval.decompose": True}]
    assert fit_searches(config.Config(), lambda _: {f"q{n}": {"nDCG@10": 1.0} for n in range(29)}, FOLLOW_UPS) is None
