"""The decision rule: which arm is recommended, when none is, and how often it errs."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import config
from ragtune_ray.evaluation import decision, intervals
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.metrics.errors import MetricError
from ragtune_ray.evaluation.significance import difference_ends
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS, Evidence, Verdict

SETTINGS = config.Config()
CHEAP_TO_DEAR = {"base": 10.0, "ft": 20.0, "rag": 30.0, "rag+ft": 40.0}


def evidence(values: dict[str, np.ndarray], **facts: dict[str, float]) -> dict[str, Evidence]:
    """Arms with these scores and the costs above, equal in everything else unless given."""
    return {
        arm: Evidence(
            scores={f"q{n}": {"token_F1": float(value), "failed": 0.0} for n, value in enumerate(column)},
            cost=Cost(0, 0, 0, CHEAP_TO_DEAR[arm] * 10, 100, CHEAP_TO_DEAR[arm], "USD"),
            p95_seconds=facts.get("p95_seconds", {}).get(arm, 1.0),
            visible_seconds=facts.get("visible_seconds", {}).get(arm, 5.0),
            cited_share=facts.get("cited_share", {}).get(arm, 1.0),
        )
        for arm, column in values.items()
    }


def verdict(values: dict[str, np.ndarray], *overrides: str, **facts: dict[str, float]) -> Verdict:
    settings = SETTINGS.using(*overrides)
    found = evidence(values, **facts)
    return decision.decide(found, decision.differences({a: e.scores for a, e in found.items()}, settings), settings)


def costing(found: dict[str, Evidence], totals: Mapping[str, float]) -> dict[str, Evidence]:
    """The same arms with other total costs."""
    return {
        arm: dataclasses.replace(each, cost=dataclasses.replace(each.cost, total=totals[arm]))
        for arm, each in found.items()
    }


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


@pytest.mark.parametrize(
    ("costs", "override", "arm", "chosen"),
    [
        ({"ft": 100.0, "rag+ft": 91.0}, "compare.cost_margin=0.1", "ft", "simplest"),
        ({"ft": 100.0, "rag+ft": 89.0}, "compare.cost_margin=0.1", "rag+ft", "cheapest"),
        ({"ft": 100.0, "rag+ft": 99.0}, "compare.cost_margin=0", "rag+ft", "cheapest"),
        ({"base": 100.4, "rag": 100.0, "ft": 120.0}, "compare.cost_margin=0.1", "base", "simplest"),
        ({"rag": 101.0, "ft": 100.0}, "compare.cost_margin=0.1", "ft", "cheapest"),  # both have one part
        ({"base": 120.0, "ft": 109.0, "rag+ft": 100.0}, "compare.cost_margin=0.1", "ft", "simplest"),  # base is dearer
    ],
)
def test_of_arms_that_cost_about_as_much_the_one_with_the_fewest_parts_is_recommended(
    costs: dict[str, float], override: str, arm: str, chosen: str
) -> None:
    settings = SETTINGS.using(override)
    found = costing(evidence(dict.fromkeys(costs, rights(0.7, 300, 5))), costs)
    made = decision.decide(found, decision.differences({a: e.scores for a, e in found.items()}, settings), settings)
    assert (made.outcome, made.arm) == ("no_difference", arm)
    assert f"take the {chosen}, {arm}" in made.headline
    assert any("compare.cost_margin" in line for line in made.reason) == (chosen == "simplest")


@pytest.mark.parametrize(("total", "outcome"), [(95.0, "recommended"), (80.0, "too_few_questions")])
def test_an_arm_that_is_little_cheaper_need_not_be_shown_to_be_worse(total: float, outcome: str) -> None:
    """rag+ft - ft is -.06 [-.15, +.03]: within the margin of .05, but not below 0, as of a cheaper arm."""
    ft = np.repeat([1.0, 0.0, 1.0], [11, 5, 84])
    answers = {"ft": ft, "rag+ft": np.repeat([0.0, 1.0, 1.0], [11, 5, 84])}
    found = costing(evidence(answers), {"ft": 100.0, "rag+ft": total})
    settings = SETTINGS.using("compare.margin=0.05")
    made = decision.decide(found, decision.differences({a: e.scores for a, e in found.items()}, settings), settings)
    assert (made.outcome, made.arm) == (outcome, "ft")


def test_an_interval_that_ends_at_the_margin_is_within_it() -> None:
    same = rights(0.7, 300, 5)
    reach = difference_ends(0.0, 0.0, 300, SETTINGS.evaluate.confidence)[1]
    assert verdict({"base": same, "rag": same}, f"compare.margin={reach!r}").outcome == "no_difference"
    assert verdict({"base": same, "rag": same}, f"compare.margin={reach - 1e-9!r}").outcome == "too_few_questions"


def test_arms_that_score_the_margin_answer_some_questions() -> None:
    quarter = np.array([1.0, 0.0, 0.0, 0.0] * 10)
    nothing = "none answers these questions"
    assert not any(nothing in line for line in verdict({"base": quarter}, "compare.margin=0.25").warnings)
    assert any(nothing in line for line in verdict({"base": quarter}, "compare.margin=0.26").warnings)


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


def test_a_cheaper_arm_within_the_margin_is_recommended() -> None:
    best = np.ones(2000)
    near = best.copy()
    near[:10] = 0  # worse by .005
    found = verdict({"base": np.zeros(2000), "ft": near, "rag+ft": best})
    assert (found.outcome, found.arm) == ("recommended", "ft")
    assert verdict({"base": np.zeros(2000), "ft": near, "rag+ft": best}, "compare.margin=0.001").arm == "rag+ft"


def test_fewer_than_twenty_questions_recommend_nothing() -> None:
    for n in (1, MIN_QUESTIONS - 1):
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


def test_failed_rows_and_forgetting_cause_warnings() -> None:
    found = evidence({"base": np.zeros(40), "rag+ft": np.ones(40)})
    scores = {name: {**row, "failed": float(name in ("q0", "q1"))} for name, row in found["rag+ft"].scores.items()}
    lost = intervals.Interval(-0.2, -0.3, -0.1, 50)
    found["rag+ft"] = dataclasses.replace(found["rag+ft"], scores=scores, forgotten=lost)
    compared = decision.differences({a: e.scores for a, e in found.items()}, SETTINGS)
    warnings = decision.decide(found, compared, SETTINGS).warnings
    assert "5.0% of the rows of rag+ft failed; they count as wrong." in warnings
    assert "The generator of rag+ft lost 0.200 [0.100, 0.300] on the probe questions." in warnings
    unsure = dataclasses.replace(found["rag+ft"], forgotten=intervals.Interval(-0.1, -0.3, 0.1, 50))
    warnings = decision.decide({**found, "rag+ft": unsure}, compared, SETTINGS).warnings
    assert not any("probe questions" in line for line in warnings), "it may have lost nothing"


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


def test_too_few_questions_prove_no_equality() -> None:
    found = verdict(dict.fromkeys(("rag", "base"), rights(0.7, 100, 5)))
    assert (found.outcome, found.arm) == ("too_few_questions", "base")
    assert found.headline == "Too few questions to tell; base (ask the model as it is) is ahead so far."
    assert found.reason[1] == (
        "rag - base: +0.000 [-0.028, +0.028], open: about 197 questions would probably show more."
    )
    assert found.warnings == (
        "To decide between base and rag takes about 197 questions if the arms differ as they do so far; there are 100.",
    )
    enough = verdict(dict.fromkeys(("rag", "base"), rights(0.7, 197, 5)))
    assert (enough.outcome, enough.differences[0].conclusion) == ("no_difference", "as good")


@pytest.mark.parametrize("right", [(20, 19), (19, 20)])
def test_a_lead_by_chance_is_not_recommended(right: tuple[int, int]) -> None:
    """40 questions, one more right answer: the data do not decide, at any price and for either arm."""
    columns = [np.repeat([1.0, 0.0], [count, 40 - count]) for count in right]
    for first, second in (("base", "rag"), ("rag", "base")):
        found = verdict({first: columns[0], second: np.roll(columns[1], 10)})
        assert found.outcome == "too_few_questions"
        assert found.arm == (first if right[0] > right[1] else second)
        assert found.differences[0].needed > 40


def test_intervals_are_wider_where_nothing_is_recommended() -> None:
    same = {
        arm: np.random.default_rng(place).permutation(np.repeat([1.0, 0.0], [33, 27]))
        for place, arm in enumerate(CHEAP_TO_DEAR)
    }
    found = verdict(same)
    assert found.outcome == "too_few_questions"
    assert len(found.differences) == 3
    for row in found.differences:
        assert row.confidence == pytest.approx(1 - 0.05 / 6), "six pairs"
        assert (row.low, row.high) == difference_ends(row.value, row.deviation, 60, row.confidence)
        assert row.conclusion == "open"
    clear = verdict(same | {"base": np.ones(60)})
    assert (clear.outcome, clear.arm) == ("recommended", "base")
    assert [row.confidence for row in clear.differences] == [0.95] * 3


def test_words_follow_from_the_intervals() -> None:
    """A dearer arm need only be no better; where it is clearly worse, the word says so."""
    best = rights(0.8, 600, 1)
    less, as_much = best.copy(), best.copy()
    less[np.flatnonzero(best)[:120]] = 0
    as_much[np.flatnonzero(best)[:3]] = 0
    found = verdict({"base": less, "ft": best, "rag": as_much, "rag+ft": less})
    assert (found.outcome, found.arm) == ("recommended", "ft")
    words = {row.arm: row.conclusion for row in found.differences}
    assert words == {"base": "worse", "rag": "no better", "rag+ft": "worse"}
    for row in found.differences:
        assert row.against == "ft"
        assert row.high < 0 if row.conclusion == "worse" else row.high <= 0.02
    assert found.reason[1].endswith("worse.")
    assert found.reason[2].endswith("no better by more than 0.02.")
    assert found.weighed[0].result == "recommended: ft; worse: base, rag+ft; no better: rag"


@given(st.integers(0, 10_000), st.integers(1, 200), st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_a_recommendation_is_shown_against_every_arm(seed: int, n: int, shares: list[float]) -> None:
    """For any scores: a recommended arm has the intervals that the rule asks for, and nothing else is recommended."""
    shared = np.random.default_rng(seed).random(n)
    values = {
        arm: (0.7 * shared + 0.3 * np.random.default_rng(seed + 1 + place).random(n) < share).astype(float)
        for place, (arm, share) in enumerate(zip(CHEAP_TO_DEAR, shares, strict=False))
    }

    def passes(arm: str, other: str) -> bool:
        moved = values[other] - values[arm]
        _, high = difference_ends(moved.mean(), float(np.std(moved, ddof=1)) if n > 1 else 0.0, n, 0.95)
        return high < 0 if CHEAP_TO_DEAR[other] < CHEAP_TO_DEAR[arm] else high <= 0.02

    passing = [
        arm for arm in values if n >= MIN_QUESTIONS and all(passes(arm, other) for other in values if other != arm)
    ]
    found = verdict(values)
    if passing:
        assert (found.arm, found.outcome != "too_few_questions") == (passing[0], True), "the cheapest that passes"
    else:
        assert found.outcome == "too_few_questions"


def test_another_winner_by_another_metric_is_in_the_first_sentence() -> None:
    f1 = {"base": np.full(60, 0.1), "rag": np.full(60, 0.3), "ft": np.full(60, 0.8)}
    contains = {"base": np.zeros(60), "rag": np.repeat([1.0, 0.0], 30), "ft": np.repeat([1.0, 0.0], [12, 48])}
    found = {
        arm: dataclasses.replace(
            each,
            scores={
                name: row | {"contains_answer": float(contains[arm][place])}
                for place, (name, row) in enumerate(each.scores.items())
            },
        )
        for arm, each in evidence(f1).items()
    }
    compared = decision.differences({arm: each.scores for arm, each in found.items()}, SETTINGS)
    made = decision.decide(found, compared, SETTINGS)
    assert (made.outcome, made.arm) == ("recommended", "ft")
    assert made.headline == (
        "Use ft by token_F1 (0.800 against 0.300), but rag is ahead by contains_answer (0.500 against 0.200): "
        "ask the tuned generator, without retrieving."
    )
    (only,) = made.disagreements
    assert (only.metric, only.arm, only.n) == ("contains_answer", "rag", 60)
    assert (only.score, only.against) == (pytest.approx(0.5), pytest.approx(0.2))
    assert 0 < only.low < 0.3 < only.high < 0.6


def test_a_metric_that_arms_lack_or_have_for_few_questions_names_no_other_winner() -> None:
    f1 = {"base": np.full(60, 0.1), "rag": np.full(60, 0.3), "ft": np.full(60, 0.8)}

    def judged(graded: Mapping[str, range]) -> str:
        found = evidence(f1)
        for arm, places in graded.items():
            for place in places:
                found[arm].scores[f"q{place}"]["judge"] = {"base": 0.0, "rag": 1.0, "ft": 0.25}[arm]
        compared = decision.differences({arm: each.scores for arm, each in found.items()}, SETTINGS)
        return decision.decide(found, compared, SETTINGS).headline

    alone = "Use ft: ask the tuned generator, without retrieving."
    assert judged({}) == alone
    assert judged({"rag": range(60), "ft": range(60)}) == alone, "one arm has no grade"
    assert judged({"base": range(60), "rag": range(30), "ft": range(30, 60)}) == alone, "no question is shared"
    assert judged({"base": range(60), "rag": range(19), "ft": range(60)}) == alone, "19 are too few"
    other = judged({"base": range(60), "rag": range(40), "ft": range(10, 60)})
    assert "but rag is ahead by judge (1.000 against 0.250)" in other


def test_differences_are_paired() -> None:
    values = {"base": rights(0.3, 100, 1), "rag": rights(0.5, 100, 2), "ft": rights(0.4, 100, 3)}
    scores = {arm: each.scores for arm, each in evidence(values).items()}
    found = {(d.arm, d.against): d for d in decision.differences(scores, SETTINGS)}
    assert list(found) == [("rag", "base"), ("ft", "base"), ("ft", "rag")]
    one, moved = found["rag", "base"], values["rag"] - values["base"]
    assert (one.value, one.deviation, one.n) == (pytest.approx(moved.mean()), pytest.approx(np.std(moved, ddof=1)), 100)
    assert (one.low, one.high) == difference_ends(one.value, one.deviation, 100, 0.95)
    with pytest.raises(MetricError, match="between 0 and 1"):
        decision.differences({"base": {"q": {"token_F1": 0.0}}, "rag": {"q": {"token_F1": 1.5}}}, SETTINGS)


def test_looking_at_any_time_needs_more_evidence() -> None:
    found = evidence({"base": np.repeat([0.0, 1.0], [24, 16]), "rag": np.repeat([0.0, 1.0], [18, 22])})
    compared = decision.differences({arm: each.scores for arm, each in found.items()}, SETTINGS)
    assert decision.decide(found, compared, SETTINGS).outcome == "recommended"
    assert decision.decide(found, compared, SETTINGS, any_time=True).outcome == "too_few_questions"


def test_arms_that_cannot_win_are_dropped() -> None:
    """An arm is dropped for a cheaper one that is at least as good, or for one that is better by more than the margin."""
    values = {
        "base": rights(0.2, 400, 1),
        "ft": rights(0.8, 400, 2),
        "rag": rights(0.5, 400, 3),
        "rag+ft": rights(0.81, 400, 4),
    }
    found = evidence(values)
    compared = decision.differences({arm: each.scores for arm, each in found.items()}, SETTINGS)
    assert decision.beaten(found, compared, SETTINGS) == {"base", "rag"}, "rag+ft may still be the best"
    # The dropped arms were asked only the first 100 questions: the others are compared on all, those on what they share.
    short = {
        arm: dataclasses.replace(each, scores=dict(list(each.scores.items())[: 100 if arm in ("base", "rag") else 400]))
        for arm, each in found.items()
    }
    compared = decision.differences({arm: each.scores for arm, each in short.items()}, SETTINGS)
    assert {(row.arm, row.against): row.n for row in compared} == {
        ("ft", "base"): 100,
        ("rag", "base"): 100,
        ("rag+ft", "base"): 100,
        ("rag", "ft"): 100,
        ("rag+ft", "ft"): 400,
        ("rag+ft", "rag"): 100,
    }
    made = decision.decide(short, compared, SETTINGS, any_time=True, dropped=("base", "rag"))
    assert made.outcome == "too_few_questions"
    assert {row.arm: row.conclusion for row in made.differences}["rag+ft" if made.arm == "ft" else "ft"] == "open"
    assert {row.needed for row in made.differences if row.arm in ("base", "rag")} == {None}


def test_an_arm_is_out_only_while_another_rules_it_out() -> None:
    found = evidence({"base": np.full(40, 0.7), "rag": np.full(40, 0.7)})
    compared = decision.differences({arm: each.scores for arm, each in found.items()}, SETTINGS)
    assert decision.decide(found, compared, SETTINGS, any_time=True).outcome == "too_few_questions"
    made = decision.decide(found, compared, SETTINGS, any_time=True, dropped=("base",))
    assert made.outcome == "too_few_questions", "no arm rules base out, whoever said so"


def test_an_arm_that_breaks_a_constraint_drops_nobody() -> None:
    """A slow arm that is best by far may not be recommended; the others go on against each other."""
    values = {"base": rights(0.4, 200, 1), "ft": rights(0.5, 200, 2), "rag": rights(0.95, 200, 3)}
    settings = SETTINGS.using("compare.max_p95_seconds=1.5")
    found = evidence(values, p95_seconds={"rag": 9.0})
    compared = decision.differences({arm: each.scores for arm, each in found.items()}, settings)
    assert decision.beaten(found, compared, settings) == set()
    # Even if it dropped them at an earlier look, when it was fast enough, they are weighed against each other.
    made = decision.decide(found, compared, settings, any_time=True, dropped=("base", "ft"))
    assert (made.outcome, made.arm) == ("too_few_questions", "ft")
    assert made.differences[0].conclusion == "open"
    assert decision.beaten(evidence(values), compared, SETTINGS) == {"base", "ft"}


def test_the_best_arm_answered_all_questions() -> None:
    """A dropped arm's mean over fewer questions is not compared with the others' means."""
    easy_first = np.concatenate([np.ones(100), np.repeat([1.0, 0.0], [150, 150])])
    found = evidence({"base": np.concatenate([np.ones(70), np.zeros(330)]), "rag": easy_first, "ft": easy_first})
    found["base"] = dataclasses.replace(found["base"], scores=dict(list(found["base"].scores.items())[:100]))
    compared = decision.differences({arm: each.scores for arm, each in found.items()}, SETTINGS)
    made = decision.decide(found, compared, SETTINGS, any_time=True, dropped=("base",))
    assert made.reason[0] == "ft scores highest of 3: token_F1 0.625 over 400 questions."
    assert {row.arm: row.conclusion for row in made.differences} == {"base": "dropped", "rag": "open"} | (
        {"base": "worse", "rag": "no better"} if made.outcome == "recommended" else {}
    )
