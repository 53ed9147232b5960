"""A verdict by a judge comes with its warnings, and a judge that prefers longer answers is found out."""

from pathlib import Path

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.evaluation.grading import graders, trust
from ragtune_ray.evaluation.grading.task import GradingError
from ragtune_ray.models.weights import ModelError

JUDGED = config.load_config(
    {"compare.metric": "judge", "evaluate.judge": {"model": "j"}, "compare.arms": ["base", "rag"]}
).with_compared_metric()


def planted(preference: float, seed: int, num_answers: int = 300) -> float:
    """The partial correlation with a judge that is right in 85 of 100 cases, plus a liking for length; truth does not depend on length."""
    draw = np.random.default_rng(seed)
    truth = draw.random(num_answers) < 0.5
    lengths = np.exp(draw.normal(4, 1, num_answers))
    seen = np.where(draw.random(num_answers) < 0.85, truth, ~truth).astype(float)
    liked = seen + preference * (np.log(lengths) - 4)
    grades = np.select([liked > 0.75, liked > 0.25], [1.0, 0.5], 0.0)
    scores = {
        str(place): {"judge": grade, "contains_answer": float(right)}
        for place, (grade, right) in enumerate(zip(grades, truth, strict=True))
    }
    return trust.length_preference(
        "judge", {"rag": scores}, {"rag": {str(place): int(value) for place, value in enumerate(lengths)}}
    )


def test_a_planted_preference_for_length_is_found_and_a_fair_judge_is_not_accused() -> None:
    fair = [planted(0.0, seed) for seed in range(50)]
    biased = [planted(0.4, seed) for seed in range(50)]
    assert max(fair) < trust.LONGER_IS_BETTER < min(biased)
    assert max(planted(-0.4, seed) for seed in range(20)) < -trust.LONGER_IS_BETTER


def test_the_partial_correlation_equals_the_textbook_formula() -> None:
    draw = np.random.default_rng(1)
    contained = draw.integers(0, 2, 80).astype(float)
    lengths = draw.integers(1, 400, 80)
    grades = np.clip(0.5 * contained + 0.1 * draw.normal(size=80) + lengths / 1000, 0, 1)
    scores = {
        str(n): {"judge": g, "contains_answer": c} for n, (g, c) in enumerate(zip(grades, contained, strict=True))
    }
    found = trust.length_preference("judge", {"a": scores}, {"a": {str(n): int(v) for n, v in enumerate(lengths)}})
    (_, gl, gc), (_, _, lc), _ = np.corrcoef([grades, np.log1p(lengths), contained])
    assert found == pytest.approx((gl - gc * lc) / np.sqrt((1 - gc**2) * (1 - lc**2)))


def test_few_or_equal_answers_accuse_nobody() -> None:
    assert planted(5.0, 0, trust.MIN_ANSWERS - 1) == 0.0
    rows = {str(n): {"judge": 1.0, "contains_answer": 1.0} for n in range(60)}
    assert trust.length_preference("judge", {"a": rows}, {"a": dict.fromkeys(rows, 9)}) == 0.0


def warnings(settings: config.Config, scores: dict, judge: str = "other") -> str:
    lengths = {arm: dict.fromkeys(each, 9) for arm, each in scores.items()}
    return "\n".join(trust.warnings(settings, dict.fromkeys(scores, judge), scores, lengths))


def test_a_judge_of_its_own_answers_and_failed_grades_are_named() -> None:
    scores = {arm: {"a": {"EM": 0.0, "judge": 1.0}, "b": {"EM": 0.0}} for arm in ("base", "rag")}
    said = warnings(JUDGED, scores, "j")
    assert "j judges its own answers, those of base and rag" in said
    assert "1 questions are left out" in said
    assert "its own answers" not in warnings(JUDGED, scores)


def test_other_metrics_have_their_own_warnings() -> None:
    scores = {arm: {"a": {"EM": 0.0, "groundedness": 0.0, "semantic": 1.0, "token_F1": 0.0}} for arm in ("base", "rag")}
    grounded = config.load_config({"compare.metric": "groundedness", "evaluate.nli_model": "m"}).with_compared_metric()
    assert warnings(grounded, scores) == (
        "groundedness asks whether passages support an answer; base show none, so their score is 0 by definition."
    )
    by_judge = grounded.with_values({"evaluate.nli_model": "", "evaluate.judge.model": "j"})
    assert "was decided by j, which nobody has checked" in warnings(by_judge, scores)
    assert "a negation" in warnings(config.load_config({"compare.metric": "semantic"}).with_compared_metric(), scores)
    assert warnings(config.Config(), scores) == ""


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"compare.metric": "judge"}, ["evaluate.judge.model", "evaluate.judge.base_url"]),
        ({"compare.metric": "groundedness"}, ["evaluate.judge.model", "evaluate.nli_model"]),
    ],
)
def test_a_metric_without_its_model_says_what_to_set(values: dict, names: list[str]) -> None:
    settings = config.load_config(values).with_compared_metric()
    with pytest.raises(GradingError) as raised:
        graders.require_models(settings)
    assert all(name in str(raised.value) for name in names)
    graders.require_models(settings.with_values({"evaluate.judge": {"model": "m"}}))


def test_the_identity_of_grades_has_the_model_and_the_rubric(generator_directory: Path) -> None:
    served = graders.identities(JUDGED)["graders"]["judge"]
    assert served["judge"]["model"] == "http://127.0.0.1:8000/v1#j"
    own = JUDGED.with_values(
        {"evaluate.judge": {"model": str(generator_directory), "engine": "transformers", "concurrency": 3}}
    )
    found = graders.identities(own)["graders"]["judge"]
    assert found["judge"]["model"] != str(generator_directory)
    assert set(found) == {"metric", "rubric", "judge"}
    assert graders.identities(own.with_values({"evaluate.judge.concurrency": 4}))["graders"]["judge"] == found
    assert graders.identities(config.Config()) == {}


def test_a_missing_key_is_found_before_anything_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAGTUNE_NO_KEY", raising=False)
    elsewhere = JUDGED.with_values(
        {"evaluate.judge.base_url": "https://judge.example/v1", "evaluate.judge.api_key_env": "RAGTUNE_NO_KEY"}
    )
    with pytest.raises(GradingError, match=r"evaluate\.judge\.api_key_env.*RAGTUNE_NO_KEY is not set"):
        graders.require_models(elsewhere)


def test_an_encoder_is_no_model_for_entailment(encoder_directory: Path) -> None:
    settings = config.load_config({"compare.metric": "groundedness", "evaluate.nli_model": str(encoder_directory)})
    with pytest.raises(ModelError, match="no label 'entailment'"):
        graders.require_models(settings.with_compared_metric())
