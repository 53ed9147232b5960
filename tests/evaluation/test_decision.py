"""The decision rule: which arm is recommended, when none is, and how often it errs."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import config
from ragtune_ray.evaluation import decision, intervals
from ragtune_ray.evaluation.costs import Cost

SETTINGS = config.Config().using("evaluate.resamples=2000")
CHEAP_TO_DEAR = {"base": 10.0, "ft": 20.0, "rag": 30.0, "rag+ft": 40.0}


def evidence(values: dict[str, np.ndarray], **facts: dict[str, float]) -> dict[str, decision.Evidence]:
    """Arms with these scores and the costs above, equal in everything else unless given."""
    return {
        arm: decision.Evidence(
            scores={f"q{n}": {"token_F1": float(value), "failed": 0.0} for n, value in enumerate(column)},
            cost=Cost(0, 0, 0, CHEAP_TO_DEAR[arm] * 10, 100, CHEAP_TO_DEAR[arm], "USD"),
            p95_seconds=facts.get("p95_seconds", {}).get(arm, 1.0),
            visible_seconds=facts.get("visible_seconds", {}).get(arm, 5.0),
            cited_share=facts.get("cited_share", {}).get(arm, 1.0),
        )
        for arm, column in values.items()
    }


def verdict(values: dict[str, np.ndarray], *overrides: str, **facts: dict[str, float]) -> decision.Verdict:
    settings = SETTINGS.using(*overrides)
    found = evidence(values, **facts)
    return decision.decide(found, decision.differences({a: e.scores for a, e in found.items()}, settings), settings)


def rights(share: float, n: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def test_a_clearly_better_arm_is_recommended_despite_its_cost() -> None:
    found = verdict(
        {
            "base": rights(0.1, 200, 1),
            "rag": rights(0.4, 200, 2),
            "ft": rights(0.1, 200, 3),
            "rag+ft": rights(0.9, 200, 4),
        }
    )
    assert (found.outcome, found.arm) == ("recommended", "rag+ft")
    assert found.headline == "Use rag+ft: retrieve, with the tuned generator."


def test_cost_decides_between_arms_with_equal_answers() -> None:
    same = rights(0.7, 300, 5)
    found = verdict(dict.fromkeys(("rag+ft", "rag", "ft", "base"), same))
    assert (found.outcome, found.arm) == ("no_difference", "base")


def test_too_few_questions_prove_no_equality() -> None:
    found = verdict(dict.fromkeys(("rag", "base"), rights(0.7, 100, 5)))
    assert (found.outcome, found.arm) == ("too_few_questions", "base")
    assert found.headline.endswith("base (ask the model as it is) is the cheapest of those that are ahead so far.")
    assert found.reason[1] == (
        "rag - base: +0.000 [-0.036, +0.036], inconclusive "
        "(p = 1.000; about 183 questions would show a difference of 0.02)."
    )
    assert "To tell rag from base to within 0.02 takes about 183 questions; there are 100." in found.warnings
    assert verdict(dict.fromkeys(("rag", "base"), rights(0.7, 183, 5))).outcome == "no_difference"


def test_unseen_losses_rarely_pass_as_no_loss() -> None:
    """Two in five samples of 30 questions show no loss where .03 of all would lose, more than the margin of .02."""
    settings = config.Config().using("evaluate.resamples=200")
    wrong = 0
    for trial in range(200):
        found = evidence({"base": rights(0.97, 30, trial), "rag+ft": np.ones(30)})
        compared = decision.differences({a: e.scores for a, e in found.items()}, settings)
        wrong += compared[0].high <= settings.compare.margin  # base - rag+ft is not below -.02
        made = decision.decide(found, compared, settings)
        wrong += made.arm == "base" and made.outcome != "too_few_questions"
    assert wrong < 0.05 * 200


def test_intervals_allow_for_unseen_losses_and_gains() -> None:
    unseen = 1 - 0.025 ** (1 / 160)  # Clopper and Pearson, no event in 160
    ends = []
    for lost, won in ((0, 0), (1, 0), (0, 40), (30, 40)):
        before, after = np.repeat([1.0, 0.0], 80), np.repeat([1.0, 0.0], 80)
        after[:lost], after[160 - won :] = 0, 1
        scores = {arm: each.scores for arm, each in evidence({"base": before, "rag": after}).items()}
        (one,) = decision.differences(scores, SETTINGS)
        ends.append((one.low, one.high))
    assert ends[0] == pytest.approx((-unseen, unseen))
    assert ends[1][0] <= ends[0][0]
    assert ends[1][1] == 0, "whether an arm that is behind is worse is decided by the bootstrap alone"
    assert 0.15 < ends[2][0] < 0.25, "and so is whether an arm that is ahead is better"
    before, after = np.repeat([1.0, 0.0], 80), np.concatenate([np.zeros(30), np.ones(50), np.zeros(40), np.ones(40)])
    plain = intervals.paired_bootstrap(before, after, 2000, 0.95, 0)
    assert ends[3] == (plain.low, plain.high), "frequent losses and gains make a wider interval than unseen ones"


def test_needed_questions_rule_out_unseen_losses() -> None:
    scores = {arm: each.scores for arm, each in evidence({"base": np.zeros(50), "rag": np.full(50, 0.1)}).items()}
    (one,) = decision.differences(scores, SETTINGS)
    assert (one.needed, one.needed_for_margin) == (36, 183)  # log(.025) / log(.9), log(.025) / log(.98)
    (one,) = decision.differences(scores, SETTINGS.using("compare.margin=0"))
    assert one.needed_for_margin is None
    scores = {arm: each.scores for arm, each in evidence({"base": np.zeros(50), "rag": np.ones(50)}).items()}
    (one,) = decision.differences(scores, SETTINGS)
    assert one.needed == 1


def test_a_cheaper_arm_within_the_margin_is_recommended() -> None:
    best = np.ones(2000)
    near = best.copy()
    near[:10] = 0  # worse by .005
    found = verdict({"base": np.zeros(2000), "ft": near, "rag+ft": best})
    assert (found.outcome, found.arm) == ("recommended", "ft")
    assert verdict({"base": np.zeros(2000), "ft": near, "rag+ft": best}, "compare.margin=0.001").arm == "rag+ft"


def test_inconclusive_intervals_ask_for_more_questions() -> None:
    rag = np.repeat([1.0, 0.0], 30)
    tuned = np.concatenate([np.ones(24), np.zeros(6), np.ones(9), np.zeros(21)])  # 6 lost, 9 won
    found = verdict({"rag": rag, "rag+ft": tuned})
    assert found.outcome == "too_few_questions"
    needed = int(re.search(r"about ([\d,]+) questions", " ".join(found.warnings))[1].replace(",", ""))
    assert needed > 60
    # The best arm, if it is also the cheapest, needs no more questions.
    assert verdict({"rag": tuned, "rag+ft": rag}).outcome == "recommended"


def test_fewer_than_twenty_questions_recommend_nothing() -> None:
    for n in (1, decision.MIN_QUESTIONS - 1):
        found = verdict({"base": np.zeros(n), "rag+ft": np.ones(n)})
        assert found.outcome == "too_few_questions"
        assert any(f"{n} questions are fewer than" in line for line in found.warnings)
    assert verdict({"base": np.zeros(20), "rag+ft": np.ones(20)}).outcome == "recommended"


@pytest.mark.parametrize(
    ("override", "facts", "words"),
    [
        ("compare.max_p95_seconds=2", {"p95_seconds": {"rag+ft": 2.5}}, "95 of 100 answers take up to 2.50 s"),
        ("compare.max_visible_seconds=60", {"visible_seconds": {"rag+ft": math.inf}}, "changes show never"),
        ("compare.min_cited_share=0.8", {"cited_share": {"rag+ft": 0.5}}, "50.0% of the answers cite"),
        ("compare.max_cost_per_1000=350", {}, "a thousand answers cost 400 USD"),
    ],
)
def test_constraints_exclude_even_the_best_arm(override: str, facts: dict[str, dict[str, float]], words: str) -> None:
    values = {"base": np.zeros(50), "rag": rights(0.5, 50, 1), "rag+ft": np.ones(50)}
    assert verdict(values, **facts).arm == "rag+ft"
    found = verdict(values, override, **facts)
    assert found.arm == "rag"
    assert words in found.violations["rag+ft"][0]
    assert any("rag+ft does not qualify" in line for line in found.reason)


def test_verdict_when_no_arm_qualifies() -> None:
    found = verdict({"base": np.ones(50)}, "compare.max_p95_seconds=0.1")
    assert (found.outcome, found.arm) == ("none_qualifies", "")


def test_order_of_the_arms_does_not_matter() -> None:
    values = {
        "base": rights(0.3, 120, 1),
        "rag": rights(0.5, 120, 2),
        "ft": rights(0.45, 120, 3),
        "rag+ft": rights(0.5, 120, 4),
    }
    found = {verdict({arm: values[arm] for arm in order}).arm for order in (list(values), list(values)[::-1])}
    assert len(found) == 1


@given(st.integers(0, 10_000), st.integers(20, 60), st.floats(0, 1), st.floats(0, 1))
def test_choice_never_costs_more_than_an_equally_good_arm(seed: int, n: int, first: float, second: float) -> None:
    settings = config.Config().using("evaluate.resamples=100")
    found = evidence(
        {"base": rights(first, n, seed), "ft": rights(second, n, seed + 1), "rag": rights(0.5, n, seed + 2)}
    )
    compared = decision.differences({a: e.scores for a, e in found.items()}, settings)
    chosen = decision.decide(found, compared, settings).arm
    best = max(found, key=lambda arm: np.mean([row["token_F1"] for row in found[arm].scores.values()]))
    for arm in found:
        lows = [d.low for d in compared if (d.arm, d.against) == (arm, best)] + [
            -d.high for d in compared if (d.arm, d.against) == (best, arm)
        ]
        if lows and lows[0] >= -settings.compare.margin:
            assert found[chosen].cost.total <= found[arm].cost.total


def test_a_worse_arm_is_rarely_recommended() -> None:
    """At 95 % confidence, an arm that is .1 worse passes as good in few of 100 trials."""
    settings = config.Config().using("evaluate.resamples=300", "compare.margin=0.05")
    wrong = 0
    for trial in range(100):
        best = rights(0.6, 150, 2 * trial)
        worse = (
            np.where(rights(0.9, 150, 2 * trial + 1) == 1, best, 0) * 1.0
        )  # loses a tenth of what is right, about .06
        found = evidence({"base": worse, "rag+ft": best})
        compared = decision.differences({a: e.scores for a, e in found.items()}, settings)
        wrong += decision.decide(found, compared, settings).arm == "base"
    assert wrong <= 10


def test_differences_are_paired_widened_and_adjusted() -> None:
    values = {"base": rights(0.3, 100, 1), "rag": rights(0.5, 100, 2), "ft": rights(0.4, 100, 3)}
    scores = {arm: each.scores for arm, each in evidence(values).items()}
    found = {(d.arm, d.against): d for d in decision.differences(scores, SETTINGS)}
    assert list(found) == [("rag", "base"), ("ft", "base"), ("ft", "rag")]
    one = found["rag", "base"]
    expected = intervals.paired_bootstrap(values["base"], values["rag"], 2000, 1 - 0.05 / 3, 0)
    assert (one.value, one.low, one.high, one.n) == dataclasses.astuple(expected)
    assert one.value == pytest.approx((values["rag"] - values["base"]).mean())
    assert all(d.p_value <= d.p_adjusted <= min(1, 3 * d.p_value) for d in found.values())


def test_failed_rows_and_forgetting_cause_warnings() -> None:
    found = evidence({"base": np.zeros(40), "rag+ft": np.ones(40)})
    scores = {name: {**row, "failed": float(name in ("q0", "q1"))} for name, row in found["rag+ft"].scores.items()}
    lost = intervals.Interval(-0.2, -0.3, -0.1, 50)
    found["rag+ft"] = dataclasses.replace(found["rag+ft"], scores=scores, forgotten=lost)
    compared = decision.differences({a: e.scores for a, e in found.items()}, SETTINGS)
    warnings = decision.decide(found, compared, SETTINGS).warnings
    assert "5.0% of the rows of rag+ft failed; they count as wrong." in warnings
    assert "The generator of rag+ft lost 0.200 [0.100, 0.300] on the probe questions." in warnings


def test_arms_that_answer_nothing_cause_a_warning() -> None:
    found = verdict({"base": np.zeros(200), "rag": np.zeros(200)})
    assert (found.outcome, found.arm) == ("no_difference", "base")
    assert any("none answers these questions" in line for line in found.warnings)


def test_every_dimension_reports_its_result() -> None:
    found = verdict({"base": np.zeros(40), "rag": np.ones(40)}, visible_seconds={"base": math.inf})
    assert [each.dimension for each in found.weighed] == [
        "quality",
        "latency",
        "cost",
        "freshness",
        "explainability",
        "forgetting",
    ]
    assert "base never" in found.weighed[3].result
